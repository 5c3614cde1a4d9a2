// Op: all_reduce, with or without residual and norm; combine and all_reduce in one. CPU twins: kernels/collective.rs,
// kernels/combine.rs.
// Regime: any number of rows. With fewer than `shares_from`, every rank sends its rows to all others, and each sums all. With
//   more, every rank sums a share of the rows and sends the sums: two ways over the link, but fewer bytes if there are more than
//   two ranks.
// Tile: a row, in registers.
// Grid: persistent, a CTA a row at a time. Every CTA is resident, sends a row before it waits for that row, and takes rows in
//   ascending order; so ranks may have different grids.
// Numerics: the contract's, to the bit: parts in ascending rank from the first one, one rounding; the residual; one
//   rounding. The norm is that of rms::norm, to the bit. So it does not matter who sums a row.
// Requires: inboxes that every rank of the group can write to.
// Traffic: a row to each other rank, and one from each; in shares, 2 · (RANKS - 1) / RANKS of a row instead of RANKS - 1. The
//   residual read, one or two rows written.
// Measured: docs/perf/ranks.md.
#pragma once

#include "base/step.cuh"
#include "collective/exchange.cuh"
#include "moe/combined.cuh"
#include "norm/row.cuh"
#include "ptx/pdl.cuh"

namespace exchange {

// A row as it is sent: the packets of a thread.
template <typename T, int COLS>
struct Packed {
    using Row = rms::Row<COLS>;

    Packet<T> at[Row::VECTORS];

    __device__ __forceinline__ explicit Packed(const Row& x) {
#pragma unroll
        for (int v = 0; v < Row::VECTORS; ++v) at[v].pack_from(x.at[v]);
    }

    static __device__ __forceinline__ i64 index(i64 row, int v) { return row * packets(COLS) + Row::column(v) / VECTOR; }

    // To all other ranks.
    template <int RANKS>
    __device__ __forceinline__ void send(i64 row, const Slot<T, RANKS>& slot) const {
#pragma unroll
        for (int v = 0; v < Row::VECTORS; ++v) {
            if (Row::column(v) < COLS) slot.send(at[v], index(row, v));
        }
    }

    template <int RANKS>
    __device__ __forceinline__ void send_to(i32 peer, i64 row, const Slot<T, RANKS>& slot) const {
#pragma unroll
        for (int v = 0; v < Row::VECTORS; ++v) {
            if (Row::column(v) < COLS) slot.send_to(peer, at[v], index(row, v));
        }
    }

    // What `peer` sent.
    template <int RANKS>
    static __device__ __forceinline__ Row take(i32 peer, i64 row, const Slot<T, RANKS>& slot, Patience& patience) {
        Row x = {};
#pragma unroll
        for (int v = 0; v < Row::VECTORS; ++v) {
            if (Row::column(v) >= COLS) continue;
            Packet<T> packet;
            slot.take(packet, peer, index(row, v), patience);
            packet.unpack_to(x.at[v]);
        }
        return x;
    }

    // The sum of all ranks' parts, of which this is one.
    template <int RANKS>
    __device__ __forceinline__ Row sum(i64 row, const Slot<T, RANKS>& slot, Patience& patience) const {
        Row x = {};
#pragma unroll
        for (int v = 0; v < Row::VECTORS; ++v) {
            if (Row::column(v) >= COLS) continue;
#pragma unroll
            for (i32 peer = 0; peer < RANKS; ++peer) {
                Packet<T> part = at[v];
                slot.take(part, peer, index(row, v), patience);
                float y[VECTOR];
                part.unpack_to(y);
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) x.at[v][i] = peer == 0 ? y[i] : __fadd_rn(x.at[v][i], y[i]);
            }
        }
        x.template round<T>();
        return x;
    }
};

// What becomes of the sums. `residual` may be `out`; `scale`, `eps` and `normalized` are those of the norm.
template <typename T, int COLS, bool RESIDUAL, bool NORM>
struct Sums {
    using Row = rms::Row<COLS>;

    const T* residual;
    T* out;
    Row scale;
    float eps;
    T* normalized;

    __device__ __forceinline__ Row base(i64 row) const {
        Row base = {};
        if constexpr (RESIDUAL) base.load(residual + row * COLS);
        return base;
    }

    // `turn` counts the CTA's rows: with two places for what warps add up, a row need not wait for the one before.
    __device__ __forceinline__ void write(Row& x, const Row& base, i64 row, int turn) const {
        __shared__ float shared[2][32];
        if constexpr (RESIDUAL) {
#pragma unroll
            for (int v = 0; v < Row::VECTORS; ++v) {
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) x.at[v][i] = rounded<T>(__fadd_rn(x.at[v][i], base.at[v][i]));
            }
        }
        // (The sums are stored last: before the norm, the stores would delay what the warps tell each other.)
        const Row sum = x;
        if constexpr (NORM) {
            x.template normalize<T>(scale, eps, shared[turn % 2]);
            x.store(normalized + row * COLS);
        }
        sum.store(out + row * COLS);
    }
};

// Sums rows of which every rank has a part: this rank's is `part(row)`. In shares, rank r sums the rows whose number modulo
// RANKS is r. A part goes to the rank that sums the row, and the sum comes back to the same place in the inbox. No CTA waits
// before it has sent all its parts, nor for a sum before it has sent all of its own; so no circle of waiting is possible.
// `number` loads the collective's number. (That is called after the first row was asked for, so both take one way to memory.)
template <typename T, int COLS, int RANKS, bool RESIDUAL, bool NORM, typename Part, typename Number>
__device__ __forceinline__ void reduce(i64 rows, bool in_shares, i32 rank, const Part& part, Slot<T, RANKS>& slot, const Number& number,
                                       Patience& patience, const Sums<T, COLS, RESIDUAL, NORM>& sums) {
    using Row = rms::Row<COLS>;
    // The i-th row that another rank sums, and that rank.
    const auto of_another = [rank](i64 i, i32& peer) {
        peer = static_cast<i32>(i % (RANKS - 1));
        peer += peer >= rank ? 1 : 0;
        return i / (RANKS - 1) * RANKS + peer;
    };
    const i64 first = in_shares ? rank : 0, next = in_shares ? RANKS : 1;
    i64 row = first + blockIdx.x * next;
    Row base = {}, own = {};
    const auto load = [&] {
        if (row >= rows) return;
        base = sums.base(row);
        own = part(row);
    };
    if (!in_shares && row >= rows) return;
    load();
    slot.open(number());
    int turn = 0;
    i32 peer;
    if (in_shares) {
        i64 other;
        for (i64 i = blockIdx.x; (other = of_another(i, peer)) < rows; i += gridDim.x) {
            Packed<T, COLS>(part(other)).send_to(peer, other, slot);
        }
    }
    while (row < rows) {
        const Packed<T, COLS> mine(own);
        if (!in_shares) mine.send(row, slot);
        if (!slot.leaves()) {
            Row x = mine.sum(row, slot, patience);
            if (in_shares) Packed<T, COLS>(x).send(row, slot);
            sums.write(x, base, row, turn++);
        }
        row += gridDim.x * next;
        load();
    }
    if (in_shares) {
        for (i64 i = blockIdx.x; (row = of_another(i, peer)) < rows; i += gridDim.x) {
            const Row base = sums.base(row);
            Row x = Packed<T, COLS>::take(peer, row, slot, patience);
            sums.write(x, base, row, turn++);
        }
    }
}

// All-reduce of `input`.
template <typename T, typename W, int COLS, int RANKS, step::Rows ROWS, bool RESIDUAL, bool NORM>
__global__ void __launch_bounds__(rms::threads(COLS), per_sm(COLS))
    all_reduce(const step::Header* header, i32 times, const T* input, const T* residual, T* out, const W* weight, float eps,
               T* normalized, i32 shares_from, const u64* inboxes, i64 capacity, i32 rank, i32 half, const u32* done, i32 ordinal,
               u32* stop, u32* report) {
    pdl::launch_dependents();
    Sums<T, COLS, RESIDUAL, NORM> sums{residual, out, {}, eps, normalized};
    if constexpr (NORM) sums.scale.load(weight);
    const i64 rows = step::num_rows<ROWS>(header, times);
    Patience patience(stop, report);
    Slot<T, RANKS> slot(inboxes, capacity, rank, half);
    pdl::wait();
    const auto number = [=] { return glance(done) + ordinal; };
    const auto part = [input](i64 row) {
        rms::Row<COLS> x;
        x.load(input + row * COLS);
        return x;
    };
    reduce(rows, RANKS > 2 && slot.is_whole() && rows >= shares_from, rank, part, slot, number, patience, sums);
}

// All-reduce of the sums of the local experts, [FIRST, LAST): each token's TOP_K rows of `input`, added as moe::combine
// adds them.
template <typename T, typename W, int COLS, int TOP_K, int FIRST, int LAST, bool ALL, int RANKS, bool RESIDUAL, bool NORM>
__global__ void __launch_bounds__(rms::threads(COLS), per_sm(COLS))
    combine_all_reduce(const step::Header* header, const T* input, const i32* expert_ids, const float* expert_weights,
                       const T* residual, T* out, const W* weight, float eps, T* normalized, i32 shares_from,
                       const u64* inboxes, i64 capacity, i32 rank, i32 half, const u32* done, i32 ordinal, u32* stop,
                       u32* report) {
    pdl::launch_dependents();
    Sums<T, COLS, RESIDUAL, NORM> sums{residual, out, {}, eps, normalized};
    if constexpr (NORM) sums.scale.load(weight);
    const i64 rows = header->num_tokens;
    Patience patience(stop, report);
    Slot<T, RANKS> slot(inboxes, capacity, rank, half);
    pdl::wait();
    const auto number = [=] { return glance(done) + ordinal; };
    const auto part = [=](i64 row) {
        rms::Row<COLS> x = moe::combined<T, COLS, TOP_K, FIRST, LAST, ALL>(row, input, expert_ids, expert_weights);
        x.template round<T>();
        return x;
    };
    reduce(rows, RANKS > 2 && slot.is_whole() && rows >= shares_from, rank, part, slot, number, patience, sums);
}

}  // namespace exchange
