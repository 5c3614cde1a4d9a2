//! `mixtral convert`.

use std::path::PathBuf;

use mixtral_convert::Input;
use mixtral_model::{DType, MoeNormalization};

use super::geometry::GeometryArgs;
use super::parallel::ParallelArgs;
use super::{Usage, dtype_or_auto, numbers, usage};
use crate::say;

const OUTPUT: &str = "Model and checkpoint";
const PARALLELISM: &str = "Parallelism";

/// The flags as they were typed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  mixtral convert --model-dir ./Mixtral-8x7B-v0.1 --output-dir ./ckpt --dtype bf16
  mixtral convert --model-dir ./Mixtral-8x7B-v0.1 --output-dir ./ckpt --tp-size 2 --moe-tp-mode 1 --dry-run")]
pub struct ConvertArgs {
    /// Hugging Face model (or Mistral's own files); without it only config.json is written, from the geometry flags
    #[arg(help_heading = OUTPUT, long)]
    pub model_dir: Option<PathBuf>,
    /// Where the checkpoint goes
    #[arg(help_heading = OUTPUT, long, default_value = "tllm_checkpoint")]
    pub output_dir: PathBuf,
    /// Data type of the weights: auto (the model's), f16, bf16, f32
    #[arg(help_heading = OUTPUT, long, default_value = "f16")]
    pub dtype: String,
    #[command(flatten)]
    pub parallel: ParallelArgs,
    /// Scaling of expert weights: 0 softmax over all experts, 1 softmax over the chosen ones
    #[arg(help_heading = OUTPUT, long, alias = "moe-renorm-mode", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1))]
    pub moe_normalization_mode: u32,
    /// Shard the token embedding over tensor-parallel ranks
    #[arg(help_heading = PARALLELISM, long)]
    pub use_parallel_embedding: bool,
    /// What it is sharded along: 0 vocabulary, 1 hidden size [default: 0]
    #[arg(help_heading = PARALLELISM, long, value_parser = clap::value_parser!(u8).range(0..=1))]
    pub embedding_sharding_dim: Option<u8>,
    /// Write config.json only
    #[arg(help_heading = OUTPUT, long)]
    pub save_config_only: bool,
    /// Threads [default: all cores]
    #[arg(help_heading = OUTPUT, long, value_parser = numbers::threads)]
    pub workers: Option<usize>,
    /// Print the plan (tensors, bytes a rank, peak memory, disk) and write nothing
    #[arg(help_heading = OUTPUT, long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub geometry: GeometryArgs,
}

/// The validated options.
#[derive(Debug)]
pub struct ConvertOptions {
    /// What to convert, and how.
    pub convert: mixtral_convert::ConvertOptions,
    /// Whether to print the plan only.
    pub dry_run: bool,
    /// The geometry flags, to be compared with the model's.
    pub geometry: GeometryArgs,
}

impl ConvertArgs {
    /// Checks that the flags agree with each other.
    pub fn validate(self) -> Result<ConvertOptions, Usage> {
        let dtype = dtype_or_auto(&self.dtype).or_else(|e| usage!("--dtype: {e}"))?;
        let mapping = self.parallel.mapping()?;
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
        if self.embedding_sharding_dim.is_some() && !self.use_parallel_embedding {
            say::warning("--embedding-sharding-dim changes nothing without --use-parallel-embedding");
        }
        convert.embedding_sharding_dim = usize::from(self.embedding_sharding_dim.unwrap_or(0));
        convert.save_config_only = self.save_config_only;
        if let Some(workers) = self.workers {
            convert.workers = workers;
        }
        Ok(ConvertOptions { convert, dry_run: self.dry_run, geometry: self.geometry })
    }
}
