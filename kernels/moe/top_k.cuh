// A warp computes the softmax and selects the experts of one token. Lane l holds the values of experts l, l + 32 …
#pragma once

#include "base/math.cuh"
#include "base/reduce.cuh"
#include "base/vector.cuh"

namespace moe {

// The values of a lane.
template <int EXPERTS>
struct Values {
    static constexpr int COUNT = ceil_div(EXPERTS, 32);
    float at[COUNT];

    // Loads the values of a row in memory; −infinity behind its end.
    __device__ __forceinline__ void load(const float* row) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            const int expert = n * 32 + threadIdx.x % 32;
            at[n] = expert < EXPERTS ? row[expert] : math::minus_infinity();
        }
    }

    __device__ __forceinline__ void store(float* row) const {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            const int expert = n * 32 + threadIdx.x % 32;
            if (expert < EXPERTS) row[expert] = at[n];
        }
    }
};

// exp(x − max), divided by their sum in ascending order.
template <int EXPERTS>
__device__ __forceinline__ void softmax_by_warp(Values<EXPERTS>& x) {
    float max = math::minus_infinity();
#pragma unroll
    for (int n = 0; n < x.COUNT; ++n) max = fmaxf(max, x.at[n]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, distance));
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < x.COUNT; ++n) {
        x.at[n] = math::exp(__fsub_rn(x.at[n], max));
#pragma unroll
        for (int lane = 0; lane < 32 && n * 32 + lane < EXPERTS; ++lane) {
            sum = __fadd_rn(sum, __shfl_sync(ALL_LANES, x.at[n], lane));
        }
    }
#pragma unroll
    for (int n = 0; n < x.COUNT; ++n) x.at[n] = __fdiv_rn(x.at[n], sum);
}

// The K largest values, in ascending id. Ties go to the lower id, and NaNs are taken last. Every lane gets the same.
// With RENORM the values are divided by their sum.
template <int EXPERTS, int K, bool RENORM>
__device__ __forceinline__ void top_k_by_warp(const Values<EXPERTS>& p, i32 (&ids)[K], float (&weights)[K]) {
    constexpr int COUNT = Values<EXPERTS>::COUNT;
    const int lane = threadIdx.x % 32;
    // Integers in the order of the values. 0 stands for an expert that is taken or does not exist, 1 for NaN.
    u32 keys[COUNT], taken[COUNT] = {};
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
        // −0 becomes +0, because they are equal.
        const u32 bits = __float_as_uint(__fadd_rn(p.at[n], 0.0f));
        keys[n] = bits >> 31 ? ~bits : bits | 0x80000000u;
        if (p.at[n] != p.at[n]) keys[n] = 1;
        if (n * 32 + lane >= EXPERTS) keys[n] = 0;
    }
#pragma unroll
    for (int j = 0; j < K; ++j) {
        u32 best = 0;
#pragma unroll
        for (int n = 0; n < COUNT; ++n) best = keys[n] > best ? keys[n] : best;
        best = __reduce_max_sync(ALL_LANES, best);
        bool found = false;
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            const u32 holders = __ballot_sync(ALL_LANES, keys[n] == best);
            if (!found && holders != 0) {
                found = true;
                const int first = __ffs(holders) - 1;
                taken[n] |= 1u << first;
                if (lane == first) keys[n] = 0;
            }
        }
    }
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < K; ++j) {
        bool found = false;
        ids[j] = 0;
        weights[j] = 0.0f;
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            if (!found && taken[n] != 0) {
                found = true;
                const int first = __ffs(taken[n]) - 1;
                taken[n] &= taken[n] - 1;
                ids[j] = n * 32 + first;
                weights[j] = __shfl_sync(ALL_LANES, p.at[n], first);
            }
        }
        sum = __fadd_rn(sum, weights[j]);
    }
    if constexpr (RENORM) {
#pragma unroll
        for (int j = 0; j < K; ++j) weights[j] = __fdiv_rn(weights[j], sum);
    }
}

// The warp writes a token's choice, and counts it unless `counts` is null.
template <int K>
__device__ __forceinline__ void store_choice(i64 token, const i32 (&ids)[K], const float (&weights)[K], i32* expert_ids,
                                             float* expert_weights, u64* counts) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < K; ++j) {
        if (lane == j) {
            expert_ids[token * K + j] = ids[j];
            expert_weights[token * K + j] = weights[j];
            if (counts != nullptr) atomicAdd(counts + ids[j], 1ull);
        }
    }
}

}  // namespace moe
