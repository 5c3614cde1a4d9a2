// Op: linear, expert_gate_up, expert_down · CPU twin: mixtral-cpu/src/kernels/{linear,experts}.rs
// Regime: up to 64 tokens, quantized weights · Tile: 16 output features (a slab) × COLS tokens for a warp or a team of
// warps · Grid: persistent, each CTA a run of slabs
// Numerics: as `mma`: each 16 elements of K one product, chains in ascending K, one rounding; bits do not depend on the
// Config or on other tokens · Requires: sm_90, 16-bit types, K a multiple of 128
// Traffic: weights once per tile of COLS tokens; tokens once for each CTA (RESIDENT), or once per round of its warps
// (through L2) · Measured: docs/perf/cuda.md
//
// With few tokens a linear is as fast as its weights are read. Each warp has a ring of its own in shared memory, which it
// fills by bulk copies: no warp waits for another one's weights, and 128 KB and more are under way on a multiprocessor at
// all times. Tokens are shared: one more warp copies them. A team of SPLIT warps shares a slab along K, if there are too
// few slabs to occupy all warps. They leave the sums of all groups in shared memory, and one more warp scales and adds
// them in ascending K. (So a chain over a whole row cannot be split.)
#pragma once

#include "base/step.cuh"
#include "base/types.cuh"
#include "epilogue/tile.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/pdl.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "sched/spans.cuh"
#include "weight/quantized.cuh"

namespace linear {

// A lane's integers of a block, with its scales and zeros.
template <typename W>
struct Block {
    typename W::Lane lane;
    typename W::Scales scales[W::CHAINS];
    typename W::Zero zeros[W::CHAINS];

    __device__ __forceinline__ void load(const u8* block, int lane_index, typename W::Zero of_row) {
        W::load(lane, block, lane_index);
#pragma unroll
        for (int i = 0; i < W::CHAINS; i++) {
            if constexpr (W::SCALED) {
                scales[i] = W::scales(block, i, lane_index);
                zeros[i] = W::group_zero(block, i, lane_index);
            } else {
                zeros[i] = of_row;
            }
        }
    }
};

template <typename Weight, int COLS_, int WARPS_, int SPLIT_, int SLABS_, int BLOCKS_, int STAGES_, int TOKEN_BLOCKS_,
          int TOKEN_STAGES_, int OUTPUTS_, int K_, int KIND_, int SHARED_>
struct StreamConfig {
    using W = Weight;  // a packed format: weight/quantized.cuh
    using T = typename W::T;
    static constexpr int COLS = COLS_;                  // tokens of a tile at most
    static constexpr int WARPS = WARPS_;                // that multiply
    static constexpr int SPLIT = SPLIT_;                // warps that share a slab along K
    static constexpr int SLABS = SLABS_;                // that a team computes at a time
    static constexpr int BLOCKS = BLOCKS_;              // of a slab in a stage of a warp's ring
    static constexpr int STAGES = STAGES_;              // of a warp's ring
    static constexpr int TOKEN_BLOCKS = TOKEN_BLOCKS_;  // of each warp's part of K in a stage of tokens
    static constexpr int TOKEN_STAGES = TOKEN_STAGES_;
    static constexpr int OUTPUTS = OUTPUTS_;            // columns of the output: features, after silu·mul if there is one
    static constexpr int K = K_;
    static constexpr int KIND = KIND_;                  // epilogue::Kind

    static constexpr bool SILU = KIND == epilogue::SiluMul;
    static constexpr int TEAMS = WARPS / SPLIT;
    static constexpr int PART = W::blocks(K) / SPLIT;  // blocks of a warp's part of K
    static constexpr int CHUNKS = PART / BLOCKS;       // a chunk is a stage's blocks
    static constexpr int WIDTH = (COLS + 7) / 8;       // products side by side
    static constexpr int MATRIX_SLABS = W::slabs(OUTPUTS, SILU);
    // Whether all of a tile's tokens are in shared memory at once. Else they are copied again for each round of slabs.
    static constexpr bool RESIDENT = TOKEN_STAGES * TOKEN_BLOCKS == PART;
    static constexpr int TOKEN_CHUNKS = TOKEN_BLOCKS / BLOCKS;  // chunks of weights that a stage of tokens serves
    // Whether a warp moves a whole chunk to registers before it multiplies. Then it refills the stage earlier.
    static constexpr bool AHEAD = WIDTH == 1 && BLOCKS * SLABS * sizeof(Block<W>) <= (WARPS < 8 ? 400 : 192);

    static constexpr int COPY = BLOCKS * W::BLOCK, STAGE = SLABS * COPY;
    static constexpr int TOKEN_ROW = TOKEN_BLOCKS * 256 + 16;  // 16 more, so that rows begin in different banks
    static constexpr int TOKEN_STAGE = SPLIT * COLS * TOKEN_ROW;
    static constexpr int TOKENS_AT = WARPS * STAGES * STAGE;
    // The sums of a team's slab: each group's 16 rows of each token, and their scales. There are SLOTS of them, so that
    // the next slab's may be written while one slab's are added.
    static constexpr int SLOTS = 2;
    static constexpr int GROUPS = W::blocks(K) * W::CHAINS;
    static constexpr int COLUMN = COLS == 1 ? 16 : 20;  // 4 more, so that columns begin in different banks
    static constexpr int SUMS = GROUPS * COLS * COLUMN * 4, SLOT = SUMS + GROUPS * 8 * static_cast<int>(sizeof(typename W::Scales));
    static constexpr int SLOTS_AT = TOKENS_AT + TOKEN_STAGES * TOKEN_STAGE;
    static constexpr int BARRIERS_AT = SLOTS_AT + (SPLIT > 1 ? TEAMS * SLOTS * SLOT : 0);
    static constexpr int BARRIERS = WARPS * STAGES + 2 * TOKEN_STAGES + (SPLIT > 1 ? 2 * TEAMS * SLOTS : 0);
    static constexpr int SHARED = BARRIERS_AT + BARRIERS * 8;
    static_assert(SHARED <= SHARED_ && SHARED_ <= 232448, "what the launch asks for");
    static constexpr int THREADS = (WARPS + (SPLIT > 1 ? 2 : 1)) * 32;

    static_assert(K % W::DEPTH == 0 && W::blocks(K) % SPLIT == 0 && PART % BLOCKS == 0 && WARPS % SPLIT == 0, "");
    static_assert(TOKEN_BLOCKS % BLOCKS == 0 && PART % TOKEN_BLOCKS == 0, "");
    static_assert(SPLIT == 1 || (W::SCALED && SLABS == 1 && WIDTH == 1), "sums of a group, of few tokens");
    static_assert(STAGE % 16 == 0 && TOKENS_AT % 16 == 0, "bulk copies");
};

// The barriers in shared memory.
template <typename C>
struct StreamBarriers {
    u32 base;

    __device__ __forceinline__ u32 at(int i) const { return base + C::BARRIERS_AT + i * 8; }
    __device__ __forceinline__ u32 full(int warp, int stage) const { return at(warp * C::STAGES + stage); }
    __device__ __forceinline__ u32 tokens_full(int stage) const { return at(C::WARPS * C::STAGES + stage); }
    __device__ __forceinline__ u32 tokens_empty(int stage) const { return tokens_full(C::TOKEN_STAGES + stage); }
    // A team's slot has all sums; and they are added.
    __device__ __forceinline__ u32 summed(int team, int slot) const {
        return tokens_full(2 * C::TOKEN_STAGES + team * C::SLOTS + slot);
    }
    __device__ __forceinline__ u32 added(int team, int slot) const { return summed(C::TEAMS + team, slot); }
};

// A place in a ring.
template <int STAGES>
struct Turn {
    int stage = 0;
    u32 phase = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// What a warp copies into its ring: the chunks of all its slabs, in the order in which it multiplies them.
template <typename C, typename Spans>
struct Loader {
    Spans spans;
    const u8* weight;
    int team, part;
    sched::Span span{};
    int slab = 0, chunk = 0;  // the next: a slab of the span
    bool more = false;

    __device__ __forceinline__ Loader(const Spans& spans, const u8* weight, int team, int part)
        : spans(spans), weight(weight), team(team), part(part) {
        find();
    }

    // Goes to the next span in which the team has a slab.
    __device__ __forceinline__ void find() {
        do {
            more = spans.take(span);
            slab = team * C::SLABS;
        } while (more && slab >= span.slabs);
    }

    __device__ __forceinline__ void load(u32 to, u32 barrier) {
        if (!more) return;
        const i64 first = span.expert * C::MATRIX_SLABS + span.slab + slab;
        const int slabs = min(C::SLABS, span.slabs - slab);
        if (ptx::elect()) {
            const u8* from = weight + first * C::W::slab_bytes(C::K) + (part * C::PART + chunk * C::BLOCKS) * C::W::BLOCK;
            mbarrier::arrive_expect(barrier, slabs * C::COPY);
            for (int i = 0; i < slabs; i++) {
                tma::load_bytes(to + i * C::COPY, from + i * C::W::slab_bytes(C::K), C::COPY, barrier, tma::EVICT_FIRST);
            }
        }
        __syncwarp();
        if (++chunk < C::CHUNKS) return;
        chunk = 0;
        slab += C::TEAMS * C::SLABS;
        if (slab >= span.slabs) find();
    }
};

// The warp that copies tokens. `source(column)` says which token a column is.
template <typename C, typename Spans, typename Source>
__device__ __forceinline__ void copy_tokens(u32 base, Spans spans, const typename C::T* tokens, Source source) {
    const StreamBarriers<C> barriers{base};
    const int lane = threadIdx.x % 32;
    Turn<C::TOKEN_STAGES> turn;
    sched::Span span;
    constexpr int EACH = (C::COLS + 31) / 32;
    while (spans.take(span)) {
        const int rounds = C::RESIDENT ? 1 : (span.slabs + C::TEAMS * C::SLABS - 1) / (C::TEAMS * C::SLABS);
        const typename C::T* from[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int column = lane + i * 32;
            if (column < span.count) from[i] = tokens + static_cast<i64>(source(span.first + column)) * C::K;
        }
        for (int round = 0; round < rounds; round++) {
            for (int block = 0; block < C::PART; block += C::TOKEN_BLOCKS) {
                const u32 full = barriers.tokens_full(turn.stage), to = base + C::TOKENS_AT + turn.stage * C::TOKEN_STAGE;
                mbarrier::wait(barriers.tokens_empty(turn.stage), turn.phase ^ 1);
                if (lane == 0) mbarrier::arrive_expect(full, span.count * C::SPLIT * C::TOKEN_BLOCKS * 256);
                __syncwarp();
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    const int column = lane + i * 32;
                    if (column >= span.count) continue;
                    for (int part = 0; part < C::SPLIT; part++) {
                        tma::load_bytes(to + (part * C::COLS + column) * C::TOKEN_ROW,
                                        from[i] + (part * C::PART + block) * C::W::DEPTH, C::TOKEN_BLOCKS * 256, full,
                                        tma::EVICT_LAST);
                    }
                }
                turn.advance();
            }
        }
    }
}

// A lane's part of the B operands of two steps of 16 elements, for all of a tile's tokens.
template <typename C>
struct TokenPair {
    u32 values[C::WIDTH][4];

    __device__ __forceinline__ void load(const u32 (&tokens)[C::WIDTH], int pair) {
#pragma unroll
        for (int c = 0; c < C::WIDTH; c++) ptx::ldmatrix_x4(values[c], tokens[c] + pair * 64);
    }
};

// A chain of a block's products: sums += slabs · tokens. `tokens` is where the lane's rows of tokens lie. `pairs` has the
// tokens of the chain's first two steps, and afterwards those behind its last ones, if they are in the block.
template <typename C>
__device__ __forceinline__ void multiply_chain(float (&sums)[C::SLABS][C::WIDTH][4], const Block<typename C::W> (&blocks)[C::SLABS],
                                               int chain, const u32 (&tokens)[C::WIDTH], TokenPair<C> (&pairs)[2]) {
    using W = typename C::W;
    constexpr int PAIRS = 4 / W::CHAINS;
#pragma unroll
    for (int pair = chain * PAIRS; pair < (chain + 1) * PAIRS; pair++) {
        if (pair < 3) pairs[(pair + 1) % 2].load(tokens, pair + 1);
        u32 a[C::SLABS][2][4];
#pragma unroll
        for (int s = 0; s < C::SLABS; s++) {
            W::fragment(a[s][0], blocks[s].lane, pair * 2, blocks[s].zeros[chain]);
            W::fragment(a[s][1], blocks[s].lane, pair * 2 + 1, blocks[s].zeros[chain]);
        }
#pragma unroll
        for (int step = 0; step < 2; step++) {
#pragma unroll
            for (int c = 0; c < C::WIDTH; c++) {
                const u32* b = pairs[pair % 2].values[c];
                const u32 of_step[2] = {b[step * 2], b[step * 2 + 1]};
#pragma unroll
                for (int s = 0; s < C::SLABS; s++) ptx::mma<typename C::T>(sums[s][c], a[s][step], of_step);
            }
        }
    }
}

// A team's slot in shared memory.
template <typename C>
struct Slot {
    float sums[C::GROUPS][C::COLS][C::COLUMN];
    typename C::W::Scales scales[C::GROUPS][8];

    __device__ static __forceinline__ Slot& of(u8* shared, int team, int slot) {
        static_assert(sizeof(Slot) == C::SLOT, "");
        return *reinterpret_cast<Slot*>(shared + C::SLOTS_AT + (team * C::SLOTS + slot) * C::SLOT);
    }

    // Stores a group's sums, which a warp has.
    __device__ __forceinline__ void store(int group, const float (&chain)[4], typename C::W::Scales of_group, int lane) {
        const int row = lane / 4, col = lane % 4 * 2;
        if (lane % 4 == 0) scales[group][row] = of_group;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (col + i % 2 < C::COLS) sums[group][col + i % 2][row + i / 2 * 8] = chain[i];
        }
    }

    // The sum over all groups of a row and a column.
    __device__ __forceinline__ float total(int row, int col) const {
        float total = 0.0f;
#pragma unroll 8
        for (int group = 0; group < C::GROUPS; group++) {
            const typename C::W::Scales& pair = scales[group][row % 8];
            total = __fmaf_rn(sums[group][col][row], to_float(row < 8 ? pair.upper : pair.lower), total);
        }
        return total;
    }
};

// The warp that adds what teams have summed. `destination(column)` is a column's row of `out`.
template <typename C, typename Spans, typename Out, typename Destination>
__device__ __forceinline__ void add_groups(u8* shared, Spans spans, Out* out, const Out* residual, Destination destination) {
    const StreamBarriers<C> barriers{ptx::shared_address(shared)};
    const int lane = threadIdx.x % 32, row = lane % 16;
    Turn<C::SLOTS> turns[C::TEAMS];
    sched::Span span;
    while (spans.take(span)) {
        for (int first = 0; first < span.slabs; first += C::TEAMS) {
#pragma unroll
            for (int team = 0; team < C::TEAMS; team++) {
                if (first + team >= span.slabs) break;
                Turn<C::SLOTS>& turn = turns[team];
                mbarrier::wait(barriers.summed(team, turn.stage), turn.phase);
                const Slot<C>& slot = Slot<C>::of(shared, team, turn.stage);
                float upper[(C::COLS + 1) / 2], lower[(C::COLS + 1) / 2];
#pragma unroll
                for (int i = 0; i < (C::COLS + 1) / 2; i++) {
                    upper[i] = slot.total(row, min(i * 2 + lane / 16, C::COLS - 1)) * C::W::UNIT;
                    lower[i] = __shfl_xor_sync(~0u, upper[i], 8);
                }
                if (lane == 0) mbarrier::arrive(barriers.added(team, turn.stage));
                turn.advance();
                const int at_row = (span.slab + first + team) * (C::SILU ? 8 : 16) + row;
#pragma unroll
                for (int i = 0; i < (C::COLS + 1) / 2; i++) {
                    const int column = i * 2 + lane / 16;
                    if (row >= 8 || column >= span.count) continue;
                    const i64 at = static_cast<i64>(destination(span.first + column)) * C::OUTPUTS;
                    epilogue::store_pair<typename C::T, C::KIND, C::OUTPUTS>(upper[i], lower[i], at_row, out + at, residual + at);
                }
            }
        }
    }
}

// A warp that multiplies. `destination(column)` is a column's row of `out`.
template <typename C, typename Spans, typename Out, typename Destination>
__device__ __forceinline__ void multiply_slabs(u8* shared, Loader<C, Spans>& loader, Spans spans, const u8* weight, Out* out,
                                               const Out* residual, Destination destination) {
    using W = typename C::W;
    const u32 base = ptx::shared_address(shared);
    const StreamBarriers<C> barriers{base};
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int team = warp / C::SPLIT, part = warp % C::SPLIT;
    u8* ring = shared + warp * C::STAGES * C::STAGE;
    // Matrices of eight tokens: lanes 0 to 7 have the rows of the first eight elements, lanes 8 to 15 of the next. A tile
    // of fewer tokens than eight repeats its last one.
    const u32 token_lane = base + C::TOKENS_AT + (part * C::COLS + min(lane % 8, C::COLS - 1)) * C::TOKEN_ROW + lane / 8 * 16;
    Turn<C::STAGES> turn;
    Turn<C::TOKEN_STAGES> token_turn;
    Turn<C::SLOTS> slot_turn;
    sched::Span span;
    while (spans.take(span)) {
        const int rounds = (span.slabs + C::TEAMS * C::SLABS - 1) / (C::TEAMS * C::SLABS);
        const Turn<C::TOKEN_STAGES> tokens_from = token_turn;
        for (int round = 0; round < rounds; round++) {
            const int slab = (round * C::TEAMS + team) * C::SLABS;
            const bool active = slab < span.slabs;
            if constexpr (C::RESIDENT) token_turn = tokens_from;
            typename W::Zero row_zeros[C::SLABS];
            float row_scales[C::SLABS][2];
            if constexpr (W::ROW_VALUES > 0) {
#pragma unroll
                for (int s = 0; s < C::SLABS; s++) {
                    const i64 at = span.expert * C::MATRIX_SLABS + min(span.slab + slab + s, C::MATRIX_SLABS - 1);
                    const float* of_row = W::row_values(weight, at) + lane / 4 * W::ROW_VALUES;
                    row_scales[s][0] = of_row[0], row_scales[s][1] = of_row[8 * W::ROW_VALUES];
                    row_zeros[s] = W::row_zero(of_row[W::ROW_VALUES - 1], of_row[9 * W::ROW_VALUES - 1]);
                }
            }
            float total[C::SLABS][C::WIDTH][4] = {};
            Slot<C>& slot = Slot<C>::of(shared, team, slot_turn.stage);
            if (C::SPLIT > 1 && active) mbarrier::wait(barriers.added(team, slot_turn.stage), slot_turn.phase ^ 1);
            const auto chunk = [&](int index) {
                u32 tokens[C::WIDTH];
#pragma unroll
                for (int c = 0; c < C::WIDTH; c++) {
                    tokens[c] = token_lane + token_turn.stage * C::TOKEN_STAGE + c * 8 * C::TOKEN_ROW +
                                index % C::TOKEN_CHUNKS * C::BLOCKS * 256;
                }
                if (index % C::TOKEN_CHUNKS == 0 && (!C::RESIDENT || round == 0)) {
                    mbarrier::wait(barriers.tokens_full(token_turn.stage), token_turn.phase);
                }
                if (active) {
                    mbarrier::wait(barriers.full(warp, turn.stage), turn.phase);
                    const u8* stage = ring + turn.stage * C::STAGE;
                    Block<W> blocks[C::AHEAD ? C::BLOCKS : 1][C::SLABS];
                    const auto fetch = [&](int b) {
#pragma unroll
                        for (int s = 0; s < C::SLABS; s++) {
                            blocks[C::AHEAD ? b : 0][s].load(stage + s * C::COPY + b * W::BLOCK, lane, row_zeros[s]);
                        }
                    };
                    const auto refill = [&] {
                        __syncwarp();
                        loader.load(base + warp * C::STAGES * C::STAGE + turn.stage * C::STAGE, barriers.full(warp, turn.stage));
                    };
                    if constexpr (C::AHEAD) {
#pragma unroll
                        for (int b = 0; b < C::BLOCKS; b++) fetch(b);
                        refill();
                    }
#pragma unroll C::AHEAD ? C::BLOCKS : 1
                    for (int b = 0; b < C::BLOCKS; b++) {
                        if constexpr (!C::AHEAD) {
                            fetch(b);
                            if (b == C::BLOCKS - 1) refill();
                        }
                        const auto& block = blocks[C::AHEAD ? b : 0];
                        TokenPair<C> pairs[2];
                        pairs[0].load(tokens, 0);
                        if constexpr (W::SCALED) {
#pragma unroll
                            for (int chain = 0; chain < W::CHAINS; chain++) {
                                float chains[C::SLABS][C::WIDTH][4] = {};
                                multiply_chain<C>(chains, block, chain, tokens, pairs);
                                if constexpr (C::SPLIT > 1) {
                                    const int group = (part * C::PART + index * C::BLOCKS + b) * W::CHAINS + chain;
                                    slot.store(group, chains[0][0], block[0].scales[chain], lane);
                                } else {
#pragma unroll
                                    for (int s = 0; s < C::SLABS; s++) {
#pragma unroll
                                        for (int c = 0; c < C::WIDTH; c++) W::add(total[s][c], chains[s][c], block[s].scales[chain]);
                                    }
                                }
                            }
                        } else {
                            multiply_chain<C>(total, block, 0, tokens, pairs);
                        }
#pragma unroll
                        for (int c = 0; c < C::WIDTH; c++) tokens[c] += 256;
                    }
                    turn.advance();
                }
                if (index % C::TOKEN_CHUNKS == C::TOKEN_CHUNKS - 1) {
                    if (!C::RESIDENT || round == rounds - 1) {
                        __syncwarp();
                        if (lane == 0) mbarrier::arrive(barriers.tokens_empty(token_turn.stage));
                    }
                    token_turn.advance();
                }
            };
#pragma unroll 1
            for (int index = 0; index < C::CHUNKS; index++) chunk(index);
            if (!active) continue;
            if constexpr (C::SPLIT > 1) {
                __syncwarp();
                if (lane == 0) mbarrier::arrive(barriers.summed(team, slot_turn.stage));
                slot_turn.advance();
            } else {
#pragma unroll
                for (int c = 0; c < C::WIDTH; c++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int column = c * 8 + lane % 4 * 2 + half;
                        if (column >= span.count) continue;
                        const i64 at = static_cast<i64>(destination(span.first + column)) * C::OUTPUTS;
#pragma unroll
                        for (int s = 0; s < C::SLABS; s++) {
                            if (slab + s >= span.slabs) continue;
                            float upper = total[s][c][half] * W::UNIT, lower = total[s][c][half + 2] * W::UNIT;
                            if constexpr (W::ROW_VALUES > 0) upper *= row_scales[s][0], lower *= row_scales[s][1];
                            const int row = (span.slab + slab + s) * (C::SILU ? 8 : 16) + lane / 4;
                            epilogue::store_pair<typename C::T, C::KIND, C::OUTPUTS>(upper, lower, row, out + at, residual + at);
                        }
                    }
                }
            }
        }
    }
}

// What both kernels do. `wait` returns when the preceding kernel has finished. With EARLY, warps begin to load weights
// before that: what the spans depend on was complete before that kernel started.
template <typename C, bool EARLY, typename MakeSpans, typename Wait, typename Source, typename Destination, typename Out>
__device__ __forceinline__ void stream(MakeSpans make_spans, Wait wait, const u8* weight, const typename C::T* tokens, Out* out,
                                       const Out* residual, Source source, Destination destination) {
    extern __shared__ __align__(128) u8 dynamic_shared[];
    const u32 base = ptx::shared_address(dynamic_shared);
    const StreamBarriers<C> barriers{base};
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (warp == C::WARPS) {
        if (lane == 0) {
            for (int s = 0; s < C::TOKEN_STAGES; s++) {
                mbarrier::init(barriers.tokens_full(s), 1);
                mbarrier::init(barriers.tokens_empty(s), C::WARPS);
            }
            mbarrier::fence_init();
        }
        __syncthreads();
        wait();
        copy_tokens<C>(base, make_spans(), tokens, source);
        return;
    }
    if (warp > C::WARPS) {
        if constexpr (C::SPLIT > 1) {
            if (lane == 0) {
                for (int s = 0; s < C::TEAMS * C::SLOTS; s++) {
                    mbarrier::init(barriers.summed(0, s), C::SPLIT);
                    mbarrier::init(barriers.added(0, s), 1);
                }
                mbarrier::fence_init();
            }
            __syncthreads();
            wait();
            add_groups<C>(dynamic_shared, make_spans(), out, residual, destination);
        }
        return;
    }
    if (lane == 0) {
        for (int s = 0; s < C::STAGES; s++) mbarrier::init(barriers.full(warp, s), 1);
        mbarrier::fence_init();
    }
    __syncwarp();
    if constexpr (!EARLY) wait();
    const auto spans = make_spans();
    Loader<C, decltype(make_spans())> loader(spans, weight, warp / C::SPLIT, warp % C::SPLIT);
    for (int s = 0; s < C::STAGES; s++) loader.load(base + (warp * C::STAGES + s) * C::STAGE, barriers.full(warp, s));
    __syncthreads();
    if constexpr (EARLY) wait();
    multiply_slabs<C>(dynamic_shared, loader, spans, weight, out, residual, destination);
}

// Dense linear of a packed weight [OUTPUTS][K] with tokens [·][K].
template <typename C, bool LOGITS, typename Out>
__global__ void __launch_bounds__(C::THREADS, 1)
    stream_dense(const u8* weight, const typename C::T* tokens, const step::Header* header, Out* out, const Out* residual) {
    pdl::launch_dependents();
    const auto spans = [&] {
        return sched::Spans<1, C::MATRIX_SLABS, C::COLS>(nullptr, LOGITS ? header->num_logits : header->num_tokens);
    };
    const auto same = [](int column) { return column; };
    stream<C, true>(spans, [] { pdl::wait(); }, weight, tokens, out, residual, same, same);
}

// Linear of each token by its experts, as `mma_grouped`. expert_down loads its first weights before its wait: the lists
// were complete before expert_gate_up started (wgmma.cuh).
template <typename C, int EXPERTS, int TOP_K, bool DOWN>
__global__ void __launch_bounds__(C::THREADS, 1)
    stream_grouped(const u8* weight, const typename C::T* tokens, const step::Header* header, const int* offsets,
                   const int* order, typename C::T* out) {
    const auto spans = [&] { return sched::Spans<EXPERTS, C::MATRIX_SLABS, C::COLS>(offsets, header->num_tokens); };
    const auto source = [&](int position) { return DOWN ? position : order[position] / TOP_K; };
    const auto destination = [&](int position) { return DOWN ? order[position] : position; };
    const auto wait = [] {
        pdl::wait();
        pdl::launch_dependents();  // after the wait, because expert_down relies on that
    };
    stream<C, DOWN>(spans, wait, weight, tokens, out, static_cast<const typename C::T*>(nullptr), source, destination);
}

}  // namespace linear
