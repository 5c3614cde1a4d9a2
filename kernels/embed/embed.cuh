// Op: embed, gather_rows. CPU twin: kernels/embed.rs.
// Regime: any number of rows.
// Tile: a row.
// Grid: one CTA for each row of the output.
// Numerics: copies; elements of a table of another type are rounded to T once.
// Requires: nothing; rows of whole vectors are accessed by 16 bytes. `drawn` holds what the step before drew, until this
//   step draws.
// Traffic: each row read and written once.
// Measured: H200, 16 384 tokens of 4096: 95 µs, 62 % of read.
#pragma once

#include "base/step.cuh"
#include "base/vector.cuh"
#include "ptx/pdl.cuh"

namespace embed {

// out[t] = table[token_ids[t] − vocab_start]; zeros for tokens outside the table's `num_rows` rows. An id below 0 stands
// for a token that the step before drew: −1 − n for draw n.
template <typename T, typename W, int COLS, int THREADS>
__global__ void __launch_bounds__(THREADS)
    embed(const step::Header* header, const i32* token_ids, const step::Drawn* drawn, const W* table, i32 vocab_start,
          i32 num_rows, T* out) {
    pdl::launch_dependents();
    const i64 token = blockIdx.x;
    const bool idle = token >= header->num_tokens;
    pdl::wait();
    if (idle) return;
    i64 id = token_ids[token];
    if (id < 0) id = drawn[-1 - id].token;
    const i64 row = id - vocab_start;
    const bool inside = row >= 0 && row < num_rows;
    constexpr bool ALIGNED = whole_vectors(COLS);
    for (int column = threadIdx.x * VECTOR; column < COLS; column += THREADS * VECTOR) {
        float x[VECTOR] = {};
        if (inside) load<ALIGNED>(x, table + row * COLS + column, COLS - column);
        store<ALIGNED>(out + token * COLS + column, x, COLS - column);
    }
}

// out[l] = input[indices[l]].
template <typename T, int COLS, int THREADS>
__global__ void __launch_bounds__(THREADS) gather_rows(const step::Header* header, const i32* indices, const T* input, T* out) {
    pdl::launch_dependents();
    pdl::wait();
    const i64 to = blockIdx.x;
    if (to >= header->num_logits) return;
    const i64 from = indices[to];
    for (int column = threadIdx.x * VECTOR; column < COLS; column += THREADS * VECTOR) {
        copy<whole_vectors(COLS)>(out + to * COLS + column, input + from * COLS + column, COLS - column);
    }
}

}  // namespace embed
