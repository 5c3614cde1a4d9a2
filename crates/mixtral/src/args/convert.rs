//! `mixtral convert`.

use std::path::PathBuf;

use mixtral_calibrate::CalibrateOptions;
use mixtral_convert::Input;
use mixtral_model::{CacheFormat, DType, MoeNormalization, Precision};

use super::build::BackendChoice;
use super::calibration::{Calibration, CalibrationArgs};
use super::geometry::GeometryArgs;
use super::numbers::positive;
use super::parallel::ParallelArgs;
use super::weight_only::WeightOnlyArgs;
use super::{Usage, dtype_or_auto, numbers, usage};
use crate::say;

const OUTPUT: &str = "Model and checkpoint";
const PARALLELISM: &str = "Parallelism";
const QUANTIZATION: &str = "Quantization";

/// The flags as they were typed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  mixtral convert --model-dir ./Mixtral-8x7B-v0.1 --output-dir ./ckpt --dtype bf16
  mixtral convert --model-dir ./Mixtral-8x7B-v0.1 --output-dir ./ckpt --use-weight-only --weight-only-precision int4
  mixtral convert --model-dir ./Mixtral-8x7B-v0.1 --output-dir ./ckpt --qformat int4_wo --calib-data ./text.txt
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
    /// Print what was written and what quantizing lost as JSON
    #[arg(help_heading = OUTPUT, long)]
    pub json: bool,
    /// Quantize the matrices: to --weight-only-precision, int8 if it is not given
    #[arg(help_heading = QUANTIZATION, long)]
    pub use_weight_only: bool,
    /// The same by the old quantize.py's words: full_prec, int8_wo, int4_wo, fp8 (weights and activations; calibrated), or fp8_pc_pt (a
    /// scale for each row and each token)
    #[arg(help_heading = QUANTIZATION, long, value_name = "FORMAT", value_parser = qformat)]
    pub qformat: Option<Precision>,
    /// The same as --qformat fp8_pc_pt
    #[arg(help_heading = QUANTIZATION, long)]
    pub use_fp8_rowwise: bool,
    /// Keys and values in the cache: float (the model's type), fp8 (calibrated), or auto (fp8 if the model has scales
    /// for it) [default: auto]
    #[arg(help_heading = QUANTIZATION, long, value_name = "auto|fp8|float", value_parser = cache_format)]
    pub kv_cache_dtype: Option<Cache>,
    /// The scale of keys and values in an fp8 cache, in place of calibrated ones (1 is usual)
    #[arg(help_heading = QUANTIZATION, long, value_parser = positive)]
    pub kv_scale: Option<f32>,
    #[command(flatten)]
    pub weight_only: WeightOnlyArgs,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    #[command(flatten)]
    pub geometry: GeometryArgs,
}

/// `--qformat`.
fn qformat(text: &str) -> Result<Precision, String> {
    match text {
        "full_prec" => Ok(Precision::Float),
        "int8_wo" => Ok(Precision::Int8),
        "int4_wo" => Ok(Precision::Int4),
        "fp8" => Ok(Precision::Fp8),
        "fp8_pc_pt" => Ok(Precision::Fp8Rows),
        "int4_awq" => Err(format!("{text} is not made here; use int4_wo with --calib-data, which calibrates too")),
        "int8_sq" | "w4a8_awq" | "nvfp4" => {
            Err(format!("this version does not have {text}; use fp8, int4_wo, int8_wo or full_prec"))
        }
        _ => Err("expected fp8, fp8_pc_pt, int8_wo, int4_wo or full_prec".to_owned()),
    }
}

/// `--kv-cache-dtype`: a format, or the one that the model's scales ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cache(Option<CacheFormat>);

fn cache_format(text: &str) -> Result<Cache, String> {
    match text {
        "auto" => Ok(Cache(None)),
        "float" => Ok(Cache(Some(CacheFormat::Plain))),
        "fp8" => Ok(Cache(Some(CacheFormat::Fp8))),
        "int8" => Err("this version has no int8 cache; use fp8, which is as small, or auto".to_owned()),
        _ => Err("expected auto, fp8 or float".to_owned()),
    }
}

/// The validated options.
#[derive(Debug)]
pub struct ConvertOptions {
    /// What to convert, and how.
    pub convert: mixtral_convert::ConvertOptions,
    /// How to calibrate the model first, if it is to be.
    pub calibrate: Option<CalibrateOptions>,
    /// Where it is calibrated.
    pub backend: BackendChoice,
    /// Whether to print the plan only.
    pub dry_run: bool,
    /// Whether to print the report as JSON.
    pub json: bool,
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
        let named = self.weight_only.weight_only_precision;
        let by_flag = self.use_weight_only.then(|| named.unwrap_or(Precision::Int8));
        let by_rows = self.use_fp8_rowwise.then_some(Precision::Fp8Rows);
        let mut asked = [by_flag, self.qformat, by_rows].into_iter().flatten();
        let precision = asked.next();
        if asked.any(|other| Some(other) != precision) {
            usage!(
                "--use-weight-only, --qformat and --use-fp8-rowwise ask for different formats; leave out all but one"
            )
        }
        let precision = precision.filter(|&precision| precision != Precision::Float);
        if named.is_some() && precision.is_none() {
            say::warning("--weight-only-precision changes nothing without --use-weight-only");
        }
        let input = match self.model_dir {
            Some(dir) => Input::Directory(dir),
            None => Input::Geometry(self.geometry.model(dtype.unwrap_or(DType::F16), normalization)?),
        };
        let mut convert = mixtral_convert::ConvertOptions::new(input, self.output_dir);
        convert.dtype = dtype;
        convert.weight_only = self.weight_only.weight_only(precision)?;
        convert.cache = self.kv_cache_dtype.and_then(|Cache(format)| format);
        convert.kv_scale = self.kv_scale;
        let has_small_cache = convert.cache == Some(CacheFormat::Fp8);
        if self.kv_scale.is_some() && convert.cache == Some(CacheFormat::Plain) {
            say::warning("--kv-scale changes nothing, because the cache is not fp8");
        }
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
        let has =
            |precision| convert.weight_only.is_some_and(|to| [to.attention, to.feed_forward].contains(&precision));
        let calibration = if has(Precision::Fp8) || has_small_cache && self.kv_scale.is_none() {
            Calibration::Needed { integers: has(Precision::Int4) }
        } else if has(Precision::Int4) {
            Calibration::OfUse
        } else {
            Calibration::OfNoUse
        };
        let backend = self.calibration.backend.unwrap_or(BackendChoice::Auto);
        let calibrate = self.calibration.options(calibration);
        Ok(ConvertOptions {
            convert,
            calibrate,
            backend,
            dry_run: self.dry_run,
            json: self.json,
            geometry: self.geometry,
        })
    }
}
