//! The layouts with one tensor for each expert and matrix, in every spelling; and dense Mistral models.

use mixtral_model::ModelConfig;

use super::view::View;
use super::{Layout, Stored};
use crate::names::{HfTensor, Matrix};

/// A layout whose experts have tensors of their own. Its other names are those of transformers 4 and 5 alike.
#[derive(Clone, Copy, Debug)]
pub struct PerExpert {
    /// Its name in messages.
    name: &'static str,
    /// What a layer calls its router and experts.
    block: &'static str,
    /// What an expert calls its matrices: gate, down, up.
    matrices: [&'static str; 3],
}

/// transformers 4, whose names are the reference for all others.
pub const TRANSFORMERS_4: PerExpert =
    PerExpert { name: "Hugging Face, a tensor an expert", block: "block_sparse_moe", matrices: ["w1", "w2", "w3"] };

/// llm-compressor with transformers 5.
pub const LLM_COMPRESSOR: PerExpert = PerExpert {
    name: "Hugging Face, a tensor an expert, as llm-compressor names them",
    matrices: ["gate_proj", "down_proj", "up_proj"],
    ..TRANSFORMERS_4
};

/// GPTQModel with transformers 5.
pub const GPTQMODEL: PerExpert =
    PerExpert { name: "Hugging Face, a tensor an expert, as GPTQModel names them", block: "mlp", ..LLM_COMPRESSOR };

impl Layout for PerExpert {
    fn name(&self) -> &'static str {
        self.name
    }

    fn stored(&self, model: &ModelConfig, tensor: HfTensor) -> Stored {
        let block = |layer| format!("model.layers.{layer}.{}", self.block);
        let name = match tensor {
            HfTensor::Router(layer) => format!("{}.gate.weight", block(layer)),
            HfTensor::Expert { layer, expert, matrix } => {
                let [gate, down, up] = self.matrices;
                let matrix = match matrix {
                    Matrix::Gate => gate,
                    Matrix::Down => down,
                    Matrix::Up => up,
                };
                format!("{}.experts.{expert}.{matrix}.weight", block(layer))
            }
            _ => tensor.to_string(),
        };
        Stored { name, shape: tensor.shape(model), view: View::Rows { first: 0 } }
    }
}
