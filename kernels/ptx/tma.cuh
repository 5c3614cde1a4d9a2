// Tensor copies from global to shared memory (sm_90 and up). One thread issues; a transaction barrier counts the bytes.
#pragma once

#include "base/types.cuh"

// A tensor map as the driver encodes it; a kernel takes it as `const __grid_constant__`.
struct alignas(64) TensorMap {
    u64 words[16];
};

namespace tma {

// How L2 should treat the lines.
inline constexpr u64 EVICT_NORMAL = 0x1000000000000000ull;
inline constexpr u64 EVICT_FIRST = 0x12F0000000000000ull;
inline constexpr u64 EVICT_LAST = 0x14F0000000000000ull;

__device__ __forceinline__ void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Orders ordinary accesses to shared memory before TMA copies and products (wgmma): those of this thread, reads too, and those of
// others of the CTA that it has waited for. A barrier alone does not: copies were seen to overwrite what an ldmatrix before
// the barrier had yet to read (docs/perf/cuda.md).
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copies `bytes` bytes that lie one after another. Addresses and the number are multiples of 16.
__device__ __forceinline__ void load_bytes(u32 shared, const void* global, u32 bytes, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(shared),
        "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

// Copies a box of two dimensions. Coordinates are innermost first.
__device__ __forceinline__ void load(u32 shared, const TensorMap& map, u32 barrier, u64 policy, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared),
        "l"(&map), "r"(barrier), "l"(policy), "r"(x), "r"(y)
        : "memory");
}

// Copies a box to the same place in every CTA of the cluster whose bit is in `mask`. Each CTA's barrier counts the
// bytes.
__device__ __forceinline__ void load_multicast(u32 shared, const TensorMap& map, u32 barrier, u64 policy, u16 mask, int x,
                                               int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%5, %6}], [%2], %3, %4;" ::"r"(shared),
        "l"(&map), "r"(barrier), "h"(mask), "l"(policy), "r"(x), "r"(y)
        : "memory");
}

// Copies a box of three dimensions.
__device__ __forceinline__ void load(u32 shared, const TensorMap& map, u32 barrier, u64 policy, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared),
        "l"(&map), "r"(barrier), "l"(policy), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// Copies a box of five dimensions.
__device__ __forceinline__ void load(u32 shared, const TensorMap& map, u32 barrier, u64 policy, int x, int y, int z,
                                     int v, int w) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(shared),
        "l"(&map), "r"(barrier), "l"(policy), "r"(x), "r"(y), "r"(z), "r"(v), "r"(w)
        : "memory");
}

}  // namespace tma
