// What a kernel's outputs are as the input of the next linear, if that has fp8 weights.
#pragma once

#include "base/fp8.cuh"
#include "base/types.cuh"

namespace epilogue {

// With ON, e4m3(out[i] / *divisor) is stored to rounded[i]; else neither is used.
template <bool ON>
struct Rounding {
    e4m3_t* rounded;
    const float* divisor;

    __device__ __forceinline__ fp8::Divisor prepare() const { return fp8::Divisor(ON ? *divisor : 1.0f); }
};

// Stores outputs `at` and up, four (as a uint2) or eight (as a uint4) of 16 bits.
template <typename T, bool ON, typename Words>
__device__ __forceinline__ void store_words(T* out, i64 at, const Words& words, Rounding<ON> rounding, const fp8::Divisor& divisor) {
    *reinterpret_cast<Words*>(out + at) = words;
    if constexpr (ON) {
        constexpr int COUNT = sizeof(Words) / 2;
        const u32* pairs = reinterpret_cast<const u32*>(&words);
        float x[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
            x[i] = low_of<T>(pairs[i / 2]);
            x[i + 1] = high_of<T>(pairs[i / 2]);
        }
        divisor.divide(x);
        u32 bytes[COUNT / 4] = {};
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) bytes[i / 4] |= fp8::pack(x[i], x[i + 1]) << i % 4 * 8;
        if constexpr (COUNT == 8) {
            *reinterpret_cast<uint2*>(rounding.rounded + at) = make_uint2(bytes[0], bytes[1]);
        } else {
            *reinterpret_cast<u32*>(rounding.rounded + at) = bytes[0];
        }
    }
}

}  // namespace epilogue
