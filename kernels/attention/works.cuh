// The works of decode attention. Each is one split of a sequence for one part of a group of heads.
#pragma once

#include "attention/tile.cuh"
#include "base/math.cuh"
#include "base/step.cuh"

namespace attention {

// A CTA's works [begin, end). The works of a sequence lie together, those of each part of its heads too, and of these
// the splits ascend. So most splits of a part are computed by one CTA, which then adds them by itself.
template <typename C>
struct DecodeList {
    const int4* items;
    int begin, end;

    __device__ __forceinline__ DecodeList(const int4* items, int num_items) : items(items) {
        const int works = num_items * C::PER_ITEM, ctas = gridDim.x, cta = blockIdx.x;
        const int each = works / ctas, more = works % ctas;
        begin = cta * each + min(cta, more);
        end = begin + each + (cta < more ? 1 : 0);
    }

    // A CTA without work exits and makes room for the next kernel, which can then begin to load weights. (CTA 0 stays,
    // because a grid in which no CTA waits could end before its predecessors.)
    __device__ __forceinline__ bool is_idle() const { return begin == end && blockIdx.x > 0; }

    // An item of the work's sequence: the first PER_ITEM works of a sequence have its first item, and so on.
    __device__ __forceinline__ int4 at(int work) const { return work < end ? items[work / C::PER_ITEM] : int4{}; }
};

template <typename C>
struct DecodeWork {
    // The sequence's tokens end before `end`, and `part` counts its parts of heads.
    int seq, end, part, split;

    // `item` is the list's `at(work)`. The items of a sequence lie together, and count all splits from 0, visible or not.
    __device__ __forceinline__ DecodeWork(int work, const int4& item) : seq(item.x), end(item.z) {
        const int at = work - (work / C::PER_ITEM - item.y) * C::PER_ITEM;
        part = at / splits();
        split = at % splits();
    }

    // Goes to the sequence's next work. False if there is none; then `begin` goes to the next sequence.
    __device__ __forceinline__ bool advance() {
        if (++split < splits()) return true;
        split = 0;
        return ++part < C::PER_ITEM;
    }

    // `item` is any of that sequence.
    __device__ __forceinline__ void begin(const int4& item) {
        seq = item.x;
        end = item.z;
        part = 0;
    }

    // The sequence's visible tokens are [first, end), in splits [first_split, splits).
    __device__ __forceinline__ int first() const { return first_visible<C::WINDOW>(end - 1); }
    __device__ __forceinline__ int first_split() const { return first() / step::DECODE_SPLIT; }
    __device__ __forceinline__ int splits() const { return max(ceil_div(end, step::DECODE_SPLIT), 1); }
    // The split's tiles [tile, last) with visible tokens; there may be no such tile.
    __device__ __forceinline__ int tile() const { return max(first(), split * step::DECODE_SPLIT) / TILE; }
    __device__ __forceinline__ int last() const { return ceil_div(min((split + 1) * step::DECODE_SPLIT, end), TILE); }
    // Query heads [first_head, first_head + heads) of KV head `head`.
    __device__ __forceinline__ int head() const { return part / C::PARTS; }
    __device__ __forceinline__ int first_head() const { return head() * C::GROUP + part % C::PARTS * 16; }
    __device__ __forceinline__ int heads() const { return min(C::GROUP - part % C::PARTS * 16, 16); }
};

}  // namespace attention
