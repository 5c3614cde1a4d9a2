//! The layout of transformers 4, with one tensor for each expert and matrix; and of dense Mistral models in any
//! version.

use mixtral_model::ModelConfig;

use super::view::View;
use super::{Layout, Stored};
use crate::names::HfTensor;

/// The layout whose names are the reference for all others.
#[derive(Clone, Copy, Debug)]
pub struct PerExpert;

impl Layout for PerExpert {
    fn name(&self) -> &'static str {
        "Hugging Face, a tensor an expert"
    }

    fn stored(&self, model: &ModelConfig, tensor: HfTensor) -> Stored {
        Stored { name: tensor.to_string(), shape: tensor.shape(model), view: View::Rows { first: 0 } }
    }
}
