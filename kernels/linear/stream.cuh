// Op: linear, expert_gate_up, expert_down · CPU twin: mixtral-cpu/src/kernels/{linear,experts}.rs
// Regime: up to 16 tokens, quantized weights · Tile: 16 output features (a slab) × COLS tokens for a warp or a team of
// warps · Grid: persistent, each CTA a run of slabs
// Numerics: as `mma`: each 16 elements of K one product, chains in ascending K, one rounding; bits do not depend on the
// Config or on other tokens · Requires: sm_90, 16-bit types, K a multiple of 128
// Traffic: weights once per tile of COLS tokens; tokens once for each CTA (RESIDENT), or once per round of its warps
// (through L2) · Measured: docs/perf/cuda.md
//
// With few tokens a linear is as fast as its weights are read. Each warp has a ring of its own in shared memory, which it
// fills by bulk copies: no warp waits for another one's weights, and 128 KB and more are under way on a multiprocessor at
// all times. Tokens are shared: one more warp copies them. A team of SPLIT warps shares a slab along K, if there are too
// few slabs to occupy all warps. They leave the sums of all groups in shared memory, and the warp that copied the tokens
// scales and adds them in ascending K. (So a chain over a whole row cannot be split.)
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

    // A word of what was loaded last.
    __device__ __forceinline__ u32 last() const {
        const u32 word = lane.pieces[W::PIECES - 1].w;
        if constexpr (!W::SCALED) return word;
        return word ^ __float_as_uint(to_float(scales[W::CHAINS - 1].lower));
    }
};

template <typename Weight, int COLS_, int ROWS_, int WARPS_, int SPLIT_, int BLOCKS_, int STAGES_, int TOKEN_BLOCKS_,
          int TOKEN_STAGES_, int OUTPUTS_, int K_, int KIND_, int SHARED_>
struct StreamConfig {
    using W = Weight;  // a packed format: weight/quantized.cuh
    using T = typename W::T;
    static constexpr int COLS = COLS_;                  // tokens of a tile at most
    static constexpr int ROWS = ROWS_;                  // tokens in shared memory at most: of one tile, or of several
    static constexpr int WARPS = WARPS_;                // that multiply
    static constexpr int SPLIT = SPLIT_;                // warps that share a slab along K
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
    // Whether all of a group's tokens are in shared memory at once. Else they are copied again for each round of slabs.
    static constexpr bool RESIDENT = TOKEN_STAGES * TOKEN_BLOCKS == PART;
    static constexpr int TOKEN_CHUNKS = TOKEN_BLOCKS / BLOCKS;  // chunks of weights that a stage of tokens serves
    // Whether a warp moves a whole chunk to registers before it multiplies. Then it refills the stage earlier.
    static constexpr bool AHEAD = WIDTH == 1 && BLOCKS * sizeof(Block<W>) <= (WARPS < 8 ? 400 : 192);
    // Blocks whose chains are computed at the same time, so that none waits for its last product.
    static constexpr int AT_ONCE = AHEAD && W::SCALED && W::CHAINS == 1 && BLOCKS % 2 == 0 ? 2 : 1;

    static constexpr int STAGE = BLOCKS * W::BLOCK;
    static constexpr int TOKEN_ROW = TOKEN_BLOCKS * 256 + 16;  // 16 more, so that rows begin in different banks
    static constexpr int TOKEN_STAGE = SPLIT * ROWS * TOKEN_ROW;
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
    static constexpr int THREADS = (WARPS + 1) * 32;

    static_assert(K % W::DEPTH == 0 && W::blocks(K) % SPLIT == 0 && PART % BLOCKS == 0 && WARPS % SPLIT == 0, "");
    static_assert(TOKEN_BLOCKS % BLOCKS == 0 && PART % TOKEN_BLOCKS == 0 && ROWS >= COLS, "");
    static_assert(SPLIT == 1 || (W::SCALED && WIDTH == 1 && RESIDENT), "sums of a group, of few tokens");
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
    bool again = false;  // whether the stage has been filled before

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
            again = true;
        }
    }
};

// Where a CTA's slabs lie, which a warp asks for in ascending order.
template <typename Spans>
struct Cursor {
    Spans spans;
    sched::Span span{};

    // The span of slab `slab`, which exists.
    __device__ __forceinline__ const sched::Span& at(int slab) {
        while (slab >= span.end) spans.take(span);
        return span;
    }
};

// What a warp copies into its ring: the chunks of all its slabs, in the order in which it multiplies them.
template <typename C, typename Spans>
struct Loader {
    Cursor<Spans> cursor;
    const u8* weight;
    int slab, part;
    const u8* from = nullptr;
    int chunk = 0;  // the next

    __device__ __forceinline__ Loader(const Spans& spans, const u8* weight, int team, int part)
        : cursor{spans}, weight(weight), slab(team), part(part) {}

    __device__ __forceinline__ void load(u32 to, u32 barrier) {
        if (slab >= cursor.spans.count()) return;
        if (chunk == 0) {
            const sched::Span& span = cursor.at(slab);
            const i64 index = span.expert * C::MATRIX_SLABS + span.slab + slab - span.begin;
            from = weight + index * C::W::slab_bytes(C::K) + part * C::PART * C::W::BLOCK;
        }
        if (ptx::elect()) {
            mbarrier::arrive_expect(barrier, C::STAGE);
            tma::load_bytes(to, from, C::STAGE, barrier, tma::EVICT_FIRST);
        }
        __syncwarp();
        from += C::STAGE;
        if (++chunk == C::CHUNKS) {
            chunk = 0;
            slab += C::TEAMS;
        }
    }
};

// Calls f(group, round) for all rounds of a CTA's groups. A round is TEAMS slabs, of which a group may have a part.
template <typename C, typename Spans, typename F>
__device__ __forceinline__ void for_rounds(Spans spans, F f) {
    sched::Group group;
    while (spans.template take<C::ROWS>(group)) {
        for (int round = group.begin / C::TEAMS; round * C::TEAMS < group.end; round++) f(group, round);
    }
}

// Whether it is the group's first, or last.
template <typename C>
__device__ __forceinline__ bool is_first(const sched::Group& group, int round) {
    return round == group.begin / C::TEAMS;
}

template <typename C>
__device__ __forceinline__ bool is_last(const sched::Group& group, int round) {
    return (round + 1) * C::TEAMS >= group.end;
}

// Copies the tokens of a round. `source(column)` says which token a column is.
template <typename C, typename Source>
__device__ __forceinline__ void copy_tokens(u32 base, Turn<C::TOKEN_STAGES>& turn, const sched::Group& group,
                                            const typename C::T* tokens, Source source) {
    const StreamBarriers<C> barriers{base};
    const int lane = threadIdx.x % 32;
    for (int block = 0; block < C::PART; block += C::TOKEN_BLOCKS) {
        const u32 full = barriers.tokens_full(turn.stage), to = base + C::TOKENS_AT + turn.stage * C::TOKEN_STAGE;
        mbarrier::wait(barriers.tokens_empty(turn.stage), turn.phase ^ 1);
        if (turn.again) tma::fence_shared();
        if (lane == 0) mbarrier::arrive_expect(full, group.count * C::SPLIT * C::TOKEN_BLOCKS * 256);
        __syncwarp();
        for (int i = lane; i < group.count * C::SPLIT; i += 32) {
            const int column = i / C::SPLIT, part = i % C::SPLIT;
            const typename C::T* from = tokens + static_cast<i64>(source(group.first + column)) * C::K;
            tma::load_bytes(to + (part * C::ROWS + column) * C::TOKEN_ROW, from + (part * C::PART + block) * C::W::DEPTH,
                            C::TOKEN_BLOCKS * 256, full, tma::EVICT_LAST);
        }
        turn.advance();
    }
}

// A lane's part of the B operands of two steps of 16 elements, for all of a tile's tokens.
template <typename C>
struct TokenPair {
    u32 values[C::WIDTH][4];

    __device__ __forceinline__ void load(const u32 (&tokens)[C::WIDTH], int block, int pair) {
#pragma unroll
        for (int c = 0; c < C::WIDTH; c++) ptx::ldmatrix_x4(values[c], tokens[c] + block * 256 + pair * 64);
    }
};

// A chain of products of each of N blocks that lie one behind the other. `tokens` is where the lane's rows of tokens
// lie for the first of them. Of up to eight tokens, `next` has those of the chain's first two steps, and afterwards those
// behind its last ones, if they are in the block. More tokens are loaded when they are needed: the products of one eight
// of them hide the loads of the next.
template <typename C, int N>
__device__ __forceinline__ void multiply_chain(float (&sums)[N][C::WIDTH][4], const Block<typename C::W>* blocks, int chain,
                                               const u32 (&tokens)[C::WIDTH], TokenPair<C> (&next)[N]) {
    using W = typename C::W;
    constexpr int PAIRS = 4 / W::CHAINS;  // of steps of 16 elements
#pragma unroll
    for (int pair = chain * PAIRS; pair < (chain + 1) * PAIRS; pair++) {
        TokenPair<C> here[N];
        u32 a[N][2][4];
#pragma unroll
        for (int n = 0; n < N; n++) {
            if constexpr (C::WIDTH == 1) {
                here[n] = next[n];
                if (pair < 3) next[n].load(tokens, n, pair + 1);
            }
            W::fragment(a[n][0], blocks[n].lane, pair * 2, blocks[n].zeros[chain]);
            W::fragment(a[n][1], blocks[n].lane, pair * 2 + 1, blocks[n].zeros[chain]);
        }
#pragma unroll
        for (int c = 0; c < C::WIDTH; c++) {
            if constexpr (C::WIDTH > 1) ptx::ldmatrix_x4(here[0].values[c], tokens[c] + pair * 64);
#pragma unroll
            for (int step = 0; step < 2; step++) {
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const u32 b[2] = {here[n].values[c][step * 2], here[n].values[c][step * 2 + 1]};
                    ptx::mma<typename C::T>(sums[n][c], a[n][step], b);
                }
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
#pragma unroll 16
        for (int group = 0; group < C::GROUPS; group++) {
            const typename C::W::Scales& pair = scales[group][row % 8];
            total = __fmaf_rn(sums[group][col][row], to_float(row < 8 ? pair.upper : pair.lower), total);
        }
        return total;
    }
};

// Adds what teams have summed in a round. `destination(column)` is a column's row of `out`.
template <typename C, typename Spans, typename Out, typename Destination>
__device__ __forceinline__ void add_sums(u8* shared, Cursor<Spans>& cursor, const sched::Group& group, int round, Out* out,
                                         const Out* residual, Destination destination) {
    const StreamBarriers<C> barriers{ptx::shared_address(shared)};
    const int lane = threadIdx.x % 32, row = lane % 16;
    constexpr int EACH = (C::COLS + 1) / 2;  // columns of a lane
    for (int team = 0; team < C::TEAMS; team++) {
        const int slab = round * C::TEAMS + team, at = round % C::SLOTS;
        if (slab < group.begin || slab >= group.end) continue;
        const sched::Span span = cursor.at(slab);
        const int at_row = (span.slab + slab - span.begin) * (C::SILU ? 8 : 16) + row;
        i64 to[EACH];
        float2 added[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int column = i * 2 + lane / 16;
            to[i] = column < span.count ? static_cast<i64>(destination(span.first + column)) * C::OUTPUTS : -1;
            if (row < 8 && to[i] >= 0) added[i] = epilogue::load_pair<C::KIND, C::OUTPUTS>(residual + to[i], at_row);
        }
        mbarrier::wait(barriers.summed(team, at), round / C::SLOTS & 1);
        const Slot<C>& slot = Slot<C>::of(shared, team, at);
        float upper[EACH], lower[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            upper[i] = slot.total(row, min(i * 2 + lane / 16, C::COLS - 1)) * C::W::UNIT;
            lower[i] = __shfl_xor_sync(~0u, upper[i], 8);
        }
        if (lane == 0) mbarrier::arrive(barriers.added(team, at));
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (row >= 8 || to[i] < 0) continue;
            epilogue::store_pair<typename C::T, C::KIND, C::OUTPUTS>(upper[i], lower[i], at_row, out + to[i], added[i]);
        }
    }
}

// A warp that multiplies. `destination(column)` is a column's row of `out`.
template <typename C, typename Spans, typename Out, typename Destination>
__device__ __forceinline__ void multiply_slabs(u8* shared, Loader<C, Spans>& loader, const Spans& spans, const u8* weight, Out* out,
                                               const Out* residual, Destination destination) {
    using W = typename C::W;
    const u32 base = ptx::shared_address(shared);
    const StreamBarriers<C> barriers{base};
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int team = warp / C::SPLIT, part = warp % C::SPLIT;
    Turn<C::STAGES> turn;
    Turn<C::TOKEN_STAGES> token_turn;
    Turn<C::SLOTS> slot_turn;
    Cursor<Spans> cursor{spans};
    for_rounds<C>(spans, [&](const sched::Group& group, int round) {
        const int slab = round * C::TEAMS + team;
        const bool active = slab >= group.begin && slab < group.end;
        sched::Span span{};
        if (active) span = cursor.at(slab);
        const int matrix_slab = span.slab + slab - span.begin;
        typename W::Zero row_zeros = W::default_zero();
        float row_scales[2];
        if constexpr (W::ROW_VALUES > 0) {
            const i64 index = active ? span.expert * C::MATRIX_SLABS + matrix_slab : 0;
            const float* of_row = W::row_values(weight, index) + lane / 4 * W::ROW_VALUES;
            row_scales[0] = of_row[0], row_scales[1] = of_row[8 * W::ROW_VALUES];
            row_zeros = W::row_zero(of_row[W::ROW_VALUES - 1], of_row[9 * W::ROW_VALUES - 1]);
        }
        // Matrices of eight tokens: lanes 0 to 7 have the rows of the first eight elements, lanes 8 to 15 of the next. Where
        // there are no more tokens, the last row is read again.
        u32 token_rows[C::WIDTH];
#pragma unroll
        for (int c = 0; c < C::WIDTH; c++) {
            const int row = min(span.first - group.first + min(c * 8 + lane % 8, C::COLS - 1), C::ROWS - 1);
            token_rows[c] = base + C::TOKENS_AT + (part * C::ROWS + (active ? row : 0)) * C::TOKEN_ROW + lane / 8 * 16;
        }
        Slot<C>& slot = Slot<C>::of(shared, team, slot_turn.stage);
        if (C::SPLIT > 1 && active) mbarrier::wait(barriers.added(team, slot_turn.stage), slot_turn.phase ^ 1);
        // Where what belongs to a column's sums lies in `out` and in the residual.
        const auto begin = [&](int column) { return static_cast<i64>(destination(span.first + column)) * C::OUTPUTS; };
        const auto first_row = [&] { return matrix_slab * (C::SILU ? 8 : 16) + lane / 4; };
        [[maybe_unused]] float2 added[C::WIDTH][2];
        if constexpr (C::SPLIT == 1 && C::KIND == epilogue::Residual) {
#pragma unroll
            for (int i = 0; i < 2 * C::WIDTH; i++) {
                const int column = i / 2 * 8 + lane % 4 * 2 + i % 2;
                if (!active || column >= span.count) continue;
                added[i / 2][i % 2] = epilogue::load_pair<C::KIND, C::OUTPUTS>(residual + begin(column), first_row());
            }
        }
        float total[1][C::WIDTH][4] = {};
#pragma unroll 1
        for (int index = 0; index < C::CHUNKS; index++) {
            if (index % C::TOKEN_CHUNKS == 0 && (!C::RESIDENT || is_first<C>(group, round))) {
                mbarrier::wait(barriers.tokens_full(token_turn.stage), token_turn.phase);
            }
            if (active) {
                u32 tokens[C::WIDTH];
#pragma unroll
                for (int c = 0; c < C::WIDTH; c++) {
                    tokens[c] = token_rows[c] + token_turn.stage * C::TOKEN_STAGE + index % C::TOKEN_CHUNKS * C::BLOCKS * 256;
                }
                mbarrier::wait(barriers.full(warp, turn.stage), turn.phase);
                const u8* stage = shared + (warp * C::STAGES + turn.stage) * C::STAGE;
                Block<W> blocks[C::AHEAD ? C::BLOCKS : 1];
                // `block` is what was loaded last.
                const auto refill = [&](const Block<W>& block) {
                    __syncwarp();
                    const u32 to = base + (warp * C::STAGES + turn.stage) * C::STAGE + ptx::zero_after(block.last());
                    loader.load(to, barriers.full(warp, turn.stage));
                };
                if constexpr (C::AHEAD) {
#pragma unroll
                    for (int b = 0; b < C::BLOCKS; b++) blocks[b].load(stage + b * W::BLOCK, lane, row_zeros);
                    refill(blocks[C::BLOCKS - 1]);
                }
#pragma unroll C::AHEAD ? C::BLOCKS : 1
                for (int b = 0; b < C::BLOCKS; b += C::AT_ONCE) {
                    if constexpr (!C::AHEAD) {
                        blocks[0].load(stage + b * W::BLOCK, lane, row_zeros);
                        if (b == C::BLOCKS - 1) refill(blocks[0]);
                    }
                    const Block<W>* here = blocks + (C::AHEAD ? b : 0);
                    TokenPair<C> next[C::AT_ONCE];
#pragma unroll
                    for (int n = 0; C::WIDTH == 1 && n < C::AT_ONCE; n++) next[n].load(tokens, n, 0);
                    if constexpr (W::SCALED) {
#pragma unroll
                        for (int chain = 0; chain < W::CHAINS; chain++) {
                            float chains[C::AT_ONCE][C::WIDTH][4] = {};
                            multiply_chain<C>(chains, here, chain, tokens, next);
#pragma unroll
                            for (int n = 0; n < C::AT_ONCE; n++) {
                                if constexpr (C::SPLIT > 1) {
                                    slot.store(((part * C::CHUNKS + index) * C::BLOCKS + b + n) * W::CHAINS + chain, chains[n][0],
                                               here[n].scales[chain], lane);
                                } else {
#pragma unroll
                                    for (int c = 0; c < C::WIDTH; c++) W::add(total[0][c], chains[n][c], here[n].scales[chain]);
                                }
                            }
                        }
                    } else {
                        multiply_chain<C>(total, here, 0, tokens, next);
                    }
#pragma unroll
                    for (int c = 0; c < C::WIDTH; c++) tokens[c] += C::AT_ONCE * 256;
                }
                turn.advance();
            }
            if (index % C::TOKEN_CHUNKS == C::TOKEN_CHUNKS - 1) {
                if (!C::RESIDENT || is_last<C>(group, round)) {
                    __syncwarp();
                    if (lane == 0) mbarrier::arrive(barriers.tokens_empty(token_turn.stage));
                }
                token_turn.advance();
            }
        }
        // In the group's next round, the same tokens are there.
        if (C::RESIDENT && !is_last<C>(group, round)) token_turn.phase ^= 1;
        if (!active) return;
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
                    float upper = total[0][c][half] * W::UNIT, lower = total[0][c][half + 2] * W::UNIT;
                    if constexpr (W::ROW_VALUES > 0) upper *= row_scales[0], lower *= row_scales[1];
                    epilogue::store_pair<typename C::T, C::KIND, C::OUTPUTS>(upper, lower, first_row(), out + begin(column), added[c][half]);
                }
            }
        }
    });
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
            for (int s = 0; C::SPLIT > 1 && s < C::TEAMS * C::SLOTS; s++) {
                mbarrier::init(barriers.summed(0, s), C::SPLIT);
                mbarrier::init(barriers.added(0, s), 1);
            }
            mbarrier::fence_init();
        }
        __syncthreads();
        if constexpr (!EARLY) wait();
        const auto spans = make_spans();
        if constexpr (EARLY) wait();
        Cursor<decltype(make_spans())> cursor{spans};
        Turn<C::TOKEN_STAGES> turn;
        for_rounds<C>(spans, [&](const sched::Group& group, int round) {
            if (!C::RESIDENT || is_first<C>(group, round)) copy_tokens<C>(base, turn, group, tokens, source);
            if constexpr (C::SPLIT > 1) add_sums<C>(dynamic_shared, cursor, group, round, out, residual, destination);
        });
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
    // (A single token's is the only row.)
    const bool single = header->num_tokens == 1;
    const auto source = [&](int position) { return DOWN ? position : single ? 0 : order[position] / TOP_K; };
    const auto destination = [&](int position) { return DOWN ? order[position] : position; };
    const auto wait = [] {
        pdl::wait();
        pdl::launch_dependents();  // after the wait, because expert_down relies on that
    };
    stream<C, DOWN>(spans, wait, weight, tokens, out, static_cast<const typename C::T*>(nullptr), source, destination);
}

}  // namespace linear
