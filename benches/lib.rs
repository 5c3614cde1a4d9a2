//! Nothing: the benchmarks are in `kernels/`.
