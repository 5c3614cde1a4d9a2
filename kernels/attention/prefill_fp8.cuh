// Op: attention of all sequences that are not decodes, with an fp8 cache. CPU twin: kernels/attention.rs.
// Regime: any chunk and context; 16-bit types.
// Tile, Grid: as prefill_wgmma, with two warpgroups.
// Numerics: as prefill_wgmma on a cache of the numbers that this one stores. They become T exactly; the scales of keys and
//   values are parts of `scale` and `value_scale`.
// Requires: sm_90a; D of 64 or 128, blocks of a multiple of 64 tokens, an even number of heads in a group, rows of the query
//   of whole 16-byte pieces.
// Traffic: half of prefill_wgmma's.
// Measured: H200, 8 prompts of 2048 tokens, 32 query heads over 8 KV heads of 128: 949 µs.
//
// The consumers are those of prefill_wgmma. Their products need 16-bit tiles in shared memory: wgmma takes values, with D
// innermost, only in 16 bits. So the producers are a whole warpgroup that converts each tile once for both heads, while the
// consumers compute with the tile before. (As register operands of the products, keys and values would have to be converted
// by each warpgroup again, in registers that its sums need.) A thread copies pieces of 16 bytes by cp.async to a place of
// its own, reads them from there when they have arrived, and writes the converted pieces to the tile. So no thread waits for
// another one's copies.
#pragma once

#include "attention/prefill_wgmma.cuh"
#include "base/fp8.cuh"
#include "ptx/cp_async.cuh"

namespace attention {

// Which pieces of a tile a thread of the producers has. The four pieces of a row's 64 elements belong to four neighbours,
// and eight neighbours have two rows, so that what they write at once lies in different banks.
template <typename C>
struct OwnPieces {
    static constexpr int ROW_STEPS = C::KEYS / 32, COUNT = C::ATOMS * ROW_STEPS;
    static_assert(COUNT * 128 * 16 == C::KEYS * C::D, "whole pieces");

    const int thread = threadIdx.x % 128;

    // Of the i-th piece: its row, which lies in page `page(i)`, and its first element of D.
    __device__ __forceinline__ int row(int i) const { return i % ROW_STEPS * 32 + thread / 4; }
    static __device__ constexpr int page(int i) { return i % ROW_STEPS * 32 / TILE; }
    __device__ __forceinline__ int column(int i) const { return i / ROW_STEPS * 64 + thread % 4 * 16; }
    // Where it lies among all threads' pieces, in bytes.
    __device__ __forceinline__ int stored(int i) const { return (i * 128 + thread) * 16; }
    // Where the first or second half of its converted elements lies in a tile, in bytes.
    __device__ __forceinline__ int converted(int i, int half) const {
        const int piece = (thread % 4 * 2 + half) ^ (thread / 4 % 8);
        return i / ROW_STEPS * C::KV_ATOM + row(i) * 128 + piece * 16;
    }
};

// The next tile that the producers copy. Before a work's first tile they load its queries.
template <typename C, typename WorkAt>
struct NextTile {
    const int num_works;
    const WorkAt work_at;
    const i32* const block_table;
    const i32 table_width;
    int index;
    PrefillWork<C> work;
    int tile;
    // Where the tile's pages begin among the rows of all blocks, [blocks, KV_HEADS, BLOCK_SIZE].
    int rows[C::PAGES] = {};

    __device__ __forceinline__ NextTile(int num_works, WorkAt work_at, const i32* block_table, i32 table_width)
        : num_works(num_works), work_at(work_at), block_table(block_table), table_width(table_width), index(blockIdx.x),
          work(work_at(blockIdx.x)), tile(work.first_tile) {
        locate();
    }
    __device__ __forceinline__ bool exists() const { return index < num_works; }
    __device__ __forceinline__ bool is_first() const { return tile == work.first_tile; }
    // (The table is read a tile before the copies need it.) A page without a visible token may have no block.
    __device__ __forceinline__ void locate() {
        const i32* blocks = block_table + static_cast<i64>(work.seq) * table_width;
#pragma unroll
        for (int i = 0; i < C::PAGES; i++) {
            const int token = tile * C::KEYS + i * TILE;
            if (token >= work.end) continue;
            const int head = blocks[token / C::BLOCK_SIZE] * C::KV_HEADS + work.head / (C::HEADS / C::KV_HEADS);
            rows[i] = head * C::BLOCK_SIZE + token % C::BLOCK_SIZE;
        }
    }
    __device__ __forceinline__ void advance() {
        tile++;
        if (tile * C::KEYS >= work.end) {
            index += gridDim.x;
            if (!exists()) return;
            work = work_at(index);
            tile = work.first_tile;
        }
        locate();
    }
};

// The producers: a warpgroup.
template <typename C, typename WorkAt>
__device__ __forceinline__ void convert(Rings<C> rings, u8* shared, int num_works, WorkAt work_at, const TensorMap& query,
                                        const e4m3_t* keys, const e4m3_t* values, const i32* block_table, i32 table_width) {
    using Own = OwnPieces<C>;
    if (static_cast<int>(blockIdx.x) >= num_works) return;
    const Own own;
    u8* const stored = shared + C::STORED_AT;
    NextTile<C, WorkAt> next(num_works, work_at, block_table, table_width);
    const auto load_queries = [&] {
        if (threadIdx.x / 32 == C::WARPGROUPS * 4 && ptx::elect()) {
            rings.queries.wait_empty();
            mbarrier::arrive_expect(rings.queries.full(), C::QUERIES);
#pragma unroll
            for (int i = 0; i < C::WARPGROUPS * C::ATOMS; i++) {
                const int column = (next.work.head + i / C::ATOMS) * C::D + i % C::ATOMS * 64;
                tma::load(rings.base + rings.query_offset() + i * C::BOX, query, rings.queries.full(), tma::EVICT_FIRST, column,
                          next.work.first_query);
            }
        }
        __syncwarp();
        rings.queries.advance();
    };
    // Starts to copy the next tile's keys or values, if there is one. Tokens behind the last visible one become zeros.
    const auto copy = [&](const e4m3_t* from, int half) {
        if (next.exists()) {
            const u32 to = ptx::shared_address(stored + half * C::STORED_BYTES);
#pragma unroll
            for (int i = 0; i < Own::COUNT; i++) {
                const int row = own.row(i);
                const i64 vector = next.rows[Own::page(i)] + row % TILE;
                ptx::cp_async_16(to + own.stored(i), from + vector * C::D + own.column(i), next.tile * C::KEYS + row < next.work.end);
            }
        }
        ptx::cp_async_commit();
    };
    // Converts what the thread has copied. `ring` is that of the tiles, which begin `at` bytes behind the shared memory's
    // start.
    const auto fill = [&](Buffers<C::STAGES>& ring, int at, int half) {
        ptx::cp_async_wait_group<1>();
        ring.wait_empty();
        const u8* from = stored + half * C::STORED_BYTES;
        u8* to = shared + at + ring.stage * C::KV_BYTES;
#pragma unroll 2
        for (int i = 0; i < Own::COUNT; i++) {
            const uint4 bytes = *reinterpret_cast<const uint4*>(from + own.stored(i));
            const fp8::Pairs a = fp8::neighbours<typename C::T>(bytes.x), b = fp8::neighbours<typename C::T>(bytes.y);
            const fp8::Pairs c = fp8::neighbours<typename C::T>(bytes.z), d = fp8::neighbours<typename C::T>(bytes.w);
            *reinterpret_cast<uint4*>(to + own.converted(i, 0)) = make_uint4(a.first, a.second, b.first, b.second);
            *reinterpret_cast<uint4*>(to + own.converted(i, 1)) = make_uint4(c.first, c.second, d.first, d.second);
        }
        // Products read the tile as asynchronous copies do.
        tma::fence_shared();
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier::arrive(ring.full());
        ring.advance();
    };

    load_queries();
    copy(keys, 0);
    copy(values, 1);
    for (bool more = true; more;) {
        next.advance();
        more = next.exists();
        if (more && next.is_first()) load_queries();
        fill(rings.keys, C::KEYS_AT, 0);
        copy(keys, 0);
        fill(rings.values, C::VALUES_AT, 1);
        copy(values, 1);
    }
    ptx::cp_async_wait_group<0>();
}

// Map: query [tokens][columns] in boxes of 64 × 64. (The host's part of the step block was uploaded before any kernel of the
// step started.)
template <typename C>
__global__ void __launch_bounds__(C::THREADS, C::PER_SM)
    prefill_fp8(const __grid_constant__ TensorMap query, const step::Header* header, const int2* items, const i32* cu_query_lens,
                const i32* seq_lens, const i32* block_table, i32 table_width, const typename C::Stored* keys,
                const typename C::Stored* values, float scale, float value_scale, typename C::T* out, const float* divisor,
                e4m3_t* rounded) {
    pdl::launch_dependents();
    extern __shared__ u8 dynamic_shared[];
    u8* shared = dynamic_shared + (1024 - ptx::shared_address(dynamic_shared) % 1024) % 1024;
    const Rings<C> rings(ptx::shared_address(shared));
    if (threadIdx.x == 0) {
        constexpr int WARPS = C::WARPGROUPS * 4, FILLERS = C::PRODUCERS / 32;
        rings.queries.init(WARPS);
        rings.keys.init(WARPS, FILLERS);
        rings.values.init(WARPS, FILLERS);
        mbarrier::fence_init();
        tma::prefetch(query);
    }
    __syncthreads();
    const int num_works = header->num_prefill_items * C::PER_ITEM;
    const auto work_at = [=](int index) { return PrefillWork<C>(index, items, cu_query_lens, seq_lens); };
    if (threadIdx.x >= C::WARPGROUPS * 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::PRODUCER_REGISTERS));
        pdl::wait();
        convert<C>(rings, shared, num_works, work_at, query, keys, values, block_table, table_width);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::CONSUMER_REGISTERS));
        pdl::wait();
        consume<C>(rings, shared, num_works, work_at, scale, value_scale, out, {rounded, divisor});
    }
}

}  // namespace attention
