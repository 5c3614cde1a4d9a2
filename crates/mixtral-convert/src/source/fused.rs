//! The layout of transformers 5: the experts of a layer are two tensors, and the router is beside them under `mlp`.

use mixtral_model::ModelConfig;

use super::per_expert::TRANSFORMERS_4;
use super::view::View;
use super::{Layout, Stored};
use crate::names::{HfTensor, Matrix};

/// `mlp.experts.gate_up_proj [E, 2I, H]`, gate rows first, and `mlp.experts.down_proj [E, H, I]`.
#[derive(Clone, Copy, Debug)]
pub struct Fused;

impl Layout for Fused {
    fn name(&self) -> &'static str {
        "Hugging Face, fused experts"
    }

    fn stored(&self, model: &ModelConfig, tensor: HfTensor) -> Stored {
        let (experts, hidden, inner) = (model.moe.num_experts, model.hidden_size, model.intermediate_size);
        match tensor {
            HfTensor::Router(layer) => {
                Stored { name: format!("model.layers.{layer}.mlp.gate.weight"), ..TRANSFORMERS_4.stored(model, tensor) }
            }
            HfTensor::Expert { layer, expert, matrix: Matrix::Down } => Stored {
                name: format!("model.layers.{layer}.mlp.experts.down_proj"),
                shape: vec![experts, hidden, inner],
                view: View::Rows { first: expert * hidden },
            },
            HfTensor::Expert { layer, expert, matrix } => Stored {
                name: format!("model.layers.{layer}.mlp.experts.gate_up_proj"),
                shape: vec![experts, 2 * inner, hidden],
                view: View::Rows { first: (2 * expert + usize::from(matrix == Matrix::Up)) * inner },
            },
            _ => TRANSFORMERS_4.stored(model, tensor),
        }
    }
}
