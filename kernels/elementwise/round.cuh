// Op: none; rounds the input of a linear with fp8 weights, unless a norm did (norm/row.cuh). CPU twin: `widen` in kernels/linear.rs.
// Regime: any number of rows.
// Tile: eight elements a thread.
// Grid: enough threads for the largest step.
// Numerics: the contract's, to the bit.
// Requires: nothing.
// Traffic: each element once, and a byte written for it.
// Measured: docs/perf/cuda.md, with the operations behind it.
#pragma once

#include "base/fp8.cuh"
#include "base/reduce.cuh"
#include "base/step.cuh"
#include "base/vector.cuh"
#include "norm/row.cuh"
#include "ptx/pdl.cuh"

namespace elementwise {

// out = e4m3(input / *scale). The buffers have `times` rows of COLS elements for each of ROWS.
template <typename T, int COLS, step::Rows ROWS>
__global__ void __launch_bounds__(256)
    round_rows(const step::Header* header, i32 times, const T* input, const float* scale, e4m3_t* out) {
    pdl::launch_dependents();
    const fp8::Divisor divisor(*scale);
    pdl::wait();
    const i64 count = static_cast<i64>(step::num_rows<ROWS>(header, times)) * COLS;
    const i64 first = (static_cast<i64>(blockIdx.x) * 256 + threadIdx.x) * VECTOR;
    if (first >= count) return;
    const int n = count - first < VECTOR ? static_cast<int>(count - first) : VECTOR;
    float x[VECTOR];
    load<true>(x, input + first, n);
    divisor.divide(x);
    store<true>(out + first, x, n);
}

// The same with a scale for each row, its largest magnitude / 448, which is stored too. A CTA has a row.
template <typename T, int COLS, step::Rows ROWS>
__global__ void __launch_bounds__(rms::threads(COLS))
    round_tokens(const step::Header* header, i32 times, const T* input, float* scales, e4m3_t* out) {
    pdl::launch_dependents();
    __shared__ float shared[32];
    const i64 row = blockIdx.x;
    const bool idle = row >= step::num_rows<ROWS>(header, times);
    pdl::wait();
    if (idle) return;
    rms::Row<COLS> x;
    x.load(input + row * COLS);
    const float scale = fp8::scale(block_max<rms::threads(COLS)>(x.largest(), shared));
    if (threadIdx.x == 0) scales[row] = scale;
    x.store_rounded(out + row * COLS, scale);
}

}  // namespace elementwise
