// The products of a tile of `dense` and `grouped` along K (linear/wgmma.cuh): of plain and fp8 weights from shared memory,
// of packed weights through registers.
#pragma once

#include "epilogue/tile.cuh"
#include "linear/ring.cuh"
#include "ptx/mbarrier.cuh"
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

// Stages of a turn of `multiply_in_pairs`: two if a stage has a single unit.
template <typename C>
__device__ constexpr int turn_stages() {
    return C::BLOCKS * C::W::CHAINS == 1 ? 2 : 1;
}

// Whether a tile's products of N columns go in pairs of units. The ring must have the stages of a turn and of the next one, or warps would
// wait for stages that they keep themselves; and two more, so that copies go on meanwhile. And registers must suffice for the sums, the
// chains, the operands and the integers of two units.
template <typename C, int N>
__device__ constexpr bool go_in_pairs() {
    constexpr int SETS = turn_stages<C>() * C::BLOCKS;
    constexpr int REGISTERS =
        C::BLOCKS * C::COLS / 2 + (C::W::SCALED ? N : 0) + 64 / C::W::CHAINS + SETS * C::W::PIECES * 4;
    return C::BLOCKS <= 2 && N <= 64 && C::STAGES >= 2 * turn_stages<C>() + 2 && REGISTERS <= 200;
}

// The same, where a unit is a chain of a block of 64 rows (of whole rows: 128 elements). Units go in pairs: while the tensor
// cores compute one, the warpgroup converts the other. With few columns two products take only 26 cycles, less than the conversion of the
// next two; a whole chain hides more of it. Of two blocks the chains take turns; of one block they follow each other.
template <typename C, int N>
__device__ __forceinline__ void multiply_in_pairs(Ring<C>& ring, int warpgroup, const Rows<C>& rows,
                                                  float (&d)[C::BLOCKS][C::COLS / 2]) {
    using W = typename C::W;
    using T = typename C::T;
    static_assert(C::DEPTH == W::DEPTH, "a stage is a block of each slab");
    constexpr int STEPS = 8 / W::CHAINS;
    constexpr int STAGES = turn_stages<C>(), UNITS = STAGES * C::BLOCKS * W::CHAINS;
    struct Unit {
        int stage, block, chain, set;  // the set of integers
    };
    const auto unit = [](int u) {
        return C::BLOCKS == 2 ? Unit{0, u % 2, u / 2, u % 2} : Unit{u / W::CHAINS, 0, u % W::CHAINS, u / W::CHAINS};
    };
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const int first = min(warpgroup * C::BLOCKS * 4 + warp, C::SLABS - 1) * W::BLOCK;

    float chain[2][W::SCALED ? N / 2 : 1];
    u32 a[2][STEPS][4];
    typename W::Lane integers[STAGES * C::BLOCKS];
    int now[STAGES], next[STAGES];  // stages of this turn, and of the next one
    int taken = 0;
    const auto tile = [&](int stage) { return ring.base + stage * C::STAGE; };
    const auto slab = [&](int stage, int m) { return tile(stage) + first + m * 4 * W::BLOCK; };
    const auto block = [&](int stage, int m) { return static_cast<const u8*>(__cvta_shared_to_generic(slab(stage, m))); };
    // Waits for the tile's next stage. Behind the last one it returns a stage that may not have arrived; what is then loaded from it is
    // never multiplied.
    const auto take = [&](int& stage, bool is_there) {
        stage = ring.stage;
        if (taken == C::K_BLOCKS) return;
        if (!is_there) mbarrier::wait(ring.full(), ring.phase);
        ring.advance();
        taken++;
    };
    const auto load = [&](const int (&stages)[STAGES], int u) {
#pragma unroll
        for (int p = 0; p < W::PIECES; p++) {
            W::load_piece(integers[unit(u).set], p, slab(stages[unit(u).stage], unit(u).block), lane);
        }
    };
    const auto convert = [&](const int (&stages)[STAGES], int u) {
        typename W::Zero zero;
        if constexpr (W::SCALED) {
            zero = W::group_zero(block(stages[unit(u).stage], unit(u).block), unit(u).chain, lane);
        } else {
            zero = rows.zeros[unit(u).block];
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) W::fragment(a[u % 2][i], integers[unit(u).set], unit(u).chain * STEPS + i, zero);
    };
    const auto products = [&](u32 b, int u) {
        wgmma::pin(a[u % 2]);
        wgmma::fence();
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int step = unit(u).chain * STEPS + i;
            const u32 at = b + ((step / 4 * C::B_ATOM) >> 4) + step % 4 * 2;
            if constexpr (!W::SCALED) {
                wgmma::FragmentProduct<T, N>::run(d[unit(u).block], a[u % 2][i], at);
            } else if (i == 0) {
                wgmma::FirstFragmentProduct<T, N>::run(chain[u % 2], a[u % 2][i], at);
            } else {
                wgmma::FragmentProduct<T, N>::run(chain[u % 2], a[u % 2][i], at);
            }
        }
        wgmma::commit();
    };
    const auto add = [&](typename W::Scales scales, int u) {
        wgmma::pin(a[u % 2]);
        if constexpr (W::SCALED) {
            wgmma::pin(chain[u % 2]);
            const float scale[2] = {to_float(scales.upper), to_float(scales.lower)};
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                d[unit(u).block][i] = __fmaf_rn(chain[u % 2][i], scale[i % 4 / 2], d[unit(u).block][i]);
            }
        }
    };
    const auto scales_of = [&](const int (&stages)[STAGES], int u) {
        typename W::Scales scales{};
        if constexpr (W::SCALED) scales = W::scales(block(stages[unit(u).stage], unit(u).block), unit(u).chain, lane);
        return scales;
    };

#pragma unroll
    for (int m = 0; m < C::BLOCKS; m++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) d[m][i] = 0.0f;
        if constexpr (!W::SCALED) wgmma::pin(d[m]);
    }
#pragma unroll
    for (int s = 0; s < STAGES; s++) take(now[s], false);
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        if (unit(u).chain == 0) load(now, u);
    }
    convert(now, 0);
#pragma unroll 1
    for (int turn = 0; turn < C::K_BLOCKS / STAGES; turn++) {
        const bool is_there = mbarrier::is_over(ring.full(), ring.phase);
        typename W::Scales scales[UNITS];
        u32 loaded = 0;  // (Integers and zeros need no such word: the products that used them have ended by then.)
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            scales[u] = scales_of(now, u);
            if constexpr (W::SCALED) loaded |= scales[u].word();
        }
        u32 b[STAGES];
#pragma unroll
        for (int s = 0; s < STAGES; s++) b[s] = wgmma::descriptor(tile(now[s]) + C::A_BYTES);
        // When the last chain of a block is converted, the next block's integers take the place of its own.
        const auto load_next = [&](int u) {
            if (unit(u).chain < W::CHAINS - 1) return;
            if (unit(u).block == 0) take(next[unit(u).stage], is_there && unit(u).stage == 0);
            load(next, u);
        };
#pragma unroll
        for (int u = 0; u < UNITS; u += 2) {
            products(b[unit(u).stage], u);
            load_next(u);
            convert(now, u + 1);
            load_next(u + 1);
            products(b[unit(u + 1).stage], u + 1);
            wgmma::wait<1>();
            add(scales[u], u);
            if (u + 2 < UNITS) {
                convert(now, u + 2);
            } else {
                convert(next, 0);
            }
            wgmma::wait<0>();
            add(scales[u + 1], u + 1);
        }
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
            ring.release(now[s], loaded);
            now[s] = next[s];
        }
    }
    if constexpr (C::K_BLOCKS % STAGES != 0) {
        const auto scales = scales_of(now, 0);
        products(wgmma::descriptor(tile(now[0]) + C::A_BYTES), 0);
        wgmma::wait<0>();
        add(scales, 0);
        u32 loaded = 0;
        if constexpr (W::SCALED) loaded = scales.word();
        ring.release(now[0], loaded);
    }
    if constexpr (!W::SCALED) {
#pragma unroll
        for (int m = 0; m < C::BLOCKS; m++) wgmma::pin(d[m]);
    }
}

// One tile's products, with instructions of N columns.
template <typename C, int N>
__device__ __forceinline__ void multiply(Ring<C>& ring, int warpgroup, const Rows<C>& rows,
                                         float (&d)[C::BLOCKS][C::COLS / 2]) {
    if constexpr (C::W::PACKED) {
        if constexpr (go_in_pairs<C, N>()) {
            multiply_in_pairs<C, N>(ring, warpgroup, rows, d);
        } else {
            multiply_packed<C, N>(ring, warpgroup, rows, d);
        }
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
