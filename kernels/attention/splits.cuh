// How the splits of a sequence become one result. They are added in ascending order, whoever adds them: a CTA that
// computes them one after another in registers, or, where several CTAs share them, the last CTA from memory.
#pragma once

#include "attention/works.cuh"
#include "base/math.cuh"

namespace attention {

// What some tokens give for four elements of a head: their greatest score, the total of their probabilities relative to
// it, and the sum of the values times these.
struct Quad {
    float top, total;
    float4 sum;

    __device__ __forceinline__ void scale_and_add(float by, float factor, const Quad& x) {
        total = __fmaf_rn(factor, x.total, by * total);
        sum.x = __fmaf_rn(factor, x.sum.x, by * sum.x);
        sum.y = __fmaf_rn(factor, x.sum.y, by * sum.y);
        sum.z = __fmaf_rn(factor, x.sum.z, by * sum.z);
        sum.w = __fmaf_rn(factor, x.sum.w, by * sum.w);
    }

    // Adds the tokens that follow.
    __device__ __forceinline__ void add(const Quad& next) {
        const float greatest = fmaxf(top, next.top);
        scale_and_add(math::exp2_approximate(top - greatest), math::exp2_approximate(next.top - greatest), next);
        top = greatest;
    }
};

// Adds what several CTAs stored of one quad: its sums, its states and how many splits there are, STRIDE floats one from
// the next. The first may already hold the first `merged` of them. What else was stored of these is skipped, except in the
// first batch, whose loads begin before `merged` is known.
template <int STRIDE>
__device__ __forceinline__ Quad add_splits(const float* sums, const float* states, int splits) {
    constexpr int BATCH = 8;  // loads that are under way together
    const int merged = __float_as_int(__ldcg(states + 2));
    Quad sum{math::minus_infinity(), 0.0f, {}};
#pragma unroll 1
    for (int begin = 0; begin < splits;) {
        float4 from[BATCH];
        float2 state[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (begin + i < splits) {
                state[i] = __ldcg(reinterpret_cast<const float2*>(states + i * STRIDE));
                from[i] = __ldcg(reinterpret_cast<const float4*>(sums + i * STRIDE));
            }
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int split = begin + i;
            if (split == 0) {
                sum = {state[i].x, state[i].y, from[i]};
            } else if (split >= merged && split < splits) {
                sum.add({state[i].x, state[i].y, from[i]});
            }
        }
        const int next = max(begin + BATCH, merged);
        sums += (next - begin) * STRIDE;
        states += (next - begin) * STRIDE;
        begin = next;
    }
    return sum;
}

// Sums of splits in memory, for works whose splits several CTAs share: [sequences][max_splits] of [HEADS][D] sums and
// [HEADS][4] of a greatest score, a total and the number of splits added.
template <typename C>
struct Partials {
    static constexpr int D = C::D, STRIDE = C::HEADS * (D + 4), STATES = C::HEADS * D;

    float* memory;
    int max_splits;

    __device__ __forceinline__ float* of(int seq, int split) const {
        return memory + (static_cast<i64>(seq) * max_splits + split) * STRIDE;
    }

    // Of the quad that begins at element `at` of a head.
    __device__ __forceinline__ void store(int seq, int split, int head, int at, const Quad& quad, int splits) const {
        float* to = of(seq, split);
        *reinterpret_cast<float4*>(to + head * D + at) = quad.sum;
        if (at == 0) *reinterpret_cast<float4*>(to + STATES + head * 4) = make_float4(quad.top, quad.total, __int_as_float(splits), 0.0f);
    }

    // Adds all splits of a work's sequence.
    __device__ __forceinline__ Quad sum(const DecodeWork<C>& work, int head, int at) const {
        const float* from = of(work.seq, work.first_split());
        return add_splits<STRIDE>(from + head * D + at, from + STATES + head * 4, work.splits() - work.first_split());
    }
};

}  // namespace attention
