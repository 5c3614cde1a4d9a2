//! The CPU interpreter of a program: the definition of what each operation computes.
//!
//! [`CpuBackend`] implements [`mixtral_engine::Backend`]. It knows operations, not models: every program that passes
//! [`Program::check`](mixtral_engine::Program::check) runs. Weights are read where they lie, usually in a mapped file.
//! The bits of a step's results depend neither on the instruction set, nor on the number of threads, nor on what else
//! is in the batch.
//!
//! Reading order: [`backend`] (loading and stepping), `resolve` (names to indices), `execute` (operands out of the
//! arena), `kernels` (one operation a file), `simd` (the vector kernels and the only unsafe code), [`probe`] (the
//! machine's ceilings), and underneath `memory`, `cache`, `weights`.
#![deny(unsafe_code)]

pub mod backend;
mod cache;
mod execute;
mod kernels;
mod memory;
pub mod probe;
mod resolve;
mod simd;
mod weights;

pub use backend::{CpuBackend, CpuOptions};
pub use simd::Isa;
