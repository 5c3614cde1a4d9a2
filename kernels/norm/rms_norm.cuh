// Op: norm. CPU twin: kernels/norm.rs.
// Regime: any number of rows.
// Tile: a row, in registers.
// Grid: one CTA for each row.
// Numerics: the sum of squares is taken by fused multiply-add in a thread, then over lanes and warps by trees. The
//   order depends only on COLS. Both roundings of the contract are made.
// Requires: nothing; rows of whole vectors (COLS % 8 = 0) are accessed by 16 bytes.
// Traffic: each row read and written once, and once more rounded for an fp8 linear behind it.
// Measured: H200, 16 384 tokens of 4096: 94 µs, 63 % of read.
#pragma once

#include "base/step.cuh"
#include "norm/row.cuh"
#include "ptx/pdl.cuh"

namespace rms {

// W is the weight's type; a buffer has `times` rows for each of ROWS. With ROUNDS, e4m3(out / *divisor) is stored too; else
// the last two parameters are not used.
template <typename T, typename W, int COLS, step::Rows ROWS, bool ROUNDS = false>
__global__ void __launch_bounds__(threads(COLS))
    norm(const step::Header* header, i32 times, const T* input, const W* weight, float eps, T* out, const float* divisor,
         e4m3_t* rounded) {
    pdl::launch_dependents();
    __shared__ float shared[32];
    Row<COLS> scale, x;
    scale.load(weight);
    const i64 row = blockIdx.x;
    const bool idle = row >= step::num_rows<ROWS>(header, times);
    pdl::wait();
    if (idle) return;
    x.load(input + row * COLS);
    x.template normalize<T>(scale, eps, shared);
    x.store(out + row * COLS);
    if constexpr (ROUNDS) x.store_rounded(rounded + row * COLS, *divisor);
}

}  // namespace rms
