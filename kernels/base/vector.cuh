// Loads and stores eight consecutive elements as f32: by one 16-byte access for 16-bit types, two for f32, and one of 8
// bytes for e4m3.
#pragma once

#include "base/fp8.cuh"
#include "base/types.cuh"

inline constexpr int VECTOR = 8;

__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Whether rows of `cols` elements start at multiples of a vector.
__device__ constexpr bool whole_vectors(int cols) { return cols % VECTOR == 0; }

template <typename T>
__device__ __forceinline__ void unpack(float (&x)[VECTOR], const uint4& words) {
    const u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = low_of<T>(w[i]);
        x[2 * i + 1] = high_of<T>(w[i]);
    }
}

template <typename T>
__device__ __forceinline__ void load_aligned(float (&x)[VECTOR], const T* from) {
    if constexpr (sizeof(T) == 4) {
        const float4 a = reinterpret_cast<const float4*>(from)[0];
        const float4 b = reinterpret_cast<const float4*>(from)[1];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
        x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else if constexpr (sizeof(T) == 1) {
        const uint2 words = *reinterpret_cast<const uint2*>(from);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) x[i] = to_float(T{static_cast<u8>((i < 4 ? words.x : words.y) >> i % 4 * 8)});
    } else {
        unpack<T>(x, *reinterpret_cast<const uint4*>(from));
    }
}

template <typename T>
__device__ __forceinline__ void store_aligned(T* to, const float (&x)[VECTOR]) {
    if constexpr (sizeof(T) == 4) {
        reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
        reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else if constexpr (sizeof(T) == 1) {
        u32 words[2] = {};
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) words[i / 4] |= static_cast<u32>(from_float<T>(x[i]).bits) << i % 4 * 8;
        *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
        *reinterpret_cast<uint4*>(to) =
            make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
    }
}

// Loads the first n of eight elements, and zeros for the rest. With ALIGNED, `from` is a multiple of 16 bytes, or of
// eight elements that are shorter.
template <bool ALIGNED, typename T>
__device__ __forceinline__ void load(float (&x)[VECTOR], const T* from, int n) {
    if (ALIGNED && n >= VECTOR) return load_aligned(x, from);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x[i] = i < n ? to_float(from[i]) : 0.0f;
}

template <bool ALIGNED, typename T>
__device__ __forceinline__ void store(T* to, const float (&x)[VECTOR], int n) {
    if (ALIGNED && n >= VECTOR) return store_aligned(to, x);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        if (i < n) to[i] = from_float<T>(x[i]);
    }
}

// Copies the bits of the first n of eight elements.
template <bool ALIGNED, typename T>
__device__ __forceinline__ void copy(T* to, const T* from, int n) {
    if (ALIGNED && n >= VECTOR) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) {
            reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        if (i < n) to[i] = from[i];
    }
}
