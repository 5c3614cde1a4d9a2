//! `mixtral build`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use mixtral_engine::Limits;
use mixtral_kernels::Arch;
use mixtral_model::{DType, Mapping};

use super::{Usage, at_least_one, usage};
use crate::args::convert::{ParallelArgs, mapping};

/// As typed.
#[derive(Debug, clap::Args)]
#[command(next_line_help = false)]
pub struct BuildArgs {
    /// Checkpoint to build from [default: tllm_checkpoint, unless --model-config is given]
    #[arg(long)]
    pub checkpoint_dir: Option<PathBuf>,
    /// Build with dummy weights of this geometry: mixtral-8x7b, mixtral-8x22b, or a config.json (ours or Hugging Face's)
    #[arg(long, value_name = "NAME|PATH")]
    pub model_config: Option<String>,
    /// Build this engine's kernels again, in place: nothing else of it changes, and no checkpoint is needed. --arch and the
    /// plugins are as they were, or as given
    #[arg(long, value_name = "DIR")]
    pub from_engine: Option<PathBuf>,
    /// Data type of a geometry without one
    #[arg(long, default_value = "f16", value_parser = clap::value_parser!(DType))]
    pub dtype: DType,
    /// Seed of the dummy weights
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub parallel: ParallelArgs,
    /// Where the engine goes
    #[arg(long, default_value = "engine_outputs")]
    pub output_dir: PathBuf,
    /// What to build for; auto is cuda if a GPU is visible or --arch is given
    #[arg(long, default_value = "auto")]
    pub backend: BackendChoice,
    /// GPU architectures to build for (sm_80, sm_90a, …); no GPU is needed for that
    #[arg(long, num_args = 1.., value_delimiter = ',', value_parser = clap::value_parser!(Arch))]
    pub arch: Vec<Arch>,
    /// Kernels of dense linears: auto, a data type (the model's), disable (portable kernels), or cublaslt (in steps of more
    /// than 256 tokens; the machine that runs the engine needs it, and results depend on what else is in a step) [default: auto]
    #[arg(long)]
    pub gemm_plugin: Option<String>,
    /// Kernels of the experts: auto, a data type (the model's), or disable (portable kernels) [default: auto]
    #[arg(long)]
    pub moe_plugin: Option<String>,
    /// Kernels of attention: auto, a data type (the model's), or disable (there is one kind) [default: auto]
    #[arg(long)]
    pub gpt_attention_plugin: Option<String>,
    /// Attention of prompts in fp8 (needs fp8 weights)
    #[arg(long, default_value = "disable")]
    pub use_fp8_context_fmha: String,
    /// Ranks and kernels built at a time [default: one rank, and a kernel for each core]
    #[arg(long, value_parser = at_least_one)]
    pub workers: Option<usize>,
    /// Sequences in one step
    #[arg(long, default_value = "64", value_parser = at_least_one)]
    pub max_batch_size: usize,
    /// Tokens in one step
    #[arg(long, default_value = "8192", value_parser = at_least_one)]
    pub max_num_tokens: usize,
    /// Tokens of a prompt; with --max-output-len sets --max-seq-len
    #[arg(long, value_parser = at_least_one)]
    pub max_input_len: Option<usize>,
    /// Tokens of an output; with --max-input-len sets --max-seq-len
    #[arg(long, value_parser = at_least_one)]
    pub max_output_len: Option<usize>,
    /// Tokens of a sequence, prompt and output [default: the model's, at most 4096]
    #[arg(long, value_parser = at_least_one)]
    pub max_seq_len: Option<usize>,
    /// Hypotheses of beam search
    #[arg(long, default_value = "1", value_parser = at_least_one)]
    pub max_beam_width: usize,
    /// Tokens of a KV block (16 to 128)
    #[arg(long, alias = "tokens-per-block", default_value = "64", value_parser = at_least_one)]
    pub block_size: usize,
    /// Make the logits of every prompt token available
    #[arg(long, alias = "gather-all-token-logits")]
    pub gather_context_logits: bool,
    /// The logits of generated tokens are always available
    #[arg(long, hide = true)]
    pub gather_generation_logits: bool,
    /// Measure kernel candidates on this GPU
    #[arg(long)]
    pub tune: bool,
    /// Print the program with bytes, FLOPs and predicted time of each operation
    #[arg(long)]
    pub explain: bool,
    /// Draw the program as a Graphviz file
    #[arg(long, value_name = "FILE")]
    pub graph: Option<PathBuf>,
}

/// `--backend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BackendChoice {
    /// The GPU if there is one.
    Auto,
    /// The CPU.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
}

/// What to build for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildFor {
    /// The CPU alone.
    Cpu,
    /// These architectures.
    Archs(Vec<Arch>),
    /// Those of the visible GPUs, of which there has to be one.
    Gpus,
    /// Those of the visible GPUs, or the CPU alone if there is none.
    Visible,
}

/// Where the model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Model {
    /// A checkpoint directory.
    Checkpoint(PathBuf),
    /// Dummy weights of a named or written geometry.
    Dummy(String),
}

/// Validated.
#[derive(Debug)]
pub struct BuildOptions {
    /// Where the model comes from.
    pub model: Model,
    /// Data type of a geometry without one.
    pub dtype: DType,
    /// Seed of dummy weights.
    pub seed: u64,
    /// Mapping of dummy weights.
    pub mapping: Mapping,
    /// Where the engine goes.
    pub output_dir: PathBuf,
    /// What to build for.
    pub build_for: BuildFor,
    /// Ranks and kernels built at a time, if that was asked for.
    pub workers: Option<usize>,
    /// The limits; `max_seq_len` 0 stands for the model's.
    pub limits: Limits,
    /// Whether context logits are gathered.
    pub gather_context_logits: bool,
    /// What the engine's config records.
    pub recorded: BTreeMap<String, String>,
    /// Plugin flags that name a data type, to be compared with the model's.
    pub plugins: Vec<(&'static str, DType)>,
    /// Whether to print the program.
    pub explain: bool,
    /// Where to draw it.
    pub graph: Option<PathBuf>,
}

/// The data type that a plugin flag names, if it names one.
pub fn check_plugin(flag: &str, value: &str) -> Result<Option<DType>, Usage> {
    match value.parse::<DType>() {
        Ok(dtype) => Ok(Some(dtype)),
        Err(_) if matches!(value, "auto" | "disable") => Ok(None),
        Err(_) if flag == "gemm_plugin" && value == "cublaslt" => Ok(None),
        Err(_) => {
            let library = if flag == "gemm_plugin" { ", cublaslt" } else { "" };
            let flag = flag.replace('_', "-");
            usage!("--{flag} is `{value}`; expected auto, f16, bf16, f32{library} or disable")
        }
    }
}

impl BuildArgs {
    /// The plugin flags, by the names that an engine records them under.
    pub fn plugins(&self) -> [(&'static str, Option<&String>); 3] {
        [
            ("gemm_plugin", self.gemm_plugin.as_ref()),
            ("moe_plugin", self.moe_plugin.as_ref()),
            ("gpt_attention_plugin", self.gpt_attention_plugin.as_ref()),
        ]
    }

    /// Checks the flags against each other.
    pub fn validate(self) -> Result<BuildOptions, Usage> {
        let build_for = match self.backend {
            BackendChoice::Cpu if !self.arch.is_empty() => {
                usage!("--backend cpu builds no kernels, and --arch asks for some; leave one of them out")
            }
            BackendChoice::Cpu => BuildFor::Cpu,
            _ if !self.arch.is_empty() => BuildFor::Archs(self.arch.clone()),
            BackendChoice::Cuda => BuildFor::Gpus,
            BackendChoice::Auto => BuildFor::Visible,
        };
        if self.tune {
            usage!("--tune (measuring kernel candidates on this GPU) is not supported by this version; leave it out");
        }
        if self.max_beam_width > 1 {
            usage!(
                "--max-beam-width {}: beam search is not supported by this version; leave it at 1",
                self.max_beam_width
            );
        }
        if !matches!(self.use_fp8_context_fmha.as_str(), "enable" | "disable") {
            usage!("--use-fp8-context-fmha is `{}`; expected enable or disable", self.use_fp8_context_fmha);
        }
        if self.use_fp8_context_fmha == "enable" {
            usage!("--use-fp8-context-fmha enable needs fp8 weights, which this version does not have");
        }
        if !(16..=128).contains(&self.block_size) || !self.block_size.is_power_of_two() {
            usage!("--block-size is {}; expected 16, 32, 64 or 128", self.block_size);
        }
        let mut plugins = Vec::new();
        let mut recorded = BTreeMap::new();
        for (flag, value) in self.plugins() {
            let value = value.map_or("auto", String::as_str);
            recorded.insert(flag.to_owned(), value.to_owned());
            plugins.extend(check_plugin(flag, value)?.map(|dtype| (flag, dtype)));
        }
        let lengths = match (self.max_seq_len, self.max_input_len, self.max_output_len) {
            (Some(seq), input, _) if input.is_some_and(|i| i >= seq) => {
                usage!("--max-input-len {} leaves no room for output in --max-seq-len {seq}", input.unwrap_or(0))
            }
            (Some(seq), ..) => seq,
            (None, Some(input), Some(output)) => input.saturating_add(output),
            (None, ..) => 0,
        };
        for (name, value) in [("max_input_len", self.max_input_len), ("max_output_len", self.max_output_len)] {
            if let Some(value) = value {
                recorded.insert(name.to_owned(), value.to_string());
            }
        }
        let model = match (self.checkpoint_dir, self.model_config) {
            (Some(dir), None) => Model::Checkpoint(dir),
            (None, Some(name)) => Model::Dummy(name),
            (None, None) => Model::Checkpoint("tllm_checkpoint".into()),
            (Some(_), Some(_)) => usage!("--checkpoint-dir and --model-config exclude each other: name one"),
        };
        Ok(BuildOptions {
            model,
            dtype: self.dtype,
            seed: self.seed,
            mapping: mapping(&self.parallel)?,
            output_dir: self.output_dir,
            build_for,
            workers: self.workers,
            limits: Limits {
                max_batch_size: self.max_batch_size,
                max_num_tokens: self.max_num_tokens,
                max_seq_len: lengths,
                max_num_logits: 1,
                block_size: self.block_size,
            },
            gather_context_logits: self.gather_context_logits,
            recorded,
            plugins,
            explain: self.explain,
            graph: self.graph,
        })
    }
}
