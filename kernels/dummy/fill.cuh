// Op: none; makes dummy weights when an engine is loaded. CPU twin: mixtral_engine::dummy.
// Regime: each launch fills one piece of a weight.
// Tile: eight elements a thread.
// Grid: any; threads stride over the piece.
// Numerics: the contract's, to the bit.
// Requires: nothing; 16-byte stores where the piece's rows allow them.
// Traffic: each element written once.
// Measured: H200: 93.4 GB in less than 0.17 s.
#pragma once

#include "base/vector.cuh"
#include "ptx/pdl.cuh"

namespace dummy {

__device__ __forceinline__ u32 mix(u32 x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

// out[r][c] is element first + r · source_cols + c of the tensor with this key, times scale, plus bias. (Norms have
// scale 0 and bias 1.)
template <typename T>
__global__ void __launch_bounds__(256)
    fill(T* out, u64 key, u64 first, u64 rows, u64 cols, u64 source_cols, float scale, float bias) {
    pdl::launch_dependents();
    pdl::wait();
    // If rows are whole rows of the source, they are treated as one long row.
    if (cols == source_cols) {
        cols *= rows;
        rows = 1;
    }
    const u64 per_row = (cols + VECTOR - 1) / VECTOR, count = rows * per_row;
    const bool aligned = reinterpret_cast<u64>(out) % 16 == 0 && (rows == 1 || cols % VECTOR == 0);
    const u32 low_key = static_cast<u32>(key), high_key = static_cast<u32>(key >> 32);
    for (u64 v = blockIdx.x * 256ull + threadIdx.x; v < count; v += gridDim.x * 256ull) {
        const u64 row = rows == 1 ? 0 : v / per_row, column = (v - row * per_row) * VECTOR;
        const u64 index = first + row * source_cols + column;
        float x[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const u32 low = static_cast<u32>(index + i), high = static_cast<u32>((index + i) >> 32);
            const u32 word = mix(mix(low ^ low_key ^ high * 0x9e3779b9u) + high_key);
            // The sum of the four bytes.
            const u32 sum = __dp4a(word, 0x01010101u, 0u);
            x[i] = __fadd_rn(__fmul_rn(__fsub_rn(static_cast<float>(sum), 510.0f), scale), bias);
        }
        T* to = out + row * cols + column;
        const int n = cols - column < VECTOR ? static_cast<int>(cols - column) : VECTOR;
        if (aligned) {
            store<true>(to, x, n);
        } else {
            store<false>(to, x, n);
        }
    }
}

}  // namespace dummy
