//! The names of a checkpoint's files and tensors. No other place has them.

use std::fmt;

use mixtral_model::{PartKind, Rank};

/// The file that makes a directory a checkpoint. It is written last and removed first.
pub const CONFIG_FILE: &str = "config.json";

/// A tensor of one rank's file. Layers count from 0 in each pipeline stage.
///
/// Shapes, of one rank: t = tp_size, m = moe_tp_size, d = head_dim, H = hidden_size, I = intermediate_size,
/// V = vocab_size, Vp = V padded to a multiple of t, nh and kv the rank's query and KV heads, E the rank's experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorId {
    /// Token embedding, `[V, H]`; first stage only.
    Embedding,
    /// RMSNorm weight before attention, `[H]`.
    InputNorm(usize),
    /// Query, key and value projections, rows Q ‖ K ‖ V: `[(nh + 2 kv) d, H]`.
    Qkv(usize),
    /// Output projection of attention, `[H, nh d]`.
    Dense(usize),
    /// Scales of the keys and of the values in an 8-bit cache, always f32: `[2]`; or `[1]`, one for both, in another tool's files.
    CacheScales(usize),
    /// For each of the rank's KV heads, the direction in which its queries mostly lie, before rope, in the order of the
    /// elements of a key, always f32: `[kv, d]`. The writer of an 8-bit cache rounds a key k to k' so that u · (k − k') is
    /// small. u is as long as the queries are longer along it than along others: λ being the largest eigenvalue of their
    /// second moment and μ the mean of the others, |u|² = λ / μ − 1. A direction of zeros leaves keys rounded to nearest.
    KeyDirections(usize),
    /// RMSNorm weight before the feed-forward, `[H]`.
    PostNorm(usize),
    /// Router, all experts on every rank, always f32: `[experts, H]`.
    Router(usize),
    /// First feed-forward matrices, up_proj rows then gate_proj rows of each expert: `[E, 2 I/m, H]`.
    Fc(usize),
    /// Second feed-forward matrix (down_proj) of each expert: `[E, H, I/m]`.
    Proj(usize),
    /// RMSNorm weight after the last layer, `[H]`; last stage only.
    FinalNorm,
    /// Output embedding, `[Vp/t, H]`; last stage only.
    LmHead,
}

impl TensorId {
    /// The layer, counted in the pipeline stage; `None` for the tensors outside the layers.
    #[must_use]
    pub fn layer(self) -> Option<usize> {
        match self {
            TensorId::Embedding | TensorId::FinalNorm | TensorId::LmHead => None,
            TensorId::InputNorm(layer)
            | TensorId::Qkv(layer)
            | TensorId::Dense(layer)
            | TensorId::CacheScales(layer)
            | TensorId::KeyDirections(layer)
            | TensorId::PostNorm(layer)
            | TensorId::Router(layer)
            | TensorId::Fc(layer)
            | TensorId::Proj(layer) => Some(layer),
        }
    }
}

impl fmt::Display for TensorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (layer, name) = match *self {
            TensorId::Embedding => return f.write_str("transformer.vocab_embedding.weight"),
            TensorId::FinalNorm => return f.write_str("transformer.ln_f.weight"),
            TensorId::LmHead => return f.write_str("lm_head.weight"),
            TensorId::InputNorm(layer) => (layer, "input_layernorm"),
            TensorId::Qkv(layer) => (layer, "attention.qkv"),
            TensorId::Dense(layer) => (layer, "attention.dense"),
            TensorId::CacheScales(layer) => {
                return write!(f, "transformer.layers.{layer}.attention.kv_cache_scaling_factor");
            }
            TensorId::KeyDirections(layer) => {
                return write!(f, "transformer.layers.{layer}.attention.kv_cache_key_directions");
            }
            TensorId::PostNorm(layer) => (layer, "post_layernorm"),
            TensorId::Router(layer) => (layer, "mlp.router"),
            TensorId::Fc(layer) => (layer, "mlp.fc"),
            TensorId::Proj(layer) => (layer, "mlp.proj"),
        };
        write!(f, "transformer.layers.{layer}.{name}.weight")
    }
}

/// The name of a part of the weight with the name `weight`. The values have the weight's own name.
///
/// Scales have TensorRT-LLM's names. The zeros have another name than there, because that tool stores zeros
/// that are multiplied by the scale already.
#[must_use]
pub fn part_name(weight: &str, part: PartKind) -> String {
    let suffix = match part {
        PartKind::Values => return weight.to_owned(),
        PartKind::Scales => "weights_scaling_factor",
        PartKind::Zeros => "weights_zero_point",
        PartKind::InputScale => "activation_scaling_factor",
    };
    format!("{}.{suffix}", weight.strip_suffix(".weight").unwrap_or(weight))
}

/// `rank{r}.safetensors`.
#[must_use]
pub fn rank_file_name(rank: Rank) -> String {
    format!("rank{rank}.safetensors")
}

/// Whether `name` is a rank file's.
#[must_use]
pub fn is_rank_file(name: &str) -> bool {
    name.strip_prefix("rank")
        .and_then(|rest| rest.strip_suffix(".safetensors"))
        .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether `name` is one of the tokenizer's files. Every stage copies these.
#[must_use]
pub fn is_tokenizer_file(name: &str) -> bool {
    const NAMES: [&str; 7] = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
        "tokenizer.model",
        "tekken.json",
    ];
    NAMES.contains(&name) || name.starts_with("tokenizer.model.") || name.starts_with("chat_template.")
}
