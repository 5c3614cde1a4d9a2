//! The geometry of a model. It does not depend on the file that it was read from.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{CacheFormat, DType, Formats};

/// The architecture of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelFamily {
    /// Each layer has a router and several experts.
    Mixtral,
    /// Each layer has one dense feed-forward. It is treated as one expert without a router.
    Mistral,
}

/// How the weights of a token's chosen experts are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MoeNormalization {
    /// Mode 0: the softmax over all experts, unchanged.
    None,
    /// Mode 1: divided by the sum over the chosen experts. This equals a softmax over the chosen experts' logits.
    Renorm,
}

impl MoeNormalization {
    /// Its number in the checkpoint's `moe_normalization_mode`.
    #[must_use]
    pub const fn mode(self) -> u32 {
        match self {
            MoeNormalization::None => 0,
            MoeNormalization::Renorm => 1,
        }
    }

    /// The inverse of [`MoeNormalization::mode`].
    #[must_use]
    pub const fn from_mode(mode: u32) -> Option<Self> {
        match mode {
            0 => Some(MoeNormalization::None),
            1 => Some(MoeNormalization::Renorm),
            _ => None,
        }
    }
}

/// The mixture-of-experts part of the geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MoeConfig {
    /// Experts of a layer; 1 for a dense model.
    pub num_experts: usize,
    /// Experts that a token is sent to.
    pub top_k: usize,
    /// How their weights are scaled.
    pub normalization: MoeNormalization,
}

/// A Mixtral-family decoder. All sizes are those of the whole model, before any sharding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Mixtral, or dense Mistral.
    pub family: ModelFamily,
    /// Data type of weights, activations and residual.
    pub dtype: DType,
    /// Tokens of the vocabulary, without padding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of one expert's feed-forward.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads. `num_heads` is a multiple of it.
    pub num_kv_heads: usize,
    /// Elements of one head. It is not always `hidden_size / num_heads`.
    pub head_dim: usize,
    /// Experts and routing.
    pub moe: MoeConfig,
    /// The longest sequence that the positions were trained for.
    pub max_position_embeddings: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Added to the mean square inside RMSNorm.
    pub norm_eps: f64,
    /// Attention window W: key j is visible from position i when i − W < j ≤ i. `None` is full attention.
    pub sliding_window: Option<usize>,
    /// How the matrices are stored.
    #[serde(default)]
    pub formats: Formats,
    /// How keys and values are stored.
    #[serde(default, skip_serializing_if = "CacheFormat::is_plain")]
    pub cache: CacheFormat,
    /// Whether an fp8 cache has a direction for the rounding of each KV head's keys.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub key_directions: bool,
}

/// A geometry that no model can have.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// A size that must be at least one is zero.
    #[error("{field} is 0; it must be at least 1")]
    Zero {
        /// The offending field.
        field: &'static str,
    },
    /// A size that is so large that arithmetic with it could overflow.
    #[error("{field} is {value}; the largest supported value is {max}")]
    TooLarge {
        /// The offending field.
        field: &'static str,
        /// Its value.
        value: usize,
        /// The cap.
        max: usize,
    },
    /// Query heads cannot be grouped evenly over KV heads.
    #[error("num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")]
    Groups {
        /// Query heads.
        num_heads: usize,
        /// KV heads.
        num_kv_heads: usize,
    },
    /// Rotary embedding rotates pairs, so a head needs an even number of elements.
    #[error("head_dim is {0}; rotary embedding needs an even number")]
    OddHeadDim(usize),
    /// A token cannot go to more experts than there are.
    #[error("num_experts_per_tok {top_k} is more than num_local_experts {num_experts}")]
    TopK {
        /// Experts a token.
        top_k: usize,
        /// Experts.
        num_experts: usize,
    },
    /// A dense model has exactly one expert.
    #[error("a dense Mistral model has one feed-forward a layer, not {0} experts")]
    DenseExperts(usize),
    /// A real number outside its range.
    #[error("{field} is {value}; it must be a finite number above 0")]
    NotPositive {
        /// The offending field.
        field: &'static str,
        /// Its value.
        value: f64,
    },
}

/// Larger sizes are refused. Products of three sizes up to this fit into 64 bits.
const MAX_SIZE: usize = 1 << 20;

impl ModelConfig {
    /// Mixtral 8x7B's geometry.
    #[must_use]
    pub fn mixtral_8x7b(dtype: DType) -> Self {
        ModelConfig {
            family: ModelFamily::Mixtral,
            dtype,
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 14_336,
            num_layers: 32,
            num_heads: 32,
            num_kv_heads: 8,
            head_dim: 128,
            moe: MoeConfig { num_experts: 8, top_k: 2, normalization: MoeNormalization::Renorm },
            max_position_embeddings: 32_768,
            rope_theta: 1e6,
            norm_eps: 1e-5,
            sliding_window: None,
            formats: Formats::default(),
            cache: CacheFormat::Plain,
            key_directions: false,
        }
    }

    /// Mixtral 8x22B's geometry.
    #[must_use]
    pub fn mixtral_8x22b(dtype: DType) -> Self {
        ModelConfig {
            vocab_size: 32_768,
            hidden_size: 6144,
            intermediate_size: 16_384,
            num_layers: 56,
            num_heads: 48,
            max_position_embeddings: 65_536,
            ..ModelConfig::mixtral_8x7b(dtype)
        }
    }

    /// Checks that the fields agree. All readers call this before anything is computed from a geometry.
    ///
    /// # Errors
    /// The first rule that the geometry breaks.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_layers),
            ("num_attention_heads", self.num_heads),
            ("num_key_value_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
            ("num_local_experts", self.moe.num_experts),
            ("num_experts_per_tok", self.moe.top_k),
            ("max_position_embeddings", self.max_position_embeddings),
            ("sliding_window", self.sliding_window.unwrap_or(1)),
        ];
        for (field, value) in sizes {
            if value == 0 {
                return Err(ConfigError::Zero { field });
            }
            // A context length may be larger than any matrix side.
            let max = match field {
                "max_position_embeddings" | "sliding_window" => 1 << 30,
                "num_hidden_layers" | "num_local_experts" => 1 << 14,
                _ => MAX_SIZE,
            };
            if value > max {
                return Err(ConfigError::TooLarge { field, value, max });
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(ConfigError::Groups { num_heads: self.num_heads, num_kv_heads: self.num_kv_heads });
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ConfigError::OddHeadDim(self.head_dim));
        }
        if self.moe.top_k > self.moe.num_experts {
            return Err(ConfigError::TopK { top_k: self.moe.top_k, num_experts: self.moe.num_experts });
        }
        if self.family == ModelFamily::Mistral && self.moe.num_experts != 1 {
            return Err(ConfigError::DenseExperts(self.moe.num_experts));
        }
        for (field, value) in [("rope_theta", self.rope_theta), ("rms_norm_eps", self.norm_eps)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(ConfigError::NotPositive { field, value });
            }
        }
        Ok(())
    }

    /// Whether layers have a router. A dense model has one expert and no router.
    #[must_use]
    pub fn has_router(&self) -> bool {
        self.family == ModelFamily::Mixtral
    }

    /// Query heads that share one KV head.
    #[must_use]
    pub fn group_size(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// Number of parameters of the whole model. Embedding and lm_head both count. Saturates instead of overflowing.
    #[must_use]
    pub fn num_parameters(&self) -> u64 {
        let u = |n: usize| n as u128;
        let attention = u(self.hidden_size) * u(self.head_dim) * u(2 * self.num_heads + 2 * self.num_kv_heads);
        let expert = 3 * u(self.hidden_size) * u(self.intermediate_size);
        let router = if self.has_router() { u(self.moe.num_experts) * u(self.hidden_size) } else { 0 };
        let layer = attention + expert * u(self.moe.num_experts) + router + 2 * u(self.hidden_size);
        let all = u(self.num_layers) * layer + 2 * u(self.vocab_size) * u(self.hidden_size) + u(self.hidden_size);
        u64::try_from(all).unwrap_or(u64::MAX)
    }
}

/// One line for people: the sizes that tell one model from another.
impl fmt::Display for ModelConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} layers, hidden {}, {} heads over {} KV heads of {}, {} experts of {} (top {}), vocabulary {}, {}",
            self.num_layers,
            self.hidden_size,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.moe.num_experts,
            self.intermediate_size,
            self.moe.top_k,
            self.vocab_size,
            self.dtype
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_valid_and_have_the_published_sizes() {
        let small = ModelConfig::mixtral_8x7b(DType::Bf16);
        let large = ModelConfig::mixtral_8x22b(DType::Bf16);
        small.validate().unwrap();
        large.validate().unwrap();
        assert_eq!(small.num_parameters(), 46_702_792_704);
        assert_eq!(large.num_parameters(), 140_630_071_296);
    }

    #[test]
    fn impossible_geometries_are_refused() {
        let base = ModelConfig::mixtral_8x7b(DType::F32);
        let refused = |edit: fn(&mut ModelConfig)| {
            let mut config = base.clone();
            edit(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert_eq!(refused(|c| c.hidden_size = 0), "hidden_size is 0; it must be at least 1");
        assert_eq!(
            refused(|c| c.num_kv_heads = 5),
            "num_attention_heads 32 is not a multiple of num_key_value_heads 5"
        );
        assert_eq!(refused(|c| c.head_dim = 63), "head_dim is 63; rotary embedding needs an even number");
        assert_eq!(refused(|c| c.moe.top_k = 9), "num_experts_per_tok 9 is more than num_local_experts 8");
        assert_eq!(refused(|c| c.rope_theta = f64::NAN), "rope_theta is NaN; it must be a finite number above 0");
        assert_eq!(
            refused(|c| c.vocab_size = 1 << 40),
            "vocab_size is 1099511627776; the largest supported value is 1048576"
        );
    }
}
