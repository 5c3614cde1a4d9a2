// A row that a CTA holds in registers, and its RMSNorm. Every kernel that normalizes uses this code, so all sum in the
// same order. (The namespace is `rms`, because CUDA has a function `norm`.)
#pragma once

#include "base/fp8.cuh"
#include "base/reduce.cuh"
#include "base/vector.cuh"

namespace rms {

// Threads of a CTA that holds a row of `cols` columns; `row_threads` in lowering.
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
            // Aligned rows consist of whole vectors, so a vector is loaded or not, without a test for each element.
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

    // The largest magnitude of the thread's elements.
    __device__ __forceinline__ float largest() const {
        float most = 0.0f;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) most = fmaxf(most, fabsf(at[v][i]));
        }
        return most;
    }

    // Stores e4m3(x / divisor), which a linear with fp8 weights takes.
    __device__ __forceinline__ void store_rounded(e4m3_t* row, float divisor) const {
        const fp8::Divisor by(divisor);
        Row quotient = *this;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) by.divide(quotient.at[v]);
        quotient.store(row);
    }

    template <typename T>
    __device__ __forceinline__ void round() {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) at[v][i] = rounded<T>(at[v][i]);
        }
    }

    // Replaces x by round(round(x · inv) · weight), inv = 1 / sqrt(mean square + eps). `shared` holds one float for
    // each warp.
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
