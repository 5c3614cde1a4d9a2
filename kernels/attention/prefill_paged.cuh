// Op: attention of all sequences that are not decodes. CPU twin: kernels/attention.rs.
// Regime: any chunk and context; 16-bit types.
// Tile: 64 query tokens of PACK heads that share a KV head, computed by four warps of 16 · PACK rows. Keys and values
//   come in tiles of 64 tokens, two of them in shared memory. Those of an fp8 cache take half of the room. All threads
//   convert a tile into a third place before the warps compute with it: each of them would have to convert all of it.
// Grid: persistent over (tile of queries, heads); the host lists the longest tiles first.
// Numerics: scores in f32 by tensor cores. The online softmax in base 2 takes 32 tokens at a time, at multiples of 32,
//   ascending, so a row's bits do not depend on the chunking. With EXACT, the product with the values takes a
//   probability as the sum of two 16-bit parts. Without, it takes the probability rounded to T; the sum of
//   probabilities is not rounded. What an fp8 cache stores becomes T exactly; its scales are parts of `scale` and
//   `value_scale`. IN_FP8, queries and probabilities are e4m3, and all operands of products are f16, exactly; probabilities are
//   256 times as large, and relative to a power of two, so that tiles of any size round them alike.
// Requires: D a multiple of 16 (32 with an fp8 cache), 128 at most; rows of the query (COLS elements) of whole 16-byte pieces.
// Traffic: keys and values are read once for each tile of queries and PACK heads, all but the first time from L2.
// Measured: H200, 8 × 2048 tokens, 32 query heads over 8 KV heads of 128: 232 TFLOP/s.
#pragma once

#include "attention/tile.cuh"
#include "base/fp8.cuh"
#include "base/math.cuh"
#include "base/reduce.cuh"
#include "base/step.cuh"
#include "epilogue/rounding.cuh"
#include "ptx/mma.cuh"
#include "ptx/pdl.cuh"

namespace attention {

inline constexpr int PREFILL_THREADS = 128;
// Scores of this many tokens of a tile are in registers at a time.
inline constexpr int PART = 32;

// Converts a thread's own pieces of a tile of an fp8 cache, which it has copied to `from` itself, to 16-bit elements.
template <typename T, int D>
__device__ __forceinline__ void widen_tile(unsigned char* to, const unsigned char* from) {
    const Pieces<e4m3_t, D, PREFILL_THREADS> own;
    own.template each<TILE>([&](int rows) {
        const uint4 bytes = *reinterpret_cast<const uint4*>(from + own.at(rows));
        const u32 words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const fp8::Pairs a = fp8::neighbours<T>(words[2 * i]), b = fp8::neighbours<T>(words[2 * i + 1]);
            const int piece = own.column / VECTOR + i;
            *reinterpret_cast<uint4*>(to + Rows<2 * D>::at(own.row + rows, piece)) = make_uint4(a.first, a.second, b.first, b.second);
        }
    });
}

// Two numbers as e4m3, in f16.
__device__ __forceinline__ u32 round_pair(float low, float high) { return fp8::neighbours<f16_t>(fp8::pack(low, high)).first; }

// Rounds a thread's own pieces of the queries, which it has copied to `queries` itself, in place.
template <typename T, int D>
__device__ __forceinline__ void round_queries(unsigned char* queries) {
    const Pieces<T, D, PREFILL_THREADS> own;
    own.template each<step::PREFILL_TILE>([&](int rows) {
        uint4* piece = reinterpret_cast<uint4*>(queries + own.at(rows));
        u32 words[4] = {piece->x, piece->y, piece->z, piece->w};
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = round_pair(low_of<T>(words[i]), high_of<T>(words[i]));
        *piece = make_uint4(words[0], words[1], words[2], words[3]);
    });
}

template <typename T, typename Stored, int COLS, int HEADS, int KV_HEADS, int D, int BLOCK_SIZE, int WINDOW, bool ROUNDS, bool IN_FP8, int PACK, bool EXACT>
__global__ void __launch_bounds__(PREFILL_THREADS, 2)
    prefill_paged(const step::Header* header, const int2* items, const i32* cu_query_lens, const i32* seq_lens,
                  const i32* block_table, i32 table_width, const T* query, const Stored* keys, const Stored* values,
                  float scale, float value_scale, T* out, const float* divisor, e4m3_t* rounded) {
    pdl::launch_dependents();
    static_assert(step::PREFILL_TILE == 64 && (PACK == 1 || PACK == 2) && HEADS / KV_HEADS % PACK == 0, "rows of four warps");
    using Kv = Cache<Stored, KV_HEADS, D, BLOCK_SIZE>;
    using Rows = attention::Rows<2 * D>;
    constexpr bool FP8 = sizeof(Stored) == 1;
    static_assert(!IN_FP8 || (FP8 && !EXACT), "keys and values of e4m3");
    using Operand = If<IN_FP8, f16_t, T>;
    constexpr int STEPS = D / 16, PIECES = D / VECTOR, PER_ITEM = HEADS / PACK, STAGE = 2 * Kv::BYTES;
    constexpr int QUERY_BYTES = PACK * step::PREFILL_TILE * Rows::STRIDE;
    // Keys, then values, of a tile of 16-bit elements; and where the ring begins.
    constexpr int HALF_TILE = TILE * Rows::STRIDE, RING_AT = QUERY_BYTES + (FP8 ? 2 * HALF_TILE : 0);
    extern __shared__ __align__(128) unsigned char memory[];
    // These values lie here and not in registers, since the loop over tiles does not need them.
    __shared__ volatile struct {
        i32 seq, head, first_query;
    } place;
    const u32 queries = ptx::shared_address(memory), ring = queries + RING_AT;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // The warp's first row among the CTA's rows, and that row's token in the tile.
    const int first_row = warp * 16 * PACK, first_token = first_row % step::PREFILL_TILE;
    const int num_works = header->num_prefill_items * PER_ITEM;
    const u32 q_lane = queries + Rows::at(first_row + lane % 16, lane / 16);
    const Kv cache = {keys, values};
    pdl::wait();

    for (int work = blockIdx.x; work < num_works; work += gridDim.x) {
        // After this, nobody reads what the previous work item left in shared memory.
        __syncthreads();
        const int2 item = items[work / PER_ITEM];
        const int chunk = cu_query_lens[item.x], chunk_len = cu_query_lens[item.x + 1] - chunk;
        if (threadIdx.x == 0) {
            place.seq = item.x;
            place.head = work % PER_ITEM * PACK;
            place.first_query = chunk + item.y;
        }
        __syncthreads();
        // Positions of the tile's first query and of the token behind its last.
        const int position = seq_lens[item.x] - chunk_len + item.y;
        const int num_queries = chunk_len - item.y < step::PREFILL_TILE ? chunk_len - item.y : step::PREFILL_TILE;
        const int end = position + num_queries;
        const auto load = [&](int tile) {
            const i32* blocks = block_table + static_cast<i64>(place.seq) * table_width;
            cache.template load<PREFILL_THREADS>(ring + tile % 2 * STAGE, blocks, Kv::entry(blocks, tile), place.head / (HEADS / KV_HEADS), tile,
                                                 first_visible<WINDOW>(position), end);
            ptx::cp_async_commit();
        };

        const Pieces<T, D, PREFILL_THREADS> own;
        const T* own_queries = query + static_cast<i64>(place.first_query + own.row) * COLS + place.head * D + own.column;
#pragma unroll
        for (int m = 0; m < PACK; ++m) {
            own.template each<step::PREFILL_TILE>([&](int rows) {
                const u32 to = queries + m * step::PREFILL_TILE * Rows::STRIDE + own.at(rows);
                ptx::cp_async_16(to, own_queries + static_cast<i64>(rows) * COLS + m * D, own.row + rows < end - position);
            });
        }
        const int first_tile = first_visible<WINDOW>(position) / TILE;
        load(first_tile);

        float o[PACK][2 * STEPS][4] = {};
        float max[PACK][2], total[PACK][2] = {};
#pragma unroll
        for (int m = 0; m < PACK; ++m) max[m][0] = max[m][1] = math::minus_infinity();
        for (int tile = first_tile; tile * TILE < end; ++tile) {
            ptx::cp_async_wait_group<0>();
            if (IN_FP8 && tile == first_tile) {
#pragma unroll
                for (int m = 0; m < PACK; ++m) round_queries<T, D>(memory + m * step::PREFILL_TILE * Rows::STRIDE);
            }
            __syncthreads();
            if (tile * TILE + TILE < end) load(tile + 1);
            u32 keys_at = ring + tile % 2 * STAGE;
            if constexpr (FP8) {
                const unsigned char* from = memory + RING_AT + tile % 2 * STAGE;
                widen_tile<Operand, D>(memory + QUERY_BYTES, from);
                widen_tile<Operand, D>(memory + QUERY_BYTES + HALF_TILE, from + Kv::BYTES);
                keys_at = queries + QUERY_BYTES;
                __syncthreads();
            }
            // Positions of the warp's first and last row.
            const int lowest = position + first_token, highest = lowest + 16 * PACK - 1;
#pragma unroll 1
            for (int part = 0; part < TILE; part += PART) {
                const int first = tile * TILE + part;
                // Tokens that no row of the warp sees change nothing, so they are skipped.
                if (first > highest || first + PART <= first_visible<WINDOW>(lowest)) continue;
                const u32 shared = keys_at + part * Rows::STRIDE;
                const u32 k_lane = shared + Rows::at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
                const u32 v_lane = shared + HALF_TILE + Rows::at(lane % 16, lane / 16);

                float s[PACK][PART / 8][4] = {};
#pragma unroll
                for (int k = 0; k < STEPS; ++k) {
                    u32 q[PACK][4];
#pragma unroll
                    for (int m = 0; m < PACK; ++m) {
                        ptx::ldmatrix_x4(q[m], Rows::step(q_lane, k) + m * 16 * Rows::STRIDE);
                    }
#pragma unroll
                    for (int n = 0; n < PART / 8; n += 2) {
                        u32 b[4];
                        ptx::ldmatrix_x4(b, Rows::step(k_lane, k) + n * 8 * Rows::STRIDE);
#pragma unroll
                        for (int m = 0; m < PACK; ++m) {
                            ptx::mma<Operand>(s[m][n], q[m], {b[0], b[1]});
                            ptx::mma<Operand>(s[m][n + 1], q[m], {b[2], b[3]});
                        }
                    }
                }
                if (first + PART - 1 > lowest || first < first_visible<WINDOW>(highest)) {
#pragma unroll
                    for (int m = 0; m < PACK; ++m) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int at = lowest + m * 16 + lane / 4 + i / 2 * 8;
#pragma unroll
                            for (int n = 0; n < PART / 8; ++n) {
                                const int token = first + n * 8 + lane % 4 * 2 + i % 2;
                                if (token > at || token < first_visible<WINDOW>(at)) s[m][n][i] = math::minus_infinity();
                            }
                        }
                    }
                }
                float keep[PACK][2];
                u32 high[PACK][PART / 8][2], low[PACK][PART / 8][2];
#pragma unroll
                for (int m = 0; m < PACK; ++m) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float top = s[m][0][2 * half];
#pragma unroll
                        for (int n = 0; n < PART / 8; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
                        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2)) * scale;
                        top = fmaxf(top, max[m][half]);
                        if constexpr (IN_FP8) top = ceilf(top);
                        // This keeps a row as it is while it has seen nothing.
                        const float from = top == math::minus_infinity() ? 0.0f : top;
                        keep[m][half] = math::exp2_approximate(max[m][half] - from);
                        max[m][half] = top;
                        const float shift = IN_FP8 ? 8.0f - from : -from;
                        float sum = 0.0f;
#pragma unroll
                        for (int n = 0; n < PART / 8; ++n) {
                            const float p0 = math::exp2_approximate(__fmaf_rn(s[m][n][2 * half], scale, shift));
                            const float p1 = math::exp2_approximate(__fmaf_rn(s[m][n][2 * half + 1], scale, shift));
                            high[m][n][half] = IN_FP8 ? round_pair(p0, p1) : pack<T>(p0, p1);
                            sum += IN_FP8 ? low_of<f16_t>(high[m][n][half]) + high_of<f16_t>(high[m][n][half]) : p0 + p1;
                            if constexpr (EXACT) {
                                low[m][n][half] = pack<T>(p0 - low_of<T>(high[m][n][half]), p1 - high_of<T>(high[m][n][half]));
                            }
                        }
                        total[m][half] = __fmaf_rn(total[m][half], keep[m][half], sum);
                    }
                }
                bool same = true;
#pragma unroll
                for (int m = 0; m < PACK; ++m) same = same && keep[m][0] == 1.0f && keep[m][1] == 1.0f;
                // Most maxima are found early. Then all factors are 1, and this is skipped.
                if (!__all_sync(ALL_LANES, same)) {
#pragma unroll
                    for (int m = 0; m < PACK; ++m) {
#pragma unroll
                        for (int n = 0; n < 2 * STEPS; ++n) {
#pragma unroll
                            for (int i = 0; i < 4; ++i) o[m][n][i] *= keep[m][i / 2];
                        }
                    }
                }
#pragma unroll
                for (int k = 0; k < PART / 16; ++k) {
#pragma unroll
                    for (int n = 0; n < STEPS; ++n) {
                        u32 b[4];
                        ptx::ldmatrix_x4_trans(b, Rows::step(v_lane, n) + k * 16 * Rows::STRIDE);
#pragma unroll
                        for (int m = 0; m < PACK; ++m) {
                            const u32(&p)[PART / 8][2] = high[m];
                            const u32 a[4] = {p[2 * k][0], p[2 * k][1], p[2 * k + 1][0], p[2 * k + 1][1]};
                            ptx::mma<Operand>(o[m][2 * n], a, {b[0], b[1]});
                            ptx::mma<Operand>(o[m][2 * n + 1], a, {b[2], b[3]});
                            if constexpr (EXACT) {
                                const u32(&r)[PART / 8][2] = low[m];
                                const u32 a[4] = {r[2 * k][0], r[2 * k][1], r[2 * k + 1][0], r[2 * k + 1][1]};
                                ptx::mma<Operand>(o[m][2 * n], a, {b[0], b[1]});
                                ptx::mma<Operand>(o[m][2 * n + 1], a, {b[2], b[3]});
                            }
                        }
                    }
                }
            }
        }

        // Each warp writes its rows to the place of its queries in shared memory, then stores them in whole pieces.
        __syncwarp();
#pragma unroll
        for (int m = 0; m < PACK; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float sum = total[m][half];
                sum += __shfl_xor_sync(ALL_LANES, sum, 1);
                sum += __shfl_xor_sync(ALL_LANES, sum, 2);
                const float by = value_scale / sum;
                const int row = first_row + m * 16 + lane / 4 + half * 8;
#pragma unroll
                for (int n = 0; n < 2 * STEPS; ++n) {
                    *reinterpret_cast<u32*>(memory + Rows::at(row, n) + lane % 4 * 4) =
                        pack<T>(o[m][n][2 * half] * by, o[m][n][2 * half + 1] * by);
                }
            }
        }
        __syncwarp();
        const epilogue::Rounding<ROUNDS> rounding{rounded, divisor};
        const fp8::Divisor by = rounding.prepare();
        for (int i = lane; i < 16 * PACK * PIECES; i += 32) {
            const int row = first_row + i / PIECES, piece = i % PIECES, token = row % step::PREFILL_TILE;
            if (token >= end - position) continue;
            const i64 at = static_cast<i64>(place.first_query + token) * (HEADS * D) + (place.head + row / step::PREFILL_TILE) * D + piece * VECTOR;
            epilogue::store_words(out, at, *reinterpret_cast<const uint4*>(memory + Rows::at(row, piece)), rounding, by);
        }
    }
}

}  // namespace attention
