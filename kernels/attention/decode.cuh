// What the kernels of decode attention share: work items, the arithmetic of the four warps that compute them, and the
// merge of warps and of splits. The kernels differ only in how they bring tiles of keys and values to shared memory.
#pragma once

#include "attention/tile.cuh"
#include "base/fp8.cuh"
#include "base/math.cuh"
#include "base/reduce.cuh"
#include "base/step.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"

namespace attention {

// The warps that compute, and their threads. They are the first threads of a CTA. Each warp computes 16 tokens of a
// tile.
inline constexpr int DECODE_WARPS = 4, DECODE_THREADS = 128;

// T is the type of queries, outputs and the tensor cores' operands; Stored is the cache's.
template <typename Element, typename StoredElement, int COLS_, int HEADS_, int KV_HEADS_, int D_, int BLOCK_SIZE_, int WINDOW_>
struct Decode {
    using T = Element;
    using Stored = StoredElement;
    static constexpr bool FP8 = sizeof(Stored) == 1;
    static constexpr int COLS = COLS_, HEADS = HEADS_, KV_HEADS = KV_HEADS_, D = D_, BLOCK_SIZE = BLOCK_SIZE_, WINDOW = WINDOW_;
    static constexpr int GROUP = HEADS / KV_HEADS;
    // A group is computed in PARTS parts of at most ROWS heads. HALVES counts a part's heads in eights, since a tensor
    // core's product has eight columns.
    static constexpr int PARTS = ceil_div(GROUP, 16), ROWS = GROUP < 16 ? GROUP : 16, HALVES = ceil_div(ROWS, 8);
    static constexpr int PER_ITEM = KV_HEADS * PARTS;
    static constexpr int PIECES = D * sizeof(Stored) / 16;  // pieces of 16 bytes of a row of keys or values
    static constexpr int SPLIT_TILES = step::DECODE_SPLIT / TILE;

    // What the warps merge: maxima, totals and sums. The stride puts the four values of D and eight heads that a warp
    // stores at once into different banks.
    static constexpr int SUM_STRIDE = D + 4;
    struct alignas(16) Merge {
        float sums[DECODE_WARPS][ROWS][SUM_STRIDE];
        float maxima[DECODE_WARPS][16], totals[DECODE_WARPS][16];
        alignas(16) int last_split;
    };
};

// The step's works. Each is one split of a sequence for one part of a group. CTAs take them in turn.
template <typename C>
struct DecodeList {
    const int4* items;
    int num_works;

    // The caller reads an item one turn before it needs it, so that no thread waits for the item.
    __device__ __forceinline__ int4 at(int work) const { return work < num_works ? items[work / C::PER_ITEM] : int4{}; }
};

template <typename C>
struct DecodeWork {
    int seq, split, head;
    // The sequence's visible tokens are [first, end). The split's tiles [tile, last) hold some of them; there may be no
    // such tile.
    int first, end, tile, last;

    __device__ __forceinline__ DecodeWork(int work, const int4& item)
        : seq(item.x), split(item.y), head(work % C::PER_ITEM / C::PARTS), end(item.z) {
        first = first_visible<C::WINDOW>(end - 1);
        const int begin = split * step::DECODE_SPLIT;
        tile = max(first, begin) / TILE;
        last = (min(begin + step::DECODE_SPLIT, end) + TILE - 1) / TILE;
    }
};

// How a lane's registers of queries, keys, values and sums map to elements of D, for each type of the cache. Matrices of
// ldmatrix have rows of 16 bytes. A lane receives 4 bytes of a row: 2 elements of 16 bits, or 4 of e4m3. The contents of an
// fp8 cache become the numbers of T that they stand for, in an order of D that saves moves. A sum over D does not depend
// on that order as long as 16 elements stay together, and results are stored where they belong.
template <typename C>
struct Elements {
    using T = typename C::T;

    // A query's registers for 16 elements of D, for the lane's columns (the first and the other eight). Those of an fp8
    // cache are columns 4 · (lane % 4) and up: 0 and 2, then 1 and 3.
    static __device__ __forceinline__ void load_query(u32& low, u32& high, const T* from) {
        const int part = threadIdx.x % 4;
        if constexpr (C::FP8) {
            const uint2 four = *reinterpret_cast<const uint2*>(from + part * 4);
            low = __byte_perm(four.x, four.y, 0x5410);
            high = __byte_perm(four.x, four.y, 0x7632);
        } else {
            low = *reinterpret_cast<const u32*>(from + part * 2);
            high = *reinterpret_cast<const u32*>(from + part * 2 + 8);
        }
    }

    // Adds the products of queries and the 16 keys of a warp, eight in each s[n].
    template <typename Layout, int STEPS>
    static __device__ __forceinline__ void score(float (&s)[2][4], const u32 (&q)[STEPS][4], u32 k_lane) {
        // Matrices: the first eight keys' pieces 2 · k and 2 · k + 1, then those of the other eight.
#pragma unroll
        for (int k = 0; k < C::PIECES / 2; ++k) {
            u32 b[4];
            ptx::ldmatrix_x4(b, Layout::step(k_lane, k));
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                if constexpr (C::FP8) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const fp8::Pairs pairs = fp8::alternate<T>(b[2 * n + i]);
                        ptx::mma<T>(s[n], q[2 * k + i], {pairs.first, pairs.second});
                    }
                } else {
                    ptx::mma<T>(s[n], q[k], {b[2 * n], b[2 * n + 1]});
                }
            }
        }
    }

    // Adds the values of a warp's 16 tokens, each token times the two parts of its probability. `masks` has the bits of
    // the tokens that count: first for the lane's two tokens of the first eight, then for its two of the other eight.
    template <typename Layout, bool MASKED, int STEPS, int HALVES>
    static __device__ __forceinline__ void add_values(float (&o)[STEPS][HALVES][4], const u32 (&high)[HALVES][2],
                                                      const u32 (&low)[HALVES][2], u32 v_lane, const u32 (&masks)[2]) {
        const auto add = [&](float(&sums)[HALVES][4], u32(&a)[4]) {
            if constexpr (MASKED) {
#pragma unroll
                for (int i = 0; i < 4; ++i) a[i] &= masks[i / 2];
            }
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                ptx::mma<T>(sums[half], a, high[half]);
                ptx::mma<T>(sums[half], a, low[half]);
            }
        };
        // Matrices, transposed: the first eight tokens' pieces 2 · k and 2 · k + 1, then those of the other eight.
#pragma unroll
        for (int k = 0; k < C::PIECES / 2; ++k) {
            u32 a[4];
            ptx::ldmatrix_x4_trans(a, Layout::step(v_lane, k));
            if constexpr (C::FP8) {
                // A register has elements 2 · (lane / 4) and up of two tokens: of each, bytes 0 and 1, or 2 and 3.
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const fp8::Pairs first = fp8::alternate<T>(a[i]), other = fp8::alternate<T>(a[2 + i]);
                    u32 both[4] = {first.first, first.second, other.first, other.second};
                    add(o[2 * k + i], both);
                }
            } else {
                add(o[k], a);
            }
        }
    }

    // Stores a lane's two sums of step k, of one head.
    static __device__ __forceinline__ void store(float* sums, int k, float first, float second) {
        const int row = threadIdx.x % 32 / 4;
        if constexpr (C::FP8) {
            *reinterpret_cast<float2*>(sums + k * 16 + 2 * row) = make_float2(first, second);
        } else {
            sums[k * 16 + row] = first;
            sums[k * 16 + 8 + row] = second;
        }
    }
};

// Computes the CTA's works. `tiles` gives each work's tiles in ascending order. All warps call `next()` to go on to a
// tile. `keys()`, then `values()`, wait until these have arrived and return their place. `release()` ends a warp's
// reading of either. A warp that needs neither calls `skip()`. A warp may see only some of its 16 tokens; the others
// are in shared memory too, as zeros if Tiles::ZEROED, else as any bits. Called by the first DECODE_THREADS threads,
// after the wait.
template <typename C, typename Tiles>
__device__ __forceinline__ void attend(Tiles& tiles, typename C::Merge& merge, const DecodeList<C>& list, const typename C::T* query,
                                       float scale, float value_scale, typename C::T* out, float* partials, int max_splits,
                                       u32* tickets) {
    using T = typename C::T;
    using Layout = typename Tiles::Layout;
    constexpr int D = C::D, GROUP = C::GROUP, PARTS = C::PARTS, HALVES = C::HALVES, PER_ITEM = C::PER_ITEM, STEPS = D / 16;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = lane / 4, column = lane % 4 * 2;
    // Where a lane finds its row of the four matrices of 8 tokens × 16 bytes: two matrices of the first 8 tokens, then
    // two of the others. (The shuffle makes the compiler keep the result; otherwise it would compute it again for
    // each tile.)
    const u32 own = __shfl_sync(ALL_LANES, Layout::at(warp * 16 + lane / 16 * 8 + lane % 8, lane / 8 % 2), lane);
    const auto sync = [] { ptx::sync_threads(1, DECODE_THREADS); };

    // Rows of the product behind the part's heads repeat its last head. Their results are not used.
    u32 q[STEPS][4] = {};
    const auto heads_of = [](int work) { return min(GROUP - work % PARTS * 16, 16); };
    const auto first_head_of = [](int work) { return work % PER_ITEM / PARTS * GROUP + work % PARTS * 16; };
    const auto load_queries = [&](int work, int seq) {
        const T* queries = query + static_cast<i64>(seq) * C::COLS + static_cast<i64>(first_head_of(work)) * D;
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            const T* from = queries + min(row + half * 8, heads_of(work) - 1) * D;
#pragma unroll
            for (int k = 0; k < STEPS; ++k) Elements<C>::load_query(q[k][half], q[k][half + 2], from + k * 16);
        }
    };
    int4 item = list.at(blockIdx.x), next_item = item;
    if (static_cast<int>(blockIdx.x) < list.num_works) load_queries(blockIdx.x, item.x);
    for (int work = blockIdx.x; work < list.num_works; work += gridDim.x, item = next_item) {
        DecodeWork<C> c(work, item);
        const int next = work + gridDim.x;
        next_item = list.at(next);
        if (c.tile >= c.last) {
            if (next < list.num_works) load_queries(next, next_item.x);
            continue;
        }
        const int heads = heads_of(work), first_head = first_head_of(work);
        // Scores and probabilities have heads as rows, so they lie in registers as the second operand of the product
        // with the values does. Sums have heads as columns. Eight heads as columns take half of the products and
        // registers that they would take as rows.
        float o[STEPS][HALVES][4] = {};
        float max[HALVES], total[HALVES] = {};
#pragma unroll
        for (int half = 0; half < HALVES; ++half) max[half] = math::minus_infinity();
        for (; c.tile < c.last; ++c.tile) {
            tiles.next();
            const int token = c.tile * TILE + warp * 16;
            if (token >= c.end || token + 16 <= c.first) {
                tiles.skip();
                continue;
            }
            const bool edge = token < c.first || token + 16 > c.end;

            float s[2][4] = {};
            Elements<C>::template score<Layout>(s, q, tiles.keys() + own);
            tiles.release();
            if (edge) {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int at = token + n * 8 + column + i % 2;
                        if (at < c.first || at >= c.end) s[n][i] = math::minus_infinity();
                    }
                }
            }
            u32 high[HALVES][2], low[HALVES][2];
            float keep[HALVES];
            bool same = true;
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                float top = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
                top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
                top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2)) * scale;
                top = fmaxf(top, max[half]);
                keep[half] = math::exp2_approximate(max[half] - top);
                same = same && keep[half] == 1.0f;
                max[half] = top;
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const float p0 = math::exp2_approximate(__fmaf_rn(s[n][2 * half], scale, -top));
                    const float p1 = math::exp2_approximate(__fmaf_rn(s[n][2 * half + 1], scale, -top));
                    total[half] = __fmaf_rn(total[half], n == 0 ? keep[half] : 1.0f, p0 + p1);
                    high[half][n] = pack<T>(p0, p1);
                    low[half][n] = pack<T>(p0 - low_of<T>(high[half][n]), p1 - high_of<T>(high[half][n]));
                }
            }
            // Most maxima are found early. Then all factors are 1, and this is skipped.
            if (!__all_sync(ALL_LANES, same)) {
#pragma unroll
                for (int half = 0; half < HALVES; ++half) {
                    // The factors of the lane's two columns.
                    const float by[2] = {__shfl_sync(ALL_LANES, keep[half], column * 4),
                                         __shfl_sync(ALL_LANES, keep[half], column * 4 + 4)};
#pragma unroll
                    for (int k = 0; k < STEPS; ++k) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) o[k][half][i] *= by[i % 2];
                    }
                }
            }
            const u32 v_lane = tiles.values() + own;
            if (!Tiles::ZEROED && edge) {
                // Tokens that are not visible may be any bits. A probability of 0 does not remove a NaN, so they are
                // masked.
                u32 masks[2];
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const int at = token + n * 8 + column;
                    masks[n] = (at >= c.first && at < c.end ? 0x0000ffffu : 0) |
                               (at + 1 >= c.first && at + 1 < c.end ? 0xffff0000u : 0);
                }
                Elements<C>::template add_values<Layout, true>(o, high, low, v_lane, masks);
            } else {
                Elements<C>::template add_values<Layout, false>(o, high, low, v_lane, {});
            }
            tiles.release();
        }

        // The next work's queries arrive while the warps' parts are added.
        if (next < list.num_works) load_queries(next, next_item.x);
        // Adds the warps' parts in ascending order. (The first barrier ensures that all threads have read the parts of
        // the last work.)
        sync();
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            total[half] += __shfl_xor_sync(ALL_LANES, total[half], 1);
            total[half] += __shfl_xor_sync(ALL_LANES, total[half], 2);
            if (lane % 4 == 0) {
                merge.maxima[warp][row + half * 8] = max[half];
                merge.totals[warp][row + half * 8] = total[half];
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int to = half * 8 + column + i;
                if (to >= heads) continue;
#pragma unroll
                for (int k = 0; k < STEPS; ++k) Elements<C>::store(merge.sums[warp][to], k, o[k][half][i], o[k][half][2 + i]);
            }
        }
        sync();
        const int num_splits = ceil_div(c.end, step::DECODE_SPLIT), first_split = c.first / step::DECODE_SPLIT;
        const auto partial = [&](int split, int head) {
            return partials + ((static_cast<i64>(c.seq) * max_splits + split) * C::HEADS + head) * (D + 4);
        };
        const auto store = [&](int head, int at, const float4& sum, float by) {
            *reinterpret_cast<uint2*>(out + (static_cast<i64>(c.seq) * C::HEADS + head) * D + at) =
                make_uint2(pack<T>(sum.x / by * value_scale, sum.y / by * value_scale),
                           pack<T>(sum.z / by * value_scale, sum.w / by * value_scale));
        };
        const auto add = [](float4& sum, float by, const float4& x) {
            sum.x = __fmaf_rn(by, x.x, sum.x);
            sum.y = __fmaf_rn(by, x.y, sum.y);
            sum.z = __fmaf_rn(by, x.z, sum.z);
            sum.w = __fmaf_rn(by, x.w, sum.w);
        };
        const int quads = heads * (D / 4);
        for (int i = threadIdx.x; i < quads; i += DECODE_THREADS) {
            const int from = i / (D / 4), at = i % (D / 4) * 4;
            float top = merge.maxima[0][from];
#pragma unroll
            for (int w = 1; w < DECODE_WARPS; ++w) top = fmaxf(top, merge.maxima[w][from]);
            float4 sum = {};
            float by = 0.0f;
#pragma unroll
            for (int w = 0; w < DECODE_WARPS; ++w) {
                const float factor = math::exp2_approximate(merge.maxima[w][from] - top);
                by = __fmaf_rn(factor, merge.totals[w][from], by);
                add(sum, factor, *reinterpret_cast<const float4*>(&merge.sums[w][from][at]));
            }
            if (num_splits - first_split == 1) {
                store(first_head + from, at, sum, by);
            } else {
                float* to = partial(c.split, first_head + from);
                *reinterpret_cast<float4*>(to + at) = sum;
                if (at == 0) *reinterpret_cast<float2*>(to + D) = make_float2(top, by);
            }
        }
        if (num_splits - first_split == 1) continue;
        // Only thread 0 fences. Its fence is cumulative across the barriers, so it covers the other threads' writes
        // before the first barrier and their reads after the second.
        sync();
        if (threadIdx.x == 0) {
            u32* ticket = tickets + c.seq * PER_ITEM + work % PER_ITEM;
            __threadfence();
            const bool last = atomicAdd(ticket, 1u) == static_cast<u32>(num_splits - first_split - 1);
            if (last) {
                *ticket = 0;
                __threadfence();
            }
            merge.last_split = last;
        }
        sync();
        if (!merge.last_split) continue;
        for (int i = threadIdx.x; i < quads; i += DECODE_THREADS) {
            const int head = first_head + i / (D / 4), at = i % (D / 4) * 4;
            float top = math::minus_infinity();
#pragma unroll 4
            for (int split = first_split; split < num_splits; ++split) top = fmaxf(top, __ldcg(partial(split, head) + D));
            float4 sum = {};
            float by = 0.0f;
#pragma unroll 4
            for (int split = first_split; split < num_splits; ++split) {
                const float* from = partial(split, head);
                const float2 state = __ldcg(reinterpret_cast<const float2*>(from + D));
                const float factor = math::exp2_approximate(state.x - top);
                by = __fmaf_rn(factor, state.y, by);
                add(sum, factor, __ldcg(reinterpret_cast<const float4*>(from + at)));
            }
            store(head, at, sum, by);
        }
    }
}

}  // namespace attention
