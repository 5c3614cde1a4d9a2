// Sums in a fixed order, whose bits depend only on the number of threads, and maxima.
#pragma once

#include "base/types.cuh"

inline constexpr u32 ALL_LANES = 0xffffffffu;

// The sum over a warp. Every lane gets the same bits.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

// The sum over a CTA. Every thread gets the same bits. `shared` holds one float for each warp, and may be used again
// after the caller's next barrier.
template <int THREADS>
__device__ __forceinline__ float block_sum(float x, float* shared) {
    static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps");
    constexpr int WARPS = THREADS / 32;
    x = warp_sum(x);
    if constexpr (WARPS == 1) return x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_sum(lane < WARPS ? shared[lane] : 0.0f);
}

// The largest x of a CTA, as `block_sum`; no x is negative.
template <int THREADS>
__device__ __forceinline__ float block_max(float x, float* shared) {
    constexpr int WARPS = THREADS / 32;
    const auto warp_max = [](float x) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
        return x;
    };
    x = warp_max(x);
    if constexpr (WARPS == 1) return x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_max(lane < WARPS ? shared[lane] : 0.0f);
}
