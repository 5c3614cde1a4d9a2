// Op: norm, the router's linear and route in one launch (CHOOSE), or norm and linear in one. CPU twin: kernels/norm.rs,
//   kernels/linear.rs, kernels/routing.rs.
// Regime: any number of tokens; with CHOOSE up to a few hundred.
// Tile: a token.
// Grid: persistent; a CTA takes one token at a time. The last CTA to finish lists the assignments.
// Numerics: the norm has the bits of rms::norm. A logit is summed by fused multiply-add in a thread, then over lanes by
//   a tree, then over warps in ascending order. This order depends only on COLS, so neither the batch nor the grid
//   changes a token's choice.
// Requires: the router's weight in f32, 1024 experts at most.
// Traffic: each row is read and written once, and once more rounded for fp8 experts. Each CTA reads the weight once (from L2), before the wait if it fits into
//   registers.
// Measured: H200, 4096 × 8: 8.1 µs at one token with its launch, 333 µs at 16 384.
#pragma once

#include "base/step.cuh"
#include "moe/lists.cuh"
#include "moe/top_k.cuh"
#include "norm/row.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/pdl.cuh"

namespace moe {

// How many experts' sums a warp reduces together.
inline constexpr int GROUP = 8;

// Sums eight values over the warp. Lane l receives the sum of value l / 4.
__device__ __forceinline__ float warp_sums(const float (&x)[GROUP]) {
    const int lane = threadIdx.x % 32;
    float four[4], two[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const bool upper = lane & 16;
        four[i] = (upper ? x[i + 4] : x[i]) + __shfl_xor_sync(ALL_LANES, upper ? x[i] : x[i + 4], 16);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const bool upper = lane & 8;
        two[i] = (upper ? four[i + 2] : four[i]) + __shfl_xor_sync(ALL_LANES, upper ? four[i] : four[i + 2], 8);
    }
    const bool upper = lane & 4;
    float one = (upper ? two[1] : two[0]) + __shfl_xor_sync(ALL_LANES, upper ? two[0] : two[1], 4);
    one += __shfl_xor_sync(ALL_LANES, one, 2);
    return one + __shfl_xor_sync(ALL_LANES, one, 1);
}

// `ticket` is 0 between launches. Without CHOOSE the parameters from `slots` to `ticket` are not used. With ROUNDS,
// e4m3(normalized / *divisor) is stored too; else the last two parameters are not used.
template <typename T, typename W, int COLS, int EXPERTS, bool CHOOSE, int K, bool RENORM, int FIRST, int LAST, bool ROUNDS = false>
__global__ void __launch_bounds__(rms::threads(COLS))
    router(const step::Header* header, const T* input, const W* weight, float eps, const float* router_weight, T* normalized,
           float* logits, const i32* slots, i32* expert_ids, float* expert_weights, u64* counts, i32* offsets, i32* order,
           u32* ticket, const float* divisor, e4m3_t* rounded) {
    pdl::launch_dependents();
    using Row = rms::Row<COLS>;
    constexpr int THREADS = Row::THREADS, WARPS = THREADS / 32, GROUPS = ceil_div(EXPERTS, GROUP), LOCAL = LAST - FIRST;
    constexpr bool RESIDENT = EXPERTS * Row::VECTORS <= 8;
    __shared__ float shared[32];
    __shared__ float partial[WARPS][GROUPS * GROUP];
    __shared__ Lists<THREADS, CHOOSE ? LOCAL : 1> lists;
    __shared__ bool last;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int num_tokens = header->num_tokens;
    Row scale, x, next;
    i32 slot = -1, next_slot = -1;
    Row w[RESIDENT ? EXPERTS : 1];
    if (static_cast<int>(blockIdx.x) < num_tokens) {
        scale.load(weight);
        if constexpr (CHOOSE) next_slot = slots[blockIdx.x];
        if constexpr (RESIDENT) {
#pragma unroll
            for (int e = 0; e < EXPERTS; ++e) w[e].load(router_weight + e * COLS);
        } else {
            for (int i = threadIdx.x * 32; i < EXPERTS * COLS; i += THREADS * 32) ptx::prefetch_l2(router_weight + i);
        }
    }
    pdl::wait();
    if (static_cast<int>(blockIdx.x) < num_tokens) next.load(input + static_cast<i64>(blockIdx.x) * COLS);
    for (i64 token = blockIdx.x; token < num_tokens; token += gridDim.x) {
        x = next, slot = next_slot;
        if (token + gridDim.x < num_tokens) {
            next.load(input + (token + gridDim.x) * COLS);
            if constexpr (CHOOSE) next_slot = slots[token + gridDim.x];
        }
        x.template normalize<T>(scale, eps, shared);
        x.store(normalized + token * COLS);
        if constexpr (ROUNDS) x.store_rounded(rounded + token * COLS, *divisor);
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            float sums[GROUP] = {};
#pragma unroll
            for (int e = 0; e < GROUP; ++e) {
                const int expert = g * GROUP + e;
                if (expert >= EXPERTS) continue;
                Row streamed;
                if constexpr (!RESIDENT) streamed.load(router_weight + expert * COLS);
                const Row& row = RESIDENT ? w[RESIDENT ? expert : 0] : streamed;
#pragma unroll
                for (int v = 0; v < Row::VECTORS; ++v) {
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) sums[e] = __fmaf_rn(x.at[v][i], row.at[v][i], sums[e]);
                }
            }
            const float sum = warp_sums(sums);
            if (lane % 4 == 0) partial[warp][g * GROUP + lane / 4] = sum;
        }
        __syncthreads();
        if (warp == 0) {
            Values<EXPERTS> values;
#pragma unroll
            for (int n = 0; n < values.COUNT; ++n) {
                const int expert = n * 32 + lane;
                float sum = 0.0f;
#pragma unroll
                for (int from = 0; from < WARPS; ++from) {
                    if (expert < EXPERTS) sum = __fadd_rn(sum, partial[from][expert]);
                }
                values.at[n] = expert < EXPERTS ? sum : math::minus_infinity();
            }
            values.store(logits + token * EXPERTS);
            if constexpr (CHOOSE) {
                i32 ids[K];
                float weights[K];
                softmax_by_warp(values);
                top_k_by_warp<EXPERTS, K, RENORM>(values, ids, weights);
                store_choice(token, ids, weights, expert_ids, expert_weights, slot >= 0 ? counts : nullptr);
                if (num_tokens == 1) {
                    i32 local = -1;
#pragma unroll
                    for (int j = 0; j < K; ++j) {
                        if (lane == j) local = local_index<FIRST, LAST>(ids[j]);
                    }
                    list_by_warp<LOCAL>(local, offsets, order);
                }
            }
        }
        // In a CTA of one warp, nothing else ensures that partial sums are read before the next token overwrites them.
        if constexpr (WARPS == 1) __syncwarp();
    }
    if constexpr (CHOOSE) {
        if (num_tokens == 1) return;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            last = atomicAdd(ticket, 1u) == gridDim.x - 1;
            if (last) *ticket = 0;
        }
        __syncthreads();
        if (!last) return;
        __threadfence();
        const int count = num_tokens * K;
        if (count <= 32) {
            if (warp == 0) {
                list_by_warp<LOCAL>(lane < count ? local_index<FIRST, LAST>(__ldcg(expert_ids + lane)) : -1, offsets, order);
            }
        } else {
            lists.template build<FIRST>(expert_ids, count, offsets, order);
        }
    }
}

}  // namespace moe
