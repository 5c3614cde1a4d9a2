//! Empty: the benchmarks are in `kernels/`.
