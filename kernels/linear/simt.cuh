// Op: linear, expert_gate_up, expert_down · CPU twin: mixtral-cpu/src/kernels/{linear,experts}.rs
// Regime: any token count; f32 engines, and linears whose weight is f32 · Tile: 64 output features × 32 tokens, 16
// elements of K
// Grid: persistent · Numerics: one f32 multiply-add chain in ascending K; with fp8 one for each 128 elements, added up ·
// Requires: any type and shape
// Traffic: weights once per 32 tokens · Measured: not tuned, parity only
#pragma once

#include "base/math.cuh"
#include "base/step.cuh"
#include "base/types.cuh"
#include "epilogue/tile.cuh"
#include "ptx/pdl.cuh"
#include "sched/tiles.cuh"
#include "weight/fp8.cuh"
#include "weight/plain.cuh"
#include "weight/quantized.cuh"

namespace linear {

template <typename Weight, typename Element, int OUTPUTS_, int K_, int KIND_>
struct SimtConfig {
    using W = Weight;  // a format: weight/
    using Stored = typename W::Stored;
    using T = Element;
    using Token = typename W::template Token<T>;
    static constexpr int ROWS = 64;
    static constexpr int COLS = 32;
    static constexpr int DEPTH = 16;
    static constexpr int OUTPUTS = OUTPUTS_;
    static constexpr int K = K_;
    static constexpr int KIND = KIND_;
    static constexpr bool SILU = KIND == epilogue::SiluMul;
    static constexpr int OUT_ROWS = SILU ? ROWS / 2 : ROWS;
    static constexpr int ROW_TILES = (OUTPUTS + OUT_ROWS - 1) / OUT_ROWS;
    static constexpr int THREADS = 128;
    static constexpr int PER_SM = 6;  // CTAs of a multiprocessor at least; else ptxas spills to make room for more
};

template <typename C>
struct SimtShared {
    float weights[C::DEPTH][C::ROWS + 4];
    float tokens[C::DEPTH][C::COLS + 4];
    int map[C::COLS];
    int sources[C::COLS];
};

// Row `row` of a tile, or no row. With silu·mul, the first half of a tile is up, the second half gate. `weight` is that of
// all experts if it is packed, else the expert's own.
template <typename C>
__device__ __forceinline__ typename C::W::Row simt_row(typename C::Stored weight, const sched::Tile& tile, int row) {
    const int at = tile.row * C::OUT_ROWS + row % C::OUT_ROWS;
    if (at >= C::OUTPUTS) return {};
    const bool gate = C::SILU && row >= C::OUT_ROWS;
    if constexpr (C::W::PACKED) {
        constexpr i64 SLABS = C::W::slabs(C::OUTPUTS, C::SILU);
        const i64 slab = tile.expert * SLABS + (C::SILU ? at / 8 : at / 16);
        return {weight + slab * C::W::slab_bytes(C::K), C::SILU ? at % 8 + gate * 8 : at % 16, C::W::row_values(weight, slab)};
    } else {
        return weight + static_cast<i64>(at + (gate ? C::OUTPUTS : 0)) * C::K;
    }
}

// Thread (i, j) of 16 × 8 computes rows i, i + 16, i + 32, i + 48 of columns 4j … 4j + 3. With silu·mul the last two
// rows are the gates of the first two.
template <typename C, typename Out>
__device__ __forceinline__ void simt_tile(SimtShared<C>& shared, const sched::Tile& tile, typename C::Stored weight,
                                          const typename C::Token* tokens, Out* out, const Out* residual,
                                          const float* token_scales) {
    using T = typename C::T;
    using W = typename C::W;
    const int i = threadIdx.x % 16, j = threadIdx.x / 16;
    float d[4][4] = {}, sums[4][4] = {};
    float factor = 1.0f;
    if constexpr (W::FACTOR) factor = W::factor(weight, tile.expert);
    float factors[4] = {factor, factor, factor, factor};
    if constexpr (W::BY_ROWS) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = i + r * 16, at = min(tile.row * C::OUT_ROWS + row % C::OUT_ROWS, C::OUTPUTS - 1);
            const i64 first = tile.expert * static_cast<i64>(C::SILU ? 2 * C::OUTPUTS : C::OUTPUTS);
            factors[r] = W::row_factor(weight, first + (row < C::OUT_ROWS ? at : C::OUTPUTS + at));
        }
    }
    if constexpr (!C::W::PACKED) weight += tile.expert * static_cast<i64>(C::SILU ? 2 * C::OUTPUTS : C::OUTPUTS) * C::K;
    for (int k0 = 0; k0 < C::K; k0 += C::DEPTH) {
        for (int at = threadIdx.x; at < C::ROWS * C::DEPTH; at += C::THREADS) {
            const int row = at / C::DEPTH, k = at % C::DEPTH;
            const typename C::W::Row source = simt_row<C>(weight, tile, row);
            shared.weights[k][row] = source && k0 + k < C::K ? C::W::at(source, k0 + k) : 0.0f;
        }
        for (int at = threadIdx.x; at < C::COLS * C::DEPTH; at += C::THREADS) {
            const int col = at / C::DEPTH, k = at % C::DEPTH, source = shared.sources[col];
            const bool valid = source >= 0 && k0 + k < C::K;
            shared.tokens[k][col] = valid ? to_float(tokens[static_cast<i64>(source) * C::K + k0 + k]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < C::DEPTH; k++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    d[r][c] = __fmaf_rn(shared.weights[k][i + r * 16], shared.tokens[k][j * 4 + c], d[r][c]);
                }
            }
        }
        __syncthreads();
        if constexpr (W::CHAIN > 0) {
            static_assert(W::CHAIN % C::DEPTH == 0, "whole steps");
            if ((k0 + C::DEPTH) % W::CHAIN != 0 && k0 + C::DEPTH < C::K) continue;
#pragma unroll
            for (int r = 0; r < 4; r++) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    sums[r][c] = __fadd_rn(sums[r][c], d[r][c]);
                    d[r][c] = 0.0f;
                }
            }
        }
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
        const int col = j * 4 + c;
        if (col >= tile.count || shared.map[col] < 0) continue;
        const i64 base = static_cast<i64>(shared.map[col]) * C::OUTPUTS;
        const float token_scale = W::BY_TOKENS ? token_scales[shared.sources[col]] : 1.0f;
        const auto sum = [&](int r, int c) {
            return W::CHAIN > 0 ? epilogue::scaled<W::BY_TOKENS>(sums[r][c], factors[r], token_scale) : d[r][c];
        };
#pragma unroll
        for (int r = 0; r < (C::SILU ? 2 : 4); r++) {
            const int row = tile.row * C::OUT_ROWS + i + r * 16;
            if (row >= C::OUTPUTS) continue;
            float value = sum(r, c);
            if constexpr (C::SILU) value = math::silu(rounded<T>(sum(r + 2, c))) * rounded<T>(value);
            if constexpr (C::KIND == epilogue::Residual) value = rounded<T>(value) + to_float(residual[base + row]);
            out[base + row] = from_float<Out>(value);
        }
    }
    __syncthreads();
}

// As `mma_dense`.
template <typename C, bool LOGITS, typename Out>
__global__ void __launch_bounds__(C::THREADS, C::PER_SM)
    simt_dense(typename C::Stored weight, const typename C::Token* tokens, const step::Header* header, Out* out,
               const Out* residual, const float* token_scales) {
    pdl::launch_dependents();
    __shared__ SimtShared<C> shared;
    pdl::wait();
    const sched::Dense<C::ROW_TILES, C::COLS> tiles{LOGITS ? header->num_logits : header->num_tokens};
    sched::Tile tile;
    for (int index = blockIdx.x; tiles.at(index, tile); index += gridDim.x) {
        if (threadIdx.x < C::COLS) {
            const int i = threadIdx.x;
            shared.map[i] = tile.first + i;
            shared.sources[i] = i < tile.count ? tile.first + i : -1;
        }
        __syncthreads();
        simt_tile<C>(shared, tile, weight, tokens, out, residual, token_scales);
    }
}

// As `mma_grouped`.
template <typename C, int EXPERTS, int TOP_K, bool DOWN>
__global__ void __launch_bounds__(C::THREADS, C::PER_SM)
    simt_grouped(typename C::Stored weight, const typename C::Token* tokens, const step::Header* header, const int* offsets,
                 const int* order, typename C::T* out, const float* token_scales) {
    __shared__ SimtShared<C> shared;
    pdl::wait();
    pdl::launch_dependents();  // after the wait, because expert_down relies on that (wgmma.cuh)
    sched::ByExpert<EXPERTS, C::ROW_TILES, C::COLS, false> tiles{offsets, header->num_tokens};
    sched::Tile tile;
    for (int index = blockIdx.x; tiles.at(index, tile); index += gridDim.x) {
        if (threadIdx.x < C::COLS) {
            const int i = threadIdx.x, position = tile.first + i, assignment = i < tile.count ? order[position] : -1;
            shared.map[i] = DOWN ? assignment : position;
            shared.sources[i] = i >= tile.count ? -1 : DOWN ? position : assignment / TOP_K;
        }
        __syncthreads();
        simt_tile<C>(shared, tile, weight, tokens, out, static_cast<const typename C::T*>(nullptr), token_scales);
    }
}

}  // namespace linear
