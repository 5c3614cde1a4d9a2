// Op: attention of decodes (the first `num_decodes` sequences, one query each); by `rope_decode_tma` with the rope_write_kv before it. CPU
//   twins: kernels/attention.rs, kernels/rope.rs, kernels/kv.rs.
// Regime: any batch and context; 16-bit types. `rope_decode_tma`: steps of few decodes and nothing else, groups of up to eight heads.
// Tile: 64 tokens of one KV head, keys and values separately. Otherwise as decode_paged, with the same arithmetic
//   (decode.cuh) and the same bits.
// Grid: as decode_paged. A ring of SLOTS tiles of keys or values is loaded ahead, across works.
// Numerics: as decode_paged.
// Requires: sm_90a; D of 64 or 128 (128 with an fp8 cache), blocks of a multiple of 64 tokens. Keys and values of earlier steps are read before
//   the wait, since nothing in this step writes them.
//   `rope_decode_tma` leaves the queries as they are.
// Traffic: keys and values are read once for 16 heads of a group. Of a tile, only strips of 16 tokens with a visible
//   token are read.
// Measured: H200, 32 query heads over 8 KV heads of 128, per cent of read: 64 contexts of 4096 95 (fp8 cache 84), 128 of 1500 96
//   (84), 256 of 128 88 (57). One context of 4096 takes 9.6 µs with its launch.
//
// The producer is one thread of a separate warp. It looks up works and blocks and has TMA fill the ring. The four warps
// that compute wait only for full slots, and for each other only when they merge.
#pragma once

#include "attention/buffers.cuh"
#include "attention/decode.cuh"
#include "ptx/pdl.cuh"
#include "ptx/tma.cuh"

namespace attention {

template <typename T, typename Stored, int COLS, int HEADS, int KV_HEADS, int D, int BLOCK_SIZE, int WINDOW, bool ROUNDS,
          int SLOTS_, int PER_SM_, int SHARED_>
struct DecodeStream : Decode<T, Stored, COLS, HEADS, KV_HEADS, D, BLOCK_SIZE, WINDOW, ROUNDS> {
    using Base = Decode<T, Stored, COLS, HEADS, KV_HEADS, D, BLOCK_SIZE, WINDOW, ROUNDS>;
    static constexpr int SLOTS = SLOTS_;    // tiles of keys or values in shared memory
    static constexpr int PER_SM = PER_SM_;  // CTAs of a multiprocessor
    static constexpr int THREADS = DECODE_THREADS + 32;

    // A tile is ATOMS atoms of 64 rows of 128 bytes, one for each WIDTH elements of D. A strip is a warp's 16 rows of an
    // atom.
    static constexpr int WIDTH = 128 / sizeof(Stored), ATOMS = D / WIDTH, ATOM = TILE * 128, STRIP = 16 * 128, SLOT = ATOMS * ATOM;
    static constexpr int MERGE_AT = SLOTS * SLOT, KEPT_AT = MERGE_AT + sizeof(typename Base::Merge);
    static constexpr int BARRIERS_AT = KEPT_AT + Base::ROWS * D * sizeof(float);
    static constexpr int SHARED = BARRIERS_AT + SLOTS * 16;
    static_assert(SHARED == SHARED_, "what the launch asks for");
    static_assert(D <= 128 && D % WIDTH == 0 && BLOCK_SIZE % TILE == 0, "whole boxes");

    // The layout that TMA's swizzle makes.
    struct Layout {
        static __device__ __forceinline__ u32 at(int row, int piece) {
            return piece / 8 * ATOM + row * 128 + (piece % 8 ^ row % 8) * 16;
        }
        // Given the address of a row's piece 0 or 1, the address of the piece 2 · k further on.
        static __device__ __forceinline__ u32 step(u32 address, int k) { return (address ^ k % 4 * 32) + k / 4 * ATOM; }
    };

    // The tiles as the computing warps see them. A warp arrives at the slot's barrier after its reads; the __syncwarp ensures
    // that all lanes have read. The producer waits for that barrier, and fences before it copies into the slot again.
    struct Tiles {
        using Layout = DecodeStream::Layout;
        static constexpr bool ZEROED = false;

        u32 base;
        Buffers<SLOTS> ring;
        u8* shared;

        // (In registers, these would be spilled.)
        __device__ __forceinline__ float4& kept(int n) const {
            return reinterpret_cast<float4*>(shared + KEPT_AT)[n * DECODE_THREADS + threadIdx.x];
        }
        __device__ __forceinline__ void wait() const { pdl::wait(); }
        __device__ __forceinline__ void next() const {}
        __device__ __forceinline__ u32 keys() const {
            ring.wait_full();
            return base + ring.stage * SLOT;
        }
        __device__ __forceinline__ u32 values() const { return keys(); }
        // The place of the values behind the present keys.
        __device__ __forceinline__ u32 values_ahead() const {
            Tiles ahead = *this;
            ahead.ring.advance();
            return ahead.values();
        }
        __device__ __forceinline__ void release() {
            __syncwarp();
            ring.release();
        }
        // (A warp waits until the slot is full even if it skips it. Otherwise it might release the slot twice for one
        // filling.)
        __device__ __forceinline__ void skip() {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                ring.wait_full();
                release();
            }
        }
    };
};

// The tensor maps of keys or of values: with boxes of a whole tile's rows of 128 bytes, and with boxes of a strip's 16
// rows.
struct DecodeMaps {
    const TensorMap &tile, &strip;
};

// The producer: one thread. It waits for the kernels before this one only if they write newest tokens.
template <typename C, bool WAITS>
__device__ __forceinline__ void produce(u32 base, Buffers<C::SLOTS> ring, const DecodeList<typename C::Base>& list,
                                        const DecodeMaps& keys, const DecodeMaps& values, const i32* block_table, i32 table_width) {
    using Work = DecodeWork<typename C::Base>;
    // Each tile is read once, unless several parts of a group read it.
    constexpr u64 POLICY = C::PARTS == 1 ? tma::EVICT_FIRST : tma::EVICT_NORMAL;
    const auto tile_of = [](const Work& work, int i) { return work.split * C::SPLIT_TILES + i; };
    const auto has = [&](const Work& work, int i) { return tile_of(work, i) >= work.tile() && tile_of(work, i) < work.last(); };
    // Where the rows of a work's tiles begin among the rows of all blocks, [blocks, KV_HEADS, BLOCK_SIZE].
    const auto locate = [&](const Work& work, int (&rows)[C::SPLIT_TILES]) {
        const i32* blocks = block_table + static_cast<i64>(work.seq) * table_width;
#pragma unroll
        for (int i = 0; i < C::SPLIT_TILES; ++i) {
            if (!has(work, i)) continue;
            const int token = tile_of(work, i) * TILE;
            rows[i] = (blocks[token / C::BLOCK_SIZE] * C::KV_HEADS + work.head()) * C::BLOCK_SIZE + token % C::BLOCK_SIZE;
        }
    };
    // Strips [first, end) of a tile.
    const auto load = [&](const DecodeMaps& maps, int row, int first, int end) {
        ring.wait_empty();
        tma::fence_shared();
        mbarrier::arrive_expect(ring.full(), (end - first) * C::ATOMS * C::STRIP);
        const u32 to = base + ring.stage * C::SLOT;
        if (end - first == TILE / 16) {
#pragma unroll
            for (int atom = 0; atom < C::ATOMS; ++atom) {
                tma::load(to + atom * C::ATOM, maps.tile, ring.full(), POLICY, atom * C::WIDTH, row);
            }
        } else {
#pragma unroll 1
            for (int i = first; i < end; ++i) {
#pragma unroll
                for (int atom = 0; atom < C::ATOMS; ++atom) {
                    tma::load(to + atom * C::ATOM + i * C::STRIP, maps.strip, ring.full(), POLICY, atom * C::WIDTH, row + i * 16);
                }
            }
        }
        ring.advance();
    };

    // Blocks and items are read before they are needed: the blocks of the next work, and the item of the work after
    // that.
    int index = list.begin;
    Work work(index, list.at(index)), next = work;
    int4 next_item = list.at(index + 1);
    int rows[C::SPLIT_TILES] = {}, next_rows[C::SPLIT_TILES] = {};
    locate(work, rows);
    bool waited = !WAITS;
    for (; index < list.end; ++index) {
        if (!next.advance()) next.begin(next_item);
        locate(next, next_rows);
        next_item = list.at(index + 2);
#pragma unroll
        for (int i = 0; i < C::SPLIT_TILES; ++i) {
            if (!has(work, i)) continue;
            const int token = tile_of(work, i) * TILE;
            // The last token's key and value are written in this step, so wait for them.
            if (!waited && token + TILE >= work.end) {
                pdl::wait();
                waited = true;
            }
            const int first = max(work.first() - token, 0) / 16, end = ceil_div(min(work.end - token, TILE), 16);
            load(keys, rows[i], first, end);
            load(values, rows[i], first, end);
        }
        work = next;
#pragma unroll
        for (int i = 0; i < C::SPLIT_TILES; ++i) rows[i] = next_rows[i];
    }
}

template <typename C, typename Newest>
__device__ __forceinline__ void decode(const DecodeMaps& keys, const DecodeMaps& values, const step::Header* header, const int4* items,
                                       const i32* block_table, i32 table_width, const typename C::T* query, float scale, float value_scale,
                                       const typename C::Base::Output& output, float* partials, i32 max_splits, u32* tickets,
                                       const Newest& newest) {
    using Base = typename C::Base;
    // (Nothing else lies in shared memory, so it begins at a multiple of 1024, as the swizzle needs it.)
    extern __shared__ __align__(1024) u8 shared[];
    const DecodeList<Base> list(items, header->num_decode_items);
    if (list.is_idle()) return;
    const u32 base = ptx::shared_address(shared);
    const Buffers<C::SLOTS> ring{base + C::BARRIERS_AT};
    if (threadIdx.x == DECODE_THREADS) {
        ring.init(DECODE_WARPS);
        mbarrier::fence_init();
        for (const DecodeMaps* maps : {&keys, &values}) tma::prefetch(maps->tile), tma::prefetch(maps->strip);
    }
    __syncthreads();
    if (threadIdx.x >= DECODE_THREADS) {
        if (ptx::elect()) produce<C, !Newest::WRITES>(base, ring, list, keys, values, block_table, table_width);
        pdl::wait();
    } else {
        auto& merge = *reinterpret_cast<typename Base::Merge*>(shared + C::MERGE_AT);
        if (threadIdx.x == 0) prepare<Base>(merge, output);
        typename C::Tiles tiles{base, ring, shared};
        attend<Base>(tiles, merge, list, query, scale, value_scale, output, {partials, max_splits}, tickets, newest);
    }
}

// Maps: keys and values [blocks · KV_HEADS · BLOCK_SIZE][D], in boxes of WIDTH elements of 64 rows, and of 16 rows.
template <typename C>
__global__ void __launch_bounds__(C::THREADS, C::PER_SM)
    decode_tma(const __grid_constant__ TensorMap key_tiles, const __grid_constant__ TensorMap key_strips,
               const __grid_constant__ TensorMap value_tiles, const __grid_constant__ TensorMap value_strips, const step::Header* header,
               const int4* items, const i32* block_table, i32 table_width, const typename C::T* query, float scale,
               float value_scale, typename C::T* out, float* partials, i32 max_splits, u32* tickets, const float* divisor, e4m3_t* rounded) {
    pdl::launch_dependents();
    decode<C>({key_tiles, key_strips}, {value_tiles, value_strips}, header, items, block_table, table_width, query, scale, value_scale,
              {out, {rounded, divisor}}, partials, max_splits, tickets, IsWritten{});
}

// rope_write_kv and attention of a step that has only decodes. `query` are rows Q ‖ K ‖ V, which stay as they are.
template <typename C, bool DIRECTED>
__global__ void __launch_bounds__(C::THREADS, C::PER_SM)
    rope_decode_tma(const __grid_constant__ TensorMap key_tiles, const __grid_constant__ TensorMap key_strips,
                    const __grid_constant__ TensorMap value_tiles, const __grid_constant__ TensorMap value_strips, const step::Header* header,
                    const int4* items, const i32* block_table, i32 table_width, const typename C::T* query, float scale,
                    float value_scale, typename C::T* out, float* partials, i32 max_splits, u32* tickets, const float* divisor,
                    e4m3_t* rounded, const i32* slots, const float2* table, float key_scale, typename C::Stored* keys,
                    typename C::Stored* values, const float* directions) {
    pdl::launch_dependents();
    const Writes<typename C::Base, DIRECTED> newest{slots, table, query, key_scale, value_scale, keys, values, directions};
    decode<C>({key_tiles, key_strips}, {value_tiles, value_strips}, header, items, block_table, table_width, query, scale, value_scale,
              {out, {rounded, divisor}}, partials, max_splits, tickets, newest);
}

}  // namespace attention
