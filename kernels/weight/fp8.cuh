// The format of weights of e4m3. A weight stands for its elements times its matrix's scale w. The tokens that are multiplied
// with it are e4m3 too: a kernel before the linear divides them by the input's scale a and rounds them. So both
// operands are rows of e4m3, as `Plain` describes them, and a linear's sum is that of their products times a · w.
//
// Products are summed from zero for each 128 elements of K. These sums are added up in ascending order in f32, because
// the tensor cores' own sums of e4m3 lose bits: without this, outputs shrink by 3.6 % where means are not zero (K = 14336).
//
// On the device, the rows of all matrices lie one after another, as in the checkpoint. SCALES_AT bytes behind the row that
// kernels are given lie the matrices' scales, and behind these the input's, in f32.
//
// mma.sync takes the elements as f16, each divided by 256, which is exact. wgmma takes e4m3 itself, and its sums have other
// bits. A linear of an engine is computed by one of them only, whatever the number of tokens.
#pragma once

#include "base/fp8.cuh"
#include "ptx/mma.cuh"
#include "weight/plain.cuh"

namespace weight {

template <typename Element, int EXPERTS, i64 SCALES_AT>
struct Fp8 : Plain<e4m3_t> {
    using T = Element;
    using Operand = f16_t;
    template <typename Model>
    using Token = e4m3_t;

    // A stage is a chain.
    static constexpr bool SCALED = true;
    static constexpr int CHAIN = 128;
    static constexpr int BLOCK = 0;  // chains have no scales
    static constexpr float UNIT = 65536.0f;
    static_assert(DEPTH == CHAIN && CHAINS == 1, "");

    static constexpr bool FACTOR = true;

    __device__ static __forceinline__ float factor(Stored weight, int expert) {
        const float* scales = reinterpret_cast<const float*>(reinterpret_cast<const u8*>(weight) + SCALES_AT);
        return __fmul_rn(scales[EXPERTS], scales[expert]);
    }

    struct Scales {};

    __device__ static __forceinline__ Zero group_zero(const u8*, int, int) { return {}; }

    __device__ static __forceinline__ Scales scales(const u8*, int, int) { return {}; }

    __device__ static __forceinline__ void add(float (&sums)[4], const float (&chain)[4], Scales) {
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = __fadd_rn(sums[i], chain[i]);
    }

    // A lane's part of the A operand of the `step`-th 16 elements. A lane takes four elements of K that lie side by side,
    // and so it does of the tokens (`Plain::columns`). This exchanges columns of both operands of a product, which changes
    // no bit of its sum.
    __device__ static __forceinline__ void fragment(u32 (&a)[4], const Lane& from, int step, Zero) {
        u32 rows[2], upper[2], lower[2];
        ptx::ldmatrix_x2(rows, from.tile + offset(from.row + from.lane % 16, step));
        fp8::to_f16(upper, rows[0]);
        fp8::to_f16(lower, rows[1]);
        a[0] = upper[0], a[1] = lower[0], a[2] = upper[1], a[3] = lower[1];
    }
};

// The same with a scale for each row. The scale of the row that kernels are given lies SCALES_AT bytes behind it, and those of the
// following rows behind that, of all matrices. INPUT_AT bytes behind the row lies the input's scale. If that is negative, each token
// has a scale of its own, which the kernel that rounded it stored (elementwise::round_tokens).
template <typename Element, i64 SCALES_AT, i64 INPUT_AT>
struct Fp8Rows : Fp8<Element, 1, 0> {
    using Stored = typename Fp8<Element, 1, 0>::Stored;
    static constexpr bool FACTOR = false, BY_ROWS = true, BY_TOKENS = INPUT_AT < 0;

    // What the sums of a row are multiplied by, beside the token's scale.
    __device__ static __forceinline__ float row_factor(Stored weight, i64 row) {
        const u8* base = reinterpret_cast<const u8*>(weight);
        const float own = reinterpret_cast<const float*>(base + SCALES_AT)[row];
        if constexpr (BY_TOKENS) return own;
        return __fmul_rn(*reinterpret_cast<const float*>(base + INPUT_AT), own);
    }
};

}  // namespace weight
