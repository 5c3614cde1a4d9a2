// Op: linear, expert_gate_up, expert_down · CPU twin: mixtral-cpu/src/kernels/{linear,experts}.rs
// Regime: any token count · Tile: ROWS output features × COLS tokens, 64 elements of K a stage (128 of quantized and fp8 weights)
// Grid: persistent · Numerics: f32 accumulation on tensor cores in ascending K, one rounding; bits do not depend on the
// tile or on other tokens · Requires: sm_80, 16-bit types or tokens rounded to e4m3, any shape
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
#include "weight/fp8.cuh"
#include "weight/plain.cuh"
#include "weight/quantized.cuh"

namespace linear {

template <typename Weight, int ROWS_, int COLS_, int OUTPUTS_, int K_, int KIND_, int SHARED_>
struct MmaConfig {
    using W = Weight;  // a format: weight/
    using Stored = typename W::Stored;
    using T = typename W::T;
    using Token = typename W::template Token<T>;
    using Tokens = weight::Plain<Token>;
    static constexpr int ROWS = ROWS_;
    static constexpr int COLS = COLS_;
    static constexpr int OUTPUTS = OUTPUTS_;
    static constexpr int K = K_;
    static constexpr int KIND = KIND_;

    static constexpr bool SILU = KIND == epilogue::SiluMul;
    static constexpr int WARPS = 4;
    static constexpr int THREADS = WARPS * 32;
    static constexpr int STAGES = 3;
    static constexpr int DEPTH = W::DEPTH;
    static constexpr int BLOCKS = ROWS / (16 * WARPS);  // of 16 rows, of a warp
    static constexpr int OUT_ROWS = SILU ? ROWS / 2 : ROWS;
    static constexpr int ROW_TILES = (OUTPUTS + OUT_ROWS - 1) / OUT_ROWS;
    static constexpr int K_BLOCKS = (K + DEPTH - 1) / DEPTH;
    static constexpr int A_BYTES = W::tile_bytes(ROWS);
    static constexpr int B_ATOM = COLS * 128;  // Tokens::ATOM elements of each token
    static constexpr int STAGE = A_BYTES + DEPTH / Tokens::ATOM * B_ATOM;
    static constexpr int SHARED = STAGES * STAGE + 2 * COLS * 4;
    static_assert(SHARED == SHARED_, "what the launch asks for");
    // CTAs of a multiprocessor, as many as are launched. Without this number, ptxas may spill to make room for more.
    static constexpr int FITTING = (100 << 10) / (SHARED + 1024), PER_SM = FITTING < 1 ? 1 : FITTING > 8 ? 8 : FITTING;
    static_assert(ROWS % 64 == 0 && COLS % 8 == 0, "");
};

// Where row `row` of a tile lies; null if there is none. Of packed weights, where the slab lies that begins with it.
// With silu·mul, a tile has eight up rows, then their eight gate rows, and so on. So a thread has both the up and the
// gate accumulators of its outputs.
template <typename C>
__device__ __forceinline__ typename C::Stored find_row(typename C::Stored weight, const sched::Tile& tile, int row) {
    if constexpr (C::W::PACKED) {
        constexpr int SLABS = C::W::slabs(C::OUTPUTS, C::SILU);
        const int slab = tile.row * (C::ROWS / 16) + row / 16;
        return slab < SLABS ? weight + (static_cast<i64>(tile.expert) * SLABS + slab) * C::W::slab_bytes(C::K) : nullptr;
    } else {
        const i64 at = tile.row * C::OUT_ROWS + (C::SILU ? row / 16 * 8 + row % 8 : row);
        if (at >= C::OUTPUTS) return nullptr;
        constexpr i64 EXPERT_ROWS = C::SILU ? 2 * C::OUTPUTS : C::OUTPUTS;
        return weight + (tile.expert * EXPERT_ROWS + at + (C::SILU && row % 16 >= 8 ? C::OUTPUTS : 0)) * C::K;
    }
}

// Of a warp's blocks of 16 rows, which begin with the tile's block `first`: the scales and zeros of the lane's two rows of each,
// if a row has them.
template <typename C>
__device__ __forceinline__ void load_row_values(float (&scales)[C::BLOCKS][2], typename C::W::Zero (&zeros)[C::BLOCKS],
                                                typename C::Stored weight, const sched::Tile& tile, int first) {
    using W = typename C::W;
    if constexpr (W::ROW_VALUES > 0) {
        constexpr int SLABS = W::slabs(C::OUTPUTS, C::SILU);
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < C::BLOCKS; m++) {
            const int slab = min(tile.row * (C::ROWS / 16) + first + m, SLABS - 1);
            const float* of_row = W::row_values(weight, static_cast<i64>(tile.expert) * SLABS + slab) + lane / 4 * W::ROW_VALUES;
            scales[m][0] = of_row[0], scales[m][1] = of_row[8 * W::ROW_VALUES];
            zeros[m] = W::row_zero(of_row[W::ROW_VALUES - 1], of_row[9 * W::ROW_VALUES - 1]);
        }
    }
}

// Scales the sums of a warp's blocks and stores them. Of a column of the tile, `map_of` is the row of its results, or negative, and
// `scale_of` its token's scale. All lanes of the warp call both.
template <typename C, typename Out, typename MapOf, typename ScaleOf>
__device__ __forceinline__ void finish(float (&d)[C::BLOCKS][C::COLS / 8][4], const float (&scales)[C::BLOCKS][2],
                                       const sched::Tile& tile, int first, typename C::Stored weight, Out* out, const Out* residual,
                                       MapOf map_of, ScaleOf scale_of) {
    using T = typename C::T;
    using W = typename C::W;
    const int lane = threadIdx.x % 32;
    float factor = 1.0f;
    if constexpr (W::FACTOR) factor = W::factor(weight, tile.expert);
#pragma unroll
    for (int m = 0; m < C::BLOCKS; m++) {
        if constexpr (W::UNIT != 1.0f) {
#pragma unroll
            for (int c = 0; c < C::COLS / 8; c++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    d[m][c][i] *= W::UNIT;
                    if constexpr (W::ROW_VALUES > 0) d[m][c][i] *= scales[m][i / 2];
                    if constexpr (W::FACTOR) d[m][c][i] *= factor;
                }
            }
        }
        const int row = tile.row * C::OUT_ROWS + (first + m) * (C::SILU ? 8 : 16) + lane / 4;
        float factors[2] = {1.0f, 1.0f};
        if constexpr (W::BY_ROWS) {
            const int2 rows = epilogue::rows_of_pair<C::KIND, C::OUTPUTS>(row);
            const i64 of_expert = tile.expert * static_cast<i64>(C::SILU ? 2 * C::OUTPUTS : C::OUTPUTS);
            factors[0] = W::row_factor(weight, of_expert + rows.x), factors[1] = W::row_factor(weight, of_expert + rows.y);
        }
#pragma unroll
        for (int c = 0; c < C::COLS / 8; c++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int col = c * 8 + lane % 4 * 2 + half, to = map_of(col);
                float upper = d[m][c][half], lower = d[m][c][half + 2];
                if constexpr (W::BY_ROWS) {
                    const float token_scale = scale_of(col);
                    upper = epilogue::scaled<W::BY_TOKENS>(upper, factors[0], token_scale);
                    lower = epilogue::scaled<W::BY_TOKENS>(lower, factors[1], token_scale);
                }
                if (to < 0) continue;
                const i64 at = static_cast<i64>(to) * C::OUTPUTS;
                const float2 added = epilogue::load_pair<C::KIND, C::OUTPUTS>(residual + at, row);
                epilogue::store_pair<T, C::KIND, C::OUTPUTS>(upper, lower, row, out + at, added);
            }
        }
    }
}

// Computes the products of a tile, and its epilogue.
template <typename C, typename Out>
__device__ __forceinline__ void mma_tile(u8* shared, const sched::Tile& tile, const int* sources, const int* map,
                                         typename C::Stored weight, const typename C::Token* tokens, Out* out,
                                         const Out* residual, const float* token_scales) {
    using T = typename C::T;
    using Operand = typename C::W::Operand;
    using W = typename C::W;
    using Tokens = typename C::Tokens;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float d[C::BLOCKS][C::COLS / 8][4] = {};
    const auto copy = [&](int k_block) {
        if (k_block < C::K_BLOCKS) {
            u8* stage = shared + k_block % C::STAGES * C::STAGE;
            constexpr int B_PIECES = C::DEPTH / Tokens::PIECE;
            for (int i = threadIdx.x; i < C::A_BYTES / 16; i += C::THREADS) {
                W::template copy_rows<C::K>(
                    stage, i, [&](int row) { return find_row<C>(weight, tile, row); }, k_block * C::DEPTH);
            }
            for (int i = threadIdx.x; i < C::COLS * B_PIECES; i += C::THREADS) {
                const int source = sources[i / B_PIECES], atom = i % B_PIECES / 8;
                const typename C::Token* from = source < 0 ? nullptr : tokens + static_cast<i64>(source) * C::K;
                Tokens::template copy<C::K>(stage + C::A_BYTES + atom * C::B_ATOM, i / B_PIECES, i % 8, from,
                                            k_block * C::DEPTH + atom * Tokens::ATOM);
            }
        }
        ptx::cp_async_commit();
    };
    float scales[C::BLOCKS][2];
    typename W::Zero zeros[C::BLOCKS];
    load_row_values<C>(scales, zeros, weight, tile, warp * C::BLOCKS);
    for (int s = 0; s < C::STAGES - 1; s++) copy(s);
    for (int k = 0; k < C::K_BLOCKS; k++) {
        ptx::cp_async_wait_group<C::STAGES - 2>();
        __syncthreads();
        copy(k + C::STAGES - 1);
        const u8* stage = shared + k % C::STAGES * C::STAGE;
        const u32 b_tile = ptx::shared_address(stage) + C::A_BYTES;
        typename W::Lane lanes[C::BLOCKS];
#pragma unroll
        for (int m = 0; m < C::BLOCKS; m++) W::load(lanes[m], stage, (warp * C::BLOCKS + m) * 16, lane);
#pragma unroll
        for (int chain = 0; chain < W::CHAINS; chain++) {
            float chains[W::SCALED ? C::BLOCKS : 1][W::SCALED ? C::COLS / 8 : 1][4] = {};
#pragma unroll
            for (int m = 0; m < C::BLOCKS; m++) {
                if constexpr (W::SCALED) {
                    zeros[m] = W::group_zero(stage + (warp * C::BLOCKS + m) * W::BLOCK, chain, lane);
                }
            }
            constexpr int STEPS = C::DEPTH / 16 / W::CHAINS;
#pragma unroll
            for (int i = chain * STEPS; i < (chain + 1) * STEPS; i++) {
                u32 a[C::BLOCKS][4];
#pragma unroll
                for (int m = 0; m < C::BLOCKS; m++) W::fragment(a[m], lanes[m], i, zeros[m]);
#pragma unroll
                for (int c = 0; c < C::COLS / 8; c++) {
                    u32 b[2];
                    constexpr int EACH = Tokens::ATOM / 16;
                    Tokens::columns(b, b_tile + i / EACH * C::B_ATOM, c * 8, i % EACH, lane);
#pragma unroll
                    for (int m = 0; m < C::BLOCKS; m++) {
                        if constexpr (W::SCALED) {
                            ptx::mma<Operand>(chains[m][c], a[m], b);
                        } else {
                            ptx::mma<Operand>(d[m][c], a[m], b);
                        }
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < C::BLOCKS; m++) {
                if constexpr (W::SCALED) {
                    const typename W::Scales scale = W::scales(stage + (warp * C::BLOCKS + m) * W::BLOCK, chain, lane);
#pragma unroll
                    for (int c = 0; c < C::COLS / 8; c++) W::add(d[m][c], chains[m][c], scale);
                }
            }
        }
    }
    ptx::cp_async_wait_group<0>();
    finish<C>(d, scales, tile, warp * C::BLOCKS, weight, out, residual, [&](int col) { return col < tile.count ? map[col] : -1; },
              [&](int col) { return W::BY_TOKENS && col < tile.count ? token_scales[sources[col]] : 1.0f; });
    __syncthreads();
}

// Dense linear of weight [OUTPUTS][K] with tokens [·][K]. `token_scales` is used by formats that have such.
template <typename C, bool LOGITS, typename Out>
__global__ void __launch_bounds__(C::THREADS, C::PER_SM)
    mma_dense(typename C::Stored weight, const typename C::Token* tokens, const step::Header* header, Out* out,
              const Out* residual, const float* token_scales) {
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
        mma_tile<C>(dynamic_shared, tile, sources, map, weight, tokens, out, residual, token_scales);
    }
}

// Linear of each token by its experts. For gate and up, the weight is [EXPERTS][2 · OUTPUTS][K] with silu·mul, else
// [EXPERTS][OUTPUTS][K]; tokens are [T][K], and results are in expert order. With DOWN, tokens are in expert order,
// [T·k][K], and results are by assignment.
template <typename C, int EXPERTS, int TOP_K, bool DOWN>
__global__ void __launch_bounds__(C::THREADS, C::PER_SM)
    mma_grouped(typename C::Stored weight, const typename C::Token* tokens, const step::Header* header, const int* offsets,
                const int* order, typename C::T* out, const float* token_scales) {
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
        mma_tile<C>(dynamic_shared, tile, sources, map, weight, tokens, out,
                    static_cast<const typename C::T*>(nullptr), token_scales);
    }
}

}  // namespace linear
