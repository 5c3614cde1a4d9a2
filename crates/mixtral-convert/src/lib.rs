//! Converts a model directory, as Hugging Face or Mistral publish it, to a checkpoint.
//!
//! All quirks of sources end here: tensor names, fused experts, interleaved rotary rows, tied embeddings, the dialects
//! of `config.json`. The output has the same bytes however the model was stored.
//!
//! Reading order: [`names`] (transformers' names of tensors), [`source`] (finds the tensors in each layout),
//! [`mod@plan`] (which rectangles of them make a rank's tensors), [`execute`] (streams those through the conversions of
//! [`number`], [`mod@quantize`] and [`fp8`]), `directions` (what an fp8 cache rounds keys by), [`statistics`] and [`feedback`] (what calibration adds to quantizing), [`floats`] (what
//! calibration reads), [`mod@tokenizer`] (the tokenizer's files), and [`mod@convert`] (the whole stage).
#![forbid(unsafe_code)]

pub mod convert;
mod directions;
pub mod error;
pub mod execute;
pub mod feedback;
pub mod floats;
pub mod fp8;
pub mod names;
pub mod number;
pub mod plan;
pub mod quantize;
mod quantized_writer;
pub mod report;
pub mod requantize;
pub mod source;
pub mod statistics;
pub mod tokenizer;

pub use convert::{ConvertOptions, Input, convert, plan};
pub use error::ConvertError;
pub use floats::FloatModel;
pub use names::{HfTensor, Matrix};
pub use plan::recipes;
pub use report::{ConvertPlan, RankPlan, Report};
pub use requantize::requantize;
pub use statistics::{InputStatistics, LinearInput, Statistics};
