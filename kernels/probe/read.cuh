// Op: none; the device's read bandwidth, which others are measured against · CPU twin: mixtral-cpu/src/probe.rs
// Regime: bench · Tile: UNROLL words of 16 bytes a thread · Grid: any · Numerics: none · Requires: nothing
// Traffic: each word read once · Measured: docs/perf/cuda.md
#pragma once

#include "base/types.cuh"

namespace probe {

// Reads `count` words of 16 bytes. What it read is written only if it is what no data is, so that nothing is left out.
template <int UNROLL>
__global__ void __launch_bounds__(512) read(const uint4* data, u64 count, u32* out) {
    const u64 step = static_cast<u64>(gridDim.x) * 512;
    u32 all = 0;
    u64 i = static_cast<u64>(blockIdx.x) * 512 + threadIdx.x;
    for (; i + (UNROLL - 1) * step < count; i += UNROLL * step) {
        uint4 words[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) words[u] = __ldcs(data + i + u * step);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) all |= words[u].x ^ words[u].y ^ words[u].z ^ words[u].w;
    }
    for (; i < count; i += step) {
        const uint4 word = data[i];
        all |= word.x ^ word.y ^ word.z ^ word.w;
    }
    if (all == 0x5eed5eedu && count == ~0ull) out[0] = all;
}

}  // namespace probe
