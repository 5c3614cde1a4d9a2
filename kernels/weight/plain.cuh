// The format of weights that are stored in the type in which they are multiplied: a row is K elements of f16, bf16 or
// f32, one after another. Token rows have this format too, and so have rows of e4m3, weights' and tokens' (weight/fp8.cuh).
//
// A format is a type in this folder and an argument of a linear's Config. Only the format knows
//   · what points at a weight, and whether its rows lie in slabs of 16, in the order in which a tile has them: `Stored`,
//     `PACKED`;
//   · how many elements of K a stage has, how 16 bytes of it get there, whatever K is, and where they lie in it: `DEPTH`,
//     `copy_rows`, `offset`;
//   · how they become an A operand of mma.sync, and how one element becomes an f32: `load`, `fragment`, `at`;
//   · whether sums begin at zero for each group of elements, to be scaled and added up: `SCALED`;
//   · what a matrix's sums are multiplied by at the end: `UNIT`, `FACTOR`, `factor`; and each row's: `BY_ROWS`, `row_factor`; and
//     whether the token has a factor too: `BY_TOKENS`;
//   · the type of the model, in which results are rounded, that of the tokens, and that in which both are multiplied: `T`,
//     `Token`, `Operand`; and how many elements TMA writes into 128 bytes: `ATOM`.
#pragma once

#include "base/fp8.cuh"
#include "base/types.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"

namespace weight {

template <typename Element>
struct Plain {
    using T = Element;
    using Operand = Element;
    template <typename Model>
    using Token = Model;

    // Points at a weight, or at a row of it. Null is no row, and reads as zeros.
    using Stored = const Element*;
    using Row = Stored;
    static constexpr bool PACKED = false;

    // Elements of K in a stage, and bytes of a stage's rows.
    static constexpr int DEPTH = 128 / sizeof(Element);
    __device__ static constexpr int tile_bytes(int rows) { return rows * bytes(DEPTH); }

    // A sum is one chain over K, and is not scaled.
    static constexpr bool SCALED = false, FACTOR = false, BY_ROWS = false, BY_TOKENS = false;
    static constexpr int CHAINS = 1, ROW_VALUES = 0;
    static constexpr int CHAIN = 0;  // elements whose products `simt` sums from zero, before it adds them up; 0 is all
    static constexpr float UNIT = 1.0f;
    struct Zero {};

    // Bytes of `count` elements of a row.
    __device__ static constexpr int bytes(int count) { return count * static_cast<int>(sizeof(Element)); }

    // Elements in a row of TMA's 128-byte swizzle, and in 16 bytes.
    static constexpr int ATOM = 128 / sizeof(Element), PIECE = 16 / sizeof(Element);

    __device__ static __forceinline__ float at(Row row, int k) { return to_float(row[k]); }

    // Byte offset of 16-byte piece `piece` of row `row` of a stage's tile. A row of ATOM elements is 128 bytes. Its
    // pieces are exchanged, so that the eight rows that ldmatrix reads at a time lie in different banks.
    __device__ static __forceinline__ int offset(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

    // Starts to copy piece `piece` of the row's ATOM elements from `k` on to row `to_row` of a tile. Elements behind K
    // are zeros. If rows do not begin at multiples of 16 bytes, elements are copied one by one, and have arrived on
    // return.
    template <int K>
    __device__ static __forceinline__ void copy(u8* tile, int to_row, int piece, Row from, int k) {
        static_assert(sizeof(Element) <= 2, "tensor cores take 16 bits and 8");
        u8* to = tile + offset(to_row, piece);
        const int first = k + piece * PIECE;
        if constexpr (K % PIECE == 0) {
            const bool valid = from != nullptr && first < K;
            ptx::cp_async_16(ptx::shared_address(to), valid ? from + first : from, valid);
        } else {
            alignas(16) Element values[PIECE];
#pragma unroll
            for (int i = 0; i < PIECE; i++) values[i] = from != nullptr && first + i < K ? from[first + i] : Element{};
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(values);
        }
    }

    // Starts to copy the i-th 16 bytes of a tile. `find(row)` says where the elements of a tile's row lie.
    template <int K, typename Find>
    __device__ static __forceinline__ void copy_rows(u8* tile, int i, Find find, int k) {
        constexpr int PIECES = DEPTH / PIECE;
        copy<K>(tile, i / PIECES, i % PIECES, find(i / PIECES), k);
    }

    // A lane's part of 16 rows of a tile.
    struct Lane {
        u32 tile;
        int row, lane;
    };

    __device__ static __forceinline__ void load(Lane& to, const u8* tile, int row, int lane) {
        to = {ptx::shared_address(tile), row, lane};
    }

    // A lane's part of the A operand (ptx::mma) of the `step`-th 16 elements.
    __device__ static __forceinline__ void fragment(u32 (&a)[4], const Lane& from, int step, Zero) {
        ptx::ldmatrix_x4(a, from.tile + offset(from.row + from.lane % 16, step * 2 + from.lane / 16));
    }

    // A lane's part of the B operand of the `step`-th 16 elements of the tile's eight rows that begin with `row`. The rows
    // are tokens.
    __device__ static __forceinline__ void columns(u32 (&b)[2], u32 tile, int row, int step, int lane) {
        if constexpr (sizeof(Element) == 2) {
            ptx::ldmatrix_x2(b, tile + offset(row + lane % 8, step * 2 + lane / 8 % 2));
        } else {
            u32 four;
            ptx::ldmatrix_x1(four, tile + offset(row + lane % 8, step));
            fp8::to_f16(b, four);
        }
    }
};

}  // namespace weight
