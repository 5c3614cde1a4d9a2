//! `mixtral convert`.

use std::path::PathBuf;

use mixtral_convert::Input;
use mixtral_model::{DType, Mapping, ModelConfig, ModelFamily, MoeConfig, MoeNormalization, QuantScheme};

use super::{Usage, at_least_one, dtype_or_auto, usage};

/// Degrees of parallelism, as typed.
#[derive(Clone, Debug, clap::Args)]
pub struct ParallelArgs {
    /// Tensor-parallel ranks
    #[arg(long, default_value = "1", value_parser = at_least_one)]
    pub tp_size: usize,
    /// Pipeline stages
    #[arg(long, default_value = "1", value_parser = at_least_one)]
    pub pp_size: usize,
    /// How experts are spread over the tensor-parallel ranks: 1 whole experts, 2 slices of each (0 only without ranks)
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=2))]
    pub moe_tp_mode: u8,
    /// Ranks that share each expert (with --moe-ep-size, instead of --moe-tp-mode)
    #[arg(long, allow_negative_numbers = true)]
    pub moe_tp_size: Option<i64>,
    /// Ranks that whole experts are dealt over
    #[arg(long, allow_negative_numbers = true)]
    pub moe_ep_size: Option<i64>,
}

/// As typed.
#[derive(Debug, clap::Args)]
pub struct ConvertArgs {
    /// Hugging Face model (or Mistral's own files); without it only config.json is written, from the geometry flags
    #[arg(long)]
    pub model_dir: Option<PathBuf>,
    /// Where the checkpoint goes
    #[arg(long, default_value = "tllm_checkpoint")]
    pub output_dir: PathBuf,
    /// Data type of the weights: auto (the model's), f16, bf16, f32
    #[arg(long, default_value = "f16")]
    pub dtype: String,
    #[command(flatten)]
    pub parallel: ParallelArgs,
    /// Scaling of expert weights: 0 softmax over all experts, 1 softmax over the chosen ones
    #[arg(long, alias = "moe-renorm-mode", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1))]
    pub moe_normalization_mode: u32,
    /// Shard the token embedding over tensor-parallel ranks
    #[arg(long)]
    pub use_parallel_embedding: bool,
    /// What it is sharded along: 0 vocabulary, 1 hidden size
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=1))]
    pub embedding_sharding_dim: u8,
    /// Write config.json only
    #[arg(long)]
    pub save_config_only: bool,
    /// Threads
    #[arg(long, value_parser = at_least_one)]
    pub workers: Option<usize>,
    /// Print the plan (tensors, bytes a rank, peak memory, disk) and write nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub quant: QuantArgs,
    #[command(flatten)]
    pub geometry: GeometryArgs,
}

/// Quantization, as typed; this version takes only the values that leave the weights as they are.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Quantization")]
pub struct QuantArgs {
    /// Quantize the weights only
    #[arg(long)]
    pub use_weight_only: bool,
    /// Precision of quantized weights: int8 or int4
    #[arg(long)]
    pub weight_only_precision: Option<String>,
    /// Weights that share a scale
    #[arg(long)]
    pub group_size: Option<usize>,
    /// Format: fp8, int8_wo, int4_wo or full_prec
    #[arg(long, default_value = "full_prec")]
    pub qformat: String,
    /// Data type of the KV cache: auto, fp8 or int8
    #[arg(long, default_value = "auto")]
    pub kv_cache_dtype: String,
    /// Texts to calibrate with
    #[arg(long)]
    pub calib_size: Option<usize>,
    /// File to calibrate with
    #[arg(long)]
    pub calib_data: Option<PathBuf>,
}

/// Geometry of a checkpoint without a model, as typed. The defaults are the old command's.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Geometry (without --model-dir)")]
pub struct GeometryArgs {
    /// Entries of the vocabulary
    #[arg(long, default_value_t = 32_000)]
    pub vocab_size: usize,
    /// Longest sequence
    #[arg(long, default_value_t = 2048)]
    pub n_positions: usize,
    /// Layers
    #[arg(long, default_value_t = 32)]
    pub n_layer: usize,
    /// Query heads
    #[arg(long, default_value_t = 32)]
    pub n_head: usize,
    /// KV heads [default: as many as query heads]
    #[arg(long)]
    pub n_kv_head: Option<usize>,
    /// Elements of a head [default: hidden size / query heads]
    #[arg(long)]
    pub head_size: Option<usize>,
    /// Hidden size
    #[arg(long, default_value_t = 4096)]
    pub n_embd: usize,
    /// Width of a feed-forward
    #[arg(long, default_value_t = 11_008)]
    pub inter_size: usize,
    /// Epsilon of RMSNorm
    #[arg(long, default_value_t = 1e-6)]
    pub rms_norm_eps: f64,
    /// Activation
    #[arg(long, default_value = "silu")]
    pub hidden_act: String,
    /// Base of the rotary frequencies
    #[arg(long, default_value_t = 10_000.0)]
    pub rotary_base: f64,
    /// Experts; 0 is a dense model
    #[arg(long, default_value_t = 0)]
    pub moe_num_experts: usize,
    /// Experts a token [default: 1 if there are experts]
    #[arg(long, default_value_t = 0)]
    pub moe_top_k: usize,
}

/// Validated.
#[derive(Debug)]
pub struct ConvertOptions {
    /// What to convert, and how.
    pub convert: mixtral_convert::ConvertOptions,
    /// Whether to print the plan only.
    pub dry_run: bool,
}

/// The mapping that the flags describe.
pub fn mapping(args: &ParallelArgs) -> Result<Mapping, Usage> {
    let (tp_size, pp_size) = (args.tp_size, args.pp_size);
    // TensorRT-LLM 0.11 writes −1 for "not given".
    let given = |flag: &str, size: Option<i64>| match size {
        None | Some(-1) => Ok(None),
        Some(n) => match usize::try_from(n) {
            Ok(n) if n > 0 => Ok(Some(n)),
            _ => usage!("--{flag} is {n}; expected at least 1"),
        },
    };
    let (moe_tp, moe_ep) = (given("moe-tp-size", args.moe_tp_size)?, given("moe-ep-size", args.moe_ep_size)?);
    let (moe_tp_size, moe_ep_size) = match (moe_tp, moe_ep) {
        (None, None) => match args.moe_tp_mode {
            0 if tp_size > 1 => usage!(
                "--moe-tp-mode 0 (none) needs --tp-size 1, which is {tp_size}; use 1 (whole experts) or 2 (slices)"
            ),
            1 => (1, tp_size),
            _ => (tp_size, 1),
        },
        (Some(moe_tp), None) if tp_size.is_multiple_of(moe_tp) => (moe_tp, tp_size / moe_tp),
        (None, Some(moe_ep)) if tp_size.is_multiple_of(moe_ep) => (tp_size / moe_ep, moe_ep),
        (Some(moe_tp), None) => usage!("--moe-tp-size {moe_tp} does not divide --tp-size {tp_size}"),
        (None, Some(moe_ep)) => usage!("--moe-ep-size {moe_ep} does not divide --tp-size {tp_size}"),
        (Some(moe_tp), Some(moe_ep)) if moe_tp.checked_mul(moe_ep) == Some(tp_size) => (moe_tp, moe_ep),
        (Some(moe_tp), Some(moe_ep)) => {
            usage!("--moe-tp-size {moe_tp} × --moe-ep-size {moe_ep} must be --tp-size, which is {tp_size}")
        }
    };
    Ok(Mapping { tp_size, pp_size, moe_tp_size, moe_ep_size })
}

impl ConvertArgs {
    /// Checks the flags against each other.
    pub fn validate(self) -> Result<ConvertOptions, Usage> {
        self.quant.refuse()?;
        let dtype = dtype_or_auto(&self.dtype).or_else(|e| usage!("--dtype: {e}"))?;
        let mapping = mapping(&self.parallel)?;
        let Some(normalization) = MoeNormalization::from_mode(self.moe_normalization_mode) else {
            usage!("--moe-normalization-mode is {}; expected 0 or 1", self.moe_normalization_mode)
        };
        let input = match self.model_dir {
            Some(dir) => Input::Directory(dir),
            None => Input::Geometry(self.geometry.model(dtype.unwrap_or(DType::F16), normalization)?),
        };
        let mut convert = mixtral_convert::ConvertOptions::new(input, self.output_dir);
        convert.dtype = dtype;
        convert.mapping = mapping;
        convert.normalization = normalization;
        convert.use_parallel_embedding = self.use_parallel_embedding;
        convert.embedding_sharding_dim = usize::from(self.embedding_sharding_dim);
        convert.save_config_only = self.save_config_only;
        if let Some(workers) = self.workers {
            convert.workers = workers;
        }
        Ok(ConvertOptions { convert, dry_run: self.dry_run })
    }
}

impl QuantArgs {
    fn refuse(&self) -> Result<(), Usage> {
        let wanted = if self.use_weight_only {
            Some("--use-weight-only".to_owned())
        } else if self.qformat != "full_prec" {
            Some(format!("--qformat {}", self.qformat))
        } else if self.kv_cache_dtype != "auto" {
            Some(format!("--kv-cache-dtype {}", self.kv_cache_dtype))
        } else {
            None
        };
        if let Some(flag) = wanted {
            usage!("{flag}: this version converts float weights only (f16, bf16, f32); leave the flag out");
        }
        Ok(())
    }
}

impl GeometryArgs {
    fn model(&self, dtype: DType, normalization: MoeNormalization) -> Result<ModelConfig, Usage> {
        if !matches!(self.hidden_act.as_str(), "silu" | "swiglu") {
            usage!("--hidden-act is `{}`; expected silu", self.hidden_act);
        }
        let moe = self.moe_num_experts > 0;
        Ok(ModelConfig {
            family: if moe { ModelFamily::Mixtral } else { ModelFamily::Mistral },
            dtype,
            vocab_size: self.vocab_size,
            hidden_size: self.n_embd,
            intermediate_size: self.inter_size,
            num_layers: self.n_layer,
            num_heads: self.n_head,
            num_kv_heads: self.n_kv_head.unwrap_or(self.n_head),
            head_dim: self.head_size.unwrap_or(self.n_embd / self.n_head.max(1)),
            moe: MoeConfig { num_experts: self.moe_num_experts.max(1), top_k: self.moe_top_k.max(1), normalization },
            max_position_embeddings: self.n_positions,
            rope_theta: self.rotary_base,
            norm_eps: self.rms_norm_eps,
            sliding_window: None,
            quant: QuantScheme::None,
        })
    }
}
