// Op: linear, expert_gate_up, expert_down · CPU twin: mixtral-cpu/src/kernels/{linear,experts}.rs
// Regime: up to eight tokens, or tokens of an expert
// Tile: a strip of 16 output features × up to TOKENS tokens, for one warp
// Grid: one CTA for each multiprocessor; its warps take strips in turn, and never wait for each other
// Numerics: as mma.cuh, with the same bits: a strip is one warp's, from the first element of K to the last
// Requires: sm_80, 16-bit types or tokens rounded to e4m3, rows of whole 16-byte pieces
// Traffic: weights once; tokens once for each strip (from L2)
// Measured: docs/perf/cuda.md
//
// mma.cuh hides the memory's latency by many CTAs, each with a tile of 64 rows. A matrix with few rows has too few of these. Here
// a warp copies its strip through a ring of its own, and goes on to the next strip's beginning before it has multiplied this one's
// end. So as many bytes as the rings hold are always under way, with two warps a multiprocessor or with sixteen.
#pragma once

#include "base/vector.cuh"
#include "linear/mma.cuh"

namespace linear {

template <typename Weight, int WARPS_, int TOKENS_, int STAGES_, int OUTPUTS_, int K_, int KIND_, int SHARED_>
struct StripConfig {
    using W = Weight;
    using Stored = typename W::Stored;
    using T = typename W::T;
    using Token = typename W::template Token<T>;
    using Tokens = weight::Plain<Token>;
    static constexpr int WARPS = WARPS_, THREADS = WARPS * 32;
    static constexpr int TOKENS = TOKENS_;  // the most of a tile
    static constexpr int STAGES = STAGES_;
    static constexpr int OUTPUTS = OUTPUTS_, K = K_, KIND = KIND_;

    static constexpr bool SILU = KIND == epilogue::SiluMul;
    static constexpr int ROWS = 16, COLS = 8, BLOCKS = 1;
    static constexpr int OUT_ROWS = SILU ? ROWS / 2 : ROWS;
    static constexpr int ROW_TILES = (OUTPUTS + OUT_ROWS - 1) / OUT_ROWS;
    // Sums that begin at zero are computed two at a time, since a product waits for the one before it in its sum. So where a block
    // of W::DEPTH elements is one such sum, a stage has two blocks.
    static constexpr int PAIR = W::PACKED && W::SCALED && W::CHAINS == 1 ? 2 : 1;
    static constexpr int UNITS = PAIR * W::CHAINS, SIDE = UNITS > 1 ? 2 : 1, UNIT_STEPS = W::DEPTH / 16 / W::CHAINS;
    static constexpr int DEPTH = PAIR * W::DEPTH, STEPS = (K + DEPTH - 1) / DEPTH;
    static constexpr int A_BLOCK = W::tile_bytes(ROWS), A_BYTES = PAIR * A_BLOCK;
    static constexpr int B_ATOM = TOKENS * 128, B_BYTES = DEPTH / Tokens::ATOM * B_ATOM;
    static constexpr int STAGE = A_BYTES + B_BYTES;
    static constexpr int SHARED = WARPS * STAGES * STAGE;
    static_assert(SHARED == SHARED_, "what the launch asks for");
    static_assert(K % Tokens::PIECE == 0 && A_BYTES % 16 == 0 && UNITS % SIDE == 0, "whole pieces");
};

// What a warp copies: the stages of its strips, one after another. It is STAGES - 1 stages ahead of what is multiplied.
template <typename C, typename Tiles, typename SourceOf>
struct StripCopies {
    using W = typename C::W;
    using Tokens = typename C::Tokens;
    // Pieces of 16 bytes, of weights and of tokens. A lane takes every 32nd.
    static constexpr int A_PIECES = C::A_BYTES / 16, A_EACH = ceil_div(A_PIECES, 32);
    static constexpr int ROW_PIECES = C::DEPTH / Tokens::PIECE, B_PIECES = C::TOKENS * ROW_PIECES, B_EACH = ceil_div(B_PIECES, 32);
    static constexpr int POINTERS = W::PACKED ? 1 : A_EACH;

    Tiles tiles;
    const SourceOf& source_of;
    typename C::Stored weight;
    const typename C::Token* tokens;
    const u32 ring;
    const int lane;
    int index, stage = 0, step = 0;
    bool more;
    const u8* from[POINTERS];
    int rows[B_EACH];  // of tokens; negative for none

    __device__ __forceinline__ StripCopies(const Tiles& tiles, const SourceOf& source_of, typename C::Stored weight,
                                           const typename C::Token* tokens, u32 ring, int index)
        : tiles(tiles), source_of(source_of), weight(weight), tokens(tokens), ring(ring), lane(threadIdx.x % 32), index(index) {
        begin();
    }

    // Goes to the beginning of strip `index`.
    __device__ __forceinline__ void begin() {
        sched::Tile tile;
        more = tiles.at(index, tile);
        if (!more) return;
        if constexpr (W::PACKED) {
            constexpr i64 SLABS = W::slabs(C::OUTPUTS, C::SILU);
            from[0] = weight + (tile.expert * SLABS + tile.row) * W::slab_bytes(C::K) + lane * 16;
        } else {
#pragma unroll
            for (int i = 0; i < A_EACH; ++i) {
                // (Rows behind the last one repeat it. Their sums are not stored.)
                const int row = (lane + i * 32) / 8;
                const i64 at = min(tile.row * C::OUT_ROWS + (C::SILU ? row % 8 : row), C::OUTPUTS - 1);
                constexpr i64 EXPERT_ROWS = C::SILU ? 2 * C::OUTPUTS : C::OUTPUTS;
                const i64 in_all = tile.expert * EXPERT_ROWS + at + (C::SILU && row >= 8 ? C::OUTPUTS : 0);
                from[i] = reinterpret_cast<const u8*>(weight + in_all * C::K) + lane % 8 * 16;
            }
        }
#pragma unroll
        for (int i = 0; i < B_EACH; ++i) {
            const int token = (lane + i * 32) / ROW_PIECES;
            rows[i] = token < tile.count ? source_of(tile.first + token) : -1;
        }
    }

    // Starts the copies of the next stage, if there is one, and makes them a group.
    __device__ __forceinline__ void next() {
        if (more) {
            const u32 to = ring + stage * C::STAGE;
#pragma unroll
            for (int i = 0; i < A_EACH; ++i) {
                const int piece = lane + i * 32;
                if (A_PIECES % 32 != 0 && piece >= A_PIECES) continue;
                if constexpr (W::PACKED) {
                    constexpr int TOTAL = static_cast<int>(W::slab_bytes(C::K));
                    const bool valid = TOTAL % C::A_BYTES == 0 || step * C::A_BYTES + piece * 16 < TOTAL;
                    const u8* source = from[0] + i * 512;
                    ptx::cp_async_16(to + piece * 16, valid ? source : weight, valid);
                } else {
                    const bool valid = C::K % C::DEPTH == 0 || step * C::DEPTH + lane % 8 * W::PIECE < C::K;
                    ptx::cp_async_16(to + W::offset(piece / 8, lane % 8), valid ? static_cast<const void*>(from[i]) : weight, valid);
                }
            }
#pragma unroll
            for (int i = 0; i < POINTERS; ++i) from[i] += W::PACKED ? C::A_BYTES : 128;
#pragma unroll
            for (int i = 0; i < B_EACH; ++i) {
                if (rows[i] < 0) continue;
                const int piece = lane + i * 32, token = piece / ROW_PIECES, column = piece % ROW_PIECES;
                const int k = step * C::DEPTH + column * Tokens::PIECE;
                const bool valid = C::K % C::DEPTH == 0 || k < C::K;
                const u32 at = to + C::A_BYTES + column / 8 * C::B_ATOM + Tokens::offset(token, column % 8);
                ptx::cp_async_16(at, tokens + (valid ? static_cast<i64>(rows[i]) * C::K + k : 0), valid);
            }
            if (++stage == C::STAGES) stage = 0;
            if (++step == C::STEPS) {
                step = 0;
                index += gridDim.x * C::WARPS;
                begin();
            }
        }
        ptx::cp_async_commit();
    }
};

// Computes a warp's strips. Of a position, `source_of` is the row of its token, and `map_of` that of its results.
template <typename C, typename Tiles, typename SourceOf, typename MapOf, typename Out>
__device__ __forceinline__ void strips(u8* shared, Tiles tiles, const SourceOf& source_of, const MapOf& map_of,
                                       typename C::Stored weight, const typename C::Token* tokens, Out* out, const Out* residual,
                                       const float* token_scales) {
    using W = typename C::W;
    using Operand = typename W::Operand;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u8* ring = shared + warp * (C::STAGES * C::STAGE);
    // Neighbours among strips go to different multiprocessors.
    int index = warp * gridDim.x + blockIdx.x;
    StripCopies<C, Tiles, SourceOf> copies(tiles, source_of, weight, tokens, ptx::shared_address(ring), index);
    for (int i = 0; i < C::STAGES - 1; ++i) copies.next();
    // Columns behind the last token repeat it.
    const int token_lane = lane / 8 * 8 + min(lane % 8, C::TOKENS - 1);
    int stage = 0;
    sched::Tile tile;
    for (; tiles.at(index, tile); index += gridDim.x * C::WARPS) {
        int map = -1;
        float token_scale = 1.0f;
        if (lane < tile.count) {
            map = map_of(tile.first + lane);
            if constexpr (W::BY_TOKENS) token_scale = token_scales[source_of(tile.first + lane)];
        }
        float scales[1][2];
        typename W::Zero row_zeros[1];
        load_row_values<C>(scales, row_zeros, weight, tile, 0);
        float d[1][1][4] = {};
        for (int step = 0; step < C::STEPS; ++step) {
            ptx::cp_async_wait_group<C::STAGES - 2>();
            __syncwarp();
            copies.next();
            const u8* a_tile = ring + stage * C::STAGE;
            const u32 b_tile = ptx::shared_address(a_tile) + C::A_BYTES;
            if (++stage == C::STAGES) stage = 0;
            typename W::Lane lanes[C::PAIR];
#pragma unroll
            for (int p = 0; p < C::PAIR; ++p) W::load(lanes[p], a_tile + p * C::A_BLOCK, 0, lane);
#pragma unroll
            for (int unit = 0; unit < C::UNITS; unit += C::SIDE) {
                float sums[C::SIDE][4] = {};
                typename W::Zero zeros[C::SIDE];
#pragma unroll
                for (int n = 0; n < C::SIDE; ++n) {
                    zeros[n] = row_zeros[0];
                    if constexpr (W::SCALED) {
                        zeros[n] = W::group_zero(a_tile + (unit + n) / W::CHAINS * C::A_BLOCK, (unit + n) % W::CHAINS, lane);
                    }
                }
#pragma unroll
                for (int i = 0; i < C::UNIT_STEPS; ++i) {
#pragma unroll
                    for (int n = 0; n < C::SIDE; ++n) {
                        const int at = (unit + n) * C::UNIT_STEPS + i;
                        constexpr int EACH = C::Tokens::ATOM / 16, OF_BLOCK = W::DEPTH / 16;
                        u32 a[4], b[2];
                        W::fragment(a, lanes[at / OF_BLOCK], at % OF_BLOCK, zeros[n]);
                        C::Tokens::columns(b, b_tile + at / EACH * C::B_ATOM, 0, at % EACH, token_lane);
                        if constexpr (W::SCALED) {
                            ptx::mma<Operand>(sums[n], a, b);
                        } else {
                            ptx::mma<Operand>(d[0][0], a, b);
                        }
                    }
                }
                if constexpr (W::SCALED) {
#pragma unroll
                    for (int n = 0; n < C::SIDE; ++n) {
                        const u8* block = a_tile + (unit + n) / W::CHAINS * C::A_BLOCK;
                        W::add(d[0][0], sums[n], W::scales(block, (unit + n) % W::CHAINS, lane));
                    }
                }
            }
        }
        finish<C>(d, scales, tile, 0, weight, out, residual, [&](int col) { return __shfl_sync(~0u, map, col); },
                  [&](int col) { return __shfl_sync(~0u, token_scale, col); });
    }
    ptx::cp_async_wait_group<0>();
}

// As mma_dense.
template <typename C, bool LOGITS, typename Out>
__global__ void __launch_bounds__(C::THREADS, 1)
    strip_dense(typename C::Stored weight, const typename C::Token* tokens, const step::Header* header, Out* out,
                const Out* residual, const float* token_scales) {
    pdl::launch_dependents();
    extern __shared__ __align__(128) u8 dynamic_shared[];
    pdl::wait();
    const sched::Dense<C::ROW_TILES, C::TOKENS> tiles{LOGITS ? header->num_logits : header->num_tokens};
    const auto same = [](int position) { return position; };
    strips<C>(dynamic_shared, tiles, same, same, weight, tokens, out, residual, token_scales);
}

// As mma_grouped.
template <typename C, int EXPERTS, int TOP_K, bool DOWN>
__global__ void __launch_bounds__(C::THREADS, 1)
    strip_grouped(typename C::Stored weight, const typename C::Token* tokens, const step::Header* header, const int* offsets,
                  const int* order, typename C::T* out, const float* token_scales) {
    extern __shared__ __align__(128) u8 dynamic_shared[];
    pdl::wait();
    pdl::launch_dependents();  // after the wait, because expert_down relies on that (wgmma.cuh)
    const sched::ByExpert<EXPERTS, C::ROW_TILES, C::TOKENS, false> tiles{offsets, header->num_tokens};
    const auto source_of = [&](int position) { return DOWN ? position : order[position] / TOP_K; };
    const auto map_of = [&](int position) { return DOWN ? order[position] : position; };
    strips<C>(dynamic_shared, tiles, source_of, map_of, weight, tokens, out, static_cast<const typename C::T*>(nullptr), token_scales);
}

}  // namespace linear
