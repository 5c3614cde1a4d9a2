// Needs more registers than it may have.
#pragma once

namespace test {

template <int N>
__global__ void __launch_bounds__(1024) spill(float* x, int n) {
    float values[N];
    for (int i = 0; i < N; i++) values[i] = x[i * n + threadIdx.x];
    for (int j = 0; j < n; j++)
        for (int i = 0; i < N; i++) values[i] = values[i] * values[(i + 1) % N] + x[j];
    for (int i = 0; i < N; i++) x[i * n + threadIdx.x] = values[i];
}

}  // namespace test
