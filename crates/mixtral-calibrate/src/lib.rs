//! Calibration: runs a float model over text, layer by layer, and says what the inputs of its linears were like.
//!
//! The layers run one after another, each over the whole text, and what one makes waits in memory for the next. So only one
//! layer's weights are in memory at a time, and every weight is read once. The engine needs no operation for this: between two
//! operations, the buffers of the CPU backend can be read ([`mixtral_engine::Inspect`]); on a GPU, kernels of their own sum up the
//! rows before each linear ([`mixtral_kernels::lower::observe`]).
//!
//! Reading order: [`mod@text`] (the sequences), [`machine`] (where it runs), [`generate`] (text that the model makes itself),
//! `layer` (a program of one layer), [`layers`] (all of them), `cpu` and `gpu` (a layer there), `weights` (what they load),
//! [`observe`] (what is kept of the inputs), [`cache`] (the file that keeps statistics), [`mod@calibrate`] (the whole).
#![forbid(unsafe_code)]

pub mod cache;
pub mod calibrate;
mod cpu;
pub mod error;
pub mod generate;
mod gpu;
mod layer;
pub mod layers;
pub mod machine;
pub mod observe;
mod step;
pub mod text;
mod weights;

pub use calibrate::{CalibrateOptions, Calibration, calibrate};
pub use error::CalibrateError;
pub use machine::{Gpu, Machine};
pub use text::Text;
