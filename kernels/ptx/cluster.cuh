// Clusters of CTAs (sm_90 and up).
#pragma once

#include "base/types.cuh"

namespace cluster {

// This CTA's rank in its cluster.
__device__ __forceinline__ u32 rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

// Barrier of all threads of the cluster that have not exited.
__device__ __forceinline__ void sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Stores a word at the same place in the shared memory of the cluster's CTA `rank`.
__device__ __forceinline__ void store(u32 address, u32 rank, int value) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "st.shared::cluster.s32 [remote], %2;\n"
        "}\n" ::"r"(address),
        "r"(rank), "r"(value)
        : "memory");
}

}  // namespace cluster
