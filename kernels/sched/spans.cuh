// The order of a linear's slabs where each CTA takes a run of them. Slabs of 16 rows are numbered tile by tile; a tile is
// an expert's matrix and up to COLS of its tokens. CTA i of n takes the i-th n-th part of all slabs.
#pragma once

#include "base/types.cuh"

namespace sched {

// Slabs of one tile that lie one after another.
struct Span {
    int expert;  // 0 for a dense linear
    int first;   // first column: a token, or a position in the order by expert
    int count;   // columns
    int slab;    // first slab in the matrix
    int slabs;
};

// `offsets[e]` is the position of expert e's first token in expert order. A dense linear has no offsets and one matrix,
// for all columns.
template <int EXPERTS, int SLABS, int COLS>
struct Spans {
    const int* offsets;
    int columns;
    int next = 0, end = 0;  // slabs
    int before = 0;         // slabs of the matrices before `expert`
    int expert = 0;

    __device__ __forceinline__ Spans(const int* offsets, int columns) : offsets(offsets), columns(columns) {
        int all = 0;
#pragma unroll 8
        for (int e = 0; e < EXPERTS; e++) all += slabs(e);
        next = static_cast<int>(static_cast<i64>(all) * blockIdx.x / gridDim.x);
        end = static_cast<int>(static_cast<i64>(all) * (blockIdx.x + 1) / gridDim.x);
    }

    __device__ __forceinline__ int first(int e) const { return offsets == nullptr ? e * columns : offsets[e]; }

    __device__ __forceinline__ int slabs(int e) const { return SLABS * ((first(e + 1) - first(e) + COLS - 1) / COLS); }

    // The CTA's next span, if there is one.
    __device__ __forceinline__ bool take(Span& span) {
        if (next >= end) return false;
        for (int here = slabs(expert); next >= before + here; here = slabs(expert)) {
            before += here;
            expert++;
        }
        const int within = next - before, tile = within / SLABS;
        span.expert = expert;
        span.first = first(expert) + tile * COLS;
        span.count = min(COLS, first(expert + 1) - span.first);
        span.slab = within % SLABS;
        span.slabs = min(SLABS - span.slab, end - next);
        next += span.slabs;
        return true;
    }
};

}  // namespace sched
