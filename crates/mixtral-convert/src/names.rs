//! The tensors of a whole model, with the names that transformers 4 gives them.
//!
//! This is the only place with those names. Other layouts are described by how they differ from them, the shard plan
//! uses them, and dummy weights are a function of them.

use std::fmt;

use mixtral_model::ModelConfig;

/// One of the three matrices of a feed-forward: h = down(silu(gate x) · up x).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Matrix {
    /// gate_proj, w1: `[intermediate_size, hidden_size]`.
    Gate,
    /// down_proj, w2: `[hidden_size, intermediate_size]`.
    Down,
    /// up_proj, w3: `[intermediate_size, hidden_size]`.
    Up,
}

impl Matrix {
    /// All three.
    pub const ALL: [Matrix; 3] = [Matrix::Gate, Matrix::Down, Matrix::Up];

    /// `w1`, `w2` or `w3`.
    #[must_use]
    pub const fn w(self) -> &'static str {
        match self {
            Matrix::Gate => "w1",
            Matrix::Down => "w2",
            Matrix::Up => "w3",
        }
    }
}

/// A tensor of the whole model. Layers and experts are counted over the whole model. It displays as its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HfTensor {
    /// Token embedding, `[vocab_size, hidden_size]`.
    EmbedTokens,
    /// RMSNorm weight before attention, `[hidden_size]`.
    InputNorm(usize),
    /// Query projection, `[num_heads · head_dim, hidden_size]`.
    Query(usize),
    /// Key projection, `[num_kv_heads · head_dim, hidden_size]`.
    Key(usize),
    /// Value projection, with the shape of the key projection.
    Value(usize),
    /// Attention's output projection, `[hidden_size, num_heads · head_dim]`.
    Output(usize),
    /// RMSNorm weight before the feed-forward, `[hidden_size]`.
    PostNorm(usize),
    /// Router, `[num_experts, hidden_size]`.
    Router(usize),
    /// A matrix of an expert.
    Expert {
        /// Layer.
        layer: usize,
        /// Expert.
        expert: usize,
        /// Which matrix.
        matrix: Matrix,
    },
    /// A matrix of a dense model's feed-forward.
    Mlp {
        /// Layer.
        layer: usize,
        /// Which matrix.
        matrix: Matrix,
    },
    /// RMSNorm weight after the last layer, `[hidden_size]`.
    FinalNorm,
    /// Output embedding, `[vocab_size, hidden_size]`.
    LmHead,
}

impl HfTensor {
    /// A matrix of a feed-forward: of an expert, or of the only feed-forward of a dense layer.
    #[must_use]
    pub fn feed_forward(model: &ModelConfig, layer: usize, expert: usize, matrix: Matrix) -> Self {
        match model.has_router() {
            true => HfTensor::Expert { layer, expert, matrix },
            false => HfTensor::Mlp { layer, matrix },
        }
    }

    /// All tensors of `model`. A tied model has no lm_head of its own.
    #[must_use]
    pub fn all(model: &ModelConfig, tied: bool) -> Vec<Self> {
        let mut tensors = vec![HfTensor::EmbedTokens];
        for layer in 0..model.num_layers {
            tensors.extend([
                HfTensor::InputNorm(layer),
                HfTensor::Query(layer),
                HfTensor::Key(layer),
                HfTensor::Value(layer),
                HfTensor::Output(layer),
                HfTensor::PostNorm(layer),
            ]);
            if model.has_router() {
                tensors.push(HfTensor::Router(layer));
            }
            for expert in 0..model.moe.num_experts {
                tensors.extend(Matrix::ALL.map(|matrix| HfTensor::feed_forward(model, layer, expert, matrix)));
            }
        }
        tensors.push(HfTensor::FinalNorm);
        if !tied {
            tensors.push(HfTensor::LmHead);
        }
        tensors
    }

    /// The tensor's shape as a matrix, `[rows, columns]`. A vector is one row.
    #[must_use]
    pub fn matrix_shape(self, model: &ModelConfig) -> [usize; 2] {
        let hidden = model.hidden_size;
        match self {
            HfTensor::InputNorm(_) | HfTensor::PostNorm(_) | HfTensor::FinalNorm => [1, hidden],
            HfTensor::EmbedTokens | HfTensor::LmHead => [model.vocab_size, hidden],
            HfTensor::Query(_) => [model.num_heads * model.head_dim, hidden],
            HfTensor::Key(_) | HfTensor::Value(_) => [model.num_kv_heads * model.head_dim, hidden],
            HfTensor::Output(_) => [hidden, model.num_heads * model.head_dim],
            HfTensor::Router(_) => [model.moe.num_experts, hidden],
            HfTensor::Expert { matrix, .. } | HfTensor::Mlp { matrix, .. } => match matrix {
                Matrix::Gate | Matrix::Up => [model.intermediate_size, hidden],
                Matrix::Down => [hidden, model.intermediate_size],
            },
        }
    }

    /// The tensor's shape as it is stored: `[n]` or `[rows, columns]`.
    #[must_use]
    pub fn shape(self, model: &ModelConfig) -> Vec<usize> {
        let [rows, cols] = self.matrix_shape(model);
        match self {
            HfTensor::InputNorm(_) | HfTensor::PostNorm(_) | HfTensor::FinalNorm => vec![cols],
            _ => vec![rows, cols],
        }
    }
}

/// The names of a layer's scales of keys and of values in an e4m3 cache, one number each. A quantized model may have them, in several
/// spellings; the first of each is the one that messages and the plan use.
#[must_use]
pub fn cache_scales(layer: usize) -> [[String; 4]; 2] {
    ["k", "v"].map(|letter| {
        [
            format!("{letter}_scale"),
            format!("{letter}_proj.{letter}_scale"),
            format!("{letter}_proj.output_scale"),
            "kv_scale".into(),
        ]
        .map(|name| format!("model.layers.{layer}.self_attn.{name}"))
    })
}

impl fmt::Display for HfTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (layer, name) = match *self {
            HfTensor::EmbedTokens => return f.write_str("model.embed_tokens.weight"),
            HfTensor::FinalNorm => return f.write_str("model.norm.weight"),
            HfTensor::LmHead => return f.write_str("lm_head.weight"),
            HfTensor::Expert { layer, expert, matrix } => {
                let w = matrix.w();
                return write!(f, "model.layers.{layer}.block_sparse_moe.experts.{expert}.{w}.weight");
            }
            HfTensor::Mlp { layer, matrix: Matrix::Gate } => (layer, "mlp.gate_proj"),
            HfTensor::Mlp { layer, matrix: Matrix::Down } => (layer, "mlp.down_proj"),
            HfTensor::Mlp { layer, matrix: Matrix::Up } => (layer, "mlp.up_proj"),
            HfTensor::InputNorm(layer) => (layer, "input_layernorm"),
            HfTensor::Query(layer) => (layer, "self_attn.q_proj"),
            HfTensor::Key(layer) => (layer, "self_attn.k_proj"),
            HfTensor::Value(layer) => (layer, "self_attn.v_proj"),
            HfTensor::Output(layer) => (layer, "self_attn.o_proj"),
            HfTensor::PostNorm(layer) => (layer, "post_attention_layernorm"),
            HfTensor::Router(layer) => (layer, "block_sparse_moe.gate"),
        };
        write!(f, "model.layers.{layer}.{name}.weight")
    }
}
