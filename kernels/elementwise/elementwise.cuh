// Op: add, silu_mul. CPU twin: kernels/elementwise.rs.
// Regime: any number of rows. Used only in programs that are not fused, and to add a residual to a product of cuBLASLt.
// Tile: eight elements a thread.
// Grid: enough threads for the largest step.
// Numerics: the contract's, to the bit.
// Requires: nothing.
// Traffic: each operand once.
// Measured: not tuned.
#pragma once

#include "base/math.cuh"
#include "base/step.cuh"
#include "base/vector.cuh"
#include "ptx/pdl.cuh"

namespace elementwise {

inline constexpr int THREADS = 256;

// out = round(a + b). The buffers have `times` rows of COLS elements for each of ROWS. out may be b.
template <typename T, int COLS, step::Rows ROWS>
__global__ void __launch_bounds__(THREADS)
    add(const step::Header* header, i32 times, const T* a, const T* b, T* out) {
    pdl::launch_dependents();
    pdl::wait();
    const i64 count = static_cast<i64>(step::num_rows<ROWS>(header, times)) * COLS;
    const i64 first = (static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x) * VECTOR;
    if (first >= count) return;
    const int n = count - first < VECTOR ? static_cast<int>(count - first) : VECTOR;
    float x[VECTOR], y[VECTOR];
    load<true>(x, a + first, n);
    load<true>(y, b + first, n);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x[i] = __fadd_rn(x[i], y[i]);
    store<true>(out + first, x, n);
}

// out[c] = round(silu(gate[c]) · up[c]). Rows of the input are up ‖ gate, 2 · COLS elements.
template <typename T, int COLS, step::Rows ROWS>
__global__ void __launch_bounds__(THREADS) silu_mul(const step::Header* header, i32 times, const T* input, T* out) {
    pdl::launch_dependents();
    pdl::wait();
    constexpr int PER_ROW = ceil_div(COLS, VECTOR);
    const i64 index = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
    const i64 row = index / PER_ROW;
    const int column = static_cast<int>(index % PER_ROW) * VECTOR;
    if (row >= step::num_rows<ROWS>(header, times)) return;
    constexpr bool ALIGNED = whole_vectors(COLS);
    float up[VECTOR], gate[VECTOR];
    load<ALIGNED>(up, input + row * 2 * COLS + column, COLS - column);
    load<ALIGNED>(gate, input + row * 2 * COLS + COLS + column, COLS - column);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) up[i] = __fmul_rn(math::silu(gate[i]), up[i]);
    store<ALIGNED>(out + row * COLS + column, up, COLS - column);
}

}  // namespace elementwise
