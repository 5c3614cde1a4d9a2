//! From a checkpoint to an engine: the naive graph of each rank, the passes over it, the memory plan, and the engine
//! directory. This crate knows the model and the checkpoint's tensor names. It knows neither driver nor runtime.
//!
//! Reading order: [`graph`] (one operation per mathematical operation), [`passes`] (one file each), [`mod@lower`]
//! (graph → passes → planned program), [`kernels`] (CUDA's part of an engine), [`mod@build`] and [`mod@rebuild`]
//! (directories), [`mod@cost`] (bytes and FLOPs of an operation), [`mod@spread`] (how tokens spread over experts),
//! [`mod@gpu`] and [`mod@predict`] (the time of a step of all ranks), [`mod@explain`] and [`mod@dot`] (the program for
//! people), [`mod@fold`] (what is alike in it, to be shown once).
#![forbid(unsafe_code)]

pub mod build;
pub mod cost;
pub mod dot;
pub mod explain;
pub mod fold;
pub mod gpu;
pub mod graph;
pub mod kernels;
pub mod lower;
pub mod passes;
pub mod predict;
pub mod rebuild;
pub mod spread;

pub use build::{BuildError, BuildOptions, Built, WeightsFrom, build, plan};
pub use cost::Cost;
pub use explain::Roof;
pub use gpu::Gpu;
pub use kernels::{DenseLinears, KernelOptions, Kernels};
pub use lower::lower;
pub use predict::Job;
