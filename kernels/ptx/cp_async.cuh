// cp.async, which copies 16 bytes from global to shared memory past the registers and L1; and prefetches.
#pragma once

#include "base/types.cuh"
#include "ptx/shared.cuh"

namespace ptx {

// Copies 16 bytes if `valid`; else stores 16 zeros and does not read `global`. Both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(u32 shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(global)),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// Makes this thread's copies since the last group a group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when all of this thread's groups but the last N have arrived.
template <int N>
__device__ __forceinline__ void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Prefetches the 128-byte line of an address into L2.
__device__ __forceinline__ void prefetch_l2(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(global)));
}

// Prefetches the line of an address into L1.
__device__ __forceinline__ void prefetch_l1(const void* global) {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(__cvta_generic_to_global(global)));
}

// threadIdx.x, read again at each call. So the compiler does not keep values in registers that it computes from it.
__device__ __forceinline__ int thread_anew() {
    int thread;
    asm volatile("mov.u32 %0, %tid.x;" : "=r"(thread));
    return thread;
}

}  // namespace ptx
