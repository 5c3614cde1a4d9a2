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

// All threads of the cluster that have not exited.
__device__ __forceinline__ void sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

}  // namespace cluster
