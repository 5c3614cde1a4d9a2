//! From a model directory, as Hugging Face or Mistral publish it, to a checkpoint.
//!
//! All foreign quirks end here: tensor names, fused experts, interleaved rotary rows, tied embeddings, the dialects
//! of `config.json`. What comes out is the same bytes whichever way the model was stored.
//!
//! Reading order: [`names`] is transformers' vocabulary of tensors, [`source`] finds them in each layout,
//! [`mod@plan`] says which rectangles of them make a rank's tensors, [`execute`] streams those through [`number`]'s
//! conversions, [`mod@tokenizer`] looks after the tokenizer's files, and [`mod@convert`] puts the stage together.
#![forbid(unsafe_code)]

pub mod convert;
pub mod error;
pub mod execute;
pub mod names;
pub mod number;
pub mod plan;
pub mod report;
pub mod source;
pub mod tokenizer;

pub use convert::{ConvertOptions, Input, convert, plan};
pub use error::ConvertError;
pub use names::{HfTensor, Matrix};
pub use plan::recipes;
pub use report::{ConvertPlan, RankPlan, Report};
