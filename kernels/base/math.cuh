// The elementary functions of `mixtral_engine::math`, to the bit. No multiply and add is contracted.
#pragma once

#include "base/types.cuh"

namespace math {

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// e^x: 0 below -87, infinity above 88, NaN for NaN.
__device__ __forceinline__ float exp(float x) {
    constexpr float LOG2_E = 1.44269504088896340736f;
    constexpr float LN2_HI = 355.0f / 512.0f;
    constexpr float LN2_LO = -2.1219444e-4f;
    // Adding and subtracting 1.5 · 2^23 rounds to the nearest integer, ties to even.
    constexpr float ROUND = 12582912.0f;
    const float clamped = fminf(fmaxf(x, -87.0f), 88.0f);
    const float n = __fsub_rn(__fadd_rn(__fmul_rn(clamped, LOG2_E), ROUND), ROUND);
    const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, LN2_HI)), __fmul_rn(n, LN2_LO));
    float p = 1.0f / 5040.0f;
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 720.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 120.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 24.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 6.0f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f);
    const float scale = __int_as_float((__float2int_rn(n) + 127) << 23);
    const float value = __fmul_rn(p, scale);
    if (x < -87.0f) return 0.0f;
    if (x > 88.0f) return __int_as_float(0x7f800000);
    return x == x ? value : x;
}

// x / (1 + e^-x).
__device__ __forceinline__ float silu(float x) { return __fdiv_rn(x, __fadd_rn(1.0f, exp(-x))); }

// 2^x, within two units in the last place; 0 for -infinity.
__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// silu with an error of a few units in the last place of f32, in six instructions. It is for results that are then
// rounded to 16 bits.
__device__ __forceinline__ float silu_approximate(float x) {
    float reciprocal;
    asm("rcp.approx.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + exp2_approximate(-1.4426950408889634f * x)));
    return x * reciprocal;
}

}  // namespace math
