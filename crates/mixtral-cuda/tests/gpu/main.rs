//! Tests that need a GPU. They compile kernels themselves, so they need NVRTC too. On a machine without a GPU or NVRTC
//! they say so and pass. They need nothing of the source tree. (`last_bits` and `short_sums` need no GPU: they say why others have
//! their limits.)
//!
//! `MIXTRAL_CASES=attention` runs only the operation cases whose names contain `attention`. `MIXTRAL_CODE=sm_90` runs
//! only kernels compiled to `sm_90`.

mod ahead;
mod cases;
mod cublaslt;
mod faults;
mod kernels;
mod last_bits;
mod other_build;
mod ranks;
mod short_sums;
mod steps;
