//! Mistral's own layout: `params.json`, `consolidated*.safetensors`, and its own names. In the rows of the query and
//! key projections, the two rows of a rotary pair lie beside each other.

use mixtral_model::ModelConfig;

use super::view::View;
use super::{Layout, Stored};
use crate::names::{HfTensor, Matrix};

/// The layout that mistral-inference reads: an expert's matrix is `feed_forward.experts.N.w1`.
#[derive(Clone, Copy, Debug)]
pub struct Consolidated;

/// The layout in which Mixtral 8x7B was first published. The experts of a layer are stacked along the rows of
/// `block_sparse_moe.w1`, `w2` and `w3`. Each of these is `[E · I, H]`, so w2 is stored transposed.
#[derive(Clone, Copy, Debug)]
pub struct Stacked;

impl Layout for Consolidated {
    fn name(&self) -> &'static str {
        "Mistral consolidated"
    }

    fn stored(&self, model: &ModelConfig, tensor: HfTensor) -> Stored {
        let interleaved = View::Interleaved { head_dim: model.head_dim };
        let rows = View::Rows { first: 0 };
        let (layer, name, view) = match tensor {
            HfTensor::EmbedTokens => return whole("tok_embeddings.weight", model, tensor),
            HfTensor::FinalNorm => return whole("norm.weight", model, tensor),
            HfTensor::LmHead => return whole("output.weight", model, tensor),
            HfTensor::InputNorm(layer) => (layer, "attention_norm".to_owned(), rows),
            HfTensor::PostNorm(layer) => (layer, "ffn_norm".to_owned(), rows),
            HfTensor::Query(layer) => (layer, "attention.wq".to_owned(), interleaved),
            HfTensor::Key(layer) => (layer, "attention.wk".to_owned(), interleaved),
            HfTensor::Value(layer) => (layer, "attention.wv".to_owned(), rows),
            HfTensor::Output(layer) => (layer, "attention.wo".to_owned(), rows),
            HfTensor::Router(layer) => (layer, "feed_forward.gate".to_owned(), rows),
            HfTensor::Expert { layer, expert, matrix } => {
                (layer, format!("feed_forward.experts.{expert}.{}", matrix.w()), rows)
            }
            HfTensor::Mlp { layer, matrix } => (layer, format!("feed_forward.{}", matrix.w()), rows),
        };
        Stored { name: format!("layers.{layer}.{name}.weight"), shape: tensor.shape(model), view }
    }
}

impl Layout for Stacked {
    fn name(&self) -> &'static str {
        "Mistral consolidated, stacked experts"
    }

    fn stored(&self, model: &ModelConfig, tensor: HfTensor) -> Stored {
        let inner = model.intermediate_size;
        match tensor {
            HfTensor::Expert { layer, expert, matrix } => Stored {
                name: format!("layers.{layer}.block_sparse_moe.{}", matrix.w()),
                shape: vec![model.moe.num_experts * inner, model.hidden_size],
                view: match matrix {
                    Matrix::Down => View::Transposed { first: expert * inner },
                    Matrix::Gate | Matrix::Up => View::Rows { first: expert * inner },
                },
            },
            HfTensor::Router(layer) => whole(&format!("layers.{layer}.block_sparse_moe.gate.weight"), model, tensor),
            _ => Consolidated.stored(model, tensor),
        }
    }
}

fn whole(name: &str, model: &ModelConfig, tensor: HfTensor) -> Stored {
    Stored { name: name.to_owned(), shape: tensor.shape(model), view: View::Rows { first: 0 } }
}
