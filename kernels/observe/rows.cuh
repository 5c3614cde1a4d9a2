// Op: none; sums up the rows that come to a linear. CPU twin: `Observed` of crates/mixtral-calibrate.
// Regime: steps of many tokens, while a model is calibrated.
// Tile: 128 neighbouring elements of the rows of one list (all tokens, or an expert's).
// Grid: a CTA for each 128 elements of each list.
// Numerics: those of the twin, to the bit: products are rounded, a sequence's are added in f32 in the order of its
//   tokens, and sequences are added in f64.
// Requires: nothing.
// Traffic: the rows once; with products also 1 KB for each element of a list and each sequence, read and written.
// Measured: not tuned.
#pragma once

#include "base/step.cuh"
#include "base/vector.cuh"
#include "ptx/pdl.cuh"

namespace observe {

// Elements whose products are kept, each with each.
inline constexpr int BLOCK = 128;
// A thread keeps the products of SIDE elements with SIDE others.
inline constexpr int SIDE = 8;
inline constexpr int SQUARES = BLOCK / SIDE;
// One for each of the 136 squares on and above the diagonal, in whole warps.
inline constexpr int THREADS = 160;
// Rows in shared memory at a time.
inline constexpr int DEPTH = 32;

// All tokens, in their order.
struct Tokens {
    __device__ __forceinline__ i64 row(int at) const { return at; }
    __device__ __forceinline__ int token(int at) const { return at; }
};

// Assignments in the order of experts. Rows are those of tokens, or (IN_ORDER) they lie in that order themselves.
template <int K, bool IN_ORDER>
struct Assignments {
    const i32* order;
    __device__ __forceinline__ i64 row(int at) const { return IN_ORDER ? at : order[at] / K; }
    __device__ __forceinline__ int token(int at) const { return order[at] / K; }
};

// The first place of [from, to) whose token is `token` or a later one.
template <typename List>
__device__ __forceinline__ int first_of(const List& list, int from, int to, int token) {
    while (from < to) {
        const int middle = from + (to - from) / 2;
        if (list.token(middle) < token) {
            from = middle + 1;
        } else {
            to = middle;
        }
    }
    return from;
}

// Adds the elements of block `block` of the rows at the places [first, last) of a list. `sums` is f64[WIDTH][BLOCK]: the
// products of each element with those of its block; only those on and above the diagonal are added.
template <typename T, int WIDTH, bool PRODUCTS, typename List>
__device__ __forceinline__ void add(const List& list, int first, int last, const step::Header* header, const i32* cu_query_lens,
                                    const T* input, int block, u64* count, u32* amax, double* sums) {
    constexpr int VECTORS = BLOCK / VECTOR;
    __shared__ __align__(16) float x[DEPTH][BLOCK];
    // The thread's square: the squares above the diagonal, row by row.
    int above = 0, right = threadIdx.x;
    while (above < SQUARES && right >= SQUARES - above) right -= SQUARES - above++;
    const bool multiplies = above < SQUARES;
    const int i = above * SIDE, j = (above + right) * SIDE;
    float products[SIDE][SIDE] = {};
    // Magnitudes compare as their bits do, and NaN is above all numbers.
    u32 most = 0;
    int at = first;
    for (int sequence = 0; sequence < header->num_seqs && at < last; ++sequence) {
        const int end = first_of(list, at, last, cu_query_lens[sequence + 1]);
        if (at == end) continue;
        for (; at < end; at += DEPTH) {
            const int rows = end - at < DEPTH ? end - at : DEPTH;
            if constexpr (PRODUCTS) __syncthreads();
            for (int v = threadIdx.x; v < rows * VECTORS; v += THREADS) {
                const int row = v / VECTORS, column = v % VECTORS * VECTOR, from = block * BLOCK + column;
                float values[VECTOR];
                load<whole_vectors(WIDTH)>(values, input + list.row(at + row) * WIDTH + from, WIDTH - from);
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) {
                    const u32 magnitude = __float_as_uint(values[e]) & 0x7fffffffu;
                    most = magnitude > most ? magnitude : most;
                    if constexpr (PRODUCTS) x[row][column + e] = values[e];
                }
            }
            if constexpr (PRODUCTS) {
                __syncthreads();
                for (int row = 0; row < (multiplies ? rows : 0); ++row) {
                    float a[SIDE], b[SIDE];
                    load_aligned(a, &x[row][i]);
                    load_aligned(b, &x[row][j]);
#pragma unroll
                    for (int p = 0; p < SIDE; ++p) {
#pragma unroll
                        for (int q = 0; q < SIDE; ++q) products[p][q] = __fadd_rn(products[p][q], __fmul_rn(a[p], b[q]));
                    }
                }
            }
        }
        at = end;
        if constexpr (PRODUCTS) {
#pragma unroll
            for (int p = 0; p < SIDE; ++p) {
                const int element = block * BLOCK + i + p;
#pragma unroll
                for (int q = 0; q < SIDE; ++q) {
                    if (multiplies && element < WIDTH) sums[static_cast<i64>(element) * BLOCK + j + q] += products[p][q];
                    products[p][q] = 0.0f;
                }
            }
        }
    }
    most = __reduce_max_sync(0xffffffffu, most);
    if (threadIdx.x % 32 == 0) atomicMax(amax, most);
    if (block == 0 && threadIdx.x == 0) *count += last - first;
}

// The rows of all tokens.
template <typename T, int WIDTH, bool PRODUCTS>
__global__ void __launch_bounds__(THREADS) tokens(const step::Header* header, const i32* cu_query_lens, const T* input,
                                                  u64* count, u32* amax, double* sums) {
    pdl::launch_dependents();
    pdl::wait();
    add<T, WIDTH, PRODUCTS>(Tokens{}, 0, header->num_tokens, header, cu_query_lens, input, blockIdx.x, count, amax, sums);
}

// The rows of each expert: count[experts], amax[experts], sums[experts][WIDTH][BLOCK].
template <typename T, int WIDTH, int K, bool IN_ORDER, bool PRODUCTS>
__global__ void __launch_bounds__(THREADS) experts(const step::Header* header, const i32* cu_query_lens, const i32* offsets,
                                                   const i32* order, const T* input, u64* count, u32* amax, double* sums) {
    pdl::launch_dependents();
    pdl::wait();
    constexpr int BLOCKS = ceil_div(WIDTH, BLOCK);
    const int expert = blockIdx.x / BLOCKS;
    add<T, WIDTH, PRODUCTS>(Assignments<K, IN_ORDER>{order}, offsets[expert], offsets[expert + 1], header, cu_query_lens, input,
                            blockIdx.x % BLOCKS, count + expert, amax + expert,
                            sums + (PRODUCTS ? static_cast<i64>(expert) * WIDTH * BLOCK : 0));
}

}  // namespace observe
