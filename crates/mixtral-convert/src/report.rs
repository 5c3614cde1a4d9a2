//! What a conversion will do (for `--dry-run`), and what it did.

use std::fmt;
use std::path::PathBuf;

use mixtral_model::{DType, Mapping, ModelConfig, WeightFormat};
use serde::Serialize;

use crate::execute::Losses;
use crate::quantize::Loss;

/// What a conversion will do.
#[derive(Clone, Debug, Serialize)]
pub struct ConvertPlan {
    /// The model directory; `None` for a geometry without weights.
    pub model_dir: Option<PathBuf>,
    /// How its weights are laid out and quantized.
    pub layout: Option<String>,
    /// Type of its weights.
    pub source_dtype: Option<DType>,
    /// Bytes of its weights.
    pub source_bytes: u64,
    /// The directory that will be written.
    pub output_dir: PathBuf,
    /// The model, in the type that it will be written in.
    pub model: ModelConfig,
    /// How it will be cut.
    pub mapping: Mapping,
    /// What each rank will hold; empty if only the config will be written.
    pub ranks: Vec<RankPlan>,
    /// Tokenizer files that will be copied along.
    pub tokenizer_files: Vec<String>,
    /// What a user should know about them.
    pub warnings: Vec<String>,
    /// Bytes that will be written.
    pub output_bytes: u64,
    /// Free bytes on the output's disk, if the system tells.
    pub free_bytes: Option<u64>,
    /// Threads.
    pub workers: usize,
    /// The most memory that will be resident at a time.
    pub peak_memory_bytes: u64,
}

/// One rank's part of a [`ConvertPlan`].
#[derive(Clone, Debug, Serialize)]
pub struct RankPlan {
    /// The rank.
    pub rank: usize,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Its weights.
    pub tensors: Vec<PlannedTensor>,
}

/// A weight of a [`RankPlan`].
#[derive(Clone, Debug, Serialize)]
pub struct PlannedTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// Type of its elements, or of what they stand for.
    pub dtype: DType,
    /// How it is stored.
    pub format: WeightFormat,
    /// Shape.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub bytes: u64,
}

/// What a conversion did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The run id in the checkpoint; `None` without weights.
    pub run_id: Option<String>,
    /// Ranks.
    pub ranks: usize,
    /// Tensors written, over all ranks.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Wall time.
    pub seconds: f64,
    /// What each tensor of the source lost by quantizing, the largest part first. Empty if nothing was quantized.
    pub quantized: Vec<QuantizedTensor>,
    /// What a user should know about the source.
    pub warnings: Vec<String>,
}

/// A tensor that was quantized.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QuantizedTensor {
    /// Name of the source's tensor, in Hugging Face's per-expert spelling.
    pub name: String,
    /// Its error as a part of its size: √(Σ (w − ŵ)² / Σ w²).
    pub error: f64,
}

impl QuantizedTensor {
    /// All tensors that lost something, the largest part first.
    #[must_use]
    pub fn list(losses: Losses) -> Vec<QuantizedTensor> {
        let tensor = |(name, loss): (String, Loss)| QuantizedTensor { name, error: loss.relative() };
        let mut tensors: Vec<QuantizedTensor> = losses.into_iter().map(tensor).collect();
        tensors.sort_by(|a, b| b.error.total_cmp(&a.error));
        tensors
    }
}

/// Bytes for people: `1.93 GB`.
fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.1} kB", b / 1e3),
    }
}

impl fmt::Display for ConvertPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.model_dir, &self.layout, self.source_dtype) {
            (Some(dir), Some(layout), Some(dtype)) => {
                writeln!(f, "source   {} ({layout}, {dtype}, {})", dir.display(), size(self.source_bytes))?;
            }
            (Some(dir), ..) => writeln!(f, "source   {} (configuration only)", dir.display())?,
            _ => writeln!(f, "source   none: a geometry without weights")?,
        }
        writeln!(f, "model    {}", self.model)?;
        let Mapping { tp_size, pp_size, moe_tp_size, moe_ep_size } = self.mapping;
        writeln!(f, "mapping  tp {tp_size} (experts: tp {moe_tp_size} × ep {moe_ep_size}), pp {pp_size}")?;
        writeln!(f, "output   {}", self.output_dir.display())?;
        for RankPlan { rank, bytes, tensors } in &self.ranks {
            writeln!(f, "  rank {rank}: {} tensors, {}", tensors.len(), size(*bytes))?;
        }
        if let Some(first) = self.ranks.first() {
            writeln!(f, "  tensors of rank 0, layers like its first left out:")?;
            let is_later_layer =
                |name: &str| name.starts_with("transformer.layers.") && !name.starts_with("transformer.layers.0.");
            let stored = |tensor: &PlannedTensor| match tensor.format {
                WeightFormat::Plain => tensor.dtype.to_string(),
                WeightFormat::Quantized(_) | WeightFormat::Fp8 | WeightFormat::Fp8Rows(_) => tensor.format.to_string(),
            };
            let tensors = || first.tensors.iter().filter(|tensor| !is_later_layer(&tensor.name));
            let width = tensors().map(|tensor| stored(tensor).len()).max().unwrap_or(0).max(4);
            for tensor in tensors() {
                let PlannedTensor { name, shape, bytes, .. } = tensor;
                let (stored, shape) = (stored(tensor), format!("{shape:?}"));
                writeln!(f, "    {name:<48} {stored:<width$} {shape:<20} {}", size(*bytes))?;
            }
        }
        if !self.tokenizer_files.is_empty() {
            writeln!(f, "tokenizer {}", self.tokenizer_files.join(", "))?;
        }
        let free = self.free_bytes.map_or_else(|| "unknown".to_owned(), size);
        writeln!(f, "disk     {} to write, {free} free", size(self.output_bytes))?;
        write!(f, "memory   {} at most, {} workers", size(self.peak_memory_bytes), self.workers)
    }
}
