// Op: dummy weights · CPU twin: mixtral-engine/src/dummy.rs
// Regime: once, when an engine is loaded · Tile: a row, 8 elements a thread · Grid: persistent, CTAs over rows (or over parts of a row
// where there are few) · Numerics: the CPU's bits · Requires: any type and shape
// Traffic: each element written once · Measured: docs/perf/cuda.md
#pragma once

#include "base/types.cuh"
#include "base/vector.cuh"

namespace dummy {

__device__ __forceinline__ u32 mix(u32 x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

// The element at `index` of the tensor that `key` stands for: four uniform bytes summed, centred and scaled.
__device__ __forceinline__ float element(u64 key, u64 index, float scale, float bias) {
    const u32 low = static_cast<u32>(index), high = static_cast<u32>(index >> 32);
    const u32 word = mix(mix(low ^ static_cast<u32>(key) ^ high * 0x9e3779b9u) + static_cast<u32>(key >> 32));
    const u32 sum = __dp4a(word, 0x01010101u, 0u);
    return __fmaf_rn(static_cast<float>(sum) - 510.0f, scale, bias);
}

// out[r][c] = the element at first + r · source_cols + c, for [rows][cols].
template <typename T>
__global__ void __launch_bounds__(256)
    fill(T* out, u64 key, u64 first, u64 rows, u64 cols, u64 source_cols, float scale, float bias) {
    constexpr u64 STEP = VECTOR;
    const u64 pieces = (cols + STEP - 1) / STEP;
    // As many CTAs share a row as are left over.
    const u64 sharing = rows < gridDim.x ? gridDim.x / rows : 1;
    const bool vectors = cols % STEP == 0 && reinterpret_cast<u64>(out) % 16 == 0;
    for (u64 r = blockIdx.x / sharing; r < rows; r += gridDim.x / sharing) {
        for (u64 piece = blockIdx.x % sharing * 256 + threadIdx.x; piece < pieces; piece += sharing * 256) {
            const u64 c = piece * STEP, index = first + r * source_cols + c;
            float values[STEP];
#pragma unroll
            for (int i = 0; i < STEP; i++) values[i] = element(key, index + i, scale, bias);
            T* to = out + r * cols + c;
            const int n = static_cast<int>(cols - c < STEP ? cols - c : STEP);
            if (vectors) {
                store<true>(to, values, n);
            } else {
                store<false>(to, values, n);
            }
        }
    }
}

}  // namespace dummy
