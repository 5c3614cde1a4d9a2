// The 8-bit float e4m3 and its conversions, with the bits of `mixtral_model::fp8`. It has no infinities.
#pragma once

#include "base/types.cuh"

// A sign, four bits of exponent, three of mantissa.
struct e4m3_t {
    u8 bits;
};

static_assert(sizeof(e4m3_t) == 1, "the size that its name says");

namespace fp8 {

// The largest number.
inline constexpr float MAX = 448.0f;

// The scale that makes `most` the largest number; 1 if it is 0.
__device__ __forceinline__ float scale(float most) {
    constexpr float SMALLEST_NORMAL = 1.17549435e-38f;
    return most > 0.0f ? fmaxf(__fdiv_rn(most, MAX), SMALLEST_NORMAL) : 1.0f;
}

// Divides numbers by one divisor before they become bytes. The bytes are those of a correctly rounded quotient, but
// without __fdiv_rn's branches, one number after another: a reciprocal and two corrections give that quotient for all
// magnitudes that do not become 0 or MAX anyway.
struct Divisor {
    // With divisors far from 1, the corrections could lose bits among the smallest numbers. So numbers and divisor are multiplied by a
    // power of two first. What that takes out of an f32's range becomes 0 or MAX in any case.
    float factor, divisor, reciprocal;

    __device__ __forceinline__ explicit Divisor(float by)
        : factor(by < 1e-20f ? 0x1p64f : by > 1e20f ? 0x1p-64f : 1.0f), divisor(by * factor), reciprocal(__fdiv_rn(1.0f, divisor)) {}

    template <int COUNT>
    __device__ __forceinline__ void divide(float (&x)[COUNT]) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const float number = __fmul_rn(x[i], factor);
            const float first = __fmul_rn(number, reciprocal);
            const float second = __fmaf_rn(__fmaf_rn(-first, divisor, number), reciprocal, first);
            const float third = __fmaf_rn(__fmaf_rn(-second, divisor, number), reciprocal, second);
            // (The corrections would make NaN of infinity, and 0 of -0.)
            x[i] = fabsf(first) < 512.0f ? copysignf(third, first) : first;
        }
    }
};

// The byte of x, nearest, ties to even. What is larger than MAX becomes MAX. Without the instruction, which GPUs have since
// sm_89.
__device__ __forceinline__ u32 round_by_integers(float x) {
    const float clamped = fminf(fmaxf(x, -MAX), MAX);
    // Cuts 20 bits of the mantissa off, rounding to even.
    const u32 bits = __float_as_uint(clamped);
    const u32 normal = (bits + 0x7ffffu + (bits >> 20 & 1)) & 0xfff00000u;
    // Below 2^-6, numbers are multiples of 2^-9. Adding 1.5 · 2^14 and subtracting it rounds to such a multiple.
    const float small = __fsub_rn(__fadd_rn(clamped, 24576.0f), 24576.0f);
    const float rounded = fabsf(clamped) < 0.015625f ? small : __uint_as_float(normal);
    // 2^-120 moves the exponent to where an f32's begin.
    const u32 magnitude = __float_as_uint(__fmul_rn(fabsf(rounded), __uint_as_float(7u << 23))) >> 20;
    return x == x ? (bits >> 24 & 0x80) | magnitude : 0x7f;
}

// The number of a byte. NaN's gives 480.
__device__ __forceinline__ float number(u32 byte) {
    // Exponent and mantissa at the place of an f32's, whose exponents begin 120 lower.
    return __fmul_rn(__uint_as_float((byte & 0x80) << 24 | (byte & 0x7f) << 20), 0x1p120f);
}

// Two bytes, of `low` in the lower half.
__device__ __forceinline__ u32 pack(float low, float high) {
#if __CUDA_ARCH__ >= 890
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return round_by_integers(low) | round_by_integers(high) << 8;
#endif
}

// Bytes become 16-bit floats by moving their exponent and mantissa to the place of T's, and multiplying with a power of
// two, since T's exponents begin lower. The constants are in both halves of a register: the bits of a moved magnitude,
// and the factor.
template <typename T>
struct Moved;

template <>
struct Moved<f16_t> {
    static constexpr int SHIFT = 1;  // from the upper byte of 16 bits
    static constexpr u32 MAGNITUDES = 0x3f803f80, FACTOR = 0x5c005c00;  // 2^8
};

template <>
struct Moved<bf16_t> {
    static constexpr int SHIFT = 4;
    static constexpr u32 MAGNITUDES = 0x07f007f0, FACTOR = 0x7b807b80;  // 2^120
};

// Bytes 0 and 2, moved.
template <typename T>
__device__ __forceinline__ u32 move_even(u32 bytes) {
    return (bytes << 8 & 0x80008000) | (bytes << (8 - Moved<T>::SHIFT) & Moved<T>::MAGNITUDES);
}

// Bytes 1 and 3, moved.
template <typename T>
__device__ __forceinline__ u32 move_odd(u32 bytes) {
    return (bytes & 0x80008000) | (bytes >> Moved<T>::SHIFT & Moved<T>::MAGNITUDES);
}

// The numbers of two moved bytes. (Adding -0 changes no number, and no zero's sign.)
template <typename T>
__device__ __forceinline__ u32 scale_moved(u32 moved) {
    return multiply_add<T>(moved, Moved<T>::FACTOR, 0x80008000);
}

#if __CUDA_ARCH__ >= 890
// The numbers of the two lower bytes.
__device__ __forceinline__ u32 convert(u16 bytes) {
    u32 pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(bytes));
    return pair;
}
#endif

// Four numbers as two registers of T.
struct Pairs {
    u32 first, second;
};

// Of bytes 0 and 2, and of bytes 1 and 3.
template <typename T>
__device__ __forceinline__ Pairs alternate(u32 bytes) {
    return {scale_moved<T>(move_even<T>(bytes)), scale_moved<T>(move_odd<T>(bytes))};
}

// Of bytes 0 and 1, and of bytes 2 and 3.
template <typename T>
__device__ __forceinline__ Pairs neighbours(u32 bytes) {
    return alternate<T>(__byte_perm(bytes, 0, 0x3120));
}

#if __CUDA_ARCH__ >= 890
template <>
__device__ __forceinline__ Pairs neighbours<f16_t>(u32 bytes) {
    return {convert(static_cast<u16>(bytes)), convert(static_cast<u16>(bytes >> 16))};
}

template <>
__device__ __forceinline__ Pairs alternate<f16_t>(u32 bytes) {
    return neighbours<f16_t>(__byte_perm(bytes, 0, 0x3120));
}
#endif

// Four numbers, the first in the lowest byte, as two registers of f16: each number divided by 256, exactly. An f16 has the
// exponent's lowest bit three places higher, and its exponents begin eight lower. Both NaNs become NaN.
__device__ __forceinline__ void to_f16(u32 (&pairs)[2], u32 four) {
#if __CUDA_ARCH__ >= 890
    constexpr u32 BY_256 = 0x1c001c00;  // 2^-8, twice
    pairs[0] = multiply_add<f16_t>(convert(static_cast<u16>(four)), BY_256, 0x80008000);
    pairs[1] = multiply_add<f16_t>(convert(static_cast<u16>(four >> 16)), BY_256, 0x80008000);
#else
    // The bit behind the largest magnitude: set where a byte is NaN.
    const u32 nan = ((four & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        // Two bytes as the upper halves of 16 bits each.
        const u32 order = i == 0 ? 0x1404 : 0x3424;
        const u32 wide = __byte_perm(four, 0, order);
        pairs[i] = (wide & 0x80008000u) | (wide >> 1 & 0x3f803f80u) | __byte_perm(nan, 0, order) >> 1;
    }
#endif
}

}  // namespace fp8

// The number of a byte; NaN for both bytes of NaN.
__device__ __forceinline__ float to_float(e4m3_t x) {
    // Exponent and mantissa at the place of an f32's, whose exponents begin 120 lower. Exact for subnormal numbers too.
    const u32 magnitude = x.bits & 0x7fu, sign = (x.bits & 0x80u) << 24;
    const float number = __uint_as_float(sign | magnitude << 20) * __uint_as_float((127u + 120u) << 23);
    return magnitude == 0x7f ? __uint_as_float(0x7fffffffu) : number;
}

template <>
__device__ __forceinline__ e4m3_t from_float<e4m3_t>(float x) {
    return {static_cast<u8>(fp8::pack(x, 0.0f))};
}
