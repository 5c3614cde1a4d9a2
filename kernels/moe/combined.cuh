// The sum of a token's expert outputs.
#pragma once

#include "norm/row.cuh"

namespace moe {

// Σ weight · row over the token's experts among the local ones, [FIRST, LAST), in ascending id, by fused multiply-add
// from +0. With ALL, every expert is local.
template <typename T, int COLS, int TOP_K, int FIRST, int LAST, bool ALL>
__device__ __forceinline__ rms::Row<COLS> combined(i64 token, const T* input, const i32* expert_ids, const float* expert_weights) {
    using Row = rms::Row<COLS>;
    Row x, sum = {};
#pragma unroll
    for (int j = 0; j < TOP_K; ++j) {
        const i64 row = token * TOP_K + j;
        if constexpr (!ALL) {
            const i32 id = expert_ids[row];
            if (id < FIRST || id >= LAST) continue;
        }
        x.load(input + row * COLS);
        const float by = expert_weights[row];
#pragma unroll
        for (int v = 0; v < Row::VECTORS; ++v) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) sum.at[v][i] = __fmaf_rn(by, x.at[v][i], sum.at[v][i]);
        }
    }
    return sum;
}

}  // namespace moe
