//! `mixtral run`.

use std::path::PathBuf;

use mixtral_engine::SamplingParams;

use super::build::BackendChoice;
use super::{Usage, at_least_one, finite, non_negative, positive, probability, usage};

/// As typed.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Engine to run
    #[arg(long, default_value = "engine_outputs")]
    pub engine_dir: PathBuf,
    /// Directory of tokenizer.json [default: the engine's, which carries the model's]
    #[arg(long)]
    pub tokenizer_dir: Option<PathBuf>,
    /// Where to run; auto is a GPU if the engine was built for one, else the CPU
    #[arg(long, default_value = "auto")]
    pub backend: BackendChoice,
    /// Threads of the CPU backend [default: all cores]
    #[arg(long, value_parser = at_least_one)]
    pub threads: Option<usize>,
    /// Prompts
    #[arg(long, num_args = 1.., allow_hyphen_values = false)]
    pub input_text: Vec<String>,
    /// Prompts from a file: .txt (one a line), .csv (token ids), .npy (2-D token ids, negative is padding)
    #[arg(long, conflicts_with = "input_text")]
    pub input_file: Option<PathBuf>,
    /// Apply the model's chat template
    #[arg(long)]
    pub chat: bool,
    /// Tokens to generate at most
    #[arg(long, default_value = "128", value_parser = at_least_one)]
    pub max_output_len: usize,
    /// Cut prompts on the left to this many tokens [default: too long is an error]
    #[arg(long, value_parser = at_least_one)]
    pub max_input_length: Option<usize>,
    /// Logits are divided by it; 0 is greedy
    #[arg(long, default_value = "1.0", value_parser = non_negative, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Candidates by rank: 1 is greedy, 0 is off
    #[arg(long, default_value_t = 1)]
    pub top_k: usize,
    /// Candidates up to this cumulative probability; 0 is off
    #[arg(long, default_value = "0.0", value_parser = probability, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Candidates at least this likely, relative to the likeliest; 0 is off
    #[arg(long, default_value = "0.0", value_parser = probability, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Penalty on tokens of prompt and output; 1 is off
    #[arg(long, default_value = "1.0", value_parser = positive, allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// Penalty on tokens of the output; 0 is off
    #[arg(long, default_value = "0.0", value_parser = finite, allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// Penalty on tokens of the output, by count; 0 is off
    #[arg(long, default_value = "0.0", value_parser = finite, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// Hypotheses of beam search
    #[arg(long, default_value = "1", value_parser = at_least_one)]
    pub num_beams: usize,
    /// Beam search: exponent of the length
    #[arg(long, default_value = "1.0", value_parser = finite, allow_negative_numbers = true)]
    pub length_penalty: f32,
    /// Beam search: when to stop
    #[arg(long, default_value_t = 1, allow_negative_numbers = true)]
    pub early_stopping: i32,
    /// Sequences drawn for each prompt
    #[arg(long, default_value = "1", value_parser = at_least_one)]
    pub num_return_sequences: usize,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    pub random_seed: u64,
    /// Texts that end a sequence
    #[arg(long, num_args = 1..)]
    pub stop_words: Vec<String>,
    /// Texts that may not come up
    #[arg(long, num_args = 1..)]
    pub bad_words: Vec<String>,
    /// Token that ends a sequence; -1 is none [default: the model's]
    #[arg(long, allow_negative_numbers = true)]
    pub end_id: Option<i64>,
    /// Print outputs as they grow
    #[arg(long)]
    pub streaming: bool,
    /// Tokens between two prints
    #[arg(long, default_value = "5", value_parser = at_least_one)]
    pub streaming_interval: usize,
    /// Do not put the model's start token before prompts
    #[arg(long)]
    pub no_add_special_tokens: bool,
    /// Write generated ids, a line for each prompt and beam
    #[arg(long, value_name = "FILE")]
    pub output_csv: Option<PathBuf>,
    /// Write generated ids as i32 [prompts · beams, max_output_len], padded with -1
    #[arg(long, value_name = "FILE")]
    pub output_npy: Option<PathBuf>,
    /// Write logits as F_generation.npy, and F_context.npy if the engine gathers them
    #[arg(long, value_name = "F")]
    pub output_logits_npy: Option<PathBuf>,
    /// Write log-probabilities
    #[arg(long, value_name = "FILE")]
    pub output_log_probs_npy: Option<PathBuf>,
    /// Write cumulative log-probabilities
    #[arg(long, value_name = "FILE")]
    pub output_cum_log_probs_npy: Option<PathBuf>,
    /// Run 10 times to warm up and 10 times for the mean latency
    #[arg(long)]
    pub run_profiling: bool,
    /// Print tokens, latencies, rates, bandwidth and a hash of the logits
    #[arg(long)]
    pub stats: bool,
    /// Print how many tokens each expert was given
    #[arg(long)]
    pub expert_stats: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Fraction of free GPU memory for the KV cache
    #[arg(long, alias = "kv-cache-free-gpu-memory-fraction", default_value = "0.9", value_parser = probability)]
    pub kv_cache_free_gpu_mem_fraction: f32,
}

/// Where prompts come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompts {
    /// The command line.
    Texts(Vec<String>),
    /// A file, its kind told by its name.
    File(PathBuf),
}

/// Validated.
#[derive(Debug)]
pub struct RunOptions {
    /// Everything that needs no check of its own.
    pub args: RunArgs,
    /// Where prompts come from.
    pub prompts: Prompts,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
}

impl RunArgs {
    /// Checks the flags against each other.
    pub fn validate(self) -> Result<RunOptions, Usage> {
        if self.num_beams > 1 {
            usage!(
                "--num-beams {}: beam search is not supported by this version; --num-return-sequences draws several outputs",
                self.num_beams
            );
        }
        if self.chat {
            usage!("--chat: chat templates are not supported by this version; write the template into --input-text");
        }
        if self.output_log_probs_npy.is_some() || self.output_cum_log_probs_npy.is_some() {
            usage!(
                "log-probabilities are not supported by this version; --output-logits-npy has what they are computed from"
            );
        }
        let sampling = SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
        };
        if self.num_return_sequences > 1 && sampling.is_greedy() {
            usage!(
                "--num-return-sequences {} with greedy sampling would give equal outputs; add --top-k 0 (or more than 1) and a temperature above 0",
                self.num_return_sequences
            );
        }
        if self.json && self.streaming {
            usage!("--json prints one object at the end, --streaming prints as it goes; choose one");
        }
        // run.py's default prompt.
        let prompts = match &self.input_file {
            Some(path) => Prompts::File(path.clone()),
            None if self.input_text.is_empty() => {
                Prompts::Texts(vec!["Born in north-east France, Soyer trained as a".to_owned()])
            }
            None => Prompts::Texts(self.input_text.clone()),
        };
        Ok(RunOptions { args: self, prompts, sampling })
    }
}
