// Op: attention of decodes (the first `num_decodes` sequences, one query each). CPU twin: kernels/attention.rs.
// Regime: any batch and context; 16-bit types. Where blocks and heads suit TMA, Hopper has decode_tma, whose bits are the same.
// Tile: 64 tokens of one KV head. The heads of a group (16 at most) share the tensor cores' products. Each of four
//   warps computes 16 of the tokens.
// Grid: persistent; a CTA has a run of works (works.cuh). A ring of STAGES tiles is loaded ahead, across works. Splits
//   of a sequence that several CTAs have are added by the one that finishes last.
// Numerics: scores in f32 by tensor cores; online softmax in base 2. The product with the values takes a probability as
//   the sum of two 16-bit parts, with a relative error of 2^-16 (bf16) or 2^-21 (f16). Warps and splits merge in
//   ascending order. Splits begin at multiples of 256 and tiles at multiples of 64, so a sequence's bits depend only on
//   the sequence. What an fp8 cache stores becomes T exactly; its scales are parts of `scale` and `value_scale`.
// Requires: D a multiple of 16 (32 with an fp8 cache), 128 at most. Keys and values of earlier steps are read before the wait, since nothing
//   in this step writes them.
// Traffic: keys and values are read once for 16 heads of a group.
// Measured: not since a CTA has a run of works.
#pragma once

#include "attention/decode.cuh"
#include "ptx/pdl.cuh"

namespace attention {

template <typename T, typename Stored, int COLS, int HEADS, int KV_HEADS, int D, int BLOCK_SIZE, int WINDOW, bool ROUNDS, int STAGES>
struct DecodeCopies : Decode<T, Stored, COLS, HEADS, KV_HEADS, D, BLOCK_SIZE, WINDOW, ROUNDS> {
    using Base = Decode<T, Stored, COLS, HEADS, KV_HEADS, D, BLOCK_SIZE, WINDOW, ROUNDS>;
    using Kv = Cache<Stored, KV_HEADS, D, BLOCK_SIZE>;
    static constexpr int STAGE = 2 * Kv::BYTES;

    // Tiles that the warps copy themselves. All warps together copy each tile.
    struct Tiles {
        using Layout = Rows<D * sizeof(Stored)>;
        static constexpr bool ZEROED = true;

        const DecodeList<Base> list;
        const Kv cache;
        const i32* const block_table;
        const i32 table_width;
        const u32 ring;
        // The next tile to copy, if there is one, and its block. Items and blocks are read one turn before they are
        // needed: the item of the work after `ahead`, and the block of the tile after the one that is copied.
        int work;
        int4 next_item;
        DecodeWork<Base> ahead;
        int tile;
        i32 block = 0;
        int stage = 0;
        bool waited = false;
        float4 sums[Base::QUADS];

        __device__ __forceinline__ float4& kept(int n) { return sums[n]; }

        __device__ __forceinline__ Tiles(const DecodeList<Base>& list, const Kv& cache, const i32* block_table, i32 table_width, u32 ring)
            : list(list), cache(cache), block_table(block_table), table_width(table_width), ring(ring), work(list.begin),
              next_item(list.at(work + 1)), ahead(work, list.at(work)) {
            seek();
#pragma unroll
            for (int i = 0; i < STAGES - 1; ++i) load_next(i);
        }

        __device__ __forceinline__ void wait() {
            if (!waited) pdl::wait();
            waited = true;
        }
        __device__ __forceinline__ void advance() {
            if (!ahead.advance()) ahead.begin(next_item);
            next_item = list.at(++work + 1);
        }
        // Goes to the first work, from this one on, that has tiles.
        __device__ __forceinline__ void seek() {
            while (work < list.end && ahead.tile() >= ahead.last()) advance();
            tile = ahead.tile();
            look_up();
        }
        __device__ __forceinline__ const i32* blocks() const { return block_table + static_cast<i64>(ahead.seq) * table_width; }
        __device__ __forceinline__ void look_up() {
            if (work < list.end) block = Kv::entry(blocks(), tile);
        }
        __device__ __forceinline__ void load_next(int to) {
            if (work < list.end) {
                // The last token's key and value are written in this step, so wait for them.
                if ((tile + 1) * TILE >= ahead.end) wait();
                cache.template load<DECODE_THREADS>(ring + to * STAGE, blocks(), block, ahead.head(), tile, ahead.first(), ahead.end);
                if (++tile == ahead.last()) {
                    advance();
                    seek();
                } else {
                    look_up();
                }
            }
            ptx::cp_async_commit();
        }

        __device__ __forceinline__ void next() {
            ptx::cp_async_wait_group<STAGES - 2>();
            __syncthreads();
            load_next(stage == 0 ? STAGES - 1 : stage - 1);
            stage = stage == STAGES - 1 ? 0 : stage + 1;
        }
        __device__ __forceinline__ u32 keys() const { return ring + (stage == 0 ? STAGES - 1 : stage - 1) * STAGE; }
        __device__ __forceinline__ u32 values() const { return keys() + Kv::BYTES; }
        __device__ __forceinline__ void release() const {}
        __device__ __forceinline__ void skip() const {}
    };
};

template <typename T, typename Stored, int COLS, int HEADS, int KV_HEADS, int D, int BLOCK_SIZE, int WINDOW, bool ROUNDS, int STAGES>
__global__ void __launch_bounds__(DECODE_THREADS, HEADS / KV_HEADS > 8 ? 2 : 3)
    decode_paged(const step::Header* header, const int4* items, const i32* block_table, i32 table_width, const T* query,
                 const Stored* keys, const Stored* values, float scale, float value_scale, T* out, float* partials, i32 max_splits,
                 u32* tickets, const float* divisor, e4m3_t* rounded) {
    pdl::launch_dependents();
    using C = DecodeCopies<T, Stored, COLS, HEADS, KV_HEADS, D, BLOCK_SIZE, WINDOW, ROUNDS, STAGES>;
    using Base = typename C::Base;
    extern __shared__ __align__(128) unsigned char memory[];
    const DecodeList<Base> list(items, header->num_decode_items);
    if (list.is_idle()) return;
    auto& merge = *reinterpret_cast<typename Base::Merge*>(memory + STAGES * C::STAGE);
    const typename Base::Output output{out, {rounded, divisor}};
    if (threadIdx.x == 0) prepare<Base>(merge, output);
    typename C::Tiles tiles(list, {keys, values}, block_table, table_width, ptx::shared_address(memory));
    attend<Base>(tiles, merge, list, query, scale, value_scale, output, {partials, max_splits}, tickets);
    ptx::cp_async_wait_group<0>();
}

}  // namespace attention
