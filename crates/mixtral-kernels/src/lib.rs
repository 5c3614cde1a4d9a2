//! The Rust side of `kernels/`: which kernels a program needs, how they are launched, and how they are compiled. No
//! driver and no GPU is needed for any of it; the CUDA backend only carries out what is decided here.
//!
//! Reading order: [`arch`] (what is compiled for), [`plan`] (the kernel plans of linears and their text), [`select`] (which plan
//! for which shape and token count), [`kernel`] (one instantiation of a template), [`launch`] (a kernel with its grid and
//! parameters), [`step_block`] (a step's inputs as the device sees them), [`scratch`] (workspaces between kernels), [`lower`]
//! (a program's operations → launches).

pub mod arch;
pub mod kernel;
pub mod launch;
pub mod lower;
pub mod plan;
pub mod scratch;
pub mod select;
pub mod step_block;

pub use arch::{Arch, Family};
pub use kernel::Kernel;
pub use launch::{Arg, Grid, Launch, TensorMap};
pub use lower::{LowerError, Regime, Schedule, Target};
pub use plan::LinearPlan;
pub use scratch::Scratch;
pub use step_block::StepBlock;
