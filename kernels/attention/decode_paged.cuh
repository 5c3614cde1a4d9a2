// Op: attention of decodes (the first `num_decodes` sequences, one query each). CPU twin: kernels/attention.rs.
// Regime: any batch and context; 16-bit types.
// Tile: 64 tokens of one KV head; the heads of a group (16 of them at most) are the rows of the tensor cores' products, and each of
//   four warps takes 16 of the tokens.
// Grid: persistent over (sequence, split of 256 tokens, KV head); a ring of STAGES tiles runs ahead across work items. The last CTA
//   to finish a sequence's split merges the splits.
// Numerics: scores in f32 by tensor cores; online softmax in base 2; a probability enters the product with the values as the sum of
//   two 16-bit parts, which is exact to 2^-16 (bf16) or 2^-21 (f16) of it. Warps and splits merge in ascending order. Splits lie at
//   multiples of 256, tiles at multiples of 64, so a sequence's bits depend on itself alone.
// Requires: D a multiple of 16, 128 at most. Keys and values of earlier steps are read before the wait: nothing in a step writes
//   them.
// Traffic: keys and values once for 16 heads of a group.
// Measured: H200, 32 query over 8 KV heads of 128, context 128: 8.5 µs at batch 1 with its launch, 56 µs at batch 256 (57 % of read).
#pragma once

#include "attention/tile.cuh"
#include "base/math.cuh"
#include "base/reduce.cuh"
#include "base/step.cuh"
#include "ptx/mma.cuh"
#include "ptx/pdl.cuh"

namespace attention {

inline constexpr int DECODE_THREADS = 128;

template <typename T, int COLS, int HEADS, int KV_HEADS, int D, int BLOCK_SIZE, int WINDOW, int STAGES>
struct Decode {
    static constexpr int WARPS = DECODE_THREADS / 32;
    static constexpr int GROUP = HEADS / KV_HEADS;
    // Parts of a group that are computed apart, and heads of a part at most.
    static constexpr int PARTS = ceil_div(GROUP, 16), ROWS = GROUP < 16 ? GROUP : 16;
    static constexpr int SPLIT_TILES = step::DECODE_SPLIT / TILE;
    using Kv = Cache<T, KV_HEADS, D, BLOCK_SIZE>;
    static constexpr int STAGE = 2 * Kv::BYTES;
    // The warps' sums, their rows shifted by 8 banks each.
    static constexpr int SUM_STRIDE = D + 8;
    static constexpr int SHARED_BYTES = STAGES * STAGE + WARPS * ROWS * SUM_STRIDE * 4;

    // A work item, and a tile of it.
    struct Cursor {
        int work;
        int seq, split, head, part;
        // Visible tokens [first, end) of the sequence; tiles [tile, last) of the split are left.
        int first, end, tile, last;
    };
};

template <typename T, int COLS, int HEADS, int KV_HEADS, int D, int BLOCK_SIZE, int WINDOW, int STAGES>
__global__ void __launch_bounds__(DECODE_THREADS, 3)
    decode_paged(const step::Header* header, const int4* items, const i32* block_table, i32 table_width, const T* query, const T* keys, const T* values, float scale, T* out, float* partials,
                 i32 max_splits, u32* tickets) {
    pdl::launch_dependents();
    using Shape = Decode<T, COLS, HEADS, KV_HEADS, D, BLOCK_SIZE, WINDOW, STAGES>;
    using Cursor = typename Shape::Cursor;
    constexpr int GROUP = Shape::GROUP, PARTS = Shape::PARTS, ROWS = Shape::ROWS, WARPS = Shape::WARPS;
    constexpr int STEPS = D / 16, PER_ITEM = KV_HEADS * PARTS, SUM_STRIDE = Shape::SUM_STRIDE;
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ float maxima[WARPS][16], totals[WARPS][16];
    __shared__ bool last_split;
    float* sums = reinterpret_cast<float*>(memory + STAGES * Shape::STAGE);
    const u32 ring = ptx::shared_address(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = lane / 4, column = lane % 4 * 2;
    const int num_works = header->num_decode_items * PER_ITEM;
    // Who has nothing to do makes room for the next kernel, whose weights can then be under way. (CTA 0 stays: a grid of which none
    // waits would end before its predecessors.)
    if (blockIdx.x > 0 && blockIdx.x >= num_works) return;
    const typename Shape::Kv cache = {keys, values};

    // What is needed next is asked for one turn before: the item of the work after a cursor's, the block of the tile after the one that
    // is copied, the queries of the next work. Where contexts are short these latencies would be half of the time.
    const auto item_at = [&](int work) { return work < num_works ? items[work / PER_ITEM] : int4{}; };
    // Goes to the work item at `work`, whose item is `item`, or the first after it that has tiles; then `item` is that of the one after.
    const auto seek = [&](Cursor& c, int4& item) {
        for (; c.work < num_works; c.work += gridDim.x) {
            c.seq = item.x;
            c.split = item.y;
            c.end = item.z;
            item = item_at(c.work + gridDim.x);
            c.head = c.work % PER_ITEM / PARTS;
            c.part = c.work % PARTS;
            c.first = first_visible<WINDOW>(c.end - 1);
            const int begin = c.split * step::DECODE_SPLIT;
            c.tile = (c.first > begin ? c.first : begin) / TILE;
            const int past = begin + step::DECODE_SPLIT < c.end ? begin + step::DECODE_SPLIT : c.end;
            c.last = (past + TILE - 1) / TILE;
            if (c.tile < c.last && c.first < past) return;
        }
    };
    bool waited = false;
    const auto wait = [&] {
        if (!waited) pdl::wait();
        waited = true;
    };
    // The next tile to be copied, if there is one, and its block.
    Cursor ahead = {};
    ahead.work = blockIdx.x;
    int4 ahead_item = item_at(ahead.work);
    i32 ahead_block = 0;
    const auto blocks_of = [&](const Cursor& c) { return block_table + static_cast<i64>(c.seq) * table_width; };
    const auto look_up = [&] {
        if (ahead.work < num_works) ahead_block = Shape::Kv::entry(blocks_of(ahead), ahead.tile);
    };
    seek(ahead, ahead_item);
    look_up();
    const auto load_next = [&](int stage) {
        if (ahead.work < num_works) {
            // The last token is this step's.
            if ((ahead.tile + 1) * TILE >= ahead.end) wait();
            cache.template load<DECODE_THREADS>(ring + stage * Shape::STAGE, blocks_of(ahead), ahead_block, ahead.head,
                                                ahead.tile, ahead.first, ahead.end);
            if (++ahead.tile == ahead.last) {
                ahead.work += gridDim.x;
                seek(ahead, ahead_item);
            }
            look_up();
        }
        ptx::cp_async_commit();
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) load_next(stage);
    wait();

    // Rows of the product past the part's heads are zero.
    u32 q[STEPS][4];
    const auto heads_of = [](int work) { return GROUP - work % PARTS * 16 < 16 ? GROUP - work % PARTS * 16 : 16; };
    const auto first_head_of = [](int work) { return work % PER_ITEM / PARTS * GROUP + work % PARTS * 16; };
    const auto load_queries = [&](int work, int seq) {
        const T* queries = query + static_cast<i64>(seq) * COLS + static_cast<i64>(first_head_of(work)) * D + column;
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int from = row + i % 2 * 8;
                const bool used = from < heads_of(work) && (ROWS > 8 || i % 2 == 0);
                q[k][i] = used ? *reinterpret_cast<const u32*>(queries + from * D + k * 16 + i / 2 * 8) : 0;
            }
        }
    };
    int stage = 0, work = blockIdx.x;
    int4 item = item_at(work);
    if (work < num_works) load_queries(work, item.x);
    for (;;) {
        Cursor c = {};
        c.work = work;
        seek(c, item);
        if (c.work >= num_works) break;
        if (c.work != work) load_queries(c.work, c.seq);
        const int heads = heads_of(c.work), first_head = first_head_of(c.work);
        float o[2 * STEPS][4] = {};
        float max[2] = {math::minus_infinity(), math::minus_infinity()}, total[2] = {};
        for (; c.tile < c.last; ++c.tile) {
            ptx::cp_async_wait_group<STAGES - 2>();
            __syncthreads();
            load_next(stage == 0 ? STAGES - 1 : stage - 1);
            const u32 k_tile = ring + stage * Shape::STAGE, v_tile = k_tile + Shape::Kv::BYTES;
            stage = stage == STAGES - 1 ? 0 : stage + 1;
            const int token = c.tile * TILE + warp * 16;
            if (token >= c.end || token + 16 <= c.first) continue;

            float s[2][4] = {};
            const u32 k_lane = k_tile + Rows<D>::at(warp * 16 + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
            for (int k = 0; k < STEPS; ++k) {
                u32 b[4];
                ptx::ldmatrix_x4(b, Rows<D>::step(k_lane, k));
                ptx::mma<T>(s[0], q[k], {b[0], b[1]});
                ptx::mma<T>(s[1], q[k], {b[2], b[3]});
            }
            if (token < c.first || token + 16 > c.end) {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int at = token + n * 8 + column + i % 2;
                        if (at < c.first || at >= c.end) s[n][i] = math::minus_infinity();
                    }
                }
            }
            u32 high[4], low[4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
                top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
                top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2)) * scale;
                top = fmaxf(top, max[half]);
                const float keep = math::exp2_approximate(max[half] - top);
                max[half] = top;
                total[half] *= keep;
#pragma unroll
                for (int n = 0; n < 2 * STEPS; ++n) o[n][2 * half] *= keep, o[n][2 * half + 1] *= keep;
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const float p0 = math::exp2_approximate(__fmaf_rn(s[n][2 * half], scale, -top));
                    const float p1 = math::exp2_approximate(__fmaf_rn(s[n][2 * half + 1], scale, -top));
                    total[half] += p0 + p1;
                    high[2 * n + half] = pack<T>(p0, p1);
                    low[2 * n + half] = pack<T>(p0 - low_of<T>(high[2 * n + half]), p1 - high_of<T>(high[2 * n + half]));
                }
            }
            const u32 v_lane = v_tile + Rows<D>::at(warp * 16 + lane % 16, lane / 16);
#pragma unroll
            for (int k = 0; k < STEPS; ++k) {
                u32 b[4];
                ptx::ldmatrix_x4_trans(b, Rows<D>::step(v_lane, k));
                ptx::mma<T>(o[2 * k], high, {b[0], b[1]});
                ptx::mma<T>(o[2 * k], low, {b[0], b[1]});
                ptx::mma<T>(o[2 * k + 1], high, {b[2], b[3]});
                ptx::mma<T>(o[2 * k + 1], low, {b[2], b[3]});
            }
        }

        // While the parts are added, the next work's queries arrive.
        work = c.work + gridDim.x;
        if (work < num_works) load_queries(work, item.x);
        // The warps' parts, in ascending order.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int to = row + half * 8;
            total[half] += __shfl_xor_sync(ALL_LANES, total[half], 1);
            total[half] += __shfl_xor_sync(ALL_LANES, total[half], 2);
            if (to >= heads) continue;
            if (lane % 4 == 0) {
                maxima[warp][to] = max[half];
                totals[warp][to] = total[half];
            }
#pragma unroll
            for (int n = 0; n < 2 * STEPS; ++n) {
                *reinterpret_cast<float2*>(sums + (warp * ROWS + to) * SUM_STRIDE + n * 8 + column) =
                    make_float2(o[n][2 * half], o[n][2 * half + 1]);
            }
        }
        __syncthreads();
        const int num_splits = (c.end + step::DECODE_SPLIT - 1) / step::DECODE_SPLIT, first_split = c.first / step::DECODE_SPLIT;
        const auto partial = [&](int split, int head) {
            return partials + ((static_cast<i64>(c.seq) * max_splits + split) * HEADS + head) * (D + 4);
        };
        const auto store = [&](int head, int at, const float4& sum, float by) {
            *reinterpret_cast<uint2*>(out + (static_cast<i64>(c.seq) * HEADS + head) * D + at) =
                make_uint2(pack<T>(sum.x / by, sum.y / by), pack<T>(sum.z / by, sum.w / by));
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
            float top = maxima[0][from];
#pragma unroll
            for (int w = 1; w < WARPS; ++w) top = fmaxf(top, maxima[w][from]);
            float4 sum = {};
            float by = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float factor = math::exp2_approximate(maxima[w][from] - top);
                by = __fmaf_rn(factor, totals[w][from], by);
                add(sum, factor, *reinterpret_cast<const float4*>(sums + (w * ROWS + from) * SUM_STRIDE + at));
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
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            u32* ticket = tickets + c.seq * PER_ITEM + c.head * PARTS + c.part;
            last_split = atomicAdd(ticket, 1u) == static_cast<u32>(num_splits - first_split - 1);
            if (last_split) *ticket = 0;
        }
        __syncthreads();
        if (!last_split) continue;
        __threadfence();
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
    ptx::cp_async_wait_group<0>();
}

}  // namespace attention
