// Op: none; makes dummy weights when an engine is loaded. CPU twin: mixtral_engine::dummy.
// Regime: each launch fills one piece of a weight.
// Tile: eight elements a thread.
// Grid: any; threads stride over the piece.
// Numerics: the contract's, to the bit.
// Requires: nothing; 16-byte stores where the piece's rows allow them.
// Traffic: each element written once.
// Measured: H200: 93.4 GB in less than 0.17 s.
#pragma once

#include "base/fp8.cuh"
#include "base/vector.cuh"
#include "ptx/pdl.cuh"

namespace dummy {

__device__ __forceinline__ u32 mix(u32 x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

// The random word of element `index` of the tensor with this key.
__device__ __forceinline__ u32 word(u64 key, u64 index) {
    const u32 low = static_cast<u32>(index), high = static_cast<u32>(index >> 32);
    return mix(mix(low ^ static_cast<u32>(key) ^ high * 0x9e3779b9u) + static_cast<u32>(key >> 32));
}

// out[r][c] is element first + r · source_cols + c of the tensor with this key, times scale, plus bias. (Norms have
// scale 0 and bias 1.)
template <typename T>
__global__ void __launch_bounds__(256)
    fill(T* out, u64 key, u64 first, u64 rows, u64 cols, u64 source_cols, float scale, float bias) {
    pdl::launch_dependents();
    pdl::wait();
    // If rows are whole rows of the source, they are treated as one long row.
    if (cols == source_cols) {
        cols *= rows;
        rows = 1;
    }
    const u64 per_row = (cols + VECTOR - 1) / VECTOR, count = rows * per_row;
    const bool aligned = reinterpret_cast<u64>(out) % 16 == 0 && (rows == 1 || cols % VECTOR == 0);
    for (u64 v = blockIdx.x * 256ull + threadIdx.x; v < count; v += gridDim.x * 256ull) {
        const u64 row = rows == 1 ? 0 : v / per_row, column = (v - row * per_row) * VECTOR;
        const u64 index = first + row * source_cols + column;
        float x[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            // The sum of the four bytes.
            const u32 sum = __dp4a(word(key, index + i), 0x01010101u, 0u);
            x[i] = __fadd_rn(__fmul_rn(__fsub_rn(static_cast<float>(sum), 510.0f), scale), bias);
        }
        T* to = out + row * cols + column;
        const int n = cols - column < VECTOR ? static_cast<int>(cols - column) : VECTOR;
        if (aligned) {
            store<true>(to, x, n);
        } else {
            store<false>(to, x, n);
        }
    }
}

// Calls f(i, index) for every element: i counts those of the piece, `index` is its index in the tensor, as for `fill`.
template <typename F>
__device__ __forceinline__ void for_each(u64 first, u64 rows, u64 cols, u64 source_cols, F f) {
    for (u64 i = blockIdx.x * 256ull + threadIdx.x; i < rows * cols; i += gridDim.x * 256ull) {
        f(i, first + i / cols * source_cols + i % cols);
    }
}

// The integers of a quantized weight, as `fill` its elements: uniform from 1 to 2 · MIDDLE − 1. A row is whole bytes.
template <int BITS>
__global__ void __launch_bounds__(256) fill_integers(u8* out, u64 key, u64 first, u64 rows, u64 cols, u64 source_cols) {
    pdl::launch_dependents();
    pdl::wait();
    constexpr u32 VALUES = (1u << BITS) - 1, EACH = 8 / BITS;  // of a byte
    const u64 row_bytes = (cols + EACH - 1) / EACH;
    for_each(0, rows, row_bytes, row_bytes, [&](u64 i, u64) {
        const u64 row = i / row_bytes, column = i % row_bytes * EACH;
        u32 byte = 0;
#pragma unroll
        for (u32 e = 0; e < EACH; e++) {
            if (column + e < cols) byte |= (1 + word(key, first + row * source_cols + column + e) % VALUES) << (e * BITS);
        }
        out[i] = static_cast<u8>(byte);
    });
}

// The scales of a quantized weight; columns are groups: uniform from 192 to 319, times scale.
template <typename T>
__global__ void __launch_bounds__(256)
    fill_scales(T* out, u64 key, u64 first, u64 rows, u64 cols, u64 source_cols, float scale) {
    pdl::launch_dependents();
    pdl::wait();
    for_each(first, rows, cols, source_cols, [&](u64 i, u64 index) {
        out[i] = from_float<T>(__fmul_rn(static_cast<float>(192 + (word(key, index) & 127)), scale));
    });
}

// The zeros of a quantized weight; columns are groups: the middle of the integers, or a neighbour of it.
template <int BITS>
__global__ void __launch_bounds__(256) fill_zeros(u8* out, u64 key, u64 first, u64 rows, u64 cols, u64 source_cols) {
    pdl::launch_dependents();
    pdl::wait();
    for_each(first, rows, cols, source_cols, [&](u64 i, u64 index) {
        out[i] = static_cast<u8>((1u << (BITS - 1)) - 1 + word(key, index) % 3);
    });
}

// The floats of an fp8 weight, as `fill` its elements: each divided by the scale of an fp8 weight, with which the largest
// becomes the largest number of e4m3.
template <typename T>
__global__ void __launch_bounds__(256)
    fill_fp8(T* out, u64 key, u64 first, u64 rows, u64 cols, u64 source_cols, float scale) {
    pdl::launch_dependents();
    pdl::wait();
    const float of_fp8 = __fdiv_rn(__fmul_rn(510.0f, scale), fp8::MAX);
    for_each(first, rows, cols, source_cols, [&](u64 i, u64 index) {
        const u32 sum = __dp4a(word(key, index), 0x01010101u, 0u);
        const float element = __fmul_rn(__fsub_rn(static_cast<float>(sum), 510.0f), scale);
        out[i] = from_float<T>(__fdiv_rn(element, of_fp8));
    });
}

}  // namespace dummy
