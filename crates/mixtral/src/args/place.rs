//! The flags of every command that runs an engine: where it runs, and how much of that place it may use.

use super::build::BackendChoice;
use super::numbers::{self, probability};

/// The heading of flags that say which engine runs, and where.
pub(super) const ENGINE: &str = "Engine";

/// The flags as they were typed.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct PlaceArgs {
    /// Where to run; auto is a GPU if the engine was built for one, else the CPU
    #[arg(help_heading = ENGINE, long, default_value = "auto")]
    pub backend: BackendChoice,
    /// Ranks that may share a GPU of their host; as threads of one process, with CUDA_DEVICE_MAX_CONNECTIONS=32 [default: 1]
    #[arg(help_heading = ENGINE, long, value_name = "N", value_parser = numbers::ranks)]
    pub ranks_per_gpu: Option<usize>,
    /// Threads of the CPU backend [default: all cores]
    #[arg(help_heading = ENGINE, long, value_parser = numbers::threads)]
    pub threads: Option<usize>,
    /// Fraction of free GPU memory for the KV cache [default: 0.9]
    #[arg(help_heading = ENGINE, long, alias = "kv-cache-free-gpu-memory-fraction", value_parser = probability)]
    pub kv_cache_free_gpu_mem_fraction: Option<f32>,
}
