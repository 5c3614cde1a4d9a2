//! Calibration: runs a float model over text, layer by layer, and says what the inputs of its linears were like.
//!
//! A layer is a pipeline stage of its own. The stages run one after another, each over the whole text, and what one sends
//! to the next waits in memory. So only one layer's weights are in memory at a time, and every weight is read once. The
//! engine needs no operation for this: between two operations, the buffers of the CPU backend can be read
//! ([`mixtral_engine::Inspect`]).
//!
//! Reading order: [`mod@text`] (the sequences), [`generate`] (text that the model makes itself), [`layers`] (the stages),
//! [`observe`] (what is kept of the inputs), [`cache`] (the file that keeps statistics), [`mod@calibrate`] (the whole).
#![forbid(unsafe_code)]

pub mod cache;
pub mod calibrate;
pub mod error;
pub mod generate;
pub mod layers;
pub mod observe;
mod step;
pub mod text;

pub use calibrate::{CalibrateOptions, Calibration, calibrate};
pub use error::CalibrateError;
pub use text::Text;
