// The format of weights that are stored in the type in which they are multiplied: a row is K elements of f16, bf16 or
// f32, one after another. Token rows have this format too.
//
// A format is a type in this folder and an argument of a linear's Config. Only the format knows
//   · what points at a row, how many bytes its elements take, and where a later row begins: `Row`, `bytes`, `after`;
//   · how 16 bytes of a stage's row get there, whatever K is, and where they lie in it: `copy`, `offset`;
//   · how they become an A operand of mma.sync, and how one element becomes an f32: `fragment`, `at`;
//   · the type in which elements are multiplied, which is the tokens' type, and how many TMA writes into 128 bytes:
//     `T`, `ATOM`.
// A format with scales has a `Row` of two pointers. The mainloops do not call it to apply scales yet, since no stored
// format needs that. For int8 and fp8, that call comes once after K and multiplies sums by their row's scale. For int4,
// it comes after each block of K: sums begin at zero, and are scaled and added to those of the blocks before.
#pragma once

#include "base/types.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"

namespace weight {

template <typename Element>
struct Plain {
    using T = Element;

    // A row of a weight. Null is no row, and reads as zeros.
    using Row = const Element*;

    // Bytes of `count` elements of a row.
    __device__ static constexpr int bytes(int count) { return count * static_cast<int>(sizeof(Element)); }

    // Elements in a row of TMA's 128-byte swizzle.
    static constexpr int ATOM = 128 / sizeof(Element);

    // The row that lies `rows` rows of `k` elements further on.
    __device__ static __forceinline__ Row after(Row row, i64 rows, int k) { return row + rows * k; }

    __device__ static __forceinline__ float at(Row row, int k) { return to_float(row[k]); }

    // Byte offset of 16-byte piece `piece` of row `row` of a stage's tile. A row of 64 elements is 128 bytes. Its
    // pieces are exchanged, so that the eight rows that ldmatrix reads at a time lie in different banks.
    __device__ static __forceinline__ int offset(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

    // Starts to copy piece `piece` of the row's 64 elements from `k` on to row `to_row` of a tile. Elements behind K
    // are zeros. If rows do not begin at multiples of 16 bytes, elements are copied one by one, and have arrived on
    // return.
    template <int K>
    __device__ static __forceinline__ void copy(u8* tile, int to_row, int piece, Row from, int k) {
        static_assert(sizeof(Element) == 2, "a piece is eight elements");
        u8* to = tile + offset(to_row, piece);
        const int first = k + piece * 8;
        if constexpr (K % 8 == 0) {
            const bool valid = from != nullptr && first < K;
            ptx::cp_async_16(ptx::shared_address(to), valid ? from + first : from, valid);
        } else {
            alignas(16) u16 values[8];
#pragma unroll
            for (int i = 0; i < 8; i++) values[i] = from != nullptr && first + i < K ? from[first + i].bits : u16{0};
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(values);
        }
    }

    // A lane's part of the A operand (ptx::mma) of 16 rows from `row` and the `step`-th 16 elements of a tile.
    __device__ static __forceinline__ void fragment(u32 (&a)[4], u32 tile, int row, int step, int lane) {
        ptx::ldmatrix_x4(a, tile + offset(row + lane % 16, step * 2 + lane / 16));
    }
};

}  // namespace weight
