// The format of weights that are stored as integers of 4 or 8 bits with scales, and the order in which they lie on the
// device. A weight stands for value(n, k) = (u(n, k) − z) · s, where u is stored. Scale s and zero z belong to a group of
// elements along K, or to a whole row. Without stored zeros, z is half of u's range: 8 or 128.
//
// On the device, rows lie in slabs of 16 and K in blocks of 128. A slab is its blocks one after another. A row or an
// element that pads a slab or a block has u = z and s = 0. Experts' slabs lie one expert after another. If silu·mul
// follows, a slab has eight up rows and then the eight gate rows that belong to them. A block is
//   · its integers: pieces of 512 bytes, 16 bytes for each lane of a warp (below);
//   · if scales belong to groups: the scales [group][8][2] and, if zeros are stored, those [group][8][2] in bytes. Entry
//     [i][0] belongs to row i and [i][1] to row i + 8.
// If scales belong to rows, they lie behind all slabs as f32, in the order of the slabs' rows; with stored zeros, a row
// has two values, its scale and its zero. Kernels find them VALUES_AT bytes behind the slab that they are given.
//
// With g = lane / 4 and c = 2 · (lane % 4), a lane's A operand of 16 elements of K (ptx::mma) is four registers: row g of
// columns c and c + 1, row g + 8 of the same, row g of columns c + 8 and c + 9, row g + 8 of the same.
//   · 4 bits: a word has these eight integers, a register's two at bits 4·register and 16 + 4·register. A piece has
//     four words of a lane: 64 elements of K.
//   · 8 bits: two words, each for two registers: bytes 0 and 2 are the first register's, bytes 1 and 3 the second's. A
//     piece has 32 elements of K.
//
// The integers become 16-bit floats without any rounding. An integer in the low bits of a register whose other bits are
// zero is a float already: a tiny one, below the normal numbers. One multiply-add gives (u − z) / UNIT from it, for two
// elements at a time. UNIT is a power of two, by which sums are multiplied at the end.
#pragma once

#include "base/types.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared.cuh"

namespace weight {

// Constants of the conversion to T, each in both halves of a register: the factor of integers in bits 0 and up, of
// integers in bits 4 and up, and the negative factor; and 8 and 128 as they are subtracted.
template <typename T>
struct Conversion;

template <>
struct Conversion<f16_t> {
    static constexpr float UNIT = 512.0f;  // 2^24 / 2^15
    static constexpr u32 FACTOR = 0x78007800, FACTOR_4 = 0x68006800, NEGATIVE = 0xF800F800;
    static constexpr u32 EIGHT = 0xA400A400, HALF_BYTE = 0xB400B400;
};

template <>
struct Conversion<bf16_t> {
    static constexpr float UNIT = 64.0f;  // 2^133 / 2^127
    static constexpr u32 FACTOR = 0x7F007F00, FACTOR_4 = 0x7D007D00, NEGATIVE = 0xFF00FF00;
    static constexpr u32 EIGHT = 0xBE00BE00, HALF_BYTE = 0xC000C000;
};

// f32 engines read single elements only.
template <>
struct Conversion<float> {
    static constexpr float UNIT = 1.0f;
};

// GROUP is the number of elements along K that share a scale, or 0 for a whole row.
template <typename Element, int BITS_, int GROUP_, bool ZEROS_, typename ScaleType, i64 VALUES_AT>
struct Quantized {
    using T = Element;  // of tokens, and what integers are converted to
    using Operand = Element;
    template <typename Model>
    using Token = Model;
    using Scale = ScaleType;
    using Stored = const u8*;  // points at a weight, or at a slab of it
    static constexpr int BITS = BITS_;
    static constexpr int GROUP = GROUP_;
    static constexpr bool ZEROS = ZEROS_;
    static_assert(BITS == 4 || BITS == 8, "");
    static_assert(GROUP == 0 || GROUP == 32 || GROUP == 64 || GROUP == 128, "");

    static constexpr bool PACKED = true;
    static constexpr int SLAB = 16;    // rows
    static constexpr int DEPTH = 128;  // elements of K in a block
    static constexpr int VALUES = SLAB * DEPTH * BITS / 8;  // bytes of a block's integers
    static constexpr int PIECES = VALUES / 512;
    // Sums begin at zero for each group. They are then multiplied by its scale and added up.
    static constexpr bool SCALED = GROUP != 0;
    static constexpr int CHAINS = SCALED ? DEPTH / GROUP : 1;  // of a block
    static constexpr int SCALES_AT = VALUES;
    static constexpr int ZEROS_AT = SCALES_AT + (SCALED ? SLAB * CHAINS * static_cast<int>(sizeof(Scale)) : 0);
    static constexpr int END = ZEROS_AT + (SCALED && ZEROS ? SLAB * CHAINS : 0);
    // Bytes of a block. TMA copies it in PARTS, each a multiple of 16 bytes and at most 256 words.
    static constexpr int PARTS = BITS / 2, BLOCK = (END + PARTS * 16 - 1) / (PARTS * 16) * (PARTS * 16);
    static constexpr int ROW_VALUES = SCALED ? 0 : ZEROS ? 2 : 1;  // f32 values of a row behind the slabs
    static constexpr float UNIT = Conversion<T>::UNIT;
    static constexpr bool FACTOR = false, BY_ROWS = false, BY_TOKENS = false;
    static constexpr int CHAIN = 0;  // `simt` reads scaled elements
    static_assert(BLOCK % 16 == 0 && BLOCK / PARTS <= 1024, "whole copies");

    __device__ static constexpr int blocks(int k) { return (k + DEPTH - 1) / DEPTH; }

    __device__ static constexpr i64 slab_bytes(int k) { return static_cast<i64>(blocks(k)) * BLOCK; }

    // Slabs of a matrix with this many outputs. With silu·mul, a slab has the eight up and the eight gate rows of eight
    // outputs.
    __device__ static constexpr int slabs(int outputs, bool silu_mul) { return silu_mul ? (outputs + 7) / 8 : (outputs + 15) / 16; }

    // The values of slab `slab`'s first row.
    __device__ static __forceinline__ const float* row_values(Stored weight, i64 slab) {
        return reinterpret_cast<const float*>(weight + VALUES_AT) + slab * SLAB * ROW_VALUES;
    }

    // Bytes of a stage's rows: one block of each of their slabs.
    __device__ static constexpr int tile_bytes(int rows) { return rows / SLAB * BLOCK; }

    // Starts to copy the i-th 16 bytes of a tile. `find(row)` says where the slab that begins with a tile's row lies.
    template <int K, typename Find>
    __device__ static __forceinline__ void copy_rows(u8* tile, int i, Find find, int k) {
        constexpr int COPIES = BLOCK / 16;  // of a block
        const Stored slab = find(i / COPIES * SLAB);
        const Stored from = slab == nullptr ? slab : slab + k / DEPTH * BLOCK + i % COPIES * 16;
        ptx::cp_async_16(ptx::shared_address(tile + i * 16), from, slab != nullptr);
    }

    // What a chain's conversions subtract, for a lane's rows g and g + 8.
    struct Zero {
        u32 upper, lower;
    };

    // From a row's stored zeros, or from none.
    __device__ static __forceinline__ Zero row_zero(float upper, float lower) {
        if constexpr (SCALED || !ZEROS) {
            return default_zero();
        } else {
            return {::pack<T>(-upper / UNIT, -upper / UNIT), ::pack<T>(-lower / UNIT, -lower / UNIT)};
        }
    }

    __device__ static __forceinline__ Zero default_zero() {
        constexpr u32 ZERO = BITS == 4 ? Conversion<T>::EIGHT : Conversion<T>::HALF_BYTE;
        return {ZERO, ZERO};
    }

    // From a block's stored zeros, or from none.
    __device__ static __forceinline__ Zero group_zero(const u8* block, int chain, int lane) {
        static_assert(SCALED, "zeros of rows lie behind the slabs");
        if constexpr (ZEROS) {
            const u32 pair = *reinterpret_cast<const u16*>(block + ZEROS_AT + chain * SLAB + lane / 4 * 2);
            return {multiply_add<T>((pair & 0xff) * 0x10001, Conversion<T>::NEGATIVE, 0),
                    multiply_add<T>((pair >> 8) * 0x10001, Conversion<T>::NEGATIVE, 0)};
        } else {
            return default_zero();
        }
    }

    // The scales of a lane's rows g and g + 8, from a block.
    struct alignas(2 * sizeof(Scale)) Scales {
        Scale upper, lower;

        // Any word of them.
        __device__ __forceinline__ u32 word() const { return reinterpret_cast<const u32&>(*this); }
    };

    __device__ static __forceinline__ Scales scales(const u8* block, int chain, int lane) {
        static_assert(SCALED, "scales of rows lie behind the slabs");
        return reinterpret_cast<const Scales*>(block + SCALES_AT)[chain * (SLAB / 2) + lane / 4];
    }

    // A lane's part of a block's integers.
    struct Lane {
        uint4 pieces[PIECES];
    };

    // Of a tile's slab that begins with `row`.
    __device__ static __forceinline__ void load(Lane& to, const u8* tile, int row, int lane) {
        load(to, tile + row / SLAB * BLOCK, lane);
    }

    __device__ static __forceinline__ void load(Lane& to, const u8* block, int lane) {
#pragma unroll
        for (int p = 0; p < PIECES; p++) to.pieces[p] = *reinterpret_cast<const uint4*>(block + p * 512 + lane * 16);
    }

    // One piece, from shared memory.
    __device__ static __forceinline__ void load_piece(Lane& to, int p, u32 block, int lane) {
        to.pieces[p] = ptx::load_shared_x4(block + p * 512 + lane * 16);
    }

    // A lane's part of the A operand of the `step`-th 16 elements of a block, divided by UNIT. `step` is known to the
    // compiler.
    __device__ static __forceinline__ void fragment(u32 (&a)[4], const Lane& from, int step, Zero zero) {
        using To = Conversion<T>;
        if constexpr (BITS == 4) {
            const uint4& piece = from.pieces[step / 4];
            const u32 low = step % 4 == 0 ? piece.x : step % 4 == 1 ? piece.y : step % 4 == 2 ? piece.z : piece.w;
            const u32 high = low >> 8;
            a[0] = multiply_add<T>(low & 0x000f000f, To::FACTOR, zero.upper);
            a[1] = multiply_add<T>(low & 0x00f000f0, To::FACTOR_4, zero.lower);
            a[2] = multiply_add<T>(high & 0x000f000f, To::FACTOR, zero.upper);
            a[3] = multiply_add<T>(high & 0x00f000f0, To::FACTOR_4, zero.lower);
        } else {
            const uint4& piece = from.pieces[step / 2];
            const u32 left = step % 2 == 0 ? piece.x : piece.z, right = step % 2 == 0 ? piece.y : piece.w;
            a[0] = multiply_add<T>(left & 0x00ff00ff, To::FACTOR, zero.upper);
            a[1] = multiply_add<T>(__byte_perm(left, 0, 0x4341), To::FACTOR, zero.lower);
            a[2] = multiply_add<T>(right & 0x00ff00ff, To::FACTOR, zero.upper);
            a[3] = multiply_add<T>(__byte_perm(right, 0, 0x4341), To::FACTOR, zero.lower);
        }
    }

    // The sums so far, plus a group's: rows g (columns c and c + 1), then g + 8.
    __device__ static __forceinline__ void add(float (&sums)[4], const float (&chain)[4], Scales scales) {
        const float upper = to_float(scales.upper), lower = to_float(scales.lower);
        sums[0] = __fmaf_rn(chain[0], upper, sums[0]);
        sums[1] = __fmaf_rn(chain[1], upper, sums[1]);
        sums[2] = __fmaf_rn(chain[2], lower, sums[2]);
        sums[3] = __fmaf_rn(chain[3], lower, sums[3]);
    }

    // One row of a slab, for kernels that read single elements.
    struct Row {
        Stored slab;  // null is no row
        int row;
        const float* values;  // of the slab's rows, if there are any

        __device__ __forceinline__ explicit operator bool() const { return slab != nullptr; }
    };

    // What element k of a row stands for.
    __device__ static __forceinline__ float at(const Row& from, int k) {
        const u8* block = from.slab + static_cast<i64>(k / DEPTH) * BLOCK;
        const int step = k % DEPTH / 16, lane = from.row % 8 * 4 + k % 8 / 2, part = from.row / 8 + k % 16 / 8 * 2;
        int value;
        if constexpr (BITS == 4) {
            const u8* word = block + step / 4 * 512 + lane * 16 + step % 4 * 4;
            value = word[k % 2 * 2 + part / 2] >> (part % 2 * 4) & 15;
        } else {
            value = block[step / 2 * 512 + lane * 16 + step % 2 * 8 + part / 2 * 4 + k % 2 * 2 + part % 2];
        }
        int zero = 1 << (BITS - 1);
        float scale;
        if constexpr (SCALED) {
            const int entry = k % DEPTH / GROUP * SLAB + from.row % 8 * 2 + from.row / 8;
            if constexpr (ZEROS) zero = block[ZEROS_AT + entry];
            scale = to_float(reinterpret_cast<const Scale*>(block + SCALES_AT)[entry]);
        } else {
            if constexpr (ZEROS) zero = static_cast<int>(from.values[from.row * 2 + 1]);
            scale = from.values[from.row * ROW_VALUES];
        }
        return static_cast<float>(value - zero) * scale;
    }
};

}  // namespace weight
