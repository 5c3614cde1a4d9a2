// A kernel written like the real ones, for the tests of compilation.
#pragma once

#include "base/types.cuh"
#include "ptx/pdl.cuh"

namespace test {

template <typename T, int N>
__global__ void __launch_bounds__(128) scale(T* x, float by) {
    __shared__ float staged[128];
    pdl::launch_dependents();
    pdl::wait();
    staged[threadIdx.x] = to_float(x[threadIdx.x]);
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < N; i++) sum += staged[(threadIdx.x + i) % 128] * by;
    x[threadIdx.x] = from_float<T>(sum);
}

}  // namespace test
