// Op: softmax, top_k, expert_sort, route (the three of them). CPU twin: kernels/routing.rs.
// Regime: any number of tokens. One CTA lists up to a few thousand assignments; more take two launches.
// Tile: one token for each warp; 1024 assignments for each CTA.
// Grid: one warp for each token; one CTA for each 1024 assignments.
// Numerics: the contract's, to the bit: the same choice for the same logits.
// Requires: 1024 experts at most.
// Traffic: logits, ids and weights once; ids twice.
// Measured: not tuned, since only programs with a separate router use it.
#pragma once

#include "base/step.cuh"
#include "moe/lists.cuh"
#include "moe/top_k.cuh"
#include "ptx/pdl.cuh"

namespace moe {

// Threads of a CTA in which each warp handles one token.
inline constexpr int THREADS = 256;

template <int EXPERTS>
__global__ void __launch_bounds__(THREADS) softmax(const step::Header* header, const float* logits, float* probs) {
    pdl::launch_dependents();
    pdl::wait();
    const i64 token = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (token >= header->num_tokens) return;
    Values<EXPERTS> x;
    x.load(logits + token * EXPERTS);
    softmax_by_warp(x);
    x.store(probs + token * EXPERTS);
}

// `input` holds probabilities, or with SOFTMAX logits. Tokens without a cache slot are not counted.
template <int EXPERTS, int K, bool SOFTMAX, bool RENORM>
__global__ void __launch_bounds__(THREADS) choose(const step::Header* header, const i32* slots, const float* input,
                                                  i32* expert_ids, float* expert_weights, u64* counts) {
    pdl::launch_dependents();
    __shared__ u32 chosen[EXPERTS];
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) chosen[e] = 0;
    __syncthreads();
    pdl::wait();
    const i64 token = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (token < header->num_tokens) {
        Values<EXPERTS> x;
        x.load(input + token * EXPERTS);
        if constexpr (SOFTMAX) softmax_by_warp(x);
        i32 ids[K];
        float weights[K];
        top_k_by_warp<EXPERTS, K, RENORM>(x, ids, weights);
        store_choice(token, ids, weights, expert_ids, expert_weights, nullptr);
        if (threadIdx.x % 32 == 0 && slots[token] >= 0) {
#pragma unroll
            for (int j = 0; j < K; ++j) atomicAdd(&chosen[ids[j]], 1u);
        }
    }
    if (counts == nullptr) return;
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
        if (chosen[e] != 0) atomicAdd(counts + e, static_cast<u64>(chosen[e]));
    }
}

// One CTA makes the lists of the experts [FIRST, LAST).
template <int K, int FIRST, int LAST>
__global__ void __launch_bounds__(CHUNK) list(const step::Header* header, const i32* expert_ids, i32* offsets, i32* order) {
    pdl::launch_dependents();
    __shared__ Lists<CHUNK, LAST - FIRST> lists;
    pdl::wait();
    lists.template build<FIRST>(expert_ids, header->num_tokens * K, offsets, order);
}

// The first of two launches: how many assignments each chunk has for each expert, `sizes[chunk][expert]`.
template <int K, int FIRST, int LAST>
__global__ void __launch_bounds__(CHUNK) count_chunks(const step::Header* header, const i32* expert_ids, i32* sizes) {
    pdl::launch_dependents();
    constexpr int LOCAL = LAST - FIRST;
    __shared__ Lists<CHUNK, LOCAL> lists;
    pdl::wait();
    const int count = header->num_tokens * K, a = blockIdx.x * CHUNK + threadIdx.x;
    if (static_cast<int>(blockIdx.x) * CHUNK >= count) return;
    lists.clear();
    lists.count(a < count ? local_index<FIRST, LAST>(expert_ids[a]) : -1);
    __syncthreads();
    for (int e = threadIdx.x; e < LOCAL; e += CHUNK) sizes[static_cast<int>(blockIdx.x) * LOCAL + e] = lists.counts[e];
}

// The second launch: puts each chunk's assignments behind those of the chunks before it.
template <int K, int FIRST, int LAST>
__global__ void __launch_bounds__(CHUNK)
    place_chunks(const step::Header* header, const i32* expert_ids, const i32* sizes, i32* offsets, i32* order) {
    pdl::launch_dependents();
    constexpr int LOCAL = LAST - FIRST;
    __shared__ Lists<CHUNK, LOCAL> lists;
    __shared__ i32 before[LOCAL];
    pdl::wait();
    const int count = header->num_tokens * K, chunk = blockIdx.x, a = chunk * CHUNK + threadIdx.x;
    if (chunk * CHUNK >= count) return;
    for (int e = threadIdx.x; e < LOCAL; e += CHUNK) {
        int sum = 0, own = 0;
        for (int c = 0; c * CHUNK < count; ++c) {
            if (c == chunk) own = sum;
            sum += sizes[c * LOCAL + e];
        }
        lists.counts[e] = sum;
        before[e] = own;
    }
    __syncthreads();
    lists.scan(chunk == 0 ? offsets : nullptr);
    for (int e = threadIdx.x; e < LOCAL; e += CHUNK) lists.next[e] += before[e];
    __syncthreads();
    lists.place(a < count ? local_index<FIRST, LAST>(expert_ids[a]) : -1, a, order);
}

// out[p] = input[order[p] / K] for the `offsets[LOCAL]` assignments of local experts.
template <typename T, int COLS, int K, int LOCAL, int WIDTH>
__global__ void __launch_bounds__(WIDTH) permute(const T* input, const i32* offsets, const i32* order, T* out) {
    pdl::launch_dependents();
    pdl::wait();
    const i64 to = blockIdx.x;
    if (to >= offsets[LOCAL]) return;
    const i64 from = order[to] / K;
    for (int column = threadIdx.x * VECTOR; column < COLS; column += WIDTH * VECTOR) {
        copy<whole_vectors(COLS)>(out + to * COLS + column, input + from * COLS + column, COLS - column);
    }
}

}  // namespace moe
