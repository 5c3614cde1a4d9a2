// Shared memory: addresses, barriers among some of a CTA's threads, matrix stores.
#pragma once

#include "base/types.cuh"

namespace ptx {

// The 32-bit address that shared-memory instructions take.
__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Loads one word. (The load is volatile, because other threads write the word.)
__device__ __forceinline__ int load_shared(u32 address) {
    int value;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

// Loads four words, and not later than here. (An ordinary load may be moved to where its words are used.)
__device__ __forceinline__ uint4 load_shared_x4(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ void store_shared(u32 address, int value) {
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, u32 value) { store_shared(address, static_cast<int>(value)); }

__device__ __forceinline__ void store_shared(u32 address, u16 value) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}

// Barrier `id` (1 to 15; 0 is __syncthreads) among `threads` threads.
__device__ __forceinline__ void sync_threads(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// 0, once `loaded` is there: what adds it to an address waits for that load. (Grids have one dimension, so blockIdx.y is 0, but the
// compiler does not know it.) A copy by TMA may overwrite what was loaded from shared memory as soon as the load has ended.
__device__ __forceinline__ u32 zero_after(u32 loaded) { return loaded & blockIdx.y; }

// Counts towards barrier `id` without waiting for it.
__device__ __forceinline__ void arrive_threads(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// True in one lane of a converged warp. The compiler knows that only one lane takes a branch on this, so it issues
// tensor copies there without a loop over lanes.
__device__ __forceinline__ bool elect() {
    u32 elected;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(elected));
    return elected != 0;
}

// Stores one 8×8 matrix of 16-bit elements transposed. Lane l holds element (l / 4, 2·(l % 4)) and its right neighbour.
// Lanes 0–7 give the addresses of the columns, which become 16-byte rows. sm_90 and up.
__device__ __forceinline__ void store_matrix_trans(u32 address, u32 a) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address), "r"(a) : "memory");
}

// As above, two matrices: lanes 0–7 give the first one's addresses, lanes 8–15 the second one's.
__device__ __forceinline__ void store_matrix_trans(u32 address, u32 a, u32 b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b)
                 : "memory");
}

}  // namespace ptx
