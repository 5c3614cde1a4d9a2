// Op: linear, expert_gate_up, expert_down · CPU twin: mixtral-cpu/src/kernels/{linear,experts}.rs
// Regime: one token to prefill, by Config · Tile: ROWS output features × up to COLS tokens, DEPTH elements of K a stage
// Grid: persistent · Numerics: f32 accumulation on tensor cores in ascending K, one rounding; bits do not depend on COLS, ROWS,
// DEPTH or the tokens beside · Requires: sm_90a, 16-bit types, K and row length multiples of 8
// Traffic: weights once per tile of COLS tokens, tokens once per tile of ROWS rows (through L2) · Measured: docs/perf/cuda.md
//
// One producer thread streams both operands through a ring of stages by TMA; consumer warpgroups multiply. Weights are the M side:
// a token more costs 8 columns of N, not 64 rows of M.
#pragma once

#include "base/math.cuh"
#include "base/step.cuh"
#include "base/types.cuh"
#include "epilogue/tile.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/pdl.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "sched/tiles.cuh"

namespace linear {

template <typename Element, int ROWS_, int COLS_, int DEPTH_, int STAGES_, int WARPGROUPS_, int OUTPUTS_, int K_, int KIND_,
          int SHARED_>
struct Config {
    using T = Element;
    static constexpr int ROWS = ROWS_;              // weight rows of a tile
    static constexpr int COLS = COLS_;              // tokens of a tile at most
    static constexpr int DEPTH = DEPTH_;            // elements of K in a stage
    static constexpr int STAGES = STAGES_;
    static constexpr int WARPGROUPS = WARPGROUPS_;  // consumers
    static constexpr int OUTPUTS = OUTPUTS_;        // columns of the output: features, after silu·mul if there is one
    static constexpr int K = K_;
    static constexpr int KIND = KIND_;              // epilogue::Kind

    static constexpr bool SILU = KIND == epilogue::SiluMul;
    static constexpr int BLOCKS = (ROWS + 64 * WARPGROUPS - 1) / (64 * WARPGROUPS);  // of 64 rows, of a warpgroup
    static constexpr int OUT_ROWS = SILU ? ROWS / 2 : ROWS;                          // outputs of a tile
    static constexpr int ROW_TILES = (OUTPUTS + OUT_ROWS - 1) / OUT_ROWS;
    static constexpr int K_BLOCKS = (K + DEPTH - 1) / DEPTH;
    static constexpr int ATOMS = DEPTH / 64;  // swizzle atoms of 128 bytes along K
    // Tokens are copied in boxes of this many, as many as a tile needs.
    static constexpr int BOX = COLS >= 32 ? COLS / 4 : COLS;

    static constexpr int A_ATOM = ROWS * 128, B_ATOM = COLS * 128;
    static constexpr int A_BYTES = ATOMS * A_ATOM, B_BYTES = ATOMS * B_ATOM;
    static constexpr int STAGE = A_BYTES + B_BYTES;
    // Outputs that a warpgroup moves at a time.
    static constexpr int MOVED = SILU ? 32 * BLOCKS : 64;
    static constexpr int MOVED_BYTES = KIND == epilogue::F32 ? 0 : epilogue::Tile<MOVED, COLS>::BYTES;
    static constexpr int RING = STAGES * STAGE;
    // Where rows of a tile end before 64, products read on behind them: what they read is dropped.
    static constexpr int OVERREAD = ROWS < 64 ? (64 - ROWS) * 128 : 0;
    static constexpr int MOVED_AT = RING + (OVERREAD > WARPGROUPS * MOVED_BYTES + B_BYTES ? OVERREAD : 0);
    static constexpr int MAP_AT = MOVED_AT + WARPGROUPS * MOVED_BYTES;
    static constexpr int BARRIERS_AT = MAP_AT + WARPGROUPS * COLS * 4;
    static constexpr int SHARED = BARRIERS_AT + 2 * STAGES * 8 + 1024;  // 1024 to align
    static_assert(SHARED == SHARED_, "what the launch asks for");
    // setmaxnreg counts whole warpgroups: with two consumers the producer is one, too.
    static constexpr int PRODUCERS = WARPGROUPS == 1 ? 32 : 128;
    static constexpr int THREADS = WARPGROUPS * 128 + PRODUCERS;

    static_assert(ROWS % 16 == 0 && (ROWS <= 64 || ROWS % (64 * WARPGROUPS) == 0), "whole blocks of 64 rows");
    static_assert(COLS % 8 == 0 && DEPTH % 64 == 0 && K % 8 == 0 && OUTPUTS % 8 == 0, "");
    static_assert(MOVED == 32 || MOVED == 64, "as epilogue::Tile");
    static_assert(SHARED <= 232448, "shared memory of a CTA");
};

// The barriers and stages of the ring.
template <typename C>
struct Ring {
    u32 base;
    int stage = 0;
    u32 phase = 0;

    __device__ __forceinline__ u32 full() const { return base + C::BARRIERS_AT + stage * 8; }
    __device__ __forceinline__ u32 empty(int s) const { return base + C::BARRIERS_AT + (C::STAGES + s) * 8; }
    __device__ __forceinline__ u32 a() const { return base + stage * C::STAGE; }
    __device__ __forceinline__ u32 b() const { return a() + C::A_BYTES; }
    __device__ __forceinline__ void advance() {
        if (++stage == C::STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// One tile's products, in columns of N.
template <typename C, int N>
__device__ __forceinline__ void multiply(Ring<C>& ring, int warpgroup, float (&d)[C::BLOCKS][C::COLS / 2]) {
    const bool signals = threadIdx.x % 32 == 0;
    int previous = 0;
    const int first_row = __shfl_sync(~0u, warpgroup, 0) * C::BLOCKS * 64;
#pragma unroll
    for (int m = 0; m < C::BLOCKS; m++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) d[m][i] = 0.0f;
        wgmma::pin(d[m]);
    }
    for (int k = 0; k < C::K_BLOCKS; k++) {
        mbarrier::wait(ring.full(), ring.phase);
        const u32 tile = wgmma::descriptor(ring.a());
        const u32 a = tile + (C::ROWS > 64 ? first_row * 8 : 0), b = tile + (C::A_BYTES >> 4);
        wgmma::fence();
#pragma unroll
        for (int i = 0; i < C::DEPTH / 16; i++) {
            const int atom = i / 4, within = i % 4 * 2;
#pragma unroll
            for (int m = 0; m < C::BLOCKS; m++) {
                wgmma::Product<typename C::T, N>::run(d[m], a + ((atom * C::A_ATOM + m * 8192) >> 4) + within,
                                                      b + ((atom * C::B_ATOM) >> 4) + within);
            }
        }
        wgmma::commit();
        if (k > 0) {
            wgmma::wait<1>();
            if (signals) mbarrier::arrive(ring.empty(previous));
        }
        previous = ring.stage;
        ring.advance();
    }
    wgmma::wait<0>();
#pragma unroll
    for (int m = 0; m < C::BLOCKS; m++) wgmma::pin(d[m]);
    if (signals) mbarrier::arrive(ring.empty(previous));
}

// The narrowest of four widths that holds `count` columns.
template <typename C>
__device__ __forceinline__ void multiply(Ring<C>& ring, int warpgroup, int count, float (&d)[C::BLOCKS][C::COLS / 2]) {
    if constexpr (C::BOX == C::COLS) {
        multiply<C, C::COLS>(ring, warpgroup, d);
    } else {
        switch ((count + C::BOX - 1) / C::BOX) {
            case 1: multiply<C, C::BOX>(ring, warpgroup, d); break;
            case 2: multiply<C, 2 * C::BOX>(ring, warpgroup, d); break;
            case 3: multiply<C, 3 * C::BOX>(ring, warpgroup, d); break;
            default: multiply<C, 4 * C::BOX>(ring, warpgroup, d);
        }
    }
}

// A tile's accumulators to where they belong. `thread` is the thread of the warpgroup, `map` the columns' rows of `out`.
template <typename C, typename Out>
__device__ __forceinline__ void finish(u8* moved, const int* map, int warpgroup, const sched::Tile& tile,
                                       const float (&d)[C::BLOCKS][C::COLS / 2], Out* out, const Out* residual) {
    using T = typename C::T;
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    if constexpr (C::KIND == epilogue::F32) {
#pragma unroll
        for (int m = 0; m < C::BLOCKS; m++) {
            const int row = tile.row * C::ROWS + (warpgroup * C::BLOCKS + m) * 64 + warp * 16 + lane / 4;
#pragma unroll
            for (int i = 0; i < C::COLS / 2; i++) {
                const int col = i / 4 * 8 + lane % 4 * 2 + i % 2, r = row + i % 4 / 2 * 8;
                if (col < tile.count && r < C::OUTPUTS && r < (tile.row + 1) * C::ROWS) {
                    out[static_cast<i64>(map[col]) * C::OUTPUTS + r] = d[m][i];
                }
            }
        }
    } else {
        using Layout = epilogue::Tile<C::MOVED, C::COLS>;
        const u32 base = ptx::shared_address(moved);
        const int first = tile.row * C::OUT_ROWS;
        if constexpr (C::SILU) {
#pragma unroll
            for (int m = 0; m < C::BLOCKS; m++) {
#pragma unroll
                for (int c = 0; c < C::COLS / 8; c++) {
                    if (c * 8 >= tile.count) break;
                    const float* v = &d[m][c * 4];
                    const float low = math::silu(rounded<T>(v[2])) * rounded<T>(v[0]);
                    const float high = math::silu(rounded<T>(v[3])) * rounded<T>(v[1]);
                    ptx::store_matrix_trans(base + Layout::offset(c * 8 + lane % 8, m * 4 + warp),
                                            pack<T>(low, high));
                }
            }
            ptx::sync_threads(1 + warpgroup, 128);
            const int row0 = first + warpgroup * C::BLOCKS * 32;
            const int limit = min(C::OUTPUTS, first + C::OUT_ROWS);
            epilogue::store<T, C::MOVED, C::COLS, false, 128>(moved, thread, tile.count, map, row0, limit, out, residual,
                                                              C::OUTPUTS);
            ptx::sync_threads(1 + warpgroup, 128);
        } else {
#pragma unroll
            for (int m = 0; m < C::BLOCKS; m++) {
#pragma unroll
                for (int c = 0; c < C::COLS / 8; c++) {
                    if (c * 8 >= tile.count) break;
                    const float* v = &d[m][c * 4];
                    ptx::store_matrix_trans(base + Layout::offset(c * 8 + lane % 8, warp * 2 + lane / 8 % 2),
                                            pack<T>(v[0], v[1]), pack<T>(v[2], v[3]));
                }
                ptx::sync_threads(1 + warpgroup, 128);
                const int row0 = first + (warpgroup * C::BLOCKS + m) * 64;
                const int limit = min(C::OUTPUTS, first + C::OUT_ROWS);
                epilogue::store<T, C::MOVED, C::COLS, C::KIND == epilogue::Residual, 128>(
                    moved, thread, tile.count, map, row0, limit, out, residual, C::OUTPUTS);
                ptx::sync_threads(1 + warpgroup, 128);
            }
        }
    }
}

// Sets up the barriers; returns shared memory aligned to 1024 bytes.
template <typename C>
__device__ __forceinline__ u8* begin() {
    extern __shared__ u8 dynamic_shared[];
    u8* shared = dynamic_shared + (1024 - ptx::shared_address(dynamic_shared) % 1024) % 1024;
    if (threadIdx.x == 0) {
        const Ring<C> ring{ptx::shared_address(shared)};
        for (int s = 0; s < C::STAGES; s++) {
            mbarrier::init(ring.base + C::BARRIERS_AT + s * 8, 1);
            mbarrier::init(ring.empty(s), C::WARPGROUPS * 4);
        }
        mbarrier::fence_init();
    }
    __syncthreads();
    return shared;
}

template <typename C>
__device__ __forceinline__ void give_registers() {
    if constexpr (C::WARPGROUPS > 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
}

template <typename C>
__device__ __forceinline__ void take_registers() {
    if constexpr (C::WARPGROUPS > 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
}

// Weights are read once in a step of few tokens, and again and again in one of many.
template <typename C>
__device__ __forceinline__ constexpr u64 weight_policy() {
    return C::COLS >= 128 ? tma::EVICT_NORMAL : tma::EVICT_FIRST;
}

// Dense linear. `logits` says whether its columns are the step's rows of logits or its tokens. Maps: weight [OUTPUTS][K] in boxes of
// ROWS × 64, tokens [·][K] in boxes of BOX × 64.
template <typename C, bool LOGITS, typename Out>
__global__ void __launch_bounds__(C::THREADS, 1)
    dense(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap tokens, const step::Header* header,
          Out* out, const Out* residual) {
    pdl::launch_dependents();
    u8* shared = begin<C>();
    Ring<C> ring{ptx::shared_address(shared)};
    sched::Tile tile;
    if (threadIdx.x >= C::WARPGROUPS * 128) {
        give_registers<C>();
        if (threadIdx.x != C::WARPGROUPS * 128) {
            pdl::wait();
            return;
        }
        tma::prefetch(weight);
        tma::prefetch(tokens);
        // The first tile's weights do not depend on what runs before, and with one tile of columns its place is known. (There may
        // be no logits at all, and what was begun must be waited for.)
        constexpr int EARLY = C::COLS < 128 && !LOGITS ? (C::STAGES < C::K_BLOCKS ? C::STAGES : C::K_BLOCKS) : 0;
        const int early = blockIdx.x < C::ROW_TILES ? EARLY : 0;
        for (int k = 0; k < early; k++) {
            const u32 full = ring.base + C::BARRIERS_AT + k * 8, a = ring.base + k * C::STAGE;
            mbarrier::arrive_expect(full, C::STAGE);
#pragma unroll
            for (int i = 0; i < C::ATOMS; i++) {
                tma::load(a + i * C::A_ATOM, weight, full, weight_policy<C>(), k * C::DEPTH + i * 64,
                          blockIdx.x * C::ROWS);
            }
        }
        pdl::wait();
        const sched::Dense<C::ROW_TILES, C::COLS> tiles{LOGITS ? header->num_logits : header->num_tokens};
        int left = early;
        for (int index = blockIdx.x; tiles.at(index, tile); index += gridDim.x) {
            for (int k = 0; k < C::K_BLOCKS; k++) {
                if (left > 0) {
                    left--;
                } else {
                    mbarrier::wait(ring.empty(ring.stage), ring.phase ^ 1);
                    mbarrier::arrive_expect(ring.full(), C::STAGE);
#pragma unroll
                    for (int i = 0; i < C::ATOMS; i++) {
                        tma::load(ring.a() + i * C::A_ATOM, weight, ring.full(), weight_policy<C>(), k * C::DEPTH + i * 64,
                                  tile.row * C::ROWS);
                    }
                }
#pragma unroll
                for (int i = 0; i < C::ATOMS; i++) {
#pragma unroll
                    for (int box = 0; box < C::COLS / C::BOX; box++) {
                        tma::load(ring.b() + i * C::B_ATOM + box * C::BOX * 128, tokens, ring.full(), tma::EVICT_LAST,
                                  k * C::DEPTH + i * 64, tile.first + box * C::BOX);
                    }
                }
                ring.advance();
            }
        }
    } else {
        take_registers<C>();
        const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
        u8* moved = shared + C::MOVED_AT + warpgroup * C::MOVED_BYTES;
        int* map = reinterpret_cast<int*>(shared + C::MAP_AT) + warpgroup * C::COLS;
        pdl::wait();
        const sched::Dense<C::ROW_TILES, C::COLS> tiles{LOGITS ? header->num_logits : header->num_tokens};
        float d[C::BLOCKS][C::COLS / 2];
        for (int index = blockIdx.x; tiles.at(index, tile); index += gridDim.x) {
            if (thread < C::COLS) map[thread] = tile.first + thread;
            ptx::sync_threads(1 + warpgroup, 128);
            multiply<C>(ring, warpgroup, tile.count, d);
            finish<C>(moved, map, warpgroup, tile, d, out, residual);
            if constexpr (C::KIND == epilogue::F32) ptx::sync_threads(1 + warpgroup, 128);
        }
    }
}

// How an expert's tokens are found, and where its results go.
enum Source {
    Every = 0,     // expert_gate_up: every token [T][K] to every expert; results by expert
    Permuted = 1,  // expert_gate_up: tokens permuted by expert [T·k][K]; results by expert
    Down = 2,      // expert_down: rows by expert [T·k][K]; results by assignment
};

// Linear of each token by its experts. Lets its successor start only once it has waited itself: see `EARLY`. Maps: weight [EXPERTS][OUTPUTS][K] in boxes of ROWS × 64, or with silu·mul
// [EXPERTS][2][OUTPUTS / 8][8][K] in boxes that interleave eight up rows with eight gate rows; tokens as `dense`.
template <typename C, int EXPERTS, int TOP_K, int SOURCE>
__global__ void __launch_bounds__(C::THREADS, 1)
    grouped(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap tokens, const step::Header* header,
            const int* offsets, const int* order, typename C::T* out) {
    using Tiles = sched::ByExpert<EXPERTS, C::ROW_TILES, C::COLS, SOURCE == Every>;
    u8* shared = begin<C>();
    Ring<C> ring{ptx::shared_address(shared)};
    sched::Tile tile;
    if (threadIdx.x >= C::WARPGROUPS * 128) {
        give_registers<C>();
        if (threadIdx.x != C::WARPGROUPS * 128) {
            pdl::wait();
            pdl::launch_dependents();
            return;
        }
        tma::prefetch(weight);
        tma::prefetch(tokens);
        const auto load_weights = [&](u32 a, u32 full, int k) {
#pragma unroll
            for (int i = 0; i < C::ATOMS; i++) {
                const int column = k * C::DEPTH + i * 64;
                if constexpr (C::SILU) {
                    tma::load(a + i * C::A_ATOM, weight, full, weight_policy<C>(), column, 0, 0,
                              tile.row * (C::ROWS / 16), tile.expert);
                } else {
                    tma::load(a + i * C::A_ATOM, weight, full, weight_policy<C>(), column, tile.row * C::ROWS, tile.expert);
                }
            }
        };
        const auto bytes = [&](int boxes) { return C::A_BYTES + C::ATOMS * boxes * C::BOX * 128; };
        // The expert lists are older than the kernel before this one, which let this one start only after it had waited itself: so
        // the first tile's weights can be under way before that kernel's results are there.
        constexpr int EARLY = SOURCE == Down && C::COLS <= 16 ? (C::STAGES < C::K_BLOCKS ? C::STAGES : C::K_BLOCKS) : 0;
        int early = 0;
        if constexpr (EARLY == 0) pdl::wait();
        Tiles tiles{offsets, header->num_tokens};
        if constexpr (EARLY > 0) {
            if (tiles.at(blockIdx.x, tile)) {
                early = EARLY;
                for (int k = 0; k < early; k++) {
                    const u32 full = ring.base + C::BARRIERS_AT + k * 8;
                    mbarrier::arrive_expect(full, bytes((tile.count + C::BOX - 1) / C::BOX));
                    load_weights(ring.base + k * C::STAGE, full, k);
                }
            }
            pdl::wait();
        }
        pdl::launch_dependents();
        for (int index = blockIdx.x; tiles.at(index, tile); index += gridDim.x) {
            const int boxes = (tile.count + C::BOX - 1) / C::BOX;
            for (int k = 0; k < C::K_BLOCKS; k++) {
                if (early > 0) {
                    early--;
                } else {
                    mbarrier::wait(ring.empty(ring.stage), ring.phase ^ 1);
                    mbarrier::arrive_expect(ring.full(), bytes(boxes));
                    load_weights(ring.a(), ring.full(), k);
                }
#pragma unroll
                for (int i = 0; i < C::ATOMS; i++) {
                    for (int box = 0; box < boxes; box++) {
                        tma::load(ring.b() + i * C::B_ATOM + box * C::BOX * 128, tokens, ring.full(), tma::EVICT_LAST,
                                  k * C::DEPTH + i * 64, tile.first + box * C::BOX);
                    }
                }
                ring.advance();
            }
        }
    } else {
        take_registers<C>();
        const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
        u8* moved = shared + C::MOVED_AT + warpgroup * C::MOVED_BYTES;
        int* map = reinterpret_cast<int*>(shared + C::MAP_AT) + warpgroup * C::COLS;
        pdl::wait();
        pdl::launch_dependents();
        Tiles tiles{offsets, header->num_tokens};
        float d[C::BLOCKS][C::COLS / 2];
        int index = blockIdx.x;
        sched::Tile next;
        for (bool more = tiles.at(index, tile); more; tile = next) {
            // What the epilogue needs from global memory is asked for before the products.
            const int first = SOURCE == Every ? offsets[tile.expert] : tile.first;
            const int own = SOURCE == Every ? offsets[tile.expert + 1] - first : tile.count;
            const int position = first + thread;
            const int assignment = SOURCE != Permuted && thread < own ? order[position] : 0;
            more = tiles.at(index += gridDim.x, next);
            multiply<C>(ring, warpgroup, tile.count, d);
            if constexpr (SOURCE == Every) {
                if (thread < C::COLS) map[thread] = -1;
                ptx::sync_threads(1 + warpgroup, 128);
                if (thread < own) map[assignment / TOP_K] = position;
            } else if (thread < own) {
                map[thread] = SOURCE == Down ? assignment : position;
            }
            ptx::sync_threads(1 + warpgroup, 128);
            finish<C>(moved, map, warpgroup, tile, d, out, static_cast<const typename C::T*>(nullptr));
        }
    }
}

}  // namespace linear
