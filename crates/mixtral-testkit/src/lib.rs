//! Code that the tests of several crates share. It is only ever a dev-dependency, and panics where a test should fail.
//!
//! Reading order: [`tiny_model`] (models on disk, in every source layout), [`elements`] (values to bytes and back),
//! [`assembly`] (programs and weights by hand), [`batch`] (the inputs of a step over shuffled blocks),
//! [`reference`](mod@reference) (every operation in f64), [`cases`] (the registry of operation cases that every backend
//! is driven by), [`large`] (operations at real models' sizes, of which `sampled` computes a part), [`poison`],
//! [`decoder`] (a small decoder's program, fused and unfused).
#![forbid(unsafe_code)]

pub mod assembly;
pub mod batch;
pub mod cases;
pub mod decoder;
pub mod elements;
pub mod fp8;
pub mod large;
pub mod poison;
pub mod quantized;
pub mod reference;
mod sampled;
pub mod tiny_model;
pub mod tolerance;

pub use tiny_model::{Layout, Tensor, TinyModel, write_safetensors};
