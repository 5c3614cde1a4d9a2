// Integer and 16-bit float types, and conversions between them and f32 (nearest, ties to even).
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

// IEEE binary16.
struct f16_t {
    u16 bits;
};

// The upper half of binary32.
struct bf16_t {
    u16 bits;
};

static_assert(sizeof(f16_t) == 2 && sizeof(bf16_t) == 2 && sizeof(u64) == 8, "types have the sizes their names say");

// A if CONDITION, else B.
template <bool CONDITION, typename A, typename B>
struct IfType {
    using Type = A;
};
template <typename A, typename B>
struct IfType<false, A, B> {
    using Type = B;
};
template <bool CONDITION, typename A, typename B>
using If = typename IfType<CONDITION, A, B>::Type;

// Whether two types are one.
template <typename A, typename B>
inline constexpr bool SAME = false;
template <typename A>
inline constexpr bool SAME<A, A> = true;

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(f16_t x) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
    return f;
}

__device__ __forceinline__ float to_float(bf16_t x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }

template <typename T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}

template <>
__device__ __forceinline__ f16_t from_float<f16_t>(float x) {
    f16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
    return h;
}

template <>
__device__ __forceinline__ bf16_t from_float<bf16_t>(float x) {
    bf16_t h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
    return h;
}

// x rounded to T, as f32.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
    return to_float(from_float<T>(x));
}

// Two floats, rounded to T, in one register. `low` is in the lower half.
template <typename T>
__device__ __forceinline__ u32 pack(float low, float high);

template <>
__device__ __forceinline__ u32 pack<f16_t>(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

template <>
__device__ __forceinline__ u32 pack<bf16_t>(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Two elements: a · b + c, rounded once.
template <typename T>
__device__ __forceinline__ u32 multiply_add(u32 a, u32 b, u32 c);

template <>
__device__ __forceinline__ u32 multiply_add<f16_t>(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

template <>
__device__ __forceinline__ u32 multiply_add<bf16_t>(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// The two elements of a register.
template <typename T>
__device__ __forceinline__ float low_of(u32 pair) {
    return to_float(T{static_cast<u16>(pair)});
}

template <typename T>
__device__ __forceinline__ float high_of(u32 pair) {
    return to_float(T{static_cast<u16>(pair >> 16)});
}

template <>
__device__ __forceinline__ float high_of<bf16_t>(u32 pair) {
    return __uint_as_float(pair & 0xffff0000u);
}
