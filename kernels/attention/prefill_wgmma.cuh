// Op: attention of all sequences that are not decodes. CPU twin: kernels/attention.rs.
// Regime: any chunk and context; 16-bit types.
// Tile: 64 query tokens of WARPGROUPS heads that share a KV head, one head for each warpgroup. Keys and values come in
//   tiles of KEYS tokens.
// Grid: persistent over (tile of queries, heads); the host lists the longest tiles first.
// Numerics: as prefill_paged without EXACT, but the online softmax takes KEYS tokens at a time, at multiples of KEYS,
//   ascending. A tile of which a row sees no token does not change the row, so a row's bits do not depend on the
//   chunking.
// Requires: sm_90a; D of 64 or 128, blocks of a multiple of 64 tokens, rows of the query of whole 16-byte pieces.
// Traffic: keys and values are read once for each tile of queries and WARPGROUPS heads, all but the first time from L2.
// Measured: H200, 8 × 2048 tokens, 32 query heads over 8 KV heads of 128: 574 µs, 479 TFLOP/s.
//
// One producer thread loads queries, keys and values by TMA, each through a separate ring. While a warpgroup computes
// probabilities, the tensor cores compute the next tile's scores and this tile's sum of values for it. Probabilities
// stay in registers, because accumulators of scores have the layout of the first operand of the product with the
// values. Two warpgroups take turns at the tensor cores.
#pragma once

#include "attention/buffers.cuh"
#include "attention/tile.cuh"
#include "base/math.cuh"
#include "base/reduce.cuh"
#include "base/step.cuh"
#include "epilogue/rounding.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/pdl.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace attention {

template <typename Element, typename StoredElement, int HEADS_, int KV_HEADS_, int D_, int BLOCK_SIZE_, int WINDOW_, bool ROUNDS_,
          int WARPGROUPS_, int KEYS_, int STAGES_, int SHARED_>
struct Prefill {
    using T = Element;
    using Stored = StoredElement;
    static constexpr bool FP8 = sizeof(Stored) == 1;
    static constexpr bool IN_FP8 = false;  // the products
    static constexpr bool ROUNDS = ROUNDS_;
    static constexpr int HEADS = HEADS_, KV_HEADS = KV_HEADS_, D = D_;
    static constexpr int BLOCK_SIZE = BLOCK_SIZE_;
    static constexpr int WINDOW = WINDOW_;
    static constexpr int WARPGROUPS = WARPGROUPS_;  // consumers, and heads of a work item
    static constexpr int KEYS = KEYS_;              // tokens of a tile of keys
    static constexpr int STAGES = STAGES_;          // tiles of keys, and of values, in shared memory

    static constexpr int ATOMS = D / 64;      // swizzle atoms of 128 bytes along D
    static constexpr int PAGES = KEYS / TILE;  // boxes of 64 tokens: each lies in one block of the cache
    static constexpr int PER_ITEM = HEADS / WARPGROUPS;
    // A box is an atom of 64 rows. Queries lie in the order of warpgroups, then atoms. Keys and values lie in the order
    // of atoms, then boxes.
    static constexpr int BOX = 64 * 128;
    static constexpr int QUERY_BYTES = ATOMS * BOX, QUERIES = WARPGROUPS * QUERY_BYTES;
    static constexpr int KV_ATOM = PAGES * BOX, KV_BYTES = ATOMS * KV_ATOM;
    static constexpr int KEYS_AT = 2 * QUERIES, VALUES_AT = KEYS_AT + STAGES * KV_BYTES;
    // A tile of keys and one of values as an fp8 cache stores them (prefill_fp8.cuh).
    static constexpr int STORED_AT = VALUES_AT + STAGES * KV_BYTES, STORED_BYTES = FP8 ? KEYS * D : 0;
    static constexpr int BARRIERS_AT = STORED_AT + 2 * STORED_BYTES;
    static constexpr int SHARED = BARRIERS_AT + (2 + 2 * STAGES) * 16 + 1024;  // 1024 to align
    static_assert(SHARED == SHARED_, "what the launch asks for");

    // setmaxnreg acts on whole warpgroups, so beside several consumers the producer is a whole warpgroup too.
    static constexpr int PRODUCERS = WARPGROUPS == 1 ? 32 : 128;
    static constexpr int THREADS = WARPGROUPS * 128 + PRODUCERS;
    static constexpr int PER_SM = WARPGROUPS == 1 ? 2 : 1;
    static constexpr int PRODUCER_REGISTERS = FP8 ? 56 : WARPGROUPS == 2 ? 40 : 32;
    static constexpr int CONSUMER_REGISTERS = FP8 ? 224 : WARPGROUPS == 2 ? 232 : 160;

    static_assert(step::PREFILL_TILE == 64 && TILE == 64, "rows of a warpgroup, and of a box");
    static_assert((D == 64 || D == 128) && BLOCK_SIZE % TILE == 0 && (KEYS == 64 || KEYS == 128), "whole boxes");
    static_assert(WARPGROUPS <= 3 && HEADS / KV_HEADS % WARPGROUPS == 0, "heads of one group");
    static_assert(SHARED <= 232448, "shared memory of a CTA");
    static_assert(!FP8 || (WARPGROUPS == 2 && KEYS == 128), "a warpgroup of producers");
};

// The rings of a CTA.
template <typename C>
struct Rings {
    u32 base;
    Buffers<2> queries;
    Buffers<C::STAGES> keys, values;

    explicit __device__ __forceinline__ Rings(u32 shared)
        : base(shared),
          queries{shared + C::BARRIERS_AT},
          keys{shared + C::BARRIERS_AT + 32},
          values{shared + C::BARRIERS_AT + 32 + C::STAGES * 16} {}

    __device__ __forceinline__ int query_offset() const { return queries.stage * C::QUERIES; }
    __device__ __forceinline__ u32 key_tile() const { return base + C::KEYS_AT + keys.stage * C::KV_BYTES; }
    __device__ __forceinline__ u32 value_tile() const { return base + C::VALUES_AT + values.stage * C::KV_BYTES; }
};

// A tile of queries of WARPGROUPS heads.
template <typename C>
struct PrefillWork {
    int seq, head;
    // The tile's first row of the queries.
    int first_query;
    // Positions of the tile's first query and of the token behind its last.
    int position, end;
    int first_tile;

    __device__ __forceinline__ PrefillWork(int index, const int2* items, const i32* cu_query_lens, const i32* seq_lens) {
        const int2 item = items[index / C::PER_ITEM];
        const int chunk = cu_query_lens[item.x], chunk_len = cu_query_lens[item.x + 1] - chunk;
        seq = item.x;
        head = index % C::PER_ITEM * C::WARPGROUPS;
        first_query = chunk + item.y;
        position = seq_lens[item.x] - chunk_len + item.y;
        end = position + min(chunk_len - item.y, step::PREFILL_TILE);
        first_tile = first_visible<C::WINDOW>(position) / C::KEYS;
    }
};

// The producer: one thread. It starts copies in the order in which the consumers wait for them.
template <typename C, typename WorkAt>
__device__ __forceinline__ void produce(Rings<C> rings, int num_works, WorkAt work_at, const TensorMap& query, const TensorMap& key,
                                        const TensorMap& value, const i32* block_table, int table_width) {
    for (int index = blockIdx.x; index < num_works; index += gridDim.x) {
        const PrefillWork<C> work = work_at(index);
        const i32* blocks = block_table + static_cast<i64>(work.seq) * table_width;
        const int kv_head = work.head / (C::HEADS / C::KV_HEADS);
        // Where the rows of a tile's boxes begin among the rows of all blocks, [blocks, KV_HEADS, BLOCK_SIZE]. A box
        // without a visible token may have no block. It is not loaded; its place in shared memory keeps old data, which
        // is not used.
        const auto boxes = [&](int tile) { return min(C::PAGES, (work.end - tile * C::KEYS + TILE - 1) / TILE); };
        const auto locate = [&](int tile, int (&rows)[C::PAGES]) {
#pragma unroll
            for (int i = 0; i < C::PAGES; i++) {
                if (i >= boxes(tile)) continue;
                const int token = tile * C::KEYS + i * TILE;
                rows[i] = (blocks[token / C::BLOCK_SIZE] * C::KV_HEADS + kv_head) * C::BLOCK_SIZE + token % C::BLOCK_SIZE;
            }
        };
        const auto load = [&](Buffers<C::STAGES>& ring, u32 to, const TensorMap& map, int tile, const int (&rows)[C::PAGES]) {
            ring.wait_empty();
            mbarrier::arrive_expect(ring.full(), boxes(tile) * C::ATOMS * C::BOX);
#pragma unroll
            for (int i = 0; i < C::PAGES; i++) {
                if (i >= boxes(tile)) continue;
#pragma unroll
                for (int atom = 0; atom < C::ATOMS; atom++) {
                    tma::load(to + atom * C::KV_ATOM + i * C::BOX, map, ring.full(), tma::EVICT_NORMAL, atom * 64, rows[i]);
                }
            }
            ring.advance();
        };

        int tile = work.first_tile, rows[C::PAGES] = {}, next[C::PAGES] = {};
        locate(tile, next);
        rings.queries.wait_empty();
        mbarrier::arrive_expect(rings.queries.full(), C::QUERIES);
#pragma unroll
        for (int i = 0; i < C::WARPGROUPS * C::ATOMS; i++) {
            const int column = (work.head + i / C::ATOMS) * C::D + i % C::ATOMS * 64;
            tma::load(rings.base + rings.query_offset() + i * C::BOX, query, rings.queries.full(), tma::EVICT_FIRST, column,
                      work.first_query);
        }
        rings.queries.advance();
        load(rings.keys, rings.key_tile(), key, tile, next);
        for (; tile * C::KEYS < work.end; tile++) {
#pragma unroll
            for (int i = 0; i < C::PAGES; i++) rows[i] = next[i];
            if ((tile + 1) * C::KEYS < work.end) {
                locate(tile + 1, next);
                load(rings.keys, rings.key_tile(), key, tile + 1, next);
            }
            load(rings.values, rings.value_tile(), value, tile, rows);
        }
    }
}

// Starts S = Q · Kᵀ. `q` is the descriptor of the warpgroup's queries.
template <typename C>
__device__ __forceinline__ void score(float (&s)[C::KEYS / 2], u32 q, u32 key_tile) {
    const u32 k = wgmma::descriptor(key_tile);
    wgmma::fence();
#pragma unroll
    for (int i = 0; i < C::D / 16; i++) {
        const u32 a = q + (i / 4 * C::BOX >> 4) + i % 4 * 2, b = k + (i / 4 * C::KV_ATOM >> 4) + i % 4 * 2;
        if (i == 0) {
            wgmma::FirstProduct<typename C::T, C::KEYS>::run(s, a, b);
        } else {
            wgmma::Product<typename C::T, C::KEYS>::run(s, a, b);
        }
    }
    wgmma::commit();
}

// Starts O += P · V for the first TOKENS of the tile.
template <typename C, int TOKENS>
__device__ __forceinline__ void add_values(float (&o)[C::D / 2], u32 (&p)[C::KEYS / 16][4], u32 value_tile) {
    const u32 v = wgmma::descriptor_of_rows<C::KV_ATOM>(value_tile);
    wgmma::pin(o);
    wgmma::pin(p);
    wgmma::fence();
#pragma unroll
    for (int i = 0; i < TOKENS / 16; i++) {
        wgmma::RegisterProduct<typename C::T, C::D>::run(o, p[i], v + i * (16 * 128 >> 4));
    }
    wgmma::commit();
}

// What each of a thread's two rows has seen so far: the largest score times the scale, and the sum of the probabilities
// relative to it (in fp8, of the whole row; else of the thread's columns).
struct Seen {
    float max[2] = {math::minus_infinity(), math::minus_infinity()};
    float total[2] = {};
};

// Turns scores into probabilities, in place; for products in fp8 into 256 times these, relative to a power of two. `keep` is
// the factor of earlier sums. `first_row` is the position of the warp's first row.
template <typename C>
__device__ __forceinline__ void soften(float (&s)[C::KEYS / 2], int tile, int first_row, float scale, Seen& seen, float (&keep)[2]) {
    const int first = tile * C::KEYS, lane = threadIdx.x % 32;
    // Scores of tokens that are not visible may be any bits, even NaN.
    if (first + C::KEYS - 1 > first_row || first < first_visible<C::WINDOW>(first_row + 15)) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Relative to the thread's first column.
            const int at = first_row + lane / 4 + half * 8, last = at - first - lane % 4 * 2;
            const int begin = first_visible<C::WINDOW>(at) - first - lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < C::KEYS / 4; i++) {
                const int token = i / 2 * 8 + i % 2;
                float& score = s[i / 2 * 4 + half * 2 + i % 2];
                if (token > last || (C::WINDOW > 0 && token < begin)) score = math::minus_infinity();
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = s[2 * half];
#pragma unroll
        for (int n = 0; n < C::KEYS / 8; n++) top = fmaxf(top, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2)) * scale;
        top = fmaxf(top, seen.max[half]);
        if constexpr (C::IN_FP8) top = ceilf(top);
        // This keeps a row as it is while it has seen nothing.
        const float from = top == math::minus_infinity() ? 0.0f : top;
        keep[half] = math::exp2_approximate(seen.max[half] - from);
        seen.max[half] = top;
        const float shift = C::IN_FP8 ? 8.0f - from : -from;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < C::KEYS / 8; n++) {
            float &p0 = s[4 * n + 2 * half], &p1 = s[4 * n + 2 * half + 1];
            p0 = math::exp2_approximate(__fmaf_rn(p0, scale, shift));
            p1 = math::exp2_approximate(__fmaf_rn(p1, scale, shift));
            sum += p0 + p1;
        }
        // (In fp8 the sum is that of rounded probabilities, which comes from the product with the values.)
        if constexpr (!C::IN_FP8) seen.total[half] = __fmaf_rn(seen.total[half], keep[half], sum);
    }
}

// Packs probabilities as the first operand of the product with the values.
template <typename C>
__device__ __forceinline__ void round_to(u32 (&p)[C::KEYS / 16][4], const float (&s)[C::KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < C::KEYS / 4; i++) p[i / 4][i % 4] = pack<typename C::T>(s[2 * i], s[2 * i + 1]);
}

// The warpgroup zeros the values of a tile's tokens from `count` to the end of their box. These may be NaN, and a
// probability of 0 does not remove a NaN. (Each warpgroup does this itself; all write the same zeros.)
template <typename C>
__device__ __forceinline__ void clear_past(u8* value_tile, int count, int barrier) {
    const int rows = (TILE - count % TILE) % TILE;
    if (rows == 0) return;
#pragma unroll
    for (int atom = 0; atom < C::ATOMS; atom++) {
        uint4* to = reinterpret_cast<uint4*>(value_tile + atom * C::KV_ATOM + count * 128);
        for (int i = threadIdx.x % 128; i < rows * 8; i += 128) to[i] = make_uint4(0, 0, 0, 0);
    }
    tma::fence_shared();
    ptx::sync_threads(barrier, 128);
}

// Divides the sums by their totals, multiplies them by the scale of values, and stores them to `out`. The way leads through
// the shared memory of the warpgroup's queries, which are no longer needed.
template <typename C>
__device__ __forceinline__ void finish(u8* queries, const PrefillWork<C>& work, int head, const float (&o)[C::D / 2], const Seen& seen,
                                       float value_scale, typename C::T* out, epilogue::Rounding<C::ROUNDS> rounding) {
    using T = typename C::T;
    const fp8::Divisor divisor = rounding.prepare();
    const int lane = threadIdx.x % 32, first_row = threadIdx.x % 128 / 32 * 16;
    const auto place = [&](int row, int piece) {
        return queries + piece / 8 * C::BOX + row * 128 + (piece % 8 ^ row % 8) * 16;
    };
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = seen.total[half];
        if constexpr (!C::IN_FP8) {
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        }
        const float by = value_scale / sum;
#pragma unroll
        for (int n = 0; n < C::D / 8; n++) {
            *reinterpret_cast<u32*>(place(first_row + lane / 4 + half * 8, n) + lane % 4 * 4) =
                pack<T>(o[4 * n + 2 * half] * by, o[4 * n + 2 * half + 1] * by);
        }
    }
    __syncwarp();
    constexpr int PIECES = C::D / VECTOR;
#pragma unroll
    for (int i = 0; i < 16 * PIECES / 32; i++) {
        const int row = first_row + (i * 32 + lane) / PIECES, piece = (i * 32 + lane) % PIECES;
        if (row >= work.end - work.position) continue;
        const i64 at = (static_cast<i64>(work.first_query + row) * C::HEADS + head) * C::D + piece * VECTOR;
        epilogue::store_words(out, at, *reinterpret_cast<const uint4*>(place(row, piece)), rounding, divisor);
    }
}

// A consumer: one warpgroup.
template <typename C, typename WorkAt>
__device__ __forceinline__ void consume(Rings<C> rings, u8* shared, int num_works, WorkAt work_at, float scale, float value_scale,
                                        typename C::T* out, epilogue::Rounding<C::ROUNDS> rounding) {
    // (Taken from lane 0, so that the compiler knows it to be uniform, as descriptors have to be.)
    const int warpgroup = C::WARPGROUPS == 1 ? 0 : __shfl_sync(~0u, threadIdx.x / 128, 0), barrier = 1 + warpgroup;
    // While one of two warpgroups multiplies, the other computes probabilities. Each gives the turn to the other once
    // its own products are under way. Both have equally many tiles, so every turn that is given is taken.
    constexpr bool TURNS = C::WARPGROUPS == 2;
    constexpr int TURN = 4;
    const auto take_turn = [&] {
        if constexpr (TURNS) ptx::sync_threads(TURN + warpgroup, 256);
    };
    const auto give_turn = [&] {
        if constexpr (TURNS) ptx::arrive_threads(TURN + 1 - warpgroup, 256);
    };
    if (static_cast<int>(blockIdx.x) >= num_works) return;
    if (warpgroup == 1) give_turn();
    PrefillWork<C> work = work_at(blockIdx.x), next = work;
    for (int index = blockIdx.x; index < num_works; index += gridDim.x, work = next) {
        const int first_row = work.position + threadIdx.x % 128 / 32 * 16;
        u8* queries = shared + rings.query_offset() + warpgroup * C::QUERY_BYTES;
        const u32 q = wgmma::descriptor(ptx::shared_address(queries));
        float s[C::KEYS / 2], o[C::D / 2] = {}, keep[2];
        u32 p[C::KEYS / 16][4];
        Seen seen;

        rings.queries.wait_full();
        rings.keys.wait_full();
        score<C>(s, q, rings.key_tile());
        // Looks up the next work early, so that nobody waits for it later.
        next = work_at(min(index + static_cast<int>(gridDim.x), num_works - 1));
        wgmma::wait<0>();
        wgmma::pin(s);
        rings.keys.release();
        int tile = work.first_tile;
        soften<C>(s, tile, first_row, scale, seen, keep);
        round_to<C>(p, s);
        rings.values.wait_full();
        for (tile++; tile * C::KEYS < work.end; tile++) {
            rings.keys.wait_full();
            take_turn();
            score<C>(s, q, rings.key_tile());
            add_values<C, C::KEYS>(o, p, rings.value_tile());
            give_turn();
            wgmma::wait<1>();
            wgmma::pin(s);
            rings.keys.release();
            soften<C>(s, tile, first_row, scale, seen, keep);
            // (This wait stands here because it is a branch. Without a branch, the assembler would make all of the
            // above wait for the products.)
            rings.values.wait_next_full();
            wgmma::wait<0>();
            wgmma::pin(o);
            rings.values.release();
            // Most maxima are found early. Then all factors are 1, and this is skipped.
            if (!__all_sync(ALL_LANES, keep[0] == 1.0f && keep[1] == 1.0f)) {
#pragma unroll
                for (int i = 0; i < C::D / 2; i++) o[i] *= keep[i % 4 / 2];
            }
            round_to<C>(p, s);
        }
        const int count = work.end - (tile - 1) * C::KEYS;
        clear_past<C>(shared + C::VALUES_AT + rings.values.stage * C::KV_BYTES, count, barrier);
        if (C::PAGES == 1 || count > TILE) {
            add_values<C, C::KEYS>(o, p, rings.value_tile());
        } else {
            add_values<C, TILE>(o, p, rings.value_tile());
        }
        wgmma::wait<0>();
        wgmma::pin(o);
        rings.values.release();
        // No warp's products read the queries any more.
        ptx::sync_threads(barrier, 128);
        finish<C>(queries, work, work.head + warpgroup, o, seen, value_scale, out, rounding);
        tma::fence_shared();
        __syncwarp();
        rings.queries.release();
    }
    if (warpgroup == 0) take_turn();
}

// Maps: query [tokens][columns] in boxes of 64 × 64, keys and values [blocks · KV_HEADS · BLOCK_SIZE][D] in boxes of 64
// × 64. (The host's part of the step block was uploaded before any kernel of the step started.)
template <typename C>
__global__ void __launch_bounds__(C::THREADS, C::PER_SM)
    prefill_wgmma(const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
                  const __grid_constant__ TensorMap value, const step::Header* header, const int2* items, const i32* cu_query_lens,
                  const i32* seq_lens, const i32* block_table, i32 table_width, float scale, float value_scale, typename C::T* out,
                  const float* divisor, e4m3_t* rounded) {
    pdl::launch_dependents();
    extern __shared__ u8 dynamic_shared[];
    u8* shared = dynamic_shared + (1024 - ptx::shared_address(dynamic_shared) % 1024) % 1024;
    const Rings<C> rings(ptx::shared_address(shared));
    if (threadIdx.x == 0) {
        constexpr int WARPS = C::WARPGROUPS * 4;
        rings.queries.init(WARPS);
        rings.keys.init(WARPS);
        rings.values.init(WARPS);
        mbarrier::fence_init();
        tma::prefetch(query);
        tma::prefetch(key);
        tma::prefetch(value);
    }
    __syncthreads();
    const int num_works = header->num_prefill_items * C::PER_ITEM;
    const auto work_at = [=](int index) { return PrefillWork<C>(index, items, cu_query_lens, seq_lens); };
    if (threadIdx.x >= C::WARPGROUPS * 128) {
        if constexpr (C::WARPGROUPS > 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::PRODUCER_REGISTERS));
        pdl::wait();
        if (threadIdx.x / 32 == C::WARPGROUPS * 4 && ptx::elect()) {
            produce<C>(rings, num_works, work_at, query, key, value, block_table, table_width);
        }
    } else {
        if constexpr (C::WARPGROUPS > 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::CONSUMER_REGISTERS));
        pdl::wait();
        consume<C>(rings, shared, num_works, work_at, scale, value_scale, out, {rounded, divisor});
    }
}

}  // namespace attention
