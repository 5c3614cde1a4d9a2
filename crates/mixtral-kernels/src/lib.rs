//! The Rust side of `kernels/`: which kernels a program needs, how they are launched, and how they are compiled. None
//! of this needs a driver or a GPU. The CUDA backend only carries out what is decided here.
//!
//! Reading order: [`arch`] (what is compiled for), [`plan`] (the kernel plans of linears and their text), [`weight`]
//! (how their weights are stored), [`select`] (which plan for which shape and token count), [`kernel`] (one
//! instantiation of a template), [`launch`] (a kernel with its grid and parameters), [`step_block`] (a step's inputs as
//! the device sees them), [`scratch`] (workspaces between kernels), [`exchange`] (memory between ranks), [`schedule`]
//! (every regime's launches, and the text that an engine holds of them), [`lower`] (a program's operations → a schedule); then [`source`] (the embedded
//! headers), [`locate`] and [`nvrtc`] (the compiler's library), [`resources`] (what a compiled kernel takes, and its
//! defects), [`compile`] (one kernel), [`cache`] and [`batch`] (many), [`needed`] (which ones), [`images`] (how an
//! engine holds them), [`executable`] (what a device runs of an engine).
#![deny(unsafe_code)]

pub mod arch;
pub mod batch;
pub mod cache;
pub mod compile;
pub mod exchange;
pub mod executable;
pub mod images;
pub mod kernel;
pub mod launch;
pub mod locate;
pub mod lower;
pub mod needed;
pub mod nvrtc;
pub mod plan;
pub mod resources;
pub mod schedule;
pub mod scratch;
pub mod select;
pub mod source;
pub mod step_block;
mod stream;
mod strip;
pub mod weight;

pub use arch::{Arch, Family};
pub use batch::{Batch, compile_all};
pub use cache::Cache;
pub use compile::{Code, CompileError, Compiled, Compiler};
pub use exchange::{Exchange, ExchangeArg, shares_from};
pub use executable::{Executable, ExecutableError};
pub use images::{ImagesError, KernelImage, KernelImages};
pub use kernel::Kernel;
pub use launch::{Arg, Grid, Launch, NamedArg, PackArg, PieceArg, ProbeArg, Product, TensorMap, Work};
pub use locate::Search;
pub use lower::{LowerError, Target};
pub use nvrtc::{Nvrtc, NvrtcError};
pub use plan::LinearPlan;
pub use resources::{Defect, Resources};
pub use schedule::text::ScheduleError;
pub use schedule::{Fill, Pack, Regime, Schedule};
pub use scratch::Scratch;
pub use source::Sources;
pub use step_block::StepBlock;
pub use weight::{Packing, WeightRows};
