//! What only a GPU can show. Kernels are compiled on the spot, so NVRTC is needed too; a machine without either says so, and
//! the tests pass. Nothing of the source tree is needed.
//!
//! `MIXTRAL_CASES=attention` runs only the operation cases whose names contain that, `MIXTRAL_CODE=sm_90` only the code that is
//! called that.

mod cases;
mod cublaslt;
mod faults;
mod kernels;
mod other_build;
mod steps;
