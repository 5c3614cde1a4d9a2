//! `mixtral bench`.

use std::path::PathBuf;

use super::build::BackendChoice;
use super::{Usage, at_least_one, probability, usage};

/// As typed.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// Engine to measure
    #[arg(long, default_value = "engine_outputs")]
    pub engine_dir: PathBuf,
    /// Where to run; auto is a GPU if the engine was built for one, else the CPU
    #[arg(long, default_value = "auto")]
    pub backend: BackendChoice,
    /// Threads of the CPU backend [default: all cores]
    #[arg(long, value_parser = at_least_one)]
    pub threads: Option<usize>,
    /// Batch sizes of the decode steps
    #[arg(long, num_args = 1.., value_delimiter = ',', default_values_t = [1, 4, 16], value_parser = at_least_one)]
    pub batch_size: Vec<usize>,
    /// Tokens in the cache of each sequence when decoding begins
    #[arg(long, default_value = "32", value_parser = at_least_one)]
    pub context: usize,
    /// Decode steps measured for each batch size, after as many as --warmup
    #[arg(long, default_value = "32", value_parser = at_least_one)]
    pub steps: usize,
    /// Decode steps, and prompts, before the measured ones
    #[arg(long, default_value_t = 4)]
    pub warmup: usize,
    /// Lengths of the prompts whose prefill is measured [default: those of 128 and 512 that the engine takes]
    #[arg(long, num_args = 1.., value_delimiter = ',', value_parser = at_least_one)]
    pub prefill: Vec<usize>,
    /// Prompts of each of those lengths that are sent at once, to be computed in one step if the engine's tokens allow
    #[arg(long, default_value = "1", value_parser = at_least_one)]
    pub prefill_batch: usize,
    /// Requests of the throughput measurement; 0 leaves it out
    #[arg(long, default_value_t = 0)]
    pub requests: usize,
    /// Tokens of a request's prompt: N, or A-B for lengths drawn evenly
    #[arg(long, default_value = "32", value_parser = span)]
    pub input_len: (usize, usize),
    /// Tokens of a request's output: N, or A-B for lengths drawn evenly
    #[arg(long, default_value = "32", value_parser = span)]
    pub output_len: (usize, usize),
    /// Requests a second, arriving at random (a Poisson process); 0 is all at once
    #[arg(long, default_value_t = 0.0)]
    pub arrival_rate: f64,
    /// Answer the requests one after another instead of in flight together
    #[arg(long)]
    pub sequential: bool,
    /// Seed of prompts, lengths and arrivals
    #[arg(long, default_value_t = 0)]
    pub random_seed: u64,
    /// Fraction of free GPU memory for the KV cache
    #[arg(long, alias = "kv-cache-free-gpu-memory-fraction", default_value = "0.9", value_parser = probability)]
    pub kv_cache_free_gpu_mem_fraction: f32,
    /// Time each operation of the program, which makes steps slower: on a GPU they are then neither captured nor overlapped
    #[arg(long)]
    pub per_op: bool,
    /// Measure the machine's own rates over 1 GB in a second, not over 4 GB
    #[arg(long)]
    pub quick: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `N` or `A-B`.
fn span(text: &str) -> Result<(usize, usize), String> {
    let wrong = || "expected a length N, or a range A-B with A at most B".to_owned();
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let (low, high) = (at_least_one(low).map_err(|_| wrong())?, at_least_one(high).map_err(|_| wrong())?);
    if low <= high { Ok((low, high)) } else { Err(wrong()) }
}

impl BenchArgs {
    /// Checks the flags against each other.
    pub fn validate(self) -> Result<Self, Usage> {
        if !(self.arrival_rate.is_finite() && self.arrival_rate >= 0.0) {
            usage!("--arrival-rate is {}; expected requests a second, or 0 for all at once", self.arrival_rate);
        }
        if self.sequential && self.arrival_rate > 0.0 {
            usage!("--sequential answers one request after another, so --arrival-rate has no meaning; leave one out");
        }
        Ok(self)
    }
}
