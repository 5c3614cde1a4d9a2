// Op: none; puts a quantized weight into the device's order (weight/quantized.cuh) when an engine is loaded. CPU twin:
// none: the CPU reads the parts as they are stored.
// Regime: one launch for each matrix · Tile: a block of a slab: 16 rows, 128 elements of K; a warp each
// Grid: any; warps stride over the blocks · Numerics: copies bits; scales of rows become f32
// Requires: a matrix's parts as a checkpoint has them, row-major: integers [ROWS][K · BITS / 8], scales and zeros
// [ROWS][groups] · Traffic: every part read once, the packed weight written once · Measured: docs/perf/cuda.md
#pragma once

#include "ptx/pdl.cuh"
#include "weight/quantized.cuh"

namespace weight {

// Packs matrix `expert` of the weight `out`. With INTERLEAVED, a slab has eight rows of the matrix's first half (up) and
// eight of its second half (gate). `zeros` are read only if the format has any.
template <typename W, typename Scale, int ROWS, int K, bool INTERLEAVED>
__global__ void __launch_bounds__(256)
    pack(const u8* values, const Scale* scales, const u8* zeros, u8* out, int expert) {
    pdl::launch_dependents();
    pdl::wait();
    constexpr int SLABS = W::slabs(INTERLEAVED ? ROWS / 2 : ROWS, INTERLEAVED), BLOCKS = W::blocks(K);
    constexpr int GROUP = W::SCALED ? W::GROUP : K, GROUPS = (K + GROUP - 1) / GROUP;
    constexpr i64 ROW_BYTES = (static_cast<i64>(K) * W::BITS + 7) / 8;
    constexpr int WORDS = W::VALUES / 128;  // of a lane
    const int lane = threadIdx.x % 32;
    // The matrix's row that is row `row` of a slab, or −1.
    const auto source = [](int slab, int row) -> i64 {
        if constexpr (INTERLEAVED) {
            const int at = slab * 8 + row % 8;
            return at < ROWS / 2 ? row / 8 * (ROWS / 2) + at : -1;
        } else {
            const int at = slab * W::SLAB + row;
            return at < ROWS ? at : -1;
        }
    };
    for (int index = blockIdx.x * 8 + threadIdx.x / 32; index < SLABS * BLOCKS; index += gridDim.x * 8) {
        const int slab = index / BLOCKS, block = index % BLOCKS;
        u8* to = out + (static_cast<i64>(expert) * SLABS * BLOCKS + index) * W::BLOCK;
        const i64 rows[2] = {source(slab, lane / 4), source(slab, lane / 4 + 8)};
        const auto zero = [&](i64 row, int group) -> u32 {
            return W::ZEROS && row >= 0 && group < GROUPS ? zeros[row * GROUPS + group] : 1u << (W::BITS - 1);
        };
        // The lane's integers of 16 elements of K are two pairs of each of its rows.
        u32 words[WORDS] = {};
#pragma unroll
        for (int step = 0; step < 8; step++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const i64 row = rows[r % 2];
                const int k = block * W::DEPTH + step * 16 + lane % 4 * 2 + r / 2 * 8;
                const u32 padding = zero(row, W::SCALED ? block * W::CHAINS + step * W::CHAINS / 8 : 0);
                u32 low = padding, high = padding;
                if (row >= 0 && k < K) {
                    const u8* from = values + row * ROW_BYTES + k * W::BITS / 8;
                    if constexpr (W::BITS == 4) {
                        low = *from & 15;
                        if (K % 2 == 0 || k + 1 < K) high = *from >> 4;
                    } else if constexpr (K % 2 == 0) {
                        const u32 both = *reinterpret_cast<const u16*>(from);
                        low = both & 255, high = both >> 8;
                    } else {
                        low = *from;
                        if (k + 1 < K) high = from[1];
                    }
                }
                if constexpr (W::BITS == 4) {
                    words[step] |= low << (4 * r) | high << (16 + 4 * r);
                } else {
                    words[step * 2 + r / 2] |= low << (8 * (r % 2)) | high << (16 + 8 * (r % 2));
                }
            }
        }
#pragma unroll
        for (int p = 0; p < W::PIECES; p++) {
            *reinterpret_cast<uint4*>(to + p * 512 + lane * 16) =
                make_uint4(words[p * 4], words[p * 4 + 1], words[p * 4 + 2], words[p * 4 + 3]);
        }
        if constexpr (W::SCALED) {
            for (int i = lane; i < W::SLAB * W::CHAINS; i += 32) {
                const i64 row = source(slab, i % W::SLAB / 2 + i % 2 * 8);
                const int group = block * W::CHAINS + i / W::SLAB;
                const bool exists = row >= 0 && group < GROUPS;
                Scale scale{};
                if (exists) scale = scales[row * GROUPS + group];
                reinterpret_cast<Scale*>(to + W::SCALES_AT)[i] = scale;
                if constexpr (W::ZEROS) to[W::ZEROS_AT + i] = exists ? zeros[row * GROUPS + group] : 1 << (W::BITS - 1);
            }
        } else if (block == 0 && lane < W::SLAB) {
            float* of_row = const_cast<float*>(W::row_values(out, static_cast<i64>(expert) * SLABS + slab)) + lane * W::ROW_VALUES;
            const i64 row = source(slab, lane);
            of_row[0] = row < 0 ? 0.0f : to_float(scales[row]);
            if constexpr (W::ZEROS) of_row[1] = row < 0 ? 1 << (W::BITS - 1) : zeros[row];
        }
    }
}

}  // namespace weight
