// (The namespace is `rms`, because CUDA has a function `norm`.)
// A row of a CTA, in registers, and its RMSNorm. Every kernel that normalizes does it by this one order of summation.
#pragma once

#include "base/reduce.cuh"
#include "base/vector.cuh"

namespace rms {

// Threads of a CTA that holds a row of so many columns; `row_threads` in lowering.
__device__ constexpr int threads(int cols) {
    const int warps = ceil_div(ceil_div(cols, VECTOR), 32);
    return 32 * (warps < 16 ? warps : 16);
}

// Vector c of thread t is vector c · threads + t of the row.
template <int COLS>
struct Row {
    static constexpr int THREADS = threads(COLS);
    static constexpr int VECTORS = ceil_div(ceil_div(COLS, VECTOR), THREADS);
    static constexpr bool ALIGNED = whole_vectors(COLS);

    float at[VECTORS][VECTOR];

    static __device__ __forceinline__ int column(int vector) { return (vector * THREADS + threadIdx.x) * VECTOR; }

    template <typename T>
    __device__ __forceinline__ void load(const T* row) {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            // Whole vectors are loaded or not, without a test of the elements.
            const int left = COLS - column(v);
            if (ALIGNED && left <= 0) {
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) at[v][i] = 0.0f;
            } else {
                ::load<ALIGNED>(at[v], row + column(v), ALIGNED ? VECTOR : left);
            }
        }
    }

    template <typename T>
    __device__ __forceinline__ void store(T* row) const {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const int left = COLS - column(v);
            if (left > 0) ::store<ALIGNED>(row + column(v), at[v], ALIGNED ? VECTOR : left);
        }
    }

    // Replaces x by round(round(x · inv) · weight), inv = 1 / sqrt(mean square + eps). `shared` holds a float a warp.
    template <typename T>
    __device__ __forceinline__ void normalize(const Row& weight, float eps, float* shared) {
        float square = 0.0f;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) square = __fmaf_rn(at[v][i], at[v][i], square);
        }
        square = block_sum<THREADS>(square, shared);
        const float inv = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(square, static_cast<float>(COLS)), eps)));
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                at[v][i] = rounded<T>(__fmul_rn(rounded<T>(__fmul_rn(at[v][i], inv)), weight.at[v][i]));
            }
        }
    }
};

}  // namespace rms
