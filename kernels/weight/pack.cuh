// Op: none; puts a quantized weight into the device's order (weight/quantized.cuh) when an engine is loaded. CPU twin:
// none: the CPU reads the parts as they are stored.
// Regime: one launch for each weight · Tile: a block of a slab: 16 rows, 128 elements of K; a warp each
// Grid: any; warps stride over the blocks · Numerics: copies bits; scales of rows become f32
// Requires: parts as a checkpoint has them, row-major: integers [experts][rows][K · BITS / 8], scales and zeros
// [experts][rows][groups]; EXPERTS of them lie one after another
// Traffic: every part read once, the packed weight written once · Measured: docs/perf/cuda.md
#pragma once

#include "ptx/pdl.cuh"
#include "weight/quantized.cuh"

namespace weight {

// With INTERLEAVED, a slab has eight rows of an expert's first half (up) and eight of its second half (gate).
template <typename W, typename Scale, int EXPERTS, int ROWS, int K, bool INTERLEAVED>
__global__ void __launch_bounds__(256)
    pack(const u8* values, const Scale* scales, const u8* zeros, u8* out) {
    pdl::launch_dependents();
    pdl::wait();
    constexpr int SLABS = W::slabs(INTERLEAVED ? ROWS / 2 : ROWS, INTERLEAVED), BLOCKS = W::blocks(K);
    constexpr int GROUP = W::SCALED ? W::GROUP : K, GROUPS = (K + GROUP - 1) / GROUP;
    constexpr i64 ROW_BYTES = static_cast<i64>(K) * W::BITS / 8;
    static_assert(K * W::BITS % 8 == 0, "rows are whole bytes");
    constexpr int WORDS = W::VALUES / 128;  // of a lane
    const int lane = threadIdx.x % 32;
    // The weight's row that is row `row` of a slab, or −1. Rows are counted over all experts.
    const auto source = [](i64 slab, int row) -> i64 {
        const i64 expert = slab / SLABS, within = slab % SLABS;
        if constexpr (INTERLEAVED) {
            const i64 at = within * 8 + row % 8;
            return at < ROWS / 2 ? expert * ROWS + row / 8 * (ROWS / 2) + at : -1;
        } else {
            const i64 at = within * W::SLAB + row;
            return at < ROWS ? expert * ROWS + at : -1;
        }
    };
    const i64 count = static_cast<i64>(EXPERTS) * SLABS * BLOCKS, stride = gridDim.x * 8ll;
    for (i64 index = blockIdx.x * 8ll + threadIdx.x / 32; index < count; index += stride) {
        const i64 slab = index / BLOCKS;
        const int block = static_cast<int>(index % BLOCKS);
        u8* to = out + index * W::BLOCK;
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
                        low = *from & 15, high = *from >> 4;
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
            float* ends = reinterpret_cast<float*>(out + static_cast<i64>(EXPERTS) * SLABS * W::slab_bytes(K));
            const i64 at = slab * W::SLAB + lane, row = source(slab, lane);
            ends[at * W::ROW_VALUES] = row < 0 ? 0.0f : to_float(scales[row]);
            if constexpr (W::ZEROS) ends[at * 2 + 1] = row < 0 ? 1 << (W::BITS - 1) : zeros[row];
        }
    }
}

}  // namespace weight
