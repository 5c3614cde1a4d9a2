// A tile of results in shared memory, token by token, before it is stored to global memory in 16-byte pieces. Pieces of
// a token are swizzled, so that neither the transposing writes nor the reads have bank conflicts.
#pragma once

#include "base/math.cuh"
#include "base/types.cuh"
#include "epilogue/rounding.cuh"

namespace epilogue {

// What happens to an accumulator. `Residual` rounds, adds the residual and rounds again. `SiluMul` takes rows 16i … 16i
// + 7 as up and the next eight as gate.
enum Kind { Store = 0, Residual = 1, F32 = 2, SiluMul = 3 };

// What `store_pair` adds: elements `row` and `row` + 8 of a token's row of the residual, if there is one. Loaded early, they are there when
// the sums are.
template <int KIND, int OUTPUTS, typename Out>
__device__ __forceinline__ float2 load_pair(const Out* residual, int row) {
    if constexpr (KIND != Residual) return {};
    return {row < OUTPUTS ? to_float(residual[row]) : 0.0f, row + 8 < OUTPUTS ? to_float(residual[row + 8]) : 0.0f};
}

// Stores one token's sums of two rows of a fragment, which a thread has: rows `row` and `row` + 8, or with silu·mul the up
// and the gate of output `row`. `to` is the token's row, of OUTPUTS elements.
template <typename T, int KIND, int OUTPUTS, typename Out>
__device__ __forceinline__ void store_pair(float upper, float lower, int row, Out* to, const float2& added) {
    if constexpr (KIND == SiluMul) {
        if (row < OUTPUTS) to[row] = from_float<Out>(math::silu_approximate(rounded<T>(lower)) * rounded<T>(upper));
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = row + i * 8;
            if (at >= OUTPUTS) continue;
            float value = i == 0 ? upper : lower;
            if constexpr (KIND == Residual) value = rounded<T>(value) + (i == 0 ? added.x : added.y);
            to[at] = from_float<Out>(value);
        }
    }
}

// The rows of their matrix to which the two sums of `store_pair` belong. (Rows behind the last one are the last one here.)
template <int KIND, int OUTPUTS>
__device__ __forceinline__ int2 rows_of_pair(int row) {
    const int upper = min(row, OUTPUTS - 1);
    return make_int2(upper, KIND == SiluMul ? OUTPUTS + upper : min(row + 8, OUTPUTS - 1));
}

// A sum times the factor of its row, and the scale of its token if that is not 1.
template <bool BY_TOKENS>
__device__ __forceinline__ float scaled(float sum, float row_factor, float token_scale) {
    return sum * (BY_TOKENS ? __fmul_rn(token_scale, row_factor) : row_factor);
}

// ROWS output features (32 or 64, 16 bits each) of COLS tokens.
template <int ROWS, int COLS>
struct Tile {
    static constexpr int PIECES = ROWS / 8;  // of a token
    static constexpr int BYTES = ROWS * COLS * 2;

    // Byte offset of piece `piece` of token `col`.
    __device__ __forceinline__ static int offset(int col, int piece) {
        const int turn = PIECES == 8 ? col & 7 : (col >> 1) & 3;
        return col * (ROWS * 2) + ((piece ^ turn) * 16);
    }
};

// round(a + b), two elements at a time.
template <typename T>
__device__ __forceinline__ u32 sum(u32 a, u32 b) {
    const float low = to_float(T{static_cast<u16>(a)}) + to_float(T{static_cast<u16>(b)});
    const float high = to_float(T{static_cast<u16>(a >> 16)}) + to_float(T{static_cast<u16>(b >> 16)});
    return pack<T>(low, high);
}

// Stores the tile's first `cols` tokens. Token `col` goes to row `destinations[col]` of `out` (nowhere if that is
// negative), to columns `row0` to `row0 + ROWS` that are below `limit`. `THREADS` threads call it. A row of `out` has
// `stride` elements, a multiple of 8.
template <typename T, int ROWS, int COLS, bool RESIDUAL, int THREADS, bool ROUNDS>
__device__ __forceinline__ void store(const u8* tile, int thread, int cols, const int* destinations, int row0, int limit,
                                      T* out, const T* residual, i64 stride, Rounding<ROUNDS> rounding) {
    using Layout = Tile<ROWS, COLS>;
    const fp8::Divisor divisor = rounding.prepare();
    for (int i = thread; i < cols * Layout::PIECES; i += THREADS) {
        const int col = i / Layout::PIECES, piece = i % Layout::PIECES;
        const int destination = destinations[col];
        if (destination < 0 || row0 + piece * 8 >= limit) continue;
        uint4 value = *reinterpret_cast<const uint4*>(tile + Layout::offset(col, piece));
        const i64 at = destination * stride + row0 + piece * 8;
        if constexpr (RESIDUAL) {
            const uint4 added = *reinterpret_cast<const uint4*>(residual + at);
            value.x = sum<T>(value.x, added.x);
            value.y = sum<T>(value.y, added.y);
            value.z = sum<T>(value.z, added.z);
            value.w = sum<T>(value.w, added.w);
        }
        store_words(out, at, value, rounding, divisor);
    }
}

}  // namespace epilogue
