//! `mixtral bench`.

use std::path::PathBuf;

use super::numbers;
use super::place::{ENGINE, PlaceArgs};
use super::steps::StepArgs;
use super::{Usage, usage};

const DECODE: &str = "Decode steps";
const PREFILL: &str = "Prefill";
const THROUGHPUT: &str = "Throughput";
const SERVER: &str = "Throughput of a server";
const OUTPUT: &str = "Output";

/// The flags as they were typed.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  mixtral bench --engine-dir ./engine --batch-size 1,8 --context 1024
  mixtral bench --engine-dir ./engine --requests 100 --input-len 100-500 --output-len 128 --arrival-rate 4
  mixtral bench --url http://localhost:8000 --requests 100 --concurrency 16")]
pub struct BenchArgs {
    /// Engine to measure
    #[arg(help_heading = ENGINE, long, default_value = "engine_outputs")]
    pub engine_dir: PathBuf,
    /// Where it runs.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// What a step holds, and when it is launched.
    #[command(flatten)]
    pub step: StepArgs,
    /// Batch sizes of the decode steps
    #[arg(help_heading = DECODE, long, num_args = 1.., action = clap::ArgAction::Set, value_delimiter = ',', default_values_t = [1, 4, 16],
        value_parser = numbers::sequences)]
    pub batch_size: Vec<usize>,
    /// Tokens in the cache of each sequence when decoding begins
    #[arg(help_heading = DECODE, long, default_value = "32", value_parser = numbers::tokens)]
    pub context: usize,
    /// Decode steps measured for each batch size, after as many as --warmup
    #[arg(help_heading = DECODE, long, default_value = "32", value_parser = numbers::tokens)]
    pub steps: usize,
    /// Decode steps, and prompts, before the measured ones
    #[arg(help_heading = DECODE, long, default_value_t = 4, value_parser = numbers::tokens_or_none)]
    pub warmup: usize,
    /// Lengths of the prompts whose prefill is measured [default: those of 128 and 512 that the engine takes]
    #[arg(help_heading = PREFILL, long, num_args = 1.., action = clap::ArgAction::Set, value_delimiter = ',', value_parser = numbers::tokens)]
    pub prefill: Vec<usize>,
    /// Prompts of each of those lengths that are sent at once, to be computed in one step if the engine's tokens allow (in a pipeline, in steps of 4096 tokens)
    #[arg(help_heading = PREFILL, long, default_value = "1", value_parser = numbers::sequences)]
    pub prefill_batch: usize,
    /// Requests of the throughput measurement; 0 leaves it out
    #[arg(help_heading = THROUGHPUT, long, default_value_t = 0, value_parser = numbers::requests)]
    pub requests: usize,
    /// Tokens of a request's prompt: N, or A-B for lengths drawn evenly
    #[arg(help_heading = THROUGHPUT, long, requires = "requests", default_value = "32", value_parser = numbers::span)]
    pub input_len: (usize, usize),
    /// Tokens of a request's output: N, or A-B for lengths drawn evenly
    #[arg(help_heading = THROUGHPUT, long, requires = "requests", default_value = "32", value_parser = numbers::span)]
    pub output_len: (usize, usize),
    /// Requests a second, arriving at random (a Poisson process); 0 is all at once
    #[arg(help_heading = THROUGHPUT, long, requires = "requests", default_value_t = 0.0, value_parser = numbers::arrival_rate)]
    pub arrival_rate: f64,
    /// Answer the requests one after another instead of in flight together
    #[arg(help_heading = THROUGHPUT, long, requires = "requests")]
    pub sequential: bool,
    /// Measure the server at this address, with OpenAI's API, instead of an engine
    #[arg(help_heading = SERVER, long, conflicts_with_all = ["engine_dir", "per_op", "quick", "max_prefill_tokens", "no_overlap"])]
    pub url: Option<String>,
    /// Its model [default: the first that it has]
    #[arg(help_heading = SERVER, long, requires = "url", value_name = "NAME")]
    pub model: Option<String>,
    /// The key to use it with
    #[arg(help_heading = SERVER, long, requires = "url", value_name = "KEY")]
    pub api_key: Option<String>,
    /// Requests at a time, at most [default: as many as have arrived]
    #[arg(help_heading = SERVER, long, requires = "url", value_name = "N", value_parser = numbers::sequences)]
    pub concurrency: Option<usize>,
    /// Milliseconds to the first token, within which a request counts as good
    #[arg(help_heading = SERVER, long, requires = "url", value_name = "MS", value_parser = numbers::milliseconds)]
    pub first_token_limit: Option<usize>,
    /// Milliseconds between tokens, in the mean, within which a request counts as good
    #[arg(help_heading = SERVER, long, requires = "url", value_name = "MS", value_parser = numbers::milliseconds)]
    pub per_token_limit: Option<usize>,
    /// Seed of prompts, lengths and arrivals
    #[arg(help_heading = OUTPUT, long, default_value_t = 0)]
    pub random_seed: u64,
    /// Time each operation of the program, which makes steps slower: on a GPU they are then neither captured nor overlapped
    #[arg(help_heading = OUTPUT, long)]
    pub per_op: bool,
    /// Measure the machine's own rates over 256 MB, however large the engine is
    #[arg(help_heading = OUTPUT, long)]
    pub quick: bool,
    /// Print one JSON object
    #[arg(help_heading = OUTPUT, long)]
    pub json: bool,
}

impl BenchArgs {
    /// Checks that the flags agree with each other.
    pub fn validate(self) -> Result<Self, Usage> {
        if self.sequential && self.arrival_rate > 0.0 {
            usage!("--sequential answers one request after another, so --arrival-rate has no meaning; leave one out");
        }
        if self.url.is_some() && self.requests == 0 {
            usage!("--url measures requests, and none was asked for; add --requests 100");
        }
        Ok(self)
    }
}
