//! `mixtral build`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use mixtral_engine::Limits;
use mixtral_kernels::Arch;
use mixtral_model::{DType, Mapping, WeightOnly};

use super::beside::{compare, described};
use super::parallel::ParallelArgs;
use super::weight_only::WeightOnlyArgs;
use super::{Usage, numbers, usage};
use crate::say;

const MODEL: &str = "Model and engine";
const LIMITS: &str = "Limits";
const KERNELS: &str = "Kernels";
const SHOW: &str = "The program for people";

/// The flags as they were typed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  mixtral build --checkpoint-dir ./ckpt --output-dir ./engine --max-batch-size 8 --max-seq-len 4096
  mixtral build --checkpoint-dir ./ckpt --output-dir ./engine --arch sm_90a
  mixtral build --model-config mixtral-8x7b --dry-run --explain")]
pub struct BuildArgs {
    /// Checkpoint to build from [default: tllm_checkpoint, unless --model-config is given]
    #[arg(help_heading = MODEL, long)]
    pub checkpoint_dir: Option<PathBuf>,
    /// Build with dummy weights of this geometry: mixtral-8x7b, mixtral-8x22b, or a config.json (ours or Hugging Face's)
    #[arg(help_heading = MODEL, long, value_name = "NAME|PATH")]
    pub model_config: Option<String>,
    /// Build this engine's kernels again, in place: nothing else of it changes, and no checkpoint is needed. --arch and the
    /// plugins are as they were, or as given
    #[arg(help_heading = MODEL, long, value_name = "DIR")]
    pub from_engine: Option<PathBuf>,
    /// Data type of dummy weights [default: the geometry's, f16 for one without]
    #[arg(help_heading = MODEL, long, value_parser = clap::value_parser!(DType))]
    pub dtype: Option<DType>,
    /// Seed of the dummy weights [default: 0]
    #[arg(help_heading = MODEL, long)]
    pub seed: Option<u64>,
    /// Where the engine goes
    #[arg(help_heading = MODEL, long, default_value = "engine_outputs")]
    pub output_dir: PathBuf,
    /// What to build for; auto is cuda if a GPU is visible or --arch is given
    #[arg(help_heading = KERNELS, long, default_value = "auto")]
    pub backend: BackendChoice,
    /// GPU architectures to build for (sm_80, sm_90a, …); no GPU is needed for that
    #[arg(help_heading = KERNELS, long, num_args = 1.., action = clap::ArgAction::Set, value_delimiter = ',',
        value_parser = clap::value_parser!(Arch))]
    pub arch: Vec<Arch>,
    /// Kernels of dense linears: auto, a data type (the model's), disable (portable kernels), or cublaslt (in steps of
    /// more than 256 tokens; the machine that runs the engine needs it, and results depend on what else is in a step)
    /// [default: auto]
    #[arg(help_heading = KERNELS, long)]
    pub gemm_plugin: Option<String>,
    /// Kernels of the experts: auto, a data type (the model's), or disable (portable kernels) [default: auto]
    #[arg(help_heading = KERNELS, long)]
    pub moe_plugin: Option<String>,
    /// Kernels of attention: auto, a data type (the model's), or disable (there is one kind) [default: auto]
    #[arg(help_heading = KERNELS, long)]
    pub gpt_attention_plugin: Option<String>,
    /// Attention of prompts with products in fp8, for a model with an fp8 cache. (Decoding stays as it is) [default: disable]
    #[arg(help_heading = KERNELS, long, value_name = "enable|disable", hide_possible_values = true)]
    pub use_fp8_context_fmha: Option<Switch>,
    /// Ranks and kernels built at a time [default: one rank, and a kernel for each core]
    #[arg(help_heading = MODEL, long, value_parser = numbers::threads)]
    pub workers: Option<usize>,
    /// Sequences in one step
    #[arg(help_heading = LIMITS, long, default_value = "64", value_parser = numbers::sequences)]
    pub max_batch_size: usize,
    /// Tokens in one step
    #[arg(help_heading = LIMITS, long, default_value = "8192", value_parser = numbers::tokens)]
    pub max_num_tokens: usize,
    /// Tokens of a prompt; with those of an output they make --max-seq-len. Either alone leaves 1024 for the other
    #[arg(help_heading = LIMITS, long, value_parser = numbers::tokens)]
    pub max_input_len: Option<usize>,
    /// Tokens of an output, as --max-input-len
    #[arg(help_heading = LIMITS, long, value_parser = numbers::tokens)]
    pub max_output_len: Option<usize>,
    /// Tokens of a sequence, prompt and output [default: the model's, at most 4096]
    #[arg(help_heading = LIMITS, long, alias = "max-decoder-seq-len", value_parser = numbers::tokens)]
    pub max_seq_len: Option<usize>,
    /// Tokens of a KV block (16 to 128)
    #[arg(help_heading = LIMITS, long, alias = "tokens-per-block", default_value = "64", value_parser = block_size)]
    pub block_size: usize,
    /// Make the logits of every prompt token available
    #[arg(help_heading = LIMITS, long, alias = "gather-all-token-logits")]
    pub gather_context_logits: bool,
    /// Say what the engine would hold, and write nothing
    #[arg(help_heading = MODEL, long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub parallel: ParallelArgs,
    #[command(flatten)]
    pub weight_only: WeightOnlyArgs,
    /// Print the program with bytes, FLOPs and predicted time of each operation
    #[arg(help_heading = SHOW, long)]
    pub explain: bool,
    /// Draw the program as a Graphviz file
    #[arg(help_heading = SHOW, long, value_name = "FILE")]
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

/// A flag of the old commands that takes a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    /// On.
    Enable,
    /// Off.
    Disable,
}

/// What to build for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildFor {
    /// The CPU alone.
    Cpu,
    /// These architectures.
    Archs(Vec<Arch>),
    /// The architectures of the visible GPUs. It is an error if there is none.
    Gpus,
    /// The architectures of the visible GPUs, or the CPU alone if there is none.
    Visible,
}

/// The longest sequence, unless a flag asks for longer ones.
const DEFAULT_MAX_SEQ_LEN: usize = 4096;

/// The old commands' default for the one of the two lengths (prompt, output) that was not given.
const DEFAULT_OTHER_LEN: usize = 1024;

/// How long a sequence may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaxSeqLen {
    /// As long as the model was trained for, but at most [`DEFAULT_MAX_SEQ_LEN`].
    Model,
    /// This many tokens.
    Given(usize),
    /// The tokens of the prompt or of the output, if only one of the two was given. The sequence also has room for the
    /// other, as far as the model's positions allow.
    WithRoom(usize),
}

impl MaxSeqLen {
    /// The length in tokens, for a model of `positions` positions.
    pub fn resolve(self, positions: usize) -> usize {
        match self {
            MaxSeqLen::Model => positions.min(DEFAULT_MAX_SEQ_LEN),
            MaxSeqLen::Given(tokens) => tokens,
            MaxSeqLen::WithRoom(one) => one.saturating_add(DEFAULT_OTHER_LEN).min(positions).max(one.saturating_add(1)),
        }
    }
}

/// Where the model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Model {
    /// A checkpoint directory.
    Checkpoint(PathBuf),
    /// Dummy weights of a named or written geometry.
    Dummy(String),
}

/// The validated options.
#[derive(Debug)]
pub struct BuildOptions {
    /// Where the model comes from.
    pub model: Model,
    /// Data type of dummy weights.
    pub dtype: Option<DType>,
    /// Seed of dummy weights.
    pub seed: Option<u64>,
    /// What the weights of a checkpoint of floats, or dummy weights, are rounded to.
    pub weight_only: Option<WeightOnly>,
    /// Mapping of dummy weights.
    pub mapping: Mapping,
    /// The flags that the mapping was made of.
    pub parallel: ParallelArgs,
    /// Where the engine goes.
    pub output_dir: PathBuf,
    /// What to build for.
    pub build_for: BuildFor,
    /// Ranks and kernels built at a time, if the user gave a number.
    pub workers: Option<usize>,
    /// How long a sequence may be.
    pub max_seq_len: MaxSeqLen,
    /// The other limits.
    pub limits: Limits,
    /// Whether context logits are gathered.
    pub gather_context_logits: bool,
    /// Whether attention of prompts is computed in fp8.
    pub fp8_context: bool,
    /// What the engine's config records.
    pub recorded: BTreeMap<String, String>,
    /// Plugin flags that name a data type, to be compared with the model's.
    pub plugins: Vec<(&'static str, DType)>,
    /// Whether to write nothing.
    pub dry_run: bool,
    /// Whether to print the program.
    pub explain: bool,
    /// Where to draw the program.
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

    /// Checks that the flags agree with each other.
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
        let mut plugins = Vec::new();
        let mut recorded = BTreeMap::new();
        for (flag, value) in self.plugins() {
            let value = value.map_or("auto", String::as_str);
            recorded.insert(flag.to_owned(), value.to_owned());
            plugins.extend(check_plugin(flag, value)?.map(|dtype| (flag, dtype)));
        }
        let fp8_context = self.use_fp8_context_fmha == Some(Switch::Enable);
        if fp8_context {
            recorded.insert("use_fp8_context_fmha".to_owned(), "enable".to_owned());
        }
        let max_seq_len = match (self.max_seq_len, self.max_input_len, self.max_output_len) {
            (Some(seq), input, _) if input.is_some_and(|i| i >= seq) => {
                usage!("--max-input-len {} leaves no room for output in --max-seq-len {seq}", input.unwrap_or(0))
            }
            (Some(seq), input, output) => {
                for (flag, value) in [("--max-input-len", input), ("--max-output-len", output)] {
                    if value.is_some() {
                        say::warning(format_args!(
                            "{flag} changes nothing beside --max-seq-len {seq}, which is the limit"
                        ));
                    }
                }
                MaxSeqLen::Given(seq)
            }
            (None, Some(input), Some(output)) => MaxSeqLen::Given(input.saturating_add(output)),
            (None, Some(one), None) | (None, None, Some(one)) => MaxSeqLen::WithRoom(one),
            (None, None, None) => MaxSeqLen::Model,
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
            weight_only: self.weight_only.weight_only(self.weight_only.weight_only_precision)?,
            mapping: self.parallel.mapping()?,
            parallel: self.parallel,
            output_dir: self.output_dir,
            build_for,
            workers: self.workers,
            max_seq_len,
            limits: Limits {
                max_batch_size: self.max_batch_size,
                max_num_tokens: self.max_num_tokens,
                max_seq_len: 0,
                max_num_logits: 1,
                block_size: self.block_size,
            },
            gather_context_logits: self.gather_context_logits,
            fp8_context,
            recorded,
            plugins,
            dry_run: self.dry_run,
            explain: self.explain,
            graph: self.graph,
        })
    }
}

impl BuildOptions {
    /// Compares the flags that describe a model with the checkpoint that is built. Messages call the checkpoint
    /// `place`.
    pub fn beside(&self, mapping: &Mapping, dtype: DType, has_weights: bool, place: &str) -> Result<(), Usage> {
        let parallel = self.parallel.beside(mapping, place)?;
        let dtype = compare(place, "convert the model again", [described("--dtype", self.dtype, "dtype", dtype)])?;
        parallel.into_iter().chain(dtype).for_each(say::warning);
        if self.seed.is_some() && has_weights {
            usage!("--seed is for dummy weights, and the checkpoint has weights; leave it out");
        }
        Ok(())
    }
}

/// Parses a block size: a power of two that attention's kernels take.
fn block_size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(size @ (16 | 32 | 64 | 128)) => Ok(size),
        _ => Err("expected 16, 32, 64 or 128".to_owned()),
    }
}
