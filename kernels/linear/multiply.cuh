// The products of a tile of `dense` and `grouped` along K (linear/wgmma.cuh): of plain and fp8 weights from shared memory,
// of packed weights through registers, by warpgroups or by warps.
#pragma once

#include "epilogue/tile.cuh"
#include "linear/ring.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "ptx/wgmma.cuh"
#include "sched/tiles.cuh"

namespace linear {

// The products of one tile of a plain weight, with instructions of N columns.
template <typename C, int N>
__device__ __forceinline__ void multiply_plain(Ring<C>& ring, int warpgroup, float (&d)[C::BLOCKS][C::COLS / 2]) {
    const int first_row = __shfl_sync(~0u, warpgroup, 0) * C::BLOCKS * 64;
#pragma unroll
    for (int m = 0; m < C::BLOCKS; m++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) d[m][i] = 0.0f;
        wgmma::pin(d[m]);
    }
    int previous = 0;
    for (int k = 0; k < C::K_BLOCKS; k++) {
        mbarrier::wait(ring.full(), ring.phase);
        const u32 tile = wgmma::descriptor(ring.a());
        const u32 a = tile + (C::ROWS > 64 ? first_row * 8 : 0), b = tile + (C::A_BYTES >> 4);
        wgmma::fence();
#pragma unroll
        for (int i = 0; i < C::DEPTH / 16; i++) {
            const int atom = i / 4, within = i % 4 * 2;
#pragma unroll
            for (int m = 0; m < C::BLOCKS; m++) {
                wgmma::Product<typename C::T, N>::run(d[m], a + ((atom * C::A_ATOM + m * 8192) >> 4) + within,
                                                      b + ((atom * C::B_ATOM) >> 4) + within);
            }
        }
        wgmma::commit();
        if (k > 0) {
            wgmma::wait<1>();
            ring.release(previous);
        }
        previous = ring.stage;
        ring.advance();
    }
    wgmma::wait<0>();
#pragma unroll
    for (int m = 0; m < C::BLOCKS; m++) wgmma::pin(d[m]);
    ring.release(previous);
}

// The same for e4m3. The products of 128 elements and 64 rows are a chain that begins at zero. It is then added to the sums of
// the chains before it. Meanwhile the tensor cores compute another warpgroup's products, if there is one.
template <typename C, int N>
__device__ __forceinline__ void multiply_fp8(Ring<C>& ring, int warpgroup, float (&d)[C::BLOCKS][C::COLS / 2]) {
    const int first_row = __shfl_sync(~0u, warpgroup, 0) * C::BLOCKS * 64;
#pragma unroll
    for (int m = 0; m < C::BLOCKS; m++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) d[m][i] = 0.0f;
    }
    for (int k = 0; k < C::K_BLOCKS; k++) {
        mbarrier::wait(ring.full(), ring.phase);
        const u32 tile = wgmma::descriptor(ring.a());
        const u32 a = tile + (C::ROWS > 64 ? first_row * 8 : 0), b = tile + (C::A_BYTES >> 4);
#pragma unroll
        for (int atom = 0; atom < C::ATOMS; atom++) {
#pragma unroll
            for (int m = 0; m < C::BLOCKS; m++) {
                const u32 rows = a + ((atom * C::A_ATOM + m * 8192) >> 4), cols = b + ((atom * C::B_ATOM) >> 4);
                float chain[N / 2];
                wgmma::fence();
                wgmma::FirstProduct<e4m3_t, N>::run(chain, rows, cols);
#pragma unroll
                for (int i = 1; i < 4; i++) wgmma::Product<e4m3_t, N>::run(chain, rows + i * 2, cols + i * 2);
                wgmma::commit();
                wgmma::wait<0>();
                if (atom == C::ATOMS - 1 && m == C::BLOCKS - 1) ring.release(ring.stage);
                wgmma::pin(chain);
#pragma unroll
                for (int i = 0; i < N / 2; i++) d[m][i] = __fadd_rn(d[m][i], chain[i]);
            }
        }
        ring.advance();
    }
}

// What a thread needs of the whole rows that it multiplies: scales and zeros, and the factor of their matrix, if the format
// has them.
template <typename C>
struct Rows {
    using W = typename C::W;

    float scales[C::BLOCKS][2];
    typename W::Zero zeros[C::BLOCKS];
    float factor;

    __device__ __forceinline__ void load(typename C::Stored stored, const sched::Tile& tile, int warpgroup) {
        if constexpr (W::FACTOR) factor = W::factor(stored, tile.expert);
        const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
        if constexpr (W::BY_ROWS) {
            const i64 first = tile.expert * static_cast<i64>(C::SILU ? 2 * C::OUTPUTS : C::OUTPUTS);
#pragma unroll
            for (int m = 0; m < C::BLOCKS; m++) {
                const int block = (warpgroup * C::BLOCKS + m) * 4 + warp;
                const int2 own = epilogue::rows_of_pair<C::KIND, C::OUTPUTS>(tile.row * (C::SILU ? C::ROWS / 2 : C::ROWS) +
                                                                             block * (C::SILU ? 8 : 16) + lane / 4);
                scales[m][0] = W::row_factor(stored, first + own.x), scales[m][1] = W::row_factor(stored, first + own.y);
            }
        }
        if constexpr (W::ROW_VALUES > 0) {
#pragma unroll
            for (int m = 0; m < C::BLOCKS; m++) {
                // Rows that the weight does not have are not stored.
                const int slab = min(tile.row * C::SLABS + (warpgroup * C::BLOCKS + m) * 4 + warp, C::MATRIX_SLABS - 1);
                const float* values = W::row_values(stored, tile.expert * C::MATRIX_SLABS + slab);
                const float* own = values + lane / 4 * W::ROW_VALUES;
                scales[m][0] = own[0], scales[m][1] = own[8 * W::ROW_VALUES];
                zeros[m] = W::row_zero(own[W::ROW_VALUES - 1], own[9 * W::ROW_VALUES - 1]);
            }
        }
    }

    // Makes a linear's sums of a tile's products. `source(column)` is the column's row of the tokens, or −1.
    template <typename Source>
    __device__ __forceinline__ void finish(float (&d)[C::BLOCKS][C::COLS / 2], const float* token_scales, Source source) const {
        if constexpr (W::BY_ROWS) {
#pragma unroll
            for (int i = 0; i < C::COLS / 2; i += i % 2 == 0 ? 1 : 3) {
                float token_scale = 1.0f;
                if constexpr (W::BY_TOKENS) {
                    const int row = source(i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2);
                    token_scale = row < 0 ? 0.0f : token_scales[row];
                }
#pragma unroll
                for (int m = 0; m < C::BLOCKS; m++) {
                    d[m][i] = epilogue::scaled<W::BY_TOKENS>(d[m][i], scales[m][0], token_scale);
                    d[m][i + 2] = epilogue::scaled<W::BY_TOKENS>(d[m][i + 2], scales[m][1], token_scale);
                }
            }
        }
        if constexpr (W::PACKED) {
#pragma unroll
            for (int m = 0; m < C::BLOCKS; m++) {
#pragma unroll
                for (int i = 0; i < C::COLS / 2; i++) {
                    d[m][i] *= W::UNIT;
                    if constexpr (W::ROW_VALUES > 0) d[m][i] *= scales[m][i % 4 / 2];
                }
            }
        }
        if constexpr (W::FACTOR) {
#pragma unroll
            for (int m = 0; m < C::BLOCKS; m++) {
#pragma unroll
                for (int i = 0; i < C::COLS / 2; i++) d[m][i] *= factor;
            }
        }
    }
};

// The products of one tile of a packed weight, with instructions of N columns. A unit is STEPS products of one block of
// 64 rows. While a unit runs on the tensor cores, the next unit's integers become A operands in registers.
//
// If scales belong to groups, a group's products are a chain that begins at zero. The chain is scaled and added to the
// sums of the groups before it. Meanwhile the tensor cores compute another warpgroup's products.
template <typename C, int N>
__device__ __forceinline__ void multiply_packed(Ring<C>& ring, int warpgroup, const Rows<C>& rows,
                                                float (&d)[C::BLOCKS][C::COLS / 2]) {
    using W = typename C::W;
    using T = typename C::T;
    constexpr int STEPS = 2;
    constexpr int UNITS = C::DEPTH / 16 / STEPS;          // of a block of 64 rows in a stage
    constexpr int STAGE = C::BLOCKS * UNITS;              // units of a stage
    constexpr int CHAIN = W::SCALED ? 8 / W::CHAINS : 0;  // steps of a chain
    constexpr int SLAB = C::DEPTH / W::DEPTH * W::BLOCK;  // bytes of 16 rows of a stage
    static_assert(STAGE % 2 == 0 && CHAIN % STEPS == 0, "operands alternate between two places");
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    // Where the warp's first slab lies in a stage. A warp for which a tile has no slab computes the last one again.
    const int first = min(warpgroup * C::BLOCKS * 4 + warp, C::SLABS - 1) * SLAB;

    float chain[W::SCALED ? N / 2 : 1];
#pragma unroll
    for (int m = 0; m < C::BLOCKS; m++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) d[m][i] = 0.0f;
        if constexpr (!W::SCALED) wgmma::pin(d[m]);
    }
    u32 a[2][STEPS][4];
    typename W::Lane integers;
    // Where a unit's integers lie, of the stage at `tile`.
    const auto block = [&](u32 tile, int unit) {
        const int offset = first + unit / UNITS * 4 * SLAB + unit % UNITS * STEPS / 8 * W::BLOCK;
        return static_cast<const u8*>(__cvta_shared_to_generic(tile + offset));
    };
    const auto load = [&](u32 tile, int unit) { W::load(integers, block(tile, unit), lane); };
    const auto convert = [&](u32 tile, int unit) {
        typename W::Zero zero;
        if constexpr (W::SCALED) {
            zero = W::group_zero(block(tile, unit), unit % UNITS * STEPS % 8 / CHAIN, lane);
        } else {
            zero = rows.zeros[unit / UNITS];
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            W::fragment(a[unit % 2][i], integers, (unit % UNITS * STEPS + i) % 8, zero);
        }
    };

    mbarrier::wait(ring.full(), ring.phase);
    load(ring.a(), 0);
    convert(ring.a(), 0);
#pragma unroll 1
    for (int k = 0; k < C::K_BLOCKS; k++) {
        const int stage = ring.stage;
        const u32 tile = ring.a(), b = wgmma::descriptor(ring.b());
        u32 loaded = 0;  // (The integers are in products that have ended by then.)
#pragma unroll
        for (int unit = 0; unit < STAGE; unit++) {
            const int m = unit / UNITS, first_step = unit % UNITS * STEPS;
            wgmma::pin(a[unit % 2]);
            wgmma::fence();
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                const int step = first_step + i;
                const u32 at = b + ((step / 4 * C::B_ATOM) >> 4) + step % 4 * 2;
                if constexpr (!W::SCALED) {
                    wgmma::FragmentProduct<T, N>::run(d[m], a[unit % 2][i], at);
                } else if (step % CHAIN == 0) {
                    wgmma::FirstFragmentProduct<T, N>::run(chain, a[unit % 2][i], at);
                } else {
                    wgmma::FragmentProduct<T, N>::run(chain, a[unit % 2][i], at);
                }
            }
            wgmma::commit();
            const int next = (unit + 1) % STAGE;
            bool more = true;
            if (next == 0) {
                ring.advance();
                more = k + 1 < C::K_BLOCKS;
                if (more) mbarrier::wait(ring.full(), ring.phase);
            }
            const u32 next_tile = next == 0 ? ring.a() : tile;
            if (more) load(next_tile, next);
            // The next unit's operands take the place of the unit before this one.
            wgmma::wait<1>();
            wgmma::pin(a[next % 2]);
            if (more) convert(next_tile, next);
            if constexpr (W::SCALED) {
                if ((first_step + STEPS) % CHAIN == 0) {
                    const auto scales = W::scales(block(tile, unit), first_step % 8 / CHAIN, lane);
                    const float scale[2] = {to_float(scales.upper), to_float(scales.lower)};
                    loaded = __float_as_uint(scale[1]);
                    wgmma::wait<0>();
                    wgmma::pin(chain);
#pragma unroll
                    for (int i = 0; i < N / 2; i++) d[m][i] = __fmaf_rn(chain[i], scale[i % 4 / 2], d[m][i]);
                }
            }
        }
        wgmma::wait<0>();
        ring.release(stage, loaded);
    }
    if constexpr (!W::SCALED) {
#pragma unroll
        for (int m = 0; m < C::BLOCKS; m++) wgmma::pin(d[m]);
    }
}

// The same by products of a single warp (mma.sync), of up to 16 columns. A warpgroup's product takes about 30 cycles beside those of its
// columns, a warp's takes none; of more columns a warpgroup's products are faster. A warp has the slabs that it has there. The
// bits are the same.
//
// A pair is two steps of 16 elements. While one pair's products run, the next pair's tokens are loaded. A piece of the next stage's
// integers is loaded as soon as this stage's is converted, so the warp asks early whether the next stage is there, and seldom waits.
template <typename C, int N>
__device__ __forceinline__ void multiply_by_warps(Ring<C>& ring, int warpgroup, const Rows<C>& rows,
                                                  float (&d)[C::BLOCKS][C::COLS / 2]) {
    using W = typename C::W;
    using T = typename C::T;
    static_assert(C::DEPTH == W::DEPTH, "a stage is a block of each slab");
    constexpr int PAIRS = C::DEPTH / 32, WIDTH = N / 8;
    constexpr int CHAIN = PAIRS / W::CHAINS;  // pairs of a chain
    constexpr int PIECE = PAIRS / W::PIECES;  // pairs of a piece
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const int first = min(warpgroup * C::BLOCKS * 4 + warp, C::SLABS - 1) * W::BLOCK;
    // Where a lane's row of eight elements lies in a matrix of eight tokens. The swizzle depends on the row.
    const u32 even = lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16, odd = even ^ 64;

    typename W::Lane integers[C::BLOCKS];
    u32 tokens[2][WIDTH][4];
    // The m-th slab of the stage at `tile`.
    const auto slab = [&](u32 tile, int m) { return tile + first + m * 4 * W::BLOCK; };
    const auto load_piece = [&](u32 tile, int piece) {
#pragma unroll
        for (int m = 0; m < C::BLOCKS; m++) W::load_piece(integers[m], piece, slab(tile, m), lane);
    };
    const auto load_tokens = [&](u32 tile, int pair) {
        const u32 at = tile + C::A_BYTES + pair / 2 * C::B_ATOM + (pair % 2 == 0 ? even : odd);
#pragma unroll
        for (int c = 0; c < WIDTH; c++) ptx::ldmatrix_x4(tokens[pair % 2][c], at + c * 1024);
    };

    float sums[C::BLOCKS][WIDTH][4] = {}, chain[C::BLOCKS][WIDTH][4];
    mbarrier::wait(ring.full(), ring.phase);
#pragma unroll
    for (int piece = 0; piece < W::PIECES; piece++) load_piece(ring.a(), piece);
    load_tokens(ring.a(), 0);
#pragma unroll 1
    for (int k = 0; k < C::K_BLOCKS; k++) {
        const int stage = ring.stage;
        const u32 tile = ring.a();
        ring.advance();
        const bool more = k + 1 < C::K_BLOCKS, is_there = mbarrier::is_over(ring.full(), ring.phase);
        typename W::Zero zeros[C::BLOCKS][W::CHAINS];
        typename W::Scales scales[C::BLOCKS][W::CHAINS];
        u32 loaded = 0;  // words of what is loaded last
#pragma unroll
        for (int m = 0; m < C::BLOCKS; m++) {
            const u8* block = static_cast<const u8*>(__cvta_shared_to_generic(slab(tile, m)));
#pragma unroll
            for (int i = 0; i < W::CHAINS; i++) {
                if constexpr (W::SCALED) {
                    zeros[m][i] = W::group_zero(block, i, lane);
                    scales[m][i] = W::scales(block, i, lane);
                    loaded |= scales[m][i].word();
                } else {
                    zeros[m][i] = rows.zeros[m];
                }
            }
            loaded |= integers[m].pieces[W::PIECES - 1].w;
        }
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
            if (pair < PAIRS - 1) load_tokens(tile, pair + 1);
            u32 a[C::BLOCKS][2][4];
#pragma unroll
            for (int m = 0; m < C::BLOCKS; m++) {
#pragma unroll
                for (int step = 0; step < 2; step++) {
                    W::fragment(a[m][step], integers[m], pair * 2 + step, zeros[m][pair / CHAIN]);
                }
                if (W::SCALED && pair % CHAIN == 0) {
#pragma unroll
                    for (int i = 0; i < WIDTH * 4; i++) chain[m][i / 4][i % 4] = 0.0f;
                }
            }
            if (pair == PIECE - 1 && more) {
                if (!is_there) mbarrier::wait(ring.full(), ring.phase);
                load_piece(ring.a(), 0);
            }
            // Behind a tile's last stage, these loads bring what nobody uses.
            if (pair % PIECE == PIECE - 1 && pair >= PIECE) load_piece(ring.a(), pair / PIECE);
            if (pair == PAIRS - 1) {
                // All of the stage is in registers, when the last words are there.
                __syncwarp();
                ring.release(stage, loaded | tokens[pair % 2][0][3] | tokens[pair % 2][WIDTH - 1][3]);
                load_tokens(ring.a(), 0);
            }
#pragma unroll
            for (int step = 0; step < 2; step++) {
#pragma unroll
                for (int c = 0; c < WIDTH; c++) {
                    const u32(&pair_of)[4] = tokens[pair % 2][c];
                    const u32 b[2] = {pair_of[step * 2], pair_of[step * 2 + 1]};
#pragma unroll
                    for (int m = 0; m < C::BLOCKS; m++) ptx::mma<T>(W::SCALED ? chain[m][c] : sums[m][c], a[m][step], b);
                }
            }
            if constexpr (W::SCALED) {
                if (pair % CHAIN == CHAIN - 1) {
#pragma unroll
                    for (int i = 0; i < C::BLOCKS * WIDTH; i++) {
                        const int m = i / WIDTH, c = i % WIDTH;
                        W::add(sums[m][c], chain[m][c], scales[m][pair / CHAIN]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < C::BLOCKS; m++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) d[m][i] = sums[m][i / 4][i % 4];
    }
}

// One tile's products, with instructions of N columns.
template <typename C, int N>
__device__ __forceinline__ void multiply(Ring<C>& ring, int warpgroup, const Rows<C>& rows,
                                         float (&d)[C::BLOCKS][C::COLS / 2]) {
    if constexpr (C::W::PACKED && N <= 16) {
        multiply_by_warps<C, N>(ring, warpgroup, rows, d);
    } else if constexpr (C::W::PACKED) {
        multiply_packed<C, N>(ring, warpgroup, rows, d);
    } else if constexpr (C::W::SCALED) {
        multiply_fp8<C, N>(ring, warpgroup, d);
    } else {
        multiply_plain<C, N>(ring, warpgroup, d);
    }
}

// One tile's products, with the fewest boxes that hold `count` columns.
template <typename C>
__device__ __forceinline__ void multiply(Ring<C>& ring, int warpgroup, const Rows<C>& rows, int count,
                                         float (&d)[C::BLOCKS][C::COLS / 2]) {
    if constexpr (C::BOXES == 1) {
        multiply<C, C::COLS>(ring, warpgroup, rows, d);
    } else {
        switch ((count + C::BOX - 1) / C::BOX) {
            case 1: multiply<C, C::BOX>(ring, warpgroup, rows, d); break;
            case 2: multiply<C, 2 * C::BOX>(ring, warpgroup, rows, d); break;
            case 3:
                if constexpr (C::BOXES > 3) {
                    multiply<C, 3 * C::BOX>(ring, warpgroup, rows, d);
                    break;
                }
                [[fallthrough]];
            default: multiply<C, C::COLS>(ring, warpgroup, rows, d);
        }
    }
}

}  // namespace linear
