// What the kernels of decode attention share: the arithmetic of the four warps that compute works, the merge of warps,
// and the merge of splits. The kernels differ only in how they bring tiles of keys and values to shared memory.
#pragma once

#include "attention/newest.cuh"
#include "attention/splits.cuh"
#include "attention/tile.cuh"
#include "attention/works.cuh"
#include "base/fp8.cuh"
#include "base/math.cuh"
#include "base/reduce.cuh"
#include "epilogue/rounding.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"

namespace attention {

// The warps that compute, and their threads. They are the first threads of a CTA. Each warp computes 16 tokens of a
// tile.
inline constexpr int DECODE_WARPS = 4, DECODE_THREADS = 128;

// T is the type of queries and outputs, Stored the cache's.
template <typename Element, typename StoredElement, int COLS_, int HEADS_, int KV_HEADS_, int D_, int BLOCK_SIZE_, int WINDOW_, bool ROUNDS_>
struct Decode {
    using T = Element;
    using Stored = StoredElement;
    static constexpr bool FP8 = sizeof(Stored) == 1, ROUNDS = ROUNDS_;
    // The type of the tensor cores' operands. Two numbers of an fp8 cache become f16 by one instruction, and bf16 by five. So queries of
    // bf16 become f16 too, divided by 2^8: then they may have magnitudes up to 2^24, and what is lost of small ones is below 2^-17.
    // Probabilities are multiplied by 2^12, so that f16 has bits for those that are small.
    using Operand = If<FP8, f16_t, T>;
    static constexpr bool CONVERTS = !SAME<T, Operand>;
    static constexpr float QUERY_SCALE = CONVERTS ? 256.0f : 1.0f, PROBABILITY_EXPONENT = FP8 ? 12.0f : 0.0f;
    static constexpr int COLS = COLS_, HEADS = HEADS_, KV_HEADS = KV_HEADS_, D = D_, BLOCK_SIZE = BLOCK_SIZE_, WINDOW = WINDOW_;
    static constexpr int GROUP = HEADS / KV_HEADS;
    // A group is computed in PARTS parts of at most ROWS heads. HALVES counts a part's heads in eights, since a tensor
    // core's product has eight columns.
    static constexpr int PARTS = ceil_div(GROUP, 16), ROWS = GROUP < 16 ? GROUP : 16, HALVES = ceil_div(ROWS, 8);
    static constexpr int PER_ITEM = KV_HEADS * PARTS;
    static constexpr int PIECES = D * sizeof(Stored) / 16;  // pieces of 16 bytes of a row of keys or values
    static constexpr int SPLIT_TILES = step::DECODE_SPLIT / TILE;

    // Four elements of a head each, that a thread adds up.
    static constexpr int QUADS = ceil_div(ROWS * (D / 4), DECODE_THREADS);

    // What the warps merge: maxima, totals and sums. The stride puts the four values of D and eight heads that a warp
    // stores at once into different banks.
    static constexpr int SUM_STRIDE = D + 4;
    struct alignas(16) Merge {
        float sums[DECODE_WARPS][ROWS][SUM_STRIDE];
        float maxima[DECODE_WARPS][16], totals[DECODE_WARPS][16];
        // The CTA's first and last work, each with its item in x, y and z, and whether the CTA adds the splits of their
        // sequences. (Kept here, so that they take no registers.)
        int4 outermost[2];
        alignas(16) u16 adds[2];
        // With ROUNDS: by what outputs are divided for the linear behind.
        fp8::Divisor divisor;
    };

    // Where results go.
    struct Output {
        T* out;
        epilogue::Rounding<ROUNDS> rounding;
    };
};

// How a lane's registers of queries, keys, values and sums map to elements of D, for each type of the cache. Matrices of
// ldmatrix have rows of 16 bytes. A lane receives 4 bytes of a row: 2 elements of 16 bits, or 4 of e4m3. The contents of an
// fp8 cache become the numbers of f16 that they stand for, in an order of D that saves moves. A sum over D does not depend
// on that order as long as 16 elements stay together, and results are stored where they belong.
template <typename C>
struct Elements {
    using T = typename C::T;
    using Operand = typename C::Operand;

    // A query's registers for 16 elements of D, for the lane's columns (the first and the other eight). Those of an fp8
    // cache are columns 4 · (lane % 4) and up.
    static __device__ __forceinline__ void load_query(u32& low, u32& high, const T* from) {
        const int part = threadIdx.x % 4;
        if constexpr (C::FP8) {
            const uint2 four = *reinterpret_cast<const uint2*>(from + part * 4);
            low = operand(four.x);
            high = operand(four.y);
        } else {
            low = *reinterpret_cast<const u32*>(from + part * 2);
            high = *reinterpret_cast<const u32*>(from + part * 2 + 8);
        }
    }

    // A query's registers for all of D, of a query that is not rotated yet. `half` counts its heads in eights.
    template <int STEPS>
    static __device__ __forceinline__ void load_rotated(u32 (&q)[STEPS][4], int half, const T* from, const float2* angles) {
        const int part = threadIdx.x % 4;
#pragma unroll
        for (int k = 0; k < STEPS / 2; ++k) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = k * 16 + (C::FP8 ? part * 4 + i * 2 : part * 2 + i * 8);
                const u32 x = *reinterpret_cast<const u32*>(from + at), y = *reinterpret_cast<const u32*>(from + at + C::D / 2);
                const float4 angle = *reinterpret_cast<const float4*>(angles + at);
                float xs[2] = {low_of<T>(x), high_of<T>(x)}, ys[2] = {low_of<T>(y), high_of<T>(y)};
                turn(xs[0], ys[0], angle.x, angle.y);
                turn(xs[1], ys[1], angle.z, angle.w);
                q[k][half + 2 * i] = operand(pack<T>(xs[0], xs[1]));
                q[k + STEPS / 2][half + 2 * i] = operand(pack<T>(ys[0], ys[1]));
            }
        }
    }

    // Two elements of a query.
    static __device__ __forceinline__ u32 operand(u32 pair) {
        if constexpr (!C::CONVERTS) return pair;
        constexpr float BY = 1.0f / C::QUERY_SCALE;
        return pack<Operand>(low_of<T>(pair) * BY, high_of<T>(pair) * BY);
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
                        const fp8::Pairs pairs = fp8::neighbours<Operand>(b[2 * n + i]);
                        ptx::mma<Operand>(s[n], q[2 * k + i], {pairs.first, pairs.second});
                    }
                } else {
                    ptx::mma<Operand>(s[n], q[k], {b[2 * n], b[2 * n + 1]});
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
                ptx::mma<Operand>(sums[half], a, high[half]);
                ptx::mma<Operand>(sums[half], a, low[half]);
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
                    const fp8::Pairs first = fp8::alternate<Operand>(a[i]), other = fp8::alternate<Operand>(a[2 + i]);
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

// Calls f for each quad of `heads` heads that is this thread's: which of its quads it is, the head, and the first of its
// four elements.
template <typename C, typename F>
__device__ __forceinline__ void each_quad(int heads, F f) {
#pragma unroll
    for (int n = 0; n < C::QUADS; ++n) {
        const int i = n * DECODE_THREADS + ptx::thread_anew();
        if (i < heads * (C::D / 4)) f(n, i / (C::D / 4), i % (C::D / 4) * 4);
    }
}

// Called by one of the threads that compute, before the wait: what is read here takes long, and no kernel of the step writes it.
template <typename C>
__device__ __forceinline__ void prepare(typename C::Merge& merge, const typename C::Output& output) {
    if constexpr (C::ROUNDS) merge.divisor = output.rounding.prepare();
}

// Stores a result.
template <typename C>
__device__ __forceinline__ void store(const typename C::Output& output, const typename C::Merge& merge, int seq, int head, int at,
                                      const Quad& quad, float value_scale) {
    using T = typename C::T;
    const float4& sum = quad.sum;
    const uint2 four = make_uint2(pack<T>(sum.x / quad.total * value_scale, sum.y / quad.total * value_scale),
                                  pack<T>(sum.z / quad.total * value_scale, sum.w / quad.total * value_scale));
    epilogue::store_words(output.out, (static_cast<i64>(seq) * C::HEADS + head) * C::D + at, four, output.rounding, merge.divisor);
}

// A CTA's first sequence and part and its last one may have splits of other CTAs too. The CTA that comes last adds all
// of them. (This is done behind all works, because a fence waits as long as the loads that are under way take.)
template <typename C>
__device__ __forceinline__ void add_shared(typename C::Merge& merge, const Partials<C>& partials, u32* tickets,
                                           const typename C::Output& output, float value_scale) {
    const int thread = ptx::thread_anew();
    // Only two threads fence. Their fence is cumulative across the barriers, so it covers the other threads' writes
    // before the first barrier and their reads after the second.
    ptx::sync_threads(1, DECODE_THREADS);
    if (thread < 2) {
        const int4 item = merge.outermost[thread];
        const int work = item.w;
        const DecodeWork<C> c(work, item);
        // How many of the splits this CTA has, if it has not all.
        int own = 0;
        if (thread == 0) {
            if (c.split > c.first_split()) own = min(c.splits() - c.split, merge.outermost[1].w + 1 - work);
        } else if (c.split < c.splits() - 1 && work - (c.split - c.first_split()) >= merge.outermost[0].w) {
            own = max(c.split + 1 - c.first_split(), 0);
        }
        bool last = false;
        if (own > 0) {
            u32* ticket = tickets + c.seq * C::PER_ITEM + c.part;
            __threadfence();
            last = atomicAdd(ticket, static_cast<u32>(own)) + own == static_cast<u32>(c.splits() - c.first_split());
            if (last) {
                *ticket = 0;
                __threadfence();
            }
        }
        merge.adds[thread] = last;
    }
    ptx::sync_threads(1, DECODE_THREADS);
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        if (!merge.adds[i]) continue;
        const DecodeWork<C> c(merge.outermost[i].w, merge.outermost[i]);
        each_quad<C>(c.heads(), [&](int, int row, int at) {
            const int head = c.first_head() + row;
            store<C>(output, merge, c.seq, head, at, partials.sum(c, head, at), value_scale);
        });
    }
}

// Computes the CTA's works. `tiles` gives each work's tiles in ascending order. All warps call `next()` to go on to a
// tile. `keys()`, then `values()`, wait until these have arrived and return their place. `release()` ends a warp's
// reading of either. A warp that needs neither calls `skip()`. A warp may see only some of its 16 tokens; the others
// are in shared memory too, as zeros if Tiles::ZEROED, else as any bits. `kept(n)` is where a thread keeps the sum of its
// quad n from work to work. `wait()` returns when the kernels before this one have completed. `newest` is IsWritten or Writes. Called by
// the first DECODE_THREADS threads, after `prepare`.
template <typename C, typename Tiles, typename Newest = IsWritten>
__device__ __forceinline__ void attend(Tiles& tiles, typename C::Merge& merge, const DecodeList<C>& list, const typename C::T* query,
                                       float scale, float value_scale, const typename C::Output& output, const Partials<C>& partials,
                                       u32* tickets, const Newest& newest = {}) {
    using T = typename C::T;
    using Operand = typename C::Operand;
    using Layout = typename Tiles::Layout;
    scale *= C::QUERY_SCALE;
    constexpr int D = C::D, HALVES = C::HALVES, STEPS = D / 16;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = lane / 4, column = lane % 4 * 2;
    // Where a lane finds its row of the four matrices of 8 tokens × 16 bytes: two matrices of the first 8 tokens, then
    // two of the others. (The shuffle makes the compiler keep the result; otherwise it would compute it again for
    // each tile.)
    const u32 own = __shfl_sync(ALL_LANES, Layout::at(warp * 16 + lane / 16 * 8 + lane % 8, lane / 8 % 2), lane);
    const auto sync = [] { ptx::sync_threads(1, DECODE_THREADS); };

    // Rows of the product behind the part's heads repeat its last head. Their results are not used.
    u32 q[STEPS][4] = {};
    typename Newest::Token fresh;
    // Whether the work's newest token is one of this warp's.
    const auto has_newest = [&](const DecodeWork<C>& c) { return c.split == c.splits() - 1 && (c.end - 1) % TILE / 16 == ptx::thread_anew() / 32; };
    const auto load_queries = [&](const DecodeWork<C>& c) {
        const T* queries = query + static_cast<i64>(c.seq) * C::COLS + static_cast<i64>(c.first_head()) * D;
        if constexpr (Newest::WRITES) newest.load(fresh, c);
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            const T* from = queries + min(ptx::thread_anew() % 32 / 4 + half * 8, c.heads() - 1) * D;
            if constexpr (Newest::WRITES) {
                Elements<C>::load_rotated(q, half, from, newest.angles(c.seq));
            } else {
#pragma unroll
                for (int k = 0; k < STEPS; ++k) Elements<C>::load_query(q[k][half], q[k][half + 2], from + k * 16);
            }
        }
        if constexpr (Newest::WRITES) {
            if (has_newest(c)) newest.round(fresh, c);
        }
    };
    // The greatest scores and totals of the splits of the present sequence and part so far, if this CTA has all of these.
    // Their sums are where `kept` says.
    float tops[C::QUADS], totals[C::QUADS];
    if (list.begin == list.end) return tiles.wait();
    if (threadIdx.x < 2) {
        const int work = threadIdx.x == 0 ? list.begin : list.end - 1;
        int4 item = list.at(work);
        item.w = work;
        merge.outermost[threadIdx.x] = item;
    }
    DecodeWork<C> present(list.begin, list.at(list.begin));
    // Whether this CTA has all splits so far, and whether others have some of its first and of its last sequence. (Bits of one
    // register.)
    constexpr u32 FROM_START = 1, SHARES_FIRST = 2, SHARES_LAST = 4;
    u32 state = present.split > present.first_split() ? SHARES_FIRST : 0;
    if constexpr (Newest::WRITES) {
        if (has_newest(present)) newest.prefetch(present);
    }
    // (Works are known before the step, but queries only now.)
    tiles.wait();
    load_queries(present);
    for (int work = list.begin; work < list.end; ++work) {
        const int first = present.first(), end = present.end, last = present.last();
        int tile = present.tile();
        const bool is_last_work = work + 1 == list.end;
        // To the next work. (Its item is read only now, because there are no registers for it beside the tiles.)
        const auto go_on = [&] {
            if (!present.advance()) present.begin(list.at(work + 1));
            if (!is_last_work) load_queries(present);
        };
        if (tile >= last) {
            go_on();
            continue;
        }
        // Scores and probabilities have heads as rows, so they lie in registers as the second operand of the product
        // with the values does. Sums have heads as columns. Eight heads as columns take half of the products and
        // registers that they would take as rows.
        float o[STEPS][HALVES][4] = {};
        float max[HALVES], total[HALVES] = {};
#pragma unroll
        for (int half = 0; half < HALVES; ++half) max[half] = math::minus_infinity();
        for (; tile < last; ++tile) {
            tiles.next();
            const int token = tile * TILE + warp * 16;
            if (token >= end || token + 16 <= first) {
                tiles.skip();
                continue;
            }
            const bool edge = token < first || token + 16 > end;

            float s[2][4] = {};
            const u32 keys = tiles.keys();
            if constexpr (Newest::WRITES) {
                if (end <= token + 16) newest.template put<Layout>(fresh, present, keys, tiles.values_ahead());
            }
            Elements<C>::template score<Layout>(s, q, keys + own);
            tiles.release();
            if (edge) {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int at = token + n * 8 + column + i % 2;
                        if (at < first || at >= end) s[n][i] = math::minus_infinity();
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
                const float minus_top = C::FP8 ? C::PROBABILITY_EXPONENT - top : -top;
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const float p0 = math::exp2_approximate(__fmaf_rn(s[n][2 * half], scale, minus_top));
                    const float p1 = math::exp2_approximate(__fmaf_rn(s[n][2 * half + 1], scale, minus_top));
                    total[half] = __fmaf_rn(total[half], n == 0 ? keep[half] : 1.0f, p0 + p1);
                    high[half][n] = pack<Operand>(p0, p1);
                    low[half][n] = pack<Operand>(p0 - low_of<Operand>(high[half][n]), p1 - high_of<Operand>(high[half][n]));
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
                    masks[n] = (at >= first && at < end ? 0x0000ffffu : 0) |
                               (at + 1 >= first && at + 1 < end ? 0xffff0000u : 0);
                }
                Elements<C>::template add_values<Layout, true>(o, high, low, v_lane, masks);
            } else {
                Elements<C>::template add_values<Layout, false>(o, high, low, v_lane, {});
            }
            tiles.release();
        }

        // The next work's queries arrive while the warps' parts are added.
        const DecodeWork<C> c = present;
        go_on();
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
                if (to >= c.heads()) continue;
#pragma unroll
                for (int k = 0; k < STEPS; ++k) Elements<C>::store(merge.sums[warp][to], k, o[k][half][i], o[k][half][2 + i]);
            }
        }
        sync();
        const bool is_first_split = c.split == c.first_split();
        if (is_first_split) state |= FROM_START;
        state = c.split < c.splits() - 1 ? state | SHARES_LAST : state & ~SHARES_LAST;
        each_quad<C>(c.heads(), [&](int n, int row, int at) {
            Quad split{merge.maxima[0][row], 0.0f, {}};
#pragma unroll
            for (int w = 1; w < DECODE_WARPS; ++w) split.top = fmaxf(split.top, merge.maxima[w][row]);
#pragma unroll
            for (int w = 0; w < DECODE_WARPS; ++w) {
                const float factor = math::exp2_approximate(merge.maxima[w][row] - split.top);
                const Quad warp_sum{split.top, merge.totals[w][row], *reinterpret_cast<const float4*>(&merge.sums[w][row][at])};
                split.scale_and_add(1.0f, factor, warp_sum);
            }
            const int head = c.first_head() + row;
            if (!(state & FROM_START)) {
                partials.store(c.seq, c.split, head, at, split, 1);
                return;
            }
            float4& kept = tiles.kept(n);
            Quad sum = split;
            if (!is_first_split) {
                sum = {tops[n], totals[n], kept};
                sum.add(split);
            }
            kept = sum.sum;
            tops[n] = sum.top;
            totals[n] = sum.total;
            if (c.split == c.splits() - 1) {
                store<C>(output, merge, c.seq, head, at, sum, value_scale);
            } else if (is_last_work) {
                partials.store(c.seq, c.first_split(), head, at, sum, c.split + 1 - c.first_split());
            }
        });
    }
    if (state & (SHARES_FIRST | SHARES_LAST)) add_shared<C>(merge, partials, tickets, output, value_scale);
}

}  // namespace attention
