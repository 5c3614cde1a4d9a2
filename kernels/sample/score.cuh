// Op: sample: what its scores need. CPU twin: mixtral_engine::score, which makes the logarithms of it on the host.
// Regime: any number of requests; most steps have none.
// Tile: a request. Each of 32 warps has a consecutive range of the vocabulary.
// Grid: one CTA for each row of logits; a CTA answers several requests if there are more.
// Numerics: the contract's, to the bit: the largest logit, the sum of the tokens' integer weights at temperature 1, and
//   logits as they are. The most likely tokens are in the total order of f32 with ties by id.
// Requires: as `draw`, which runs before and leaves the adjusted logits of draws in `copies`. At most step::MAX_BEST tokens.
// Traffic: reads the logits twice, and about ten times, from L1, if the most likely tokens are wanted.
// Measured: not alone; the bits of its results are tested on GPUs.
#pragma once

#include "sample/draw.cuh"

namespace sample {

// Writes the most likely `count` of the row's tokens, most likely first. `list` and `filled` are shared memory.
template <typename R>
__device__ __forceinline__ void write_best(const R& row, int count, step::Best (&list)[step::MAX_BEST], i32& filled, step::Best* out) {
    if (threadIdx.x == 0) filled = 0;
    const Cut kept = row.template descend<false>(static_cast<u64>(count), Cut{});
    row.template each<2>([&](i32 id, float x) {
        if (kept.keeps(order_key(x), id)) list[atomicAdd(&filled, 1)] = {id, x};
    });
    __syncthreads();
    if (threadIdx.x < step::MAX_BEST) {
        const int lane = threadIdx.x;
        const step::Best own = lane < count ? list[lane] : step::Best{};
        int rank = 0;
        for (int other = 0; other < count; ++other) {
            const u32 key = order_key(list[other].logit);
            rank += key > order_key(own.logit) || (key == order_key(own.logit) && list[other].token < own.token);
        }
        if (lane < count) out[rank] = own;
    }
    __syncthreads();
}

template <int VOCAB, int COLS>
__global__ void __launch_bounds__(THREADS)
    score(const step::Header* header, const step::Asked* asked, const step::Sample* samples, const step::Drawn* drawn,
          const float* logits, const float* copies, step::Scored* scored, step::Best* best) {
    pdl::launch_dependents();
    __shared__ Shared shared;
    __shared__ step::Best list[step::MAX_BEST];
    __shared__ i32 filled;
    pdl::wait();
    for (int index = blockIdx.x; index < header->num_scores; index += gridDim.x) {
        const step::Asked request = asked[index];
        Row<VOCAB, COLS> row = {logits + static_cast<i64>(request.row) * COLS, shared, 0.0f, 1.0f};
        step::Scored result = {0, 0.0f, 0.0f, -1, 0.0f, 0, 0};
        i32 bad;
        row.argmax(bad);
        if (bad < VOCAB) {
            result.bad_token = bad;
            result.bad_value = row.logits[bad];
            if (threadIdx.x == 0) scored[index] = result;
            continue;
        }
        if (request.adjusted_by >= 0 && samples[request.adjusted_by].num_adjustments > 0) {
            row.logits = copies + static_cast<i64>(request.adjusted_by) * COLS;
            row.argmax(bad);
        }
        result.max = row.max;
        result.sum = row.sum([&](i32, float x) { return row.weight(x); });
        __syncthreads();
        const i32 token = request.token >= 0 ? request.token : drawn[-1 - request.token].token;
        result.logit = row.logits[min(token, VOCAB - 1)];
        if (request.best > 0) {
            // Banned tokens are not among the most likely.
            const u64 tokens = row.sum([](i32, float x) { return static_cast<u64>(x > math::minus_infinity()); });
            __syncthreads();
            result.num_best = min(request.best, static_cast<int>(tokens));
            write_best(row, result.num_best, list, filled, best + static_cast<i64>(index) * step::MAX_BEST);
        }
        if (threadIdx.x == 0) scored[index] = result;
        // The next request uses the same shared memory.
        __syncthreads();
    }
}

}  // namespace sample
