// Op: all_reduce, with or without residual and norm; combine and all_reduce in one. CPU twins: kernels/collective.rs,
// kernels/combine.rs.
// Regime: any number of rows.
// Tile: a row, in registers.
// Grid: persistent, a CTA a row at a time. Every CTA is resident, sends a row before it waits for that row, and takes rows in
//   ascending order; so ranks may have different grids.
// Numerics: the contract's, to the bit: parts in ascending rank from the first one, one rounding; the residual; one
//   rounding. The norm is that of rms::norm, to the bit.
// Requires: inboxes that every rank of the group can write to.
// Traffic: a row to each other rank, and one from each; the residual read, one or two rows written.
// Measured: docs/perf/cuda.md.
#pragma once

#include "base/step.cuh"
#include "collective/exchange.cuh"
#include "moe/combined.cuh"
#include "norm/row.cuh"
#include "ptx/pdl.cuh"

namespace exchange {

// Finishes the all-reduce of one row. This rank's part of it is in `x`. `residual` may be `out`; `scale`, `eps` and
// `normalized` are those of the norm.
template <typename T, int COLS, int RANKS, bool RESIDUAL, bool NORM>
__device__ __forceinline__ void reduce_row(rms::Row<COLS>& x, i64 row, const Slot<T, RANKS>& slot, Patience& patience,
                                           const T* residual, T* out, const rms::Row<COLS>& scale, float eps, T* normalized) {
    __shared__ float shared[32];
    using Row = rms::Row<COLS>;
    Row base;
    if constexpr (RESIDUAL) base.load(residual + row * COLS);
    Packet<T> mine[Row::VECTORS];
#pragma unroll
    for (int v = 0; v < Row::VECTORS; ++v) {
        if (Row::column(v) >= COLS) continue;
        mine[v].pack_from(x.at[v]);
        slot.send(mine[v], row * packets(COLS) + Row::column(v) / VECTOR);
    }
#pragma unroll
    for (int v = 0; v < Row::VECTORS; ++v) {
        if (Row::column(v) >= COLS) continue;
        const i64 packet = row * packets(COLS) + Row::column(v) / VECTOR;
#pragma unroll
        for (i32 peer = 0; peer < RANKS; ++peer) {
            Packet<T> part = mine[v];
            slot.take(part, peer, packet, patience);
            float y[VECTOR];
            part.unpack_to(y);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) x.at[v][i] = peer == 0 ? y[i] : __fadd_rn(x.at[v][i], y[i]);
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            x.at[v][i] = rounded<T>(x.at[v][i]);
            if constexpr (RESIDUAL) x.at[v][i] = rounded<T>(__fadd_rn(x.at[v][i], base.at[v][i]));
        }
    }
    x.store(out + row * COLS);
    if constexpr (NORM) {
        x.template normalize<T>(scale, eps, shared);
        x.store(normalized + row * COLS);
        // The next row's sums are written where this one's were read.
        __syncthreads();
    }
}

// All-reduce of `input`.
template <typename T, typename W, int COLS, int RANKS, step::Rows ROWS, bool RESIDUAL, bool NORM>
__global__ void __launch_bounds__(rms::threads(COLS), per_sm(COLS))
    all_reduce(const step::Header* header, i32 times, const T* input, const T* residual, T* out, const W* weight, float eps,
               T* normalized, const u64* inboxes, i64 capacity, i32 rank, const u32* done, i32 ordinal, u32* stop, u32* report) {
    pdl::launch_dependents();
    rms::Row<COLS> scale, x;
    if constexpr (NORM) scale.load(weight);
    const i64 rows = step::num_rows<ROWS>(header, times);
    Patience patience(stop, report);
    Slot<T, RANKS> slot(inboxes, capacity, rank);
    pdl::wait();
    slot.open(*done, ordinal);
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        x.load(input + row * COLS);
        reduce_row<T, COLS, RANKS, RESIDUAL, NORM>(x, row, slot, patience, residual, out, scale, eps, normalized);
    }
}

// All-reduce of the sums of the local experts, [FIRST, LAST): each token's TOP_K rows of `input`, added as moe::combine
// adds them.
template <typename T, typename W, int COLS, int TOP_K, int FIRST, int LAST, bool ALL, int RANKS, bool RESIDUAL, bool NORM>
__global__ void __launch_bounds__(rms::threads(COLS), per_sm(COLS))
    combine_all_reduce(const step::Header* header, const T* input, const i32* expert_ids, const float* expert_weights,
                       const T* residual, T* out, const W* weight, float eps, T* normalized, const u64* inboxes, i64 capacity,
                       i32 rank, const u32* done, i32 ordinal, u32* stop, u32* report) {
    pdl::launch_dependents();
    rms::Row<COLS> scale;
    if constexpr (NORM) scale.load(weight);
    const i64 rows = header->num_tokens;
    Patience patience(stop, report);
    Slot<T, RANKS> slot(inboxes, capacity, rank);
    pdl::wait();
    slot.open(*done, ordinal);
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        rms::Row<COLS> x = moe::combined<T, COLS, TOP_K, FIRST, LAST, ALL>(row, input, expert_ids, expert_weights);
        x.template round<T>();
        reduce_row<T, COLS, RANKS, RESIDUAL, NORM>(x, row, slot, patience, residual, out, scale, eps, normalized);
    }
}

}  // namespace exchange
