// Lists the assignments by expert, with a stable counting sort by a warp, a CTA or a grid.
#pragma once

#include "base/reduce.cuh"
#include "base/vector.cuh"

namespace moe {

// Assignments of a chunk. Each has a thread.
inline constexpr int CHUNK = 1024;

// The local index of an expert, or −1.
template <int FIRST, int LAST>
__device__ __forceinline__ i32 local_index(i32 id) {
    return id >= FIRST && id < LAST ? id - FIRST : -1;
}

// The lists of at most 32 assignments. Lane a holds the local index of assignment a, or −1.
template <int LOCAL>
__device__ __forceinline__ void list_by_warp(i32 local, i32* offsets, i32* order) {
    const int lane = threadIdx.x % 32;
    int start = 0;
#pragma unroll 8
    for (int e = 0; e < LOCAL; ++e) {
        const u32 members = __ballot_sync(ALL_LANES, local == e);
        if (lane == 0) offsets[e] = start;
        if (local == e) order[start + __popc(members & ((1u << lane) - 1))] = lane;
        start += __popc(members);
    }
    if (lane == 0) offsets[LOCAL] = start;
}

// The shared memory with which a CTA lists assignments.
template <int THREADS, int LOCAL>
struct Lists {
    static constexpr int WARPS = THREADS / 32;

    // For each expert: how many assignments there are, and where the next one goes.
    i32 counts[LOCAL];
    i32 next[LOCAL];
    // Where each warp's assignments of a chunk go.
    i32 starts[WARPS][LOCAL];

    // Clears the counts.
    __device__ __forceinline__ void clear() {
        for (int e = threadIdx.x; e < LOCAL; e += THREADS) counts[e] = 0;
        __syncthreads();
    }

    // Counts a thread's assignment; −1 is none. The counts are complete after the next barrier.
    __device__ __forceinline__ void count(i32 local) {
        const u32 peers = __match_any_sync(ALL_LANES, local);
        if (local >= 0 && static_cast<int>(threadIdx.x % 32) == __ffs(peers) - 1) atomicAdd(&counts[local], __popc(peers));
    }

    // The first warp computes next[e] = sum of the counts before e. It also writes them to `offsets`, unless that is
    // null.
    __device__ __forceinline__ void scan(i32* offsets) {
        if (threadIdx.x < 32) {
            const int lane = threadIdx.x;
            int carry = 0;
#pragma unroll
            for (int first = 0; first < LOCAL; first += 32) {
                const int e = first + lane;
                const int own = e < LOCAL ? counts[e] : 0;
                int sum = own;
#pragma unroll
                for (int distance = 1; distance < 32; distance *= 2) {
                    const int before = __shfl_up_sync(ALL_LANES, sum, distance);
                    if (lane >= distance) sum += before;
                }
                if (e < LOCAL) {
                    next[e] = carry + sum - own;
                    if (offsets != nullptr) offsets[e] = carry + sum - own;
                }
                carry += __shfl_sync(ALL_LANES, sum, 31);
            }
            if (offsets != nullptr && lane == 0) offsets[LOCAL] = carry;
        }
        __syncthreads();
    }

    // Puts the CTA's assignments, which ascend over its threads, behind those that were put before.
    __device__ __forceinline__ void place(i32 local, i32 assignment, i32* order) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        for (int i = threadIdx.x; i < WARPS * LOCAL; i += THREADS) starts[i / LOCAL][i % LOCAL] = 0;
        __syncthreads();
        const u32 peers = __match_any_sync(ALL_LANES, local);
        const int rank = __popc(peers & ((1u << lane) - 1));
        if (local >= 0 && rank == 0) starts[warp][local] = __popc(peers);
        __syncthreads();
        for (int e = threadIdx.x; e < LOCAL; e += THREADS) {
            int start = next[e];
#pragma unroll 8
            for (int w = 0; w < WARPS; ++w) {
                const int size = starts[w][e];
                starts[w][e] = start;
                start += size;
            }
            next[e] = start;
        }
        __syncthreads();
        if (local >= 0) order[starts[warp][local] + rank] = assignment;
    }

    // Makes all lists of `count` assignments. The ids are read past L1, because other CTAs of this kernel may have
    // written them.
    template <int FIRST>
    __device__ __forceinline__ void build(const i32* expert_ids, int count, i32* offsets, i32* order) {
        clear();
        for (int a = threadIdx.x; a - static_cast<int>(threadIdx.x) < count; a += THREADS) {
            this->count(a < count ? local_index<FIRST, FIRST + LOCAL>(__ldcg(expert_ids + a)) : -1);
        }
        __syncthreads();
        scan(offsets);
        for (int a = threadIdx.x; a - static_cast<int>(threadIdx.x) < count; a += THREADS) {
            place(a < count ? local_index<FIRST, FIRST + LOCAL>(__ldcg(expert_ids + a)) : -1, a, order);
            __syncthreads();
        }
    }
};

}  // namespace moe
