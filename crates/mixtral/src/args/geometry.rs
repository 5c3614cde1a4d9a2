//! The geometry of a checkpoint without a model.

use mixtral_model::{DType, Formats, ModelConfig, ModelFamily, MoeConfig, MoeNormalization};

use super::beside::{compare, described};
use super::{Usage, usage};

/// The flags as they were typed. The defaults are the old command's.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Geometry (without --model-dir)")]
pub struct GeometryArgs {
    /// Entries of the vocabulary [default: 32000]
    #[arg(long)]
    pub vocab_size: Option<usize>,
    /// Longest sequence [default: 2048]
    #[arg(long)]
    pub n_positions: Option<usize>,
    /// Layers [default: 32]
    #[arg(long)]
    pub n_layer: Option<usize>,
    /// Query heads [default: 32]
    #[arg(long)]
    pub n_head: Option<usize>,
    /// KV heads [default: as many as query heads]
    #[arg(long)]
    pub n_kv_head: Option<usize>,
    /// Elements of a head [default: hidden size / query heads]
    #[arg(long)]
    pub head_size: Option<usize>,
    /// Hidden size [default: 4096]
    #[arg(long)]
    pub n_embd: Option<usize>,
    /// Width of a feed-forward [default: 11008]
    #[arg(long)]
    pub inter_size: Option<usize>,
    /// Epsilon of RMSNorm [default: 1e-6]
    #[arg(long)]
    pub rms_norm_eps: Option<f64>,
    /// Activation [default: silu]
    #[arg(long)]
    pub hidden_act: Option<String>,
    /// Base of the rotary frequencies [default: 10000]
    #[arg(long)]
    pub rotary_base: Option<f64>,
    /// Experts; 0 is a dense model [default: 0]
    #[arg(long)]
    pub moe_num_experts: Option<usize>,
    /// Experts a token [default: 1 if there are experts]
    #[arg(long)]
    pub moe_top_k: Option<usize>,
}

impl GeometryArgs {
    /// The model that the flags describe.
    pub fn model(&self, dtype: DType, normalization: MoeNormalization) -> Result<ModelConfig, Usage> {
        if let Some(other) = self.hidden_act.as_deref().filter(|act| !is_silu(act)) {
            usage!("--hidden-act is `{other}`; expected silu");
        }
        let num_experts = self.moe_num_experts.unwrap_or(0);
        let (num_heads, hidden_size) = (self.n_head.unwrap_or(32), self.n_embd.unwrap_or(4096));
        Ok(ModelConfig {
            family: if num_experts > 0 { ModelFamily::Mixtral } else { ModelFamily::Mistral },
            dtype,
            vocab_size: self.vocab_size.unwrap_or(32_000),
            hidden_size,
            intermediate_size: self.inter_size.unwrap_or(11_008),
            num_layers: self.n_layer.unwrap_or(32),
            num_heads,
            num_kv_heads: self.n_kv_head.unwrap_or(num_heads),
            head_dim: self.head_size.unwrap_or(hidden_size / num_heads.max(1)),
            moe: MoeConfig {
                num_experts: num_experts.max(1),
                top_k: self.moe_top_k.unwrap_or(0).max(1),
                normalization,
            },
            max_position_embeddings: self.n_positions.unwrap_or(2048),
            rope_theta: self.rotary_base.unwrap_or(10_000.0),
            norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            sliding_window: None,
            formats: Formats::default(),
            cache: mixtral_model::CacheFormat::Plain,
            key_directions: false,
        })
    }

    /// Whether any flag was given.
    pub fn is_given(&self) -> bool {
        let sizes = [
            self.vocab_size,
            self.n_positions,
            self.n_layer,
            self.n_head,
            self.n_kv_head,
            self.head_size,
            self.n_embd,
            self.inter_size,
            self.moe_num_experts,
            self.moe_top_k,
        ];
        sizes.iter().any(Option::is_some)
            || self.rms_norm_eps.is_some()
            || self.rotary_base.is_some()
            || self.hidden_act.is_some()
    }

    /// Compares the flags that were given with a directory's model. Messages call the directory `place`.
    pub fn beside(&self, model: &ModelConfig, place: &str) -> Result<Option<String>, Usage> {
        let is_mixtral = model.family == ModelFamily::Mixtral;
        let experts = |n: usize| if is_mixtral { n } else { 0 };
        let act = self.hidden_act.as_ref().map(|act| if is_silu(act) { "silu" } else { act });
        compare(
            place,
            "change it there",
            [
                described("--vocab-size", self.vocab_size, "vocab_size", model.vocab_size),
                described("--n-positions", self.n_positions, "max_position_embeddings", model.max_position_embeddings),
                described("--n-layer", self.n_layer, "num_hidden_layers", model.num_layers),
                described("--n-head", self.n_head, "num_attention_heads", model.num_heads),
                described("--n-kv-head", self.n_kv_head, "num_key_value_heads", model.num_kv_heads),
                described("--head-size", self.head_size, "head_dim", model.head_dim),
                described("--n-embd", self.n_embd, "hidden_size", model.hidden_size),
                described("--inter-size", self.inter_size, "intermediate_size", model.intermediate_size),
                described("--rms-norm-eps", self.rms_norm_eps, "rms_norm_eps", model.norm_eps),
                described("--hidden-act", act, "hidden_act", "silu"),
                described("--rotary-base", self.rotary_base, "rope_theta", model.rope_theta),
                described(
                    "--moe-num-experts",
                    self.moe_num_experts,
                    "num_local_experts",
                    experts(model.moe.num_experts),
                ),
                described("--moe-top-k", self.moe_top_k, "num_experts_per_tok", experts(model.moe.top_k)),
            ],
        )
    }
}

/// Both words name the same computation: `silu` the gate's activation, `swiglu` the whole gated feed-forward.
fn is_silu(act: &str) -> bool {
    matches!(act, "silu" | "swiglu")
}
