// Rotary embedding, and how keys and values become what the cache stores: what the kernels of rope.cuh and decode attention share.
#pragma once

#include "base/fp8.cuh"
#include "base/reduce.cuh"
#include "base/vector.cuh"

namespace attention {

// Rotates a pair of elements.
__device__ __forceinline__ void turn(float& x, float& y, float cosine, float sine) {
    const float a = x, b = y;
    x = __fsub_rn(__fmul_rn(a, cosine), __fmul_rn(b, sine));
    y = __fadd_rn(__fmul_rn(b, cosine), __fmul_rn(a, sine));
}

// Rotates the first n of eight pairs. x holds elements i, i + 1 … of a head, and y the elements HEAD_DIM / 2 behind
// them.
template <bool ALIGNED>
__device__ __forceinline__ void rotate(float (&x)[VECTOR], float (&y)[VECTOR], const float2* angles, int n) {
#pragma unroll
    for (int i = 0; i < VECTOR; i += 2) {
        float4 angle;
        if constexpr (ALIGNED) {
            angle = reinterpret_cast<const float4*>(angles)[i / 2];
        } else {
            const float2 first = i < n ? angles[i] : make_float2(1.0f, 0.0f);
            const float2 second = i + 1 < n ? angles[i + 1] : make_float2(1.0f, 0.0f);
            angle = make_float4(first.x, first.y, second.x, second.y);
        }
        turn(x[i], y[i], angle.x, angle.y);
        turn(x[i + 1], y[i + 1], angle.z, angle.w);
    }
}

// Where the vector of a slot and head begins in keys or values [blocks, heads, block, HEAD_DIM].
template <int NUM_HEADS, int BLOCK_SIZE, int HEAD_DIM>
__device__ __forceinline__ i64 cache_offset(i32 slot, int head) {
    return ((static_cast<i64>(slot / BLOCK_SIZE) * NUM_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM;
}

// Stores the first n of eight numbers of type T in the cache: as they are, or e4m3(x / divisor) in an fp8 cache.
template <typename T, bool ALIGNED, typename Stored>
__device__ __forceinline__ void keep(Stored* to, float (&x)[VECTOR], const fp8::Divisor& divisor, int n) {
    if constexpr (sizeof(Stored) == 1) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) x[i] = rounded<T>(x[i]);
        divisor.divide(x);
    }
    store<ALIGNED>(to, x, n);
}

// A lane's elements of a head: PAIRS of each half.
template <int HEAD_DIM>
struct Share {
    static constexpr int HALF = HEAD_DIM / 2, LANES = HALF < 32 ? HALF : 32, PAIRS = HALF / LANES;
    static_assert((HEAD_DIM & (HEAD_DIM - 1)) == 0 && HEAD_DIM >= 16 && HEAD_DIM <= 512, "what fp8::suits_directions says");

    float at[2][PAIRS] = {};

    static __device__ __forceinline__ int first() { return threadIdx.x % 32 * PAIRS; }
    static __device__ __forceinline__ bool is_used() { return threadIdx.x % 32 < LANES; }

    template <typename T>
    __device__ __forceinline__ void load(const T* head) {
        if (!is_used()) return;
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) at[0][i] = to_float(head[first() + i]), at[1][i] = to_float(head[HALF + first() + i]);
    }

    // `angles` are a token's.
    __device__ __forceinline__ void rotate(const float2* angles) {
        if (!is_used()) return;
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) turn(at[0][i], at[1][i], angles[first() + i].x, angles[first() + i].y);
    }
};

// Rounds a rotated key to e4m3 by its head's direction, which is rotated as the key is, as `mixtral_engine::KeyDirections` says. Called by
// a warp.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void round_directed(u32 (&bytes)[2][Share<HEAD_DIM>::PAIRS], Share<HEAD_DIM> key,
                                               const Share<HEAD_DIM>& direction, const fp8::Divisor& divisor) {
    using Own = Share<HEAD_DIM>;
    constexpr int HALF = Own::HALF, LANES = Own::LANES, PAIRS = Own::PAIRS;
    const int first = Own::first();
    float(&x)[2][PAIRS] = key.at;
    const float(&u)[2][PAIRS] = direction.at;
    u32 others[2][PAIRS];
    float error[2][PAIRS], step[2][PAIRS], pairs[PAIRS];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) x[half][i] = rounded<T>(x[half][i]);
        divisor.divide(x[half]);
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            const u32 byte = from_float<e4m3_t>(x[half][i]).bits;
            const float number = fp8::number(byte);
            const u32 other = fabsf(number) > fabsf(x[half][i]) ? byte - 1 : byte + 1;
            bytes[half][i] = byte;
            // The largest number has no neighbour behind it, and NaN none at all.
            others[half][i] = (byte & 0x7f) == 0x7f || (other & 0x7f) == 0x7f ? byte : other;
            error[half][i] = __fsub_rn(x[half][i], number);
            step[half][i] = __fsub_rn(number, fp8::number(others[half][i]));
        }
    }
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) pairs[i] = __fmaf_rn(u[1][i], error[1][i], __fmul_rn(u[0][i], error[0][i]));
#pragma unroll
    for (int distance = 1; distance < PAIRS; distance *= 2) {
#pragma unroll
        for (int i = 0; i < PAIRS; i += 2 * distance) pairs[i] = __fadd_rn(pairs[i], pairs[i + distance]);
    }
    float along = pairs[0];
#pragma unroll
    for (int distance = 1; distance < LANES; distance *= 2) along = __fadd_rn(along, __shfl_xor_sync(ALL_LANES, along, distance));
#pragma unroll
    for (int time = 0; time < 2; ++time) {
        // The least cost, and where it is. Bits of negative numbers ascend as the numbers descend; 0 stands for no such number.
        u32 least = 0, at = HEAD_DIM;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) {
                const float slope = __fmaf_rn(along, u[half][i], error[half][i]);
                const float curve = __fmaf_rn(u[half][i], u[half][i], 1.0f);
                const float cost = __fmul_rn(step[half][i], __fmaf_rn(curve, step[half][i], __fadd_rn(slope, slope)));
                const u32 bits = cost < 0.0f ? __float_as_uint(cost) : 0;
                if (bits > least) least = bits, at = half * HALF + first + i;
            }
        }
        const u32 best = __reduce_max_sync(ALL_LANES, least);
        if (best == 0) break;
        at = __reduce_min_sync(ALL_LANES, least == best ? at : HEAD_DIM);
        float moved = 0.0f, weight = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) {
                if (at != half * HALF + first + i) continue;
                moved = step[half][i], weight = u[half][i];
                error[half][i] = __fadd_rn(error[half][i], moved);
                step[half][i] = -moved;
                const u32 byte = bytes[half][i];
                bytes[half][i] = others[half][i];
                others[half][i] = byte;
            }
        }
        const int owner = at % HALF / PAIRS;
        along = __fmaf_rn(__shfl_sync(ALL_LANES, weight, owner), __shfl_sync(ALL_LANES, moved, owner), along);
    }
}

}  // namespace attention
