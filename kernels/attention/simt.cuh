// Op: attention. CPU twin: kernels/attention.rs.
// Regime: any step; f32, and shapes that the tensor-core kernels do not take.
// Tile: one query of one head. Four warps take turns at 32 tokens, one token for each lane.
// Grid: one CTA for each token and head.
// Numerics: plain f32 with the contract's exp; online softmax, so sums are ordered by tiles of 32 and by warps. The
//   order depends only on positions. IN_FP8, queries and probabilities of prompts are rounded to e4m3.
// Requires: nothing.
// Traffic: keys and values are read once for each token and head, from L1 and L2.
// Measured: parity only, not tuned.
#pragma once

#include "attention/tile.cuh"
#include "base/fp8.cuh"
#include "base/math.cuh"
#include "base/reduce.cuh"
#include "base/step.cuh"
#include "ptx/pdl.cuh"

namespace attention {

inline constexpr int SIMT_THREADS = 128;

template <typename T, typename Stored, int COLS, int HEADS, int KV_HEADS, int D, int BLOCK_SIZE, int WINDOW, bool ROUNDS, bool IN_FP8>
// Without the minimum of one CTA, ptxas spills on sm_80 to fit a few more CTAs.
__global__ void __launch_bounds__(SIMT_THREADS, 1)
    simt(const step::Header* header, const i32* positions, const i32* cu_query_lens, const i32* block_table, i32 table_width,
         const T* query, const Stored* keys, const Stored* values, float scale, float value_scale, T* out,
         const float* divisor, e4m3_t* rounded) {
    pdl::launch_dependents();
    constexpr int WARPS = SIMT_THREADS / 32, OWN = ceil_div(D, 32);
    __shared__ float q[D], sums[WARPS][D], maxima[WARPS], totals[WARPS];
    pdl::wait();
    const i64 token = blockIdx.x / HEADS;
    const int head = blockIdx.x % HEADS, kv_head = head / (HEADS / KV_HEADS);
    if (token >= header->num_tokens) return;
    // The token's sequence is the last one that starts at the token or before it.
    int seq = 0;
    for (int past = header->num_seqs; past - seq > 1;) {
        const int middle = (seq + past) / 2;
        if (cu_query_lens[middle] <= token) {
            seq = middle;
        } else {
            past = middle;
        }
    }
    const i32* blocks = block_table + static_cast<i64>(seq) * table_width;
    const bool in_fp8 = IN_FP8 && seq >= header->num_decodes;
    const int position = positions[token], first = first_visible<WINDOW>(position);
    for (int i = threadIdx.x; i < D; i += SIMT_THREADS) {
        const float x = to_float(query[token * COLS + head * D + i]);
        q[i] = in_fp8 ? ::rounded<e4m3_t>(x) : x;
    }
    __syncthreads();

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float max = math::minus_infinity(), total = 0.0f, o[OWN] = {};
    for (int tile = (first / 32 / WARPS * WARPS + warp) * 32; tile <= position; tile += SIMT_THREADS) {
        const int at = tile + lane;
        const bool visible = at >= first && at <= position;
        const u32 seen = __ballot_sync(ALL_LANES, visible);
        if (seen == 0) continue;
        i64 vector = 0;
        float s = math::minus_infinity();
        if (visible) {
            vector = ((static_cast<i64>(blocks[at / BLOCK_SIZE]) * KV_HEADS + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE) * D;
            float dot = 0.0f;
            constexpr bool ALIGNED = whole_vectors(D);
#pragma unroll 2
            for (int i = 0; i < D; i += VECTOR) {
                float k[VECTOR];
                load<ALIGNED>(k, keys + vector + i, D - i);
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    if (ALIGNED || i + j < D) dot = __fmaf_rn(q[i + j], k[j], dot);
                }
            }
            s = dot * scale;
        }
        float top = s;
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, distance));
        top = fmaxf(top, max);
        // A power of two, so that tiles of any size round alike.
        if (in_fp8) top = ceilf(top * 1.44269504f) * 0.693147181f;
        const float keep = math::exp(max - top);
        float p = math::exp(s - top);
        if (in_fp8) p = ::rounded<e4m3_t>(p * 256.0f) / 256.0f;
        max = top;
        total = __fmaf_rn(total, keep, p);
#pragma unroll
        for (int n = 0; n < OWN; ++n) o[n] *= keep;
        for (u32 left = seen; left != 0; left &= left - 1) {
            const int from = __ffs(left) - 1;
            const float by = __shfl_sync(ALL_LANES, p, from);
            const Stored* value = values + __shfl_sync(ALL_LANES, vector, from);
#pragma unroll
            for (int n = 0; n < OWN; ++n) {
                const int i = n * 32 + lane;
                if (i < D) o[n] = __fmaf_rn(by, to_float(value[i]), o[n]);
            }
        }
    }
    total = warp_sum(total);
    if (lane == 0) {
        maxima[warp] = max;
        totals[warp] = total;
    }
#pragma unroll
    for (int n = 0; n < OWN; ++n) {
        if (n * 32 + lane < D) sums[warp][n * 32 + lane] = o[n];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < D; i += SIMT_THREADS) {
        float top = maxima[0], sum = 0.0f, by = 0.0f;
#pragma unroll
        for (int w = 1; w < WARPS; ++w) top = fmaxf(top, maxima[w]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float factor = math::exp(maxima[w] - top);
            sum = __fmaf_rn(factor, sums[w][i], sum);
            by = __fmaf_rn(factor, totals[w], by);
        }
        const i64 at = token * (HEADS * D) + head * D + i;
        const T result = from_float<T>(sum / by * value_scale);
        out[at] = result;
        if constexpr (ROUNDS) rounded[at] = from_float<e4m3_t>(__fdiv_rn(to_float(result), *divisor));
    }
}

}  // namespace attention
