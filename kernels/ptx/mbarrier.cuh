// Transaction barriers in shared memory (sm_90 and up).
#pragma once

#include "base/types.cuh"

namespace mbarrier {

// Called by one thread. Others and TMA see the barrier after `fence_init` and a barrier of the CTA.
__device__ __forceinline__ void init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and makes the phase wait for `bytes` more bytes of transfers.
__device__ __forceinline__ void arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier at the same place in the cluster's CTA `rank`. It does not order this thread's writes: an
// arrival with release to a cluster waits for the memory of the whole GPU, and that took longer than a stage's
// products.
__device__ __forceinline__ void arrive(u32 barrier, u32 rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [remote];\n"
        "}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// As above, with release: a thread that waits there by `wait_cluster` sees what this thread did before.
__device__ __forceinline__ void arrive_release(u32 barrier, u32 rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
        "}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Waits until the phase of this parity is over. Afterwards this thread sees what the cluster's other CTAs did before
// they arrived.
__device__ __forceinline__ void wait_cluster(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over_%=;\n"
        "bra again_%=;\n"
        "over_%=:\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Waits until the phase of this parity is over.
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over_%=;\n"
        "bra again_%=;\n"
        "over_%=:\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Whether the phase of this parity is over. A thread that learns so need not wait.
__device__ __forceinline__ bool is_over(u32 barrier, u32 parity) {
    u32 over;
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}\n"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
    return over != 0;
}

}  // namespace mbarrier
