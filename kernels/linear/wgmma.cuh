// Op: linear, expert_gate_up, expert_down · CPU twin: mixtral-cpu/src/kernels/{linear,experts}.rs
// Regime: one token to prefill, by Config · Tile: ROWS output features × up to COLS tokens, DEPTH elements of K a stage
// Grid: persistent · Numerics: f32 accumulation on tensor cores in ascending K, one rounding; bits do not depend on
// COLS, ROWS, DEPTH or on other tokens; of integers with scales, as `mma`; of fp8 not (weight/fp8.cuh) · Requires: sm_90a,
// 16-bit types or tokens rounded to e4m3, K and row length multiples of 8, of fp8 K a multiple of 16
// Traffic: weights once per tile of COLS tokens, tokens once per tile of ROWS rows and CTAs of a cluster (through L2)
// Measured: docs/perf/cuda.md
//
// One producer thread streams both operands through a ring of stages by TMA; consumer warpgroups multiply
// (linear/multiply.cuh). Weights are the M side, because then tokens are padded to 8 columns of N and not to 64 rows of
// M. That is also why packed weights fit: they become operands in registers, and only the M side may come from there.
#pragma once

#include "base/math.cuh"
#include "base/step.cuh"
#include "base/types.cuh"
#include "epilogue/tile.cuh"
#include "linear/multiply.cuh"
#include "linear/ring.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/pdl.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "sched/tiles.cuh"

namespace linear {

// Stores a tile's accumulators. `map` has the row of `out` for every column.
template <typename C, typename Out, bool ROUNDS>
__device__ __forceinline__ void finish(u8* moved, const int* map, int warpgroup, const sched::Tile& tile,
                                       const float (&d)[C::BLOCKS][C::COLS / 2], Out* out, const Out* residual,
                                       epilogue::Rounding<ROUNDS> rounding) {
    using T = typename C::T;
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const int first = tile.row * C::OUT_ROWS;
    if constexpr (C::KIND == epilogue::F32) {
#pragma unroll
        for (int m = 0; m < C::BLOCKS; m++) {
            const int row = first + (warpgroup * C::BLOCKS + m) * 64 + warp * 16 + lane / 4;
#pragma unroll
            for (int i = 0; i < C::COLS / 2; i++) {
                const int col = i / 4 * 8 + lane % 4 * 2 + i % 2, r = row + i % 4 / 2 * 8;
                if (col < tile.count && r < C::OUTPUTS && r < first + C::ROWS) {
                    out[static_cast<i64>(map[col]) * C::OUTPUTS + r] = d[m][i];
                }
            }
        }
    } else {
        using Layout = epilogue::Tile<C::MOVED, C::MOVED_COLS>;
        const u32 base = ptx::shared_address(moved);
        const int limit = min(C::OUTPUTS, first + C::OUT_ROWS);
        // With silu·mul all blocks are moved together, else one after another.
        constexpr int PASSES = C::SILU ? 1 : C::BLOCKS;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
#pragma unroll
            for (int first_col = 0; first_col < C::COLS; first_col += C::MOVED_COLS) {
                if (first_col >= tile.count) break;
                const int cols = min(C::MOVED_COLS, tile.count - first_col);
#pragma unroll
                for (int c = 0; c < C::MOVED_COLS / 8; c++) {
                    if (c * 8 >= cols) break;
                    const int at = (first_col + c * 8) / 2;
                    if constexpr (C::SILU) {
#pragma unroll
                        for (int m = 0; m < C::BLOCKS; m++) {
                            const float* v = &d[m][at];
                            const float low = math::silu_approximate(rounded<T>(v[2])) * rounded<T>(v[0]);
                            const float high = math::silu_approximate(rounded<T>(v[3])) * rounded<T>(v[1]);
                            ptx::store_matrix_trans(base + Layout::offset(c * 8 + lane % 8, m * 4 + warp),
                                                    pack<T>(low, high));
                        }
                    } else {
                        const float* v = &d[pass][at];
                        ptx::store_matrix_trans(base + Layout::offset(c * 8 + lane % 8, warp * 2 + lane / 8 % 2),
                                                pack<T>(v[0], v[1]), pack<T>(v[2], v[3]));
                    }
                }
                ptx::sync_threads(1 + warpgroup, 128);
                const int row0 = first + (warpgroup * C::BLOCKS + pass) * (C::SILU ? 32 : 64);
                epilogue::store<T, C::MOVED, C::MOVED_COLS, C::KIND == epilogue::Residual, 128>(
                    moved, thread, cols, map + first_col, row0, limit, out, residual, C::OUTPUTS, rounding);
                ptx::sync_threads(1 + warpgroup, 128);
            }
        }
    }
}

// Which tile a CTA (or cluster) computes next. Turns number the tiles. Static: CTA i of n takes turns i, i + n, i + 2n
// and so on. Dynamic: CTA i takes turn i first; each later turn is the lowest that nobody has taken. So tiles that are
// computed at the same time lie beside each other, however long each takes. The leader is the producer of the cluster's
// first CTA. It takes turns from a counter in memory and passes each on to the consumers and to the cluster's other
// producers.
template <typename C>
struct Turns {
    u32 base;
    int read = 0;  // turns that were read, or passed on

    __device__ __forceinline__ u32 full(int slot) const { return base + C::TURNS_AT + slot * 8; }
    __device__ __forceinline__ u32 empty(int slot) const { return base + C::TURNS_AT + 16 + slot * 8; }
    __device__ __forceinline__ u32 index(int slot) const { return base + C::TURNS_AT + 32 + slot * 4; }

    // Called by one thread of every CTA. The readers are the consumers' warps, and all producers except the leader.
    __device__ __forceinline__ void init() const {
        for (int slot = 0; slot < 2; slot++) {
            mbarrier::init(full(slot), 1);
            mbarrier::init(empty(slot), C::CLUSTER * C::WARPGROUPS * 4 + C::CLUSTER - 1);
        }
    }

    static __device__ __forceinline__ int first() { return blockIdx.x / C::CLUSTER; }
    static __device__ __forceinline__ int count() { return gridDim.x / C::CLUSTER; }

    // The leader passes a turn on.
    __device__ __forceinline__ void pass(int turn) {
        const int slot = read & 1;
        wait(empty(slot), (read >> 1 & 1) ^ 1);
        read++;
#pragma unroll
        for (int rank = 0; rank < C::CLUSTER; rank++) {
            if constexpr (C::CLUSTER > 1) {
                cluster::store(index(slot), rank, turn);
                mbarrier::arrive_release(full(slot), rank);
            } else {
                ptx::store_shared(index(slot), turn);
                mbarrier::arrive(full(slot));
            }
        }
    }

    // Returns the next turn to one thread (`SOLE`) or to a warp.
    template <bool SOLE>
    __device__ __forceinline__ int take() {
        const int slot = read & 1;
        wait(full(slot), read >> 1 & 1);
        read++;
        int turn = 0;
        if (SOLE || threadIdx.x % 32 == 0) {
            turn = ptx::load_shared(index(slot));
            // Arrive only after the load. `min(turn, 0)` is 0, since turns are never negative, but it makes the arrival
            // depend on the load. Otherwise the compiler might move the arrival first, and the leader might overwrite
            // the turn before it is read.
            const u32 done = empty(slot) + min(turn, 0);
            if constexpr (C::CLUSTER > 1) {
                mbarrier::arrive(done, 0);
            } else {
                mbarrier::arrive(done);
            }
        }
        return SOLE ? turn : __shfl_sync(~0u, turn, 0);
    }

  private:
    static __device__ __forceinline__ void wait(u32 barrier, u32 parity) {
        if constexpr (C::CLUSTER > 1) {
            mbarrier::wait_cluster(barrier, parity);
        } else {
            mbarrier::wait(barrier, parity);
        }
    }
};

// Sets up the barriers. Returns shared memory aligned to 1024 bytes.
template <typename C>
__device__ __forceinline__ u8* begin() {
    extern __shared__ u8 dynamic_shared[];
    u8* shared = dynamic_shared + (1024 - ptx::shared_address(dynamic_shared) % 1024) % 1024;
    if (threadIdx.x == 0) {
        const Ring<C> ring{ptx::shared_address(shared)};
        for (int s = 0; s < C::STAGES; s++) {
            mbarrier::init(ring.base + C::BARRIERS_AT + s * 8, 1);
            mbarrier::init(ring.empty(s), C::WARPGROUPS * 4 * C::CLUSTER);
        }
        if constexpr (C::DYNAMIC) Turns<C>{ring.base}.init();
        mbarrier::fence_init();
    }
    if constexpr (C::CLUSTER > 1) {
        cluster::sync();
    } else {
        __syncthreads();
    }
    return shared;
}

// A CTA may not exit while others of its cluster write to its shared memory.
template <typename C>
__device__ __forceinline__ void end() {
    if constexpr (C::CLUSTER > 1) {
        __syncwarp();
        cluster::sync();
    }
}

// The tile of a turn. In a cluster, a turn is one tile for each CTA. These tiles have the same tokens and adjacent
// rows.
template <typename C, typename Tiles>
__device__ __forceinline__ bool tile_at(Tiles& tiles, int index, sched::Tile& tile) {
    const bool found = tiles.at(index, tile);
    if constexpr (C::CLUSTER > 1) tile.row = tile.row * C::CLUSTER + cluster::rank();
    return found;
}

// A step of few tokens reads each weight once, or in two tiles at about the same time. A step of many tokens reads it many times.
template <typename C>
__device__ __forceinline__ constexpr u64 weight_policy() {
    return C::COLS >= 128 ? tma::EVICT_NORMAL : tma::EVICT_FIRST;
}

// Starts the copies of stage `k` of the tile's weights. What lies behind a weight or an expert may be copied too; those
// rows are not stored.
template <typename C, bool GROUPED>
__device__ __forceinline__ void load_weights(const TensorMap& weight, u32 to, u32 full, int k, const sched::Tile& tile) {
    if constexpr (C::W::PACKED) {
        const int slab = tile.expert * C::MATRIX_SLABS + tile.row * C::SLABS;
        tma::load(to, weight, full, weight_policy<C>(), 0, k * (C::DEPTH / C::W::DEPTH) * C::W::PARTS, slab);
    } else {
#pragma unroll
        for (int i = 0; i < C::ATOMS; i++) {
            const u32 atom = to + i * C::A_ATOM;
            const int column = k * C::DEPTH + i * C::Tokens::ATOM;
            if constexpr (!GROUPED) {
                tma::load(atom, weight, full, weight_policy<C>(), column, tile.row * C::ROWS);
            } else if constexpr (C::SILU) {
                tma::load(atom, weight, full, weight_policy<C>(), column, 0, 0, tile.row * (C::ROWS / 16), tile.expert);
            } else {
                tma::load(atom, weight, full, weight_policy<C>(), column, tile.row * C::ROWS, tile.expert);
            }
        }
    }
}

// The producer: one thread. With EARLY it starts to load the first tile's weights before the preceding kernel has
// finished. The caller must know that the tile list was complete before that kernel started. `counter` is [turns taken,
// CTAs that are done]. Both are 0 between launches.
template <typename C, bool GROUPED, bool EARLY, typename Tiles>
__device__ __forceinline__ void produce(Ring<C>& ring, Tiles tiles, const TensorMap& weight, const TensorMap& tokens,
                                        u32* counter) {
    const auto boxes = [](const sched::Tile& tile) { return (tile.count + C::BOX - 1) / C::BOX; };
    const auto begin_stage = [&](u32 a, u32 full, int k, const sched::Tile& tile) {
        mbarrier::arrive_expect(full, C::COPIED + C::ATOMS * boxes(tile) * C::BOX * 128);
        load_weights<C, GROUPED>(weight, a, full, k, tile);
    };
    Turns<C> turns{ring.base};
    const bool leads = C::CLUSTER == 1 || cluster::rank() == 0;
    sched::Tile tile;
    int turn = turns.first(), early = 0;
    if constexpr (EARLY) {
        if (tile_at<C>(tiles, turn, tile)) {
            early = min(C::STAGES, C::K_BLOCKS);
            for (int k = 0; k < early; k++) {
                begin_stage(ring.base + k * C::STAGE, ring.base + C::BARRIERS_AT + k * 8, k, tile);
            }
        }
    }
    pdl::wait();
    while (tile_at<C>(tiles, turn, tile)) {
        // The next turn is asked for now and needed half a tile later.
        int next = turn + turns.count();
        if (C::DYNAMIC && leads) next = turns.count() + atomicAdd(counter, 1u);
        for (int k = 0; k < C::K_BLOCKS; k++) {
            if (early > 0) {
                early--;
            } else {
                mbarrier::wait(ring.empty(ring.stage), ring.phase ^ 1);
                begin_stage(ring.a(), ring.full(), k, tile);
            }
#pragma unroll
            for (int i = 0; i < C::ATOMS; i++) {
                const int column = k * C::DEPTH + i * C::Tokens::ATOM;
                const u32 to = ring.b() + i * C::B_ATOM;
                if constexpr (C::CLUSTER > 1) {
                    for (int box = cluster::rank(); box < boxes(tile); box += C::CLUSTER) {
                        tma::load_multicast(to + box * C::BOX * 128, tokens, ring.full(), tma::EVICT_LAST,
                                            (1 << C::CLUSTER) - 1, column, tile.first + box * C::BOX);
                    }
                } else {
                    for (int box = 0; box < boxes(tile); box++) {
                        tma::load(to + box * C::BOX * 128, tokens, ring.full(), tma::EVICT_LAST, column,
                                  tile.first + box * C::BOX);
                    }
                }
            }
            ring.advance();
            if (C::DYNAMIC && leads && k == C::K_BLOCKS / 2) turns.pass(next);
        }
        if constexpr (C::DYNAMIC) {
            if (!leads) next = turns.template take<true>();
        }
        turn = next;
    }
    // The last CTA to finish sets the counter back to 0 for the next launch.
    if constexpr (C::DYNAMIC) {
        if (leads && atomicInc(counter + 1, turns.count() - 1) == turns.count() - 1) counter[0] = 0;
    }
}

// The consumers. `fetch(tile, column)` starts to read what determines the column's row of `out`. The products follow.
// Then `place(map, tile, column, fetched)` writes that row to `map`. `source(tile, column)` is the column's row of the tokens.
template <typename C, typename Out, bool ROUNDS, typename Tiles, typename Fetch, typename Place, typename Source>
__device__ __forceinline__ void consume(Ring<C>& ring, u8* shared, Tiles tiles, typename C::Stored stored, Out* out,
                                        const Out* residual, epilogue::Rounding<ROUNDS> rounding, const float* token_scales,
                                        Fetch fetch, Place place, Source source) {
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    u8* moved = shared + C::MOVED_AT + warpgroup * C::MOVED_BYTES;
    int* map = reinterpret_cast<int*>(shared + C::MAP_AT) + warpgroup * C::COLS;
    constexpr int EACH = (C::COLS + 127) / 128;
    float d[C::BLOCKS][C::COLS / 2];
    Turns<C> turns{ring.base};
    sched::Tile tile, next;
    int turn = turns.first();
    for (bool more = tile_at<C>(tiles, turn, tile); more; tile = next) {
        int fetched[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) fetched[i] = fetch(tile, thread + i * 128);
        if constexpr (!C::DYNAMIC) more = tile_at<C>(tiles, turn += turns.count(), next);
        // The largest tiles' products leave no registers for scales of rows.
        constexpr bool LATE = C::W::BY_ROWS && C::BLOCKS > 1;
        Rows<C> rows;
        if constexpr (!LATE) rows.load(stored, tile, warpgroup);
        multiply<C>(ring, warpgroup, rows, tile.count, d);
        if constexpr (LATE) rows.load(stored, tile, warpgroup);
        rows.finish(d, token_scales, [&](int column) { return source(tile, column); });
        if constexpr (C::DYNAMIC) more = tile_at<C>(tiles, turns.template take<false>(), next);
        for (int i = thread; i < C::COLS; i += 128) map[i] = -1;
        ptx::sync_threads(1 + warpgroup, 128);
#pragma unroll
        for (int i = 0; i < EACH; i++) place(map, tile, thread + i * 128, fetched[i]);
        ptx::sync_threads(1 + warpgroup, 128);
        finish<C>(moved, map, warpgroup, tile, d, out, residual, rounding);
        if constexpr (C::KIND == epilogue::F32) ptx::sync_threads(1 + warpgroup, 128);
    }
}

template <typename C>
__device__ __forceinline__ void give_registers() {
    if constexpr (C::WARPGROUPS > 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::WARPGROUPS == 2 ? 40 : 32));
}

template <typename C>
__device__ __forceinline__ void take_registers() {
    if constexpr (C::WARPGROUPS > 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::WARPGROUPS == 2 ? 232 : 160));
}

// Dense linear. With `LOGITS` its columns are the step's rows of logits, else its tokens. Maps: weight [OUTPUTS][K] in
// boxes of ROWS × 64, or packed [slabs][blocks · PARTS][words of a part] in boxes of ROWS / 16 slabs and a stage's parts;
// tokens [·][K] in boxes of BOX × 64. `stored` is the weight too; values of a packed weight's whole rows are read from
// it. (The header may be read before the wait: it was uploaded before any kernel of the step started.)
template <typename C, bool LOGITS, typename Out>
__global__ void __launch_bounds__(C::THREADS, 1)
    dense(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap tokens, typename C::Stored stored,
          const step::Header* header, Out* out, const Out* residual, u32* counter, const float* token_scales) {
    pdl::launch_dependents();
    u8* shared = begin<C>();
    Ring<C> ring{ptx::shared_address(shared)};
    const sched::Dense<C::ROW_TURNS, C::COLS> tiles{LOGITS ? header->num_logits : header->num_tokens};
    if (threadIdx.x >= C::WARPGROUPS * 128) {
        give_registers<C>();
        if (threadIdx.x / 32 == C::WARPGROUPS * 4 && ptx::elect()) {
            tma::prefetch(weight);
            tma::prefetch(tokens);
            produce<C, false, true>(ring, tiles, weight, tokens, counter);
        } else {
            pdl::wait();
        }
    } else {
        take_registers<C>();
        pdl::wait();
        consume<C>(
            ring, shared, tiles, stored, out, residual, epilogue::Rounding<false>{}, token_scales,
            [](const sched::Tile&, int) { return 0; },
            [](int* map, const sched::Tile& tile, int column, int) {
                if (column < tile.count) map[column] = tile.first + column;
            },
            [](const sched::Tile& tile, int column) { return column < tile.count ? tile.first + column : -1; });
    }
    end<C>();
}

// Where an expert's tokens come from, and where its results go.
enum Source {
    Every = 0,     // expert_gate_up: every token [T][K] to every expert; results by expert
    Permuted = 1,  // expert_gate_up: tokens permuted by expert [T·k][K]; results by expert
    Down = 2,      // expert_down: rows by expert [T·k][K]; results by assignment
};

// Linear of each token by its experts. Maps: weight [EXPERTS][OUTPUTS][K] in boxes of ROWS × 64, or with silu·mul
// [EXPERTS][2][OUTPUTS / 8][8][K] in boxes that interleave eight up rows with eight gate rows; packed weights and tokens
// as `dense`.
//
// It calls launch_dependents only after its own wait. Its predecessor, which wrote the experts' lists, is then complete
// before its successor starts. That is why expert_down may read the lists, and load its first weights, before
// expert_gate_up has finished.
//
// With ROUNDS, expert_gate_up rounds for expert_down (epilogue::Rounding); else the last two parameters are not used.
template <typename C, int EXPERTS, int TOP_K, int SOURCE, bool ROUNDS = false>
__global__ void __launch_bounds__(C::THREADS, 1)
    grouped(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap tokens, typename C::Stored stored,
            const step::Header* header, const int* offsets, const int* order, typename C::T* out, u32* counter,
            const float* token_scales, const float* divisor, e4m3_t* rounded) {
    u8* shared = begin<C>();
    Ring<C> ring{ptx::shared_address(shared)};
    const sched::ByExpert<EXPERTS, C::ROW_TURNS, C::COLS, SOURCE == Every> tiles{offsets, header->num_tokens};
    if (threadIdx.x >= C::WARPGROUPS * 128) {
        give_registers<C>();
        if (threadIdx.x / 32 == C::WARPGROUPS * 4 && ptx::elect()) {
            tma::prefetch(weight);
            tma::prefetch(tokens);
            produce<C, true, SOURCE == Down>(ring, tiles, weight, tokens, counter);
        } else {
            pdl::wait();
        }
    } else {
        take_registers<C>();
        pdl::wait();
        pdl::launch_dependents();
        // The tile's positions in the order: the first one, and how many there are.
        const auto span = [&](const sched::Tile& tile, int& first, int& count) {
            first = SOURCE == Every ? offsets[tile.expert] : tile.first;
            count = SOURCE == Every ? offsets[tile.expert + 1] - first : tile.count;
        };
        consume<C>(
            ring, shared, tiles, stored, out, static_cast<const typename C::T*>(nullptr),
            epilogue::Rounding<ROUNDS>{rounded, divisor}, token_scales,
            [&](const sched::Tile& tile, int column) {
                int first, count;
                span(tile, first, count);
                return SOURCE != Permuted && column < count ? order[first + column] : 0;
            },
            [&](int* map, const sched::Tile& tile, int column, int assignment) {
                int first, count;
                span(tile, first, count);
                if (column >= count) return;
                if constexpr (SOURCE == Every) {
                    map[assignment / TOP_K] = first + column;
                } else {
                    map[column] = SOURCE == Down ? assignment : first + column;
                }
            },
            [&](const sched::Tile& tile, int column) {
                if (column >= tile.count) return -1;
                if constexpr (SOURCE == Permuted) return order[tile.first + column] / TOP_K;
                return tile.first + column;
            });
    }
    end<C>();
}

}  // namespace linear
