// Op: all_gather. CPU twin: kernels/collective.rs.
// Regime: any number of rows.
// Tile: THREADS packets of a row.
// Grid: persistent, a CTA a tile at a time, as all_reduce.
// Numerics: copies.
// Requires: inboxes that every rank of the group can write to.
// Traffic: a row of COLS to each other rank, and one from each; RANKS of them written.
// Measured: not tuned.
#pragma once

#include "base/step.cuh"
#include "collective/exchange.cuh"
#include "ptx/pdl.cuh"

namespace exchange {

inline constexpr int THREADS = 512;

// Row i of `out`, RANKS · COLS elements, is row i of every rank's `input` in ascending rank.
template <typename T, int COLS, int RANKS, step::Rows ROWS>
__global__ void __launch_bounds__(THREADS, per_sm(THREADS))
    all_gather(const step::Header* header, i32 times, const T* input, T* out, const u64* inboxes, i64 capacity, i32 rank,
               i32 half, const u32* done, i32 ordinal, u32* stop, u32* report) {
    pdl::launch_dependents();
    constexpr int TILES = ceil_div(packets(COLS), THREADS);
    constexpr bool ALIGNED = whole_vectors(COLS);
    const i64 tiles = static_cast<i64>(step::num_rows<ROWS>(header, times)) * TILES;
    Patience patience(stop, report);
    Slot<T, RANKS> slot(inboxes, capacity, rank, half);
    pdl::wait();
    slot.open(glance(done) + ordinal);
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const i64 row = tile / TILES;
        const int in_row = static_cast<int>(tile % TILES) * THREADS + threadIdx.x;
        const int column = in_row * VECTOR;
        if (column >= COLS) continue;
        const i64 packet = row * packets(COLS) + in_row;
        float x[VECTOR];
        load<ALIGNED>(x, input + row * COLS + column, COLS - column);
        Packet<T> mine;
        mine.pack_from(x);
        slot.send(mine, packet);
        if (slot.leaves()) continue;
#pragma unroll
        for (i32 peer = 0; peer < RANKS; ++peer) {
            Packet<T> part = mine;
            slot.take(part, peer, packet, patience);
            part.unpack_to(x);
            store<ALIGNED>(out + (row * RANKS + peer) * COLS + column, x, COLS - column);
        }
    }
}

}  // namespace exchange
