// Op: attention of all sequences that are not decodes, with an fp8 cache and products in fp8. CPU twin: kernels/attention.rs.
// Regime: any chunk and context; 16-bit types.
// Tile, Grid: as prefill_wgmma, with two warpgroups and tiles of 128 tokens.
// Numerics: queries are rounded to e4m3 as they are, probabilities as 256 times their size relative to a power of two. Products
//   of e4m3 are summed by the tensor cores from zero for each tile; these sums are added up in f32, ascending. As in
//   prefill_wgmma, a row's bits do not depend on the chunking.
// Requires: sm_90a; D of 128, blocks of a multiple of 64 tokens, an even number of heads in a group, rows of the query of whole
//   16-byte pieces.
// Traffic: as prefill_fp8.
// Measured: H200, 8 prompts of 2048 tokens, 32 query heads over 8 KV heads of 128: 597 µs.
//
// Keys come by TMA as the products take them. Values do not: products of e4m3 take rows of V only with tokens innermost. So a
// warpgroup of producers transposes each tile of values once for both heads, while the consumers compute with the tile before.
//
// It does so by pairs of bytes, with ldmatrix. What a lane then has of 16 tokens are the two numbers of D of tokens 2c, 2c + 1,
// 8 + 2c and 8 + 2c + 1 (c = lane % 4), and it writes these four side by side. So the tokens of a tile change places within each 16:
// the c-th four are those that a lane has of scores. That is the order in which a lane holds its part of the first operand, so
// probabilities stay in the registers where they arise.
//
// A tile of transposed values has eight more rows, of ones. Their products are the sums of the rounded probabilities.
#pragma once

#include "attention/prefill_fp8.cuh"
#include "base/fp8.cuh"
#include "ptx/mma.cuh"

namespace attention {

template <typename Element, typename StoredElement, int HEADS_, int KV_HEADS_, int D_, int BLOCK_SIZE_, int WINDOW_, bool ROUNDS_, int STAGES_,
          int SHARED_>
struct Fp8Prefill {
    using T = Element;
    using Stored = StoredElement;
    static constexpr bool IN_FP8 = true;
    static constexpr bool ROUNDS = ROUNDS_;
    static constexpr int HEADS = HEADS_, KV_HEADS = KV_HEADS_, D = D_;
    static constexpr int BLOCK_SIZE = BLOCK_SIZE_;
    static constexpr int WINDOW = WINDOW_;
    static constexpr int WARPGROUPS = 2;   // consumers, and heads of a work item
    static constexpr int KEYS = 128;       // tokens of a tile of keys
    static constexpr int STAGES = STAGES_;  // tiles of keys, and of transposed values, in shared memory

    static constexpr int ATOMS = D / 64;  // swizzle atoms of 128 bytes along D, of 16-bit queries
    static constexpr int PAGES = KEYS / TILE;
    static constexpr int PER_ITEM = HEADS / WARPGROUPS;
    // A box is 64 rows of 128 bytes. Queries lie in the order of warpgroups, then atoms. Rounded queries and keys have rows
    // of D, values in the end rows of KEYS.
    static constexpr int BOX = 64 * 128;
    static constexpr int QUERY_BYTES = ATOMS * BOX, QUERIES = WARPGROUPS * QUERY_BYTES;
    static constexpr int TILE_BYTES = KEYS * D;
    // Rows of transposed values, and of these and ones.
    static constexpr int COLUMNS = D + 8, VALUE_BYTES = COLUMNS * KEYS;
    static constexpr int ROUNDED_AT = 2 * QUERIES, KEYS_AT = ROUNDED_AT + WARPGROUPS * BOX;
    static constexpr int STORED_AT = KEYS_AT + STAGES * TILE_BYTES, VALUES_AT = STORED_AT + 2 * TILE_BYTES;
    static constexpr int BARRIERS_AT = VALUES_AT + STAGES * VALUE_BYTES;
    static constexpr int SHARED = BARRIERS_AT + (2 + 2 + 2 * STAGES) * 16 + 1024;  // 1024 to align
    static_assert(SHARED == SHARED_, "what the launch asks for");

    static constexpr int THREADS = WARPGROUPS * 128 + 128;
    static constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

    static_assert(step::PREFILL_TILE == 64 && TILE == 64, "rows of a warpgroup, and of a box");
    static_assert(sizeof(Stored) == 1 && D == 128 && KEYS == 128 && BLOCK_SIZE % TILE == 0, "whole boxes");
    static_assert(HEADS / KV_HEADS % WARPGROUPS == 0, "heads of one group");
    static_assert(SHARED <= 232448, "shared memory of a CTA");
};

// The rings of a CTA.
template <typename C>
struct Fp8Rings {
    u32 base;
    Buffers<2> queries;
    // Tiles of values as the cache stores them.
    Buffers<2> stored;
    Buffers<C::STAGES> keys, values;

    explicit __device__ __forceinline__ Fp8Rings(u32 shared)
        : base(shared),
          queries{shared + C::BARRIERS_AT},
          stored{shared + C::BARRIERS_AT + 32},
          keys{shared + C::BARRIERS_AT + 64},
          values{shared + C::BARRIERS_AT + 64 + C::STAGES * 16} {}

    __device__ __forceinline__ int query_offset() const { return queries.stage * C::QUERIES; }
    __device__ __forceinline__ u32 key_tile() const { return base + C::KEYS_AT + keys.stage * C::TILE_BYTES; }
    __device__ __forceinline__ u32 value_tile() const { return base + C::VALUES_AT + values.stage * C::VALUE_BYTES; }
};

// The warps of the producers transpose a tile of values, each warp 32 elements of D. Tokens from `count` on become zeros: they may
// be NaN, and a probability of 0 does not remove a NaN.
template <typename C>
__device__ __forceinline__ void transpose(u32 from, u32 to, int count) {
    const int lane = threadIdx.x % 32, first = threadIdx.x % 128 / 32 * 32;
    // A lane's address of the four matrices of a load: tokens 0 to 7 and 8 to 15 of 16 elements of D, then of the next 16.
    const int token = lane / 8 % 2 * 8 + lane % 8, piece = first / 16 + lane / 16;
    from += token * 128 + (piece ^ lane % 8) * 16;
    // Lanes of the upper half write odd rows first, so that what a warp writes at once lies in different banks.
    const int flip = lane / 16, row = first + lane / 4 * 2;
    to += row * 128 + lane % 4 * 4;
#pragma unroll 1
    for (int group = 0; group < C::KEYS / 16; group++) {
        u32 r[4];
        ptx::ldmatrix_x4_trans(r, from + group * 16 * 128);
        if (count < C::KEYS) {
            const int left = count - group * 16 - lane % 4 * 2;
            const auto mask = [](int left) { return left > 1 ? ~0u : left > 0 ? 0xffffu : 0u; };
#pragma unroll
            for (int i = 0; i < 4; i++) r[i] &= mask(left - i % 2 * 8);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 even = __byte_perm(r[2 * i], r[2 * i + 1], 0x6420), odd = __byte_perm(r[2 * i], r[2 * i + 1], 0x7531);
            const auto place = [&](int odd) { return to + (i * 16 + odd) * 128 + ((group ^ (row + odd) % 8) * 16); };
            ptx::store_shared(place(flip), static_cast<int>(flip ? odd : even));
            ptx::store_shared(place(1 - flip), static_cast<int>(flip ? even : odd));
        }
    }
}

// The producers: a warpgroup. One of its threads starts the copies, a tile ahead of what the warpgroup transposes.
template <typename C, typename WorkAt>
__device__ __forceinline__ void produce_fp8(Fp8Rings<C> rings, int num_works, WorkAt work_at, const TensorMap& query,
                                            const TensorMap& key, const TensorMap& value, const i32* block_table, i32 table_width) {
    if (static_cast<int>(blockIdx.x) >= num_works) return;
    NextTile<C, WorkAt> next(num_works, work_at, block_table, table_width);
    // The place of a tile of values as the cache stores them, by how many tiles come before it.
    const auto place_of = [&](u32 number) {
        return Buffers<2>{rings.stored.barriers, static_cast<int>(number % 2), number / 2 % 2};
    };
    const auto copy = [&](u32 number) {
        if (threadIdx.x / 32 == C::WARPGROUPS * 4 && ptx::elect()) {
            if (next.is_first()) {
                rings.queries.wait_empty();
                mbarrier::arrive_expect(rings.queries.full(), C::QUERIES);
#pragma unroll 1
                for (int i = 0; i < C::WARPGROUPS * C::ATOMS; i++) {
                    const int column = (next.work.head + i / C::ATOMS) * C::D + i % C::ATOMS * 64;
                    tma::load(rings.base + rings.query_offset() + i * C::BOX, query, rings.queries.full(), tma::EVICT_FIRST, column,
                              next.work.first_query);
                }
            }
            // A box without a visible token may have no block. Its place in shared memory keeps old data, which is not used.
            const int boxes = min(C::PAGES, (next.work.end - next.tile * C::KEYS + TILE - 1) / TILE);
            const auto load = [&](u32 to, const TensorMap& map, u32 full) {
                mbarrier::arrive_expect(full, boxes * C::BOX);
#pragma unroll
                for (int i = 0; i < C::PAGES; i++) {
                    if (i < boxes) tma::load(to + i * C::BOX, map, full, tma::EVICT_NORMAL, 0, next.rows[i]);
                }
            };
            rings.keys.wait_empty();
            load(rings.key_tile(), key, rings.keys.full());
            const Buffers<2> stored = place_of(number);
            stored.wait_empty();
            load(rings.base + C::STORED_AT + stored.stage * C::TILE_BYTES, value, stored.full());
        }
        __syncwarp();
        if (next.is_first()) rings.queries.advance();
        rings.keys.advance();
    };

    copy(0);
    bool more = true;
    for (u32 number = 0; more; number++) {
        const int count = next.work.end - next.tile * C::KEYS;
        next.advance();
        more = next.exists();
        if (more) copy(number + 1);
        Buffers<2> stored = place_of(number);
        stored.wait_full();
        rings.values.wait_empty();
        transpose<C>(rings.base + C::STORED_AT + stored.stage * C::TILE_BYTES, rings.value_tile(), count);
        // Products read the tile as asynchronous copies do.
        tma::fence_shared();
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier::arrive(rings.values.full());
        rings.values.advance();
        stored.release();
    }
}

// A warpgroup rounds its queries: [ATOMS][64][64] of T become [64][D] of e4m3, both swizzled.
template <typename C>
__device__ __forceinline__ void round_queries(u8* to, const u8* queries) {
    using T = typename C::T;
    constexpr int PIECES = C::D / 16;
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < 64 * PIECES; i += 128) {
        const int row = i / PIECES, piece = i % PIECES;
        u32 words[4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = piece * 2 + half;
            const uint4 x = *reinterpret_cast<const uint4*>(queries + at / 8 * C::BOX + row * 128 + (at % 8 ^ row % 8) * 16);
            const auto both = [](u32 pair) { return fp8::pack(low_of<T>(pair), high_of<T>(pair)); };
            words[2 * half] = both(x.x) | both(x.y) << 16;
            words[2 * half + 1] = both(x.z) | both(x.w) << 16;
        }
        *reinterpret_cast<uint4*>(to + row * 128 + (piece ^ row % 8) * 16) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// Starts S = Q · Kᵀ. `q` is the descriptor of the warpgroup's rounded queries.
template <typename C>
__device__ __forceinline__ void score_fp8(float (&s)[C::KEYS / 2], u32 q, u32 key_tile) {
    const u32 k = wgmma::descriptor(key_tile);
    wgmma::fence();
    wgmma::FirstProduct<e4m3_t, C::KEYS>::run(s, q, k);
#pragma unroll
    for (int i = 1; i < C::D / 32; i++) wgmma::Product<e4m3_t, C::KEYS>::run(s, q + i * 2, k + i * 2);
    wgmma::commit();
}

// Starts O = P · V. What lies behind the D columns of O are sums of rows of P.
template <typename C>
__device__ __forceinline__ void weigh_values(float (&o)[C::COLUMNS / 2], u32 (&p)[C::KEYS / 32][4], u32 value_tile) {
    const u32 v = wgmma::descriptor(value_tile);
    wgmma::pin(p);
    wgmma::fence();
    wgmma::FirstFragmentProduct<e4m3_t, C::COLUMNS>::run(o, p[0], v);
#pragma unroll
    for (int i = 1; i < C::KEYS / 32; i++) wgmma::FragmentProduct<e4m3_t, C::COLUMNS>::run(o, p[i], v + i * 2);
    wgmma::commit();
}

// Packs probabilities as the first operand of the product with the values.
template <typename C>
__device__ __forceinline__ void round_to_e4m3(u32 (&p)[C::KEYS / 32][4], const float (&s)[C::KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < C::KEYS / 32; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            // Of 32 tokens: those of the first or second 16, for the upper or lower row.
            const int at = i * 16 + j / 2 * 8 + j % 2 * 2;
            p[i][j] = fp8::pack(s[at], s[at + 1]) | fp8::pack(s[at + 4], s[at + 5]) << 16;
        }
    }
}

// Adds a tile's sums to those of earlier tiles.
template <typename C>
__device__ __forceinline__ void add_tile(float (&o)[C::D / 2], Seen& seen, const float (&of_tile)[C::COLUMNS / 2]) {
#pragma unroll
    for (int i = 0; i < C::D / 2; i++) o[i] += of_tile[i];
#pragma unroll
    for (int half = 0; half < 2; half++) seen.total[half] += of_tile[C::D / 2 + 2 * half];
}

// A consumer: one warpgroup. While it computes probabilities, the other one multiplies. A tile's sum of values has accumulators of its
// own, so the tensor cores compute it before the next tile's scores: after it, the registers suffice for the probabilities.
template <typename C, typename WorkAt>
__device__ __forceinline__ void consume_fp8(Fp8Rings<C> rings, u8* shared, int num_works, WorkAt work_at, float scale,
                                            float value_scale, typename C::T* out, epilogue::Rounding<C::ROUNDS> rounding) {
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), barrier = 1 + warpgroup;
    constexpr int TURN = 4;
    const auto take_turn = [&] { ptx::sync_threads(TURN + warpgroup, 256); };
    const auto give_turn = [&] { ptx::arrive_threads(TURN + 1 - warpgroup, 256); };
    if (static_cast<int>(blockIdx.x) >= num_works) return;
    if (warpgroup == 1) give_turn();
    u8* const rounded = shared + C::ROUNDED_AT + warpgroup * C::BOX;
    const u32 q = wgmma::descriptor(ptx::shared_address(rounded));
    PrefillWork<C> work = work_at(blockIdx.x), next = work;
    for (int index = blockIdx.x; index < num_works; index += gridDim.x, work = next) {
        const int first_row = work.position + threadIdx.x % 128 / 32 * 16;
        u8* queries = shared + rings.query_offset() + warpgroup * C::QUERY_BYTES;
        float o[C::D / 2] = {}, keep[2];
        u32 p[C::KEYS / 32][4];
        Seen seen;

        rings.queries.wait_full();
        round_queries<C>(rounded, queries);
        tma::fence_shared();
        ptx::sync_threads(barrier, 128);
        rings.keys.wait_full();
        float first[C::KEYS / 2];
        score_fp8<C>(first, q, rings.key_tile());
        // Looks up the next work early, so that nobody waits for it later.
        next = work_at(min(index + static_cast<int>(gridDim.x), num_works - 1));
        wgmma::wait<0>();
        wgmma::pin(first);
        rings.keys.release();
        int tile = work.first_tile;
        soften<C>(first, tile, first_row, scale, seen, keep);
        round_to_e4m3<C>(p, first);
        for (tile++; tile * C::KEYS < work.end; tile++) {
            rings.keys.wait_full();
            rings.values.wait_full();
            // (Declared here, so that nothing has to be kept for them where they do not live.)
            float of_tile[C::COLUMNS / 2], s[C::KEYS / 2];
            take_turn();
            weigh_values<C>(of_tile, p, rings.value_tile());
            score_fp8<C>(s, q, rings.key_tile());
            give_turn();
            wgmma::wait<1>();
            wgmma::pin(of_tile);
            rings.values.release();
            add_tile<C>(o, seen, of_tile);
            wgmma::wait<0>();
            wgmma::pin(s);
            rings.keys.release();
            soften<C>(s, tile, first_row, scale, seen, keep);
            // The factors are powers of two. Most maxima are found early. Then all are 1, and this is skipped.
            if (!__all_sync(ALL_LANES, keep[0] == 1.0f && keep[1] == 1.0f)) {
#pragma unroll
                for (int i = 0; i < C::D / 2; i++) o[i] *= keep[i % 4 / 2];
                seen.total[0] *= keep[0];
                seen.total[1] *= keep[1];
            }
            round_to_e4m3<C>(p, s);
        }
        rings.values.wait_full();
        float of_tile[C::COLUMNS / 2];
        weigh_values<C>(of_tile, p, rings.value_tile());
        wgmma::wait<0>();
        wgmma::pin(of_tile);
        rings.values.release();
        add_tile<C>(o, seen, of_tile);
        // No warp's products read the rounded queries any more.
        ptx::sync_threads(barrier, 128);
        finish<C>(queries, work, work.head + warpgroup, o, seen, value_scale, out, rounding);
        tma::fence_shared();
        __syncwarp();
        rings.queries.release();
    }
    if (warpgroup == 0) take_turn();
}

// Maps: query [tokens][columns] in boxes of 64 × 64, keys and values [blocks · KV_HEADS · BLOCK_SIZE][D] in boxes of 64
// × 128. (The host's part of the step block was uploaded before any kernel of the step started.)
template <typename C>
__global__ void __launch_bounds__(C::THREADS, 1)
    prefill_e4m3(const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
                 const __grid_constant__ TensorMap value, const step::Header* header, const int2* items, const i32* cu_query_lens,
                 const i32* seq_lens, const i32* block_table, i32 table_width, float scale, float value_scale, typename C::T* out,
                 const float* divisor, e4m3_t* rounded) {
    pdl::launch_dependents();
    extern __shared__ u8 dynamic_shared[];
    u8* shared = dynamic_shared + (1024 - ptx::shared_address(dynamic_shared) % 1024) % 1024;
    const Fp8Rings<C> rings(ptx::shared_address(shared));
    if (threadIdx.x == 0) {
        constexpr int WARPS = C::WARPGROUPS * 4, PRODUCERS = 4;
        rings.queries.init(WARPS);
        rings.stored.init(PRODUCERS);
        rings.keys.init(WARPS);
        rings.values.init(WARPS, PRODUCERS);
        mbarrier::fence_init();
        tma::prefetch(query);
        tma::prefetch(key);
        tma::prefetch(value);
    }
    // The ones, which nobody overwrites.
    constexpr u32 ONES = 0x38383838;
    for (int i = threadIdx.x; i < C::STAGES * 8 * C::KEYS / 4; i += C::THREADS) {
        const int stage = i / (2 * C::KEYS), word = i % (2 * C::KEYS);
        *reinterpret_cast<u32*>(shared + C::VALUES_AT + stage * C::VALUE_BYTES + C::TILE_BYTES + word * 4) = ONES;
    }
    tma::fence_shared();
    __syncthreads();
    const int num_works = header->num_prefill_items * C::PER_ITEM;
    const auto work_at = [=](int index) { return PrefillWork<C>(index, items, cu_query_lens, seq_lens); };
    if (threadIdx.x >= C::WARPGROUPS * 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::PRODUCER_REGISTERS));
        pdl::wait();
        produce_fp8<C>(rings, num_works, work_at, query, key, value, block_table, table_width);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::CONSUMER_REGISTERS));
        pdl::wait();
        consume_fp8<C>(rings, shared, num_works, work_at, scale, value_scale, out, {rounded, divisor});
    }
}

}  // namespace attention
