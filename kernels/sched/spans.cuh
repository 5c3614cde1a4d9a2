// The order of a linear's slabs where each CTA takes a run of them. Slabs of 16 rows are numbered tile by tile; a tile is
// an expert's matrix and up to COLS of its tokens. CTA i of n takes the i-th n-th part of all slabs, and numbers its own
// from 0.
#pragma once

#include "base/types.cuh"

namespace sched {

// A CTA's slabs of one tile.
struct Span {
    int expert;  // 0 for a dense linear
    int first;   // first column: a token, or a position in the order by expert
    int count;   // columns
    int slab;    // first slab in the matrix
    int begin;   // number of the first slab
    int end;     // number of the slab behind the last one
};

// Spans that lie one behind the other and have at most ROWS columns together.
struct Group {
    int first;  // first column
    int count;  // columns
    int begin, end;
};

// `offsets[e]` is the position of expert e's first token in expert order. A dense linear has no offsets and one matrix,
// for all columns.
template <int EXPERTS, int SLABS, int COLS>
struct Spans {
    const int* offsets;
    int columns;
    int start, next, end;  // slabs of all CTAs: the CTA's first one, the next one, and the one behind its last one
    int before = 0;        // slabs of the matrices before `expert`
    int expert = 0;

    __device__ __forceinline__ Spans(const int* offsets, int columns) : offsets(offsets), columns(columns) {
        int all = 0;
#pragma unroll 8
        for (int e = 0; e < EXPERTS; e++) all += slabs(e);
        start = static_cast<int>(static_cast<i64>(all) * blockIdx.x / gridDim.x);
        next = start;
        end = static_cast<int>(static_cast<i64>(all) * (blockIdx.x + 1) / gridDim.x);
    }

    __device__ __forceinline__ int first(int e) const { return offsets == nullptr ? e * columns : offsets[e]; }

    __device__ __forceinline__ int slabs(int e) const { return SLABS * ((first(e + 1) - first(e) + COLS - 1) / COLS); }

    // The CTA's slabs.
    __device__ __forceinline__ int count() const { return end - start; }

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
        span.begin = next - start;
        next = min(next + SLABS - span.slab, end);
        span.end = next - start;
        return true;
    }

    // The CTA's next group, if there is one.
    template <int ROWS>
    __device__ __forceinline__ bool take(Group& group) {
        static_assert(ROWS >= COLS, "a span is a group");
        Span span;
        if (!take(span)) return false;
        group = {span.first, span.count, span.begin, span.end};
        for (Spans behind = *this; behind.take(span) && span.first + span.count - group.first <= ROWS; *this = behind) {
            group.count = span.first + span.count - group.first;
            group.end = span.end;
        }
        return true;
    }
};

}  // namespace sched
