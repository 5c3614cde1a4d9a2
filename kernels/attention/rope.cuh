// Op: rope, write_kv, rope_write_kv, and the table of angles that they share. CPU twin: kernels/rope.rs, kernels/kv.rs.
// Regime: any number of tokens.
// Tile: a token; of keys that are rounded by directions, a head for a warp.
// Grid: one CTA for each token; `angles`: one thread for each token and frequency.
// Numerics: the contract's, to the bit (also of an fp8 cache, by directions too), except that sine and cosine in f64 may differ from the CPU's by a unit in the
//   last place of f64. That changes the rounded f32 only rarely.
// Requires: 2^20 positions at most.
// Traffic: each row read and written once; the table is 4 · head_dim bytes a token, shared by the layers of a step.
// Measured: H200, 16 384 tokens of 6144: 132 µs, 78 % of read.
#pragma once

#include "attention/rotation.cuh"
#include "base/step.cuh"
#include "ptx/pdl.cuh"

namespace attention {

// Sine and cosine of |x| < 2^20 within about a unit in the last place. The argument is reduced by π/2 in three parts;
// each remainder is exact or rounded once. Taylor polynomials on |r| ≤ π/4 follow.
__device__ __forceinline__ void sine_cosine(double x, double& sine, double& cosine) {
    const double n = rint(x * 0.63661977236758134308);
    double r = __fma_rn(-n, 1.57079632679489655800, x);
    r = __fma_rn(-n, 6.12323399573676603587e-17, r);
    const double s = r * r;
    double p = 1.0 / 355687428096000.0;
    p = __fma_rn(-p, s, 1.0 / 1307674368000.0);
    p = __fma_rn(-p, s, 1.0 / 6227020800.0);
    p = __fma_rn(-p, s, 1.0 / 39916800.0);
    p = __fma_rn(-p, s, 1.0 / 362880.0);
    p = __fma_rn(-p, s, 1.0 / 5040.0);
    p = __fma_rn(-p, s, 1.0 / 120.0);
    p = __fma_rn(-p, s, 1.0 / 6.0);
    const double sin_r = __fma_rn(-p * s, r, r);
    double q = 1.0 / 20922789888000.0;
    q = __fma_rn(-q, s, 1.0 / 87178291200.0);
    q = __fma_rn(-q, s, 1.0 / 479001600.0);
    q = __fma_rn(-q, s, 1.0 / 3628800.0);
    q = __fma_rn(-q, s, 1.0 / 40320.0);
    q = __fma_rn(-q, s, 1.0 / 720.0);
    q = __fma_rn(-q, s, 1.0 / 24.0);
    q = __fma_rn(-q, s, 0.5);
    const double cos_r = __fma_rn(-q, s, 1.0);
    const int quadrant = static_cast<int>(n) & 3;
    sine = quadrant & 1 ? cos_r : sin_r;
    cosine = quadrant & 1 ? sin_r : cos_r;
    if (quadrant & 2) sine = -sine;
    if ((quadrant + 1) & 2) cosine = -cosine;
}

// The bits of f32 constants, as an array.
template <u32... BITS>
__constant__ const u32 CONSTANTS[sizeof...(BITS)] = {BITS...};

// table[t][i] = (cosine, sine) of positions[t] · frequency i; FREQUENCIES are the bits of the contract's inverse frequencies.
template <u32... FREQUENCIES>
__global__ void __launch_bounds__(256) angles(const step::Header* header, const i32* positions, float2* table) {
    pdl::launch_dependents();
    pdl::wait();
    constexpr int COUNT = sizeof...(FREQUENCIES);
    const int index = blockIdx.x * 256 + threadIdx.x;
    const int token = index / COUNT;
    if (token >= header->num_tokens) return;
    const float frequency = __uint_as_float(CONSTANTS<FREQUENCIES...>[index % COUNT]);
    const float angle = __fmul_rn(static_cast<float>(positions[token]), frequency);
    double sine, cosine;
    sine_cosine(angle, sine, cosine);
    table[index] = make_float2(static_cast<float>(cosine), static_cast<float>(sine));
}

// Rotates the first NUM_HEADS heads of rows of COLS, in place.
template <typename T, int COLS, int NUM_HEADS, int HEAD_DIM, int THREADS>
__global__ void __launch_bounds__(THREADS) rope(const step::Header* header, const float2* table, T* data) {
    pdl::launch_dependents();
    const i64 token = blockIdx.x;
    const bool idle = token >= header->num_tokens;
    pdl::wait();
    if (idle) return;
    constexpr int HALF = HEAD_DIM / 2, PER_HEAD = ceil_div(HALF, VECTOR);
    constexpr bool ALIGNED = whole_vectors(HALF) && whole_vectors(COLS);
    for (int index = threadIdx.x; index < NUM_HEADS * PER_HEAD; index += THREADS) {
        const int i = index % PER_HEAD * VECTOR, n = ALIGNED ? VECTOR : HALF - i;
        T* at = data + token * COLS + index / PER_HEAD * HEAD_DIM + i;
        float x[VECTOR], y[VECTOR];
        load<ALIGNED>(x, at, n);
        load<ALIGNED>(y, at + HALF, n);
        rotate<ALIGNED>(x, y, table + token * HALF + i, n);
        store<ALIGNED>(at, x, n);
        store<ALIGNED>(at + HALF, y, n);
    }
}

// keys[slot[t]] = key[t], values likewise; a slot of −1 writes nothing. T is the model's type, Stored the cache's. Only an
// fp8 cache has scales.
template <typename T, typename Stored, int NUM_HEADS, int HEAD_DIM, int BLOCK_SIZE, int THREADS>
__global__ void __launch_bounds__(THREADS)
    write_kv(const step::Header* header, const i32* slots, const T* key, const T* value, float key_scale, float value_scale,
             Stored* keys, Stored* values) {
    pdl::launch_dependents();
    const fp8::Divisor by_key(key_scale), by_value(value_scale);
    const i64 token = blockIdx.x;
    const bool idle = token >= header->num_tokens;
    pdl::wait();
    if (idle) return;
    const i32 slot = slots[token];
    if (slot < 0) return;
    constexpr int PER_HEAD = ceil_div(HEAD_DIM, VECTOR);
    constexpr bool ALIGNED = whole_vectors(HEAD_DIM);
    for (int index = threadIdx.x; index < 2 * NUM_HEADS * PER_HEAD; index += THREADS) {
        const bool is_key = index < NUM_HEADS * PER_HEAD;
        const int head = index / PER_HEAD % NUM_HEADS, i = index % PER_HEAD * VECTOR;
        const i64 to = cache_offset<NUM_HEADS, BLOCK_SIZE, HEAD_DIM>(slot, head) + i;
        float x[VECTOR];
        load<ALIGNED>(x, (is_key ? key : value) + (token * NUM_HEADS + head) * HEAD_DIM + i, HEAD_DIM - i);
        keep<T, ALIGNED>((is_key ? keys : values) + to, x, is_key ? by_key : by_value, HEAD_DIM - i);
    }
}

// Rows Q ‖ K ‖ V: rotates the queries in place and writes the rotated keys and the values to the cache. DIRECTED warps
// round keys by `directions` [KV_HEADS][HEAD_DIM], each one after another; they are the last ones. Without them, keys are rounded to nearest.
template <typename T, typename Stored, int NUM_HEADS, int KV_HEADS, int HEAD_DIM, int BLOCK_SIZE, int THREADS, int DIRECTED>
__global__ void __launch_bounds__(THREADS, HEAD_DIM > 128 ? 1 : THREADS < 96 ? 16 : 1152 / THREADS)
    rope_write_kv(const step::Header* header, const i32* slots, const float2* table, T* qkv, float key_scale, float value_scale,
                  Stored* keys, Stored* values, const float* directions) {
    pdl::launch_dependents();
    const fp8::Divisor by_key(key_scale), by_value(value_scale);
    const i64 token = blockIdx.x;
    if (token >= header->num_tokens) return pdl::wait();
    constexpr int HALF = HEAD_DIM / 2, PER_HEAD = ceil_div(HALF, VECTOR);
    constexpr int ROTATED = (NUM_HEADS + KV_HEADS) * PER_HEAD, ALL = ROTATED + KV_HEADS * PER_HEAD;
    constexpr int PLAIN = THREADS - 32 * DIRECTED;  // threads that do everything else
    constexpr bool ALIGNED = whole_vectors(HALF);
    const i32 slot = slots[token];
    T* row = qkv + token * (NUM_HEADS + 2 * KV_HEADS) * HEAD_DIM;
    const float2* angles = table + token * HALF;
    if constexpr (DIRECTED > 0) {
        if (threadIdx.x >= PLAIN) {
            if (slot < 0) return pdl::wait();
            using Own = Share<HEAD_DIM>;
            const int first = (threadIdx.x - PLAIN) / 32;
            Own first_direction;
            first_direction.load(directions + first * HEAD_DIM);
            pdl::wait();
            for (int head = first; head < KV_HEADS; head += DIRECTED) {
                Own direction = first_direction, key;
                if (head != first) direction.load(directions + head * HEAD_DIM);
                key.load(row + (NUM_HEADS + head) * HEAD_DIM);
                key.rotate(angles);
                direction.rotate(angles);
                u32 bytes[2][Own::PAIRS];
                round_directed<T>(bytes, key, direction, by_key);
                if (!Own::is_used()) continue;
                Stored* to = keys + cache_offset<KV_HEADS, BLOCK_SIZE, HEAD_DIM>(slot, head) + Own::first();
#pragma unroll
                for (int half = 0; half < 2; ++half) {
#pragma unroll
                    for (int i = 0; i < Own::PAIRS; ++i) to[half * HALF + i].bits = static_cast<u8>(bytes[half][i]);
                }
            }
            return;
        }
    }
    pdl::wait();
    constexpr int LEFT = DIRECTED > 0 ? ALL - KV_HEADS * PER_HEAD : ALL;
    for (int own = threadIdx.x; own < LEFT; own += PLAIN) {
        // (Behind the queries come the values, if others have the keys.)
        const int index = DIRECTED > 0 && own >= NUM_HEADS * PER_HEAD ? own + KV_HEADS * PER_HEAD : own;
        const int head = index / PER_HEAD, i = index % PER_HEAD * VECTOR, n = ALIGNED ? VECTOR : HALF - i;
        T* at = row + head * HEAD_DIM + i;
        if (head >= NUM_HEADS && slot < 0) continue;
        float x[VECTOR], y[VECTOR];
        load<ALIGNED>(x, at, n);
        load<ALIGNED>(y, at + HALF, n);
        if (index < ROTATED) rotate<ALIGNED>(x, y, angles + i, n);
        if (head < NUM_HEADS) {
            store<ALIGNED>(at, x, n);
            store<ALIGNED>(at + HALF, y, n);
        } else {
            // (One piece of code for keys and values: at one token, what takes time is to fetch code that runs only once.)
            const bool is_key = DIRECTED == 0 && index < ROTATED;
            const int own = head - NUM_HEADS - (is_key ? 0 : KV_HEADS);
            Stored* to = (is_key ? keys : values) + cache_offset<KV_HEADS, BLOCK_SIZE, HEAD_DIM>(slot, own) + i;
            const fp8::Divisor& divisor = is_key ? by_key : by_value;
            keep<T, ALIGNED>(to, x, divisor, n);
            keep<T, ALIGNED>(to + HALF, y, divisor, n);
        }
    }
}

}  // namespace attention
