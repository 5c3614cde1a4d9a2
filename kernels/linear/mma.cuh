// Op: linear, expert_gate_up, expert_down · CPU twin: mixtral-cpu/src/kernels/{linear,experts}.rs
// Regime: any token count · Tile: ROWS output features × COLS tokens, 64 elements of K a stage
// Grid: persistent · Numerics: f32 accumulation on tensor cores in ascending K, one rounding; bits do not depend on the
// tile or on other tokens · Requires: sm_80, 16-bit types, any shape
// Traffic: weights once per tile of COLS tokens, tokens once per tile of ROWS rows (through L2) · Measured: docs/perf/cuda.md
#pragma once

#include "base/math.cuh"
#include "base/step.cuh"
#include "base/types.cuh"
#include "epilogue/tile.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mma.cuh"
#include "ptx/pdl.cuh"
#include "ptx/shared.cuh"
#include "sched/tiles.cuh"
#include "weight/plain.cuh"

namespace linear {

template <typename Weight, int ROWS_, int COLS_, int OUTPUTS_, int K_, int KIND_, int SHARED_>
struct MmaConfig {
    using W = Weight;  // a format: weight/
    using Row = typename W::Row;
    using T = typename W::T;
    using Tokens = weight::Plain<T>;
    static constexpr int ROWS = ROWS_;
    static constexpr int COLS = COLS_;
    static constexpr int OUTPUTS = OUTPUTS_;
    static constexpr int K = K_;
    static constexpr int KIND = KIND_;

    static constexpr bool SILU = KIND == epilogue::SiluMul;
    static constexpr int WARPS = 4;
    static constexpr int THREADS = WARPS * 32;
    static constexpr int STAGES = 3;
    static constexpr int DEPTH = 64;
    static constexpr int BLOCKS = ROWS / (16 * WARPS);  // of 16 rows, of a warp
    static constexpr int OUT_ROWS = SILU ? ROWS / 2 : ROWS;
    static constexpr int ROW_TILES = (OUTPUTS + OUT_ROWS - 1) / OUT_ROWS;
    static constexpr int K_BLOCKS = (K + DEPTH - 1) / DEPTH;
    static constexpr int A_ROW = W::bytes(DEPTH), B_ROW = Tokens::bytes(DEPTH);  // bytes of a stage's rows
    static constexpr int A_BYTES = ROWS * A_ROW;
    static constexpr int STAGE = A_BYTES + COLS * B_ROW;
    static constexpr int SHARED = STAGES * STAGE + 2 * COLS * 4;
    static_assert(SHARED == SHARED_, "what the launch asks for");
    // CTAs of a multiprocessor, as many as are launched. Without this number, ptxas may spill to make room for more.
    static constexpr int FITTING = (100 << 10) / (SHARED + 1024), PER_SM = FITTING < 1 ? 1 : FITTING > 8 ? 8 : FITTING;
    static_assert(ROWS % 64 == 0 && COLS % 8 == 0, "");
};

// Computes the products of a tile, and its epilogue. Functions give the tile's weight rows and token rows; null means
// no row.
template <typename C, typename Out, typename WeightRow>
__device__ __forceinline__ void mma_tile(u8* shared, const sched::Tile& tile, const int* sources, const int* map,
                                         WeightRow weight_row, const typename C::T* tokens, Out* out, const Out* residual) {
    using T = typename C::T;
    using Tokens = typename C::Tokens;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float d[C::BLOCKS][C::COLS / 8][4] = {};
    const auto copy = [&](int k_block) {
        if (k_block < C::K_BLOCKS) {
            u8* stage = shared + k_block % C::STAGES * C::STAGE;
            constexpr int A_PIECES = C::A_ROW / 16, B_PIECES = C::B_ROW / 16;
            for (int i = threadIdx.x; i < C::ROWS * A_PIECES; i += C::THREADS) {
                C::W::template copy<C::K>(stage, i / A_PIECES, i % A_PIECES, weight_row(i / A_PIECES), k_block * C::DEPTH);
            }
            for (int i = threadIdx.x; i < C::COLS * B_PIECES; i += C::THREADS) {
                const int source = sources[i / B_PIECES];
                const T* from = source < 0 ? nullptr : tokens + static_cast<i64>(source) * C::K;
                Tokens::template copy<C::K>(stage + C::A_BYTES, i / B_PIECES, i % B_PIECES, from, k_block * C::DEPTH);
            }
        }
        ptx::cp_async_commit();
    };
    for (int s = 0; s < C::STAGES - 1; s++) copy(s);
    for (int k = 0; k < C::K_BLOCKS; k++) {
        ptx::cp_async_wait_group<C::STAGES - 2>();
        __syncthreads();
        copy(k + C::STAGES - 1);
        const u32 a_tile = ptx::shared_address(shared + k % C::STAGES * C::STAGE), b_tile = a_tile + C::A_BYTES;
#pragma unroll
        for (int i = 0; i < C::DEPTH / 16; i++) {
            u32 a[C::BLOCKS][4];
#pragma unroll
            for (int m = 0; m < C::BLOCKS; m++) C::W::fragment(a[m], a_tile, (warp * C::BLOCKS + m) * 16, i, lane);
#pragma unroll
            for (int c = 0; c < C::COLS / 8; c++) {
                u32 b[2];
                ptx::ldmatrix_x2(b, b_tile + Tokens::offset(c * 8 + lane % 8, i * 2 + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < C::BLOCKS; m++) ptx::mma<T>(d[m][c], a[m], b);
            }
        }
    }
    ptx::cp_async_wait_group<0>();
#pragma unroll
    for (int m = 0; m < C::BLOCKS; m++) {
        const int block = warp * C::BLOCKS + m;
#pragma unroll
        for (int c = 0; c < C::COLS / 8; c++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int col = c * 8 + lane % 4 * 2 + half;
                if (col >= tile.count || map[col] < 0) continue;
                Out* to = out + static_cast<i64>(map[col]) * C::OUTPUTS;
                const float* v = d[m][c];
                if constexpr (C::SILU) {
                    const int row = tile.row * C::OUT_ROWS + block * 8 + lane / 4;
                    const float value = math::silu_approximate(rounded<T>(v[half + 2])) * rounded<T>(v[half]);
                    if (row < C::OUTPUTS) to[row] = from_float<Out>(value);
                } else {
#pragma unroll
                    for (int lower = 0; lower < 2; lower++) {
                        const int row = tile.row * C::ROWS + block * 16 + lane / 4 + lower * 8;
                        if (row >= C::OUTPUTS) continue;
                        float value = v[half + lower * 2];
                        if constexpr (C::KIND == epilogue::Residual) {
                            const float added = to_float(residual[static_cast<i64>(map[col]) * C::OUTPUTS + row]);
                            value = rounded<T>(value) + added;
                        }
                        to[row] = from_float<Out>(value);
                    }
                }
            }
        }
    }
    __syncthreads();
}

// Dense linear of weight [OUTPUTS][K] with tokens [·][K].
template <typename C, bool LOGITS, typename Out>
__global__ void __launch_bounds__(C::THREADS, C::PER_SM)
    mma_dense(typename C::Row weight, const typename C::T* tokens, const step::Header* header, Out* out,
              const Out* residual) {
    pdl::launch_dependents();
    extern __shared__ __align__(128) u8 dynamic_shared[];
    int* map = reinterpret_cast<int*>(dynamic_shared + C::STAGES * C::STAGE);
    int* sources = map + C::COLS;
    pdl::wait();
    const sched::Dense<C::ROW_TILES, C::COLS> tiles{LOGITS ? header->num_logits : header->num_tokens};
    sched::Tile tile;
    for (int index = blockIdx.x; tiles.at(index, tile); index += gridDim.x) {
        for (int i = threadIdx.x; i < C::COLS; i += C::THREADS) {
            map[i] = tile.first + i;
            sources[i] = i < tile.count ? tile.first + i : -1;
        }
        __syncthreads();
        const auto weight_row = [&](int row) -> typename C::Row {
            const i64 at = tile.row * C::ROWS + row;
            return at < C::OUTPUTS ? C::W::after(weight, at, C::K) : typename C::Row{};
        };
        mma_tile<C>(dynamic_shared, tile, sources, map, weight_row, tokens, out, residual);
    }
}

// Linear of each token by its experts. For gate and up, the weight is [EXPERTS][2 · OUTPUTS][K] with silu·mul, else
// [EXPERTS][OUTPUTS][K]; tokens are [T][K], and results are in expert order. With DOWN, tokens are in expert order,
// [T·k][K], and results are by assignment.
template <typename C, int EXPERTS, int TOP_K, bool DOWN>
__global__ void __launch_bounds__(C::THREADS, C::PER_SM)
    mma_grouped(typename C::Row weight, const typename C::T* tokens, const step::Header* header, const int* offsets,
                const int* order, typename C::T* out) {
    extern __shared__ __align__(128) u8 dynamic_shared[];
    int* map = reinterpret_cast<int*>(dynamic_shared + C::STAGES * C::STAGE);
    int* sources = map + C::COLS;
    pdl::wait();
    pdl::launch_dependents();  // after the wait, because expert_down relies on that (wgmma.cuh)
    sched::ByExpert<EXPERTS, C::ROW_TILES, C::COLS, false> tiles{offsets, header->num_tokens};
    sched::Tile tile;
    for (int index = blockIdx.x; tiles.at(index, tile); index += gridDim.x) {
        for (int i = threadIdx.x; i < C::COLS; i += C::THREADS) {
            const int position = tile.first + i, assignment = i < tile.count ? order[position] : -1;
            map[i] = DOWN ? assignment : position;
            sources[i] = i >= tile.count ? -1 : DOWN ? position : assignment / TOP_K;
        }
        __syncthreads();
        constexpr i64 EXPERT_ROWS = C::SILU ? 2 * C::OUTPUTS : C::OUTPUTS;
        const typename C::Row expert = C::W::after(weight, tile.expert * EXPERT_ROWS, C::K);
        const auto weight_row = [&](int row) -> typename C::Row {
            if constexpr (C::SILU) {
                // Eight up rows, then eight gate rows, so a thread has both the up and the gate accumulators of its
                // outputs.
                const i64 at = tile.row * C::OUT_ROWS + row / 16 * 8 + row % 8;
                return at < C::OUTPUTS ? C::W::after(expert, at + (row % 16 < 8 ? 0 : C::OUTPUTS), C::K) : typename C::Row{};
            } else {
                const i64 at = tile.row * C::ROWS + row;
                return at < C::OUTPUTS ? C::W::after(expert, at, C::K) : typename C::Row{};
            }
        };
        mma_tile<C>(dynamic_shared, tile, sources, map, weight_row, tokens, out, static_cast<const typename C::T*>(nullptr));
    }
}

}  // namespace linear
