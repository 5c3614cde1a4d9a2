//! `mixtral run`.

use std::path::PathBuf;

use mixtral_engine::SamplingParams;

use super::numbers::{self, finite, non_negative, positive, probability};
use super::place::{ENGINE, PlaceArgs};
use super::words::Words;
use super::{Usage, spelling, usage};
use crate::say;

const PROMPTS: &str = "Prompts";
pub(super) const LENGTHS: &str = "Lengths and ends";
pub(super) const SAMPLING: &str = "Sampling";
const OUTPUT: &str = "Output";
const FIGURES: &str = "Figures";

/// The flags as they were typed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  mixtral run --engine-dir ./engine --max-output-len 32 --input-text \"I love french quiche\" \"- and so do you\"
  mixtral run --engine-dir ./engine --input-file prompts.txt --top-k 40 --temperature 0.8 --random-seed 7 --output-csv ids.csv
  mpirun -n 2 mixtral run --engine-dir ./engine-of-two-ranks --input-text \"I love french quiche\"")]
pub struct RunArgs {
    /// Engine to run
    #[arg(help_heading = ENGINE, long, default_value = "engine_outputs")]
    pub engine_dir: PathBuf,
    /// Directory of tokenizer.json [default: the engine's, which carries the model's]
    #[arg(help_heading = ENGINE, long)]
    pub tokenizer_dir: Option<PathBuf>,
    /// The old commands' model directory, whose tokenizer is used if no other is named
    #[arg(long, hide = true, alias = "model-dir")]
    pub hf_model_dir: Option<PathBuf>,
    /// Where it runs.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Prompts
    #[arg(help_heading = PROMPTS, long, num_args = 1.., action = clap::ArgAction::Set, value_name = "TEXT", value_parser = spelling::text)]
    pub input_text: Vec<String>,
    /// Prompts from a file: .txt (one a line), .csv (token ids), .npy (2-D token ids, negative is padding)
    #[arg(help_heading = PROMPTS, long, conflicts_with = "input_text")]
    pub input_file: Option<PathBuf>,
    /// Tokens to generate at most
    #[arg(help_heading = LENGTHS, long, default_value = "128", value_parser = numbers::tokens)]
    pub max_output_len: usize,
    /// Cut prompts on the left to this many tokens [default: too long is an error]
    #[arg(help_heading = PROMPTS, long, value_parser = numbers::tokens)]
    pub max_input_length: Option<usize>,
    /// Logits are divided by it; 0 is greedy
    #[arg(help_heading = SAMPLING, long, default_value = "1.0", value_parser = non_negative, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Candidates by rank: 1 is greedy, 0 is off
    #[arg(help_heading = SAMPLING, long, default_value_t = 1)]
    pub top_k: usize,
    /// Candidates up to this cumulative probability; 0 is off
    #[arg(help_heading = SAMPLING, long, default_value = "0.0", value_parser = probability, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Candidates at least this likely, relative to the likeliest; 0 is off
    #[arg(help_heading = SAMPLING, long, default_value = "0.0", value_parser = probability, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Penalty on tokens of prompt and output; 1 is off
    #[arg(help_heading = SAMPLING, long, default_value = "1.0", value_parser = positive, allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// Penalty on tokens of the output; 0 is off
    #[arg(help_heading = SAMPLING, long, default_value = "0.0", value_parser = finite, allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// Penalty on tokens of the output, by count; 0 is off
    #[arg(help_heading = SAMPLING, long, default_value = "0.0", value_parser = finite, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// Sequences drawn for each prompt
    #[arg(help_heading = SAMPLING, long, default_value = "1", value_parser = numbers::return_sequences)]
    pub num_return_sequences: usize,
    /// Seed of the draws
    #[arg(help_heading = SAMPLING, long, default_value_t = 0)]
    pub random_seed: u64,
    /// Texts that end a sequence, and texts that may not come up
    #[command(flatten)]
    pub words: Words,
    /// Token that ends a sequence; -1 is none [default: the model's]
    #[arg(help_heading = LENGTHS, long, allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..=i64::from(u32::MAX)))]
    pub end_id: Option<i64>,
    /// The old commands' window; one shorter than the engine's sequences is refused
    #[arg(long, hide = true, num_args = 1.., action = clap::ArgAction::Set, value_parser = numbers::tokens)]
    pub max_attention_window_size: Vec<usize>,
    /// Print outputs as they grow, each time what is new
    #[arg(help_heading = OUTPUT, long)]
    pub streaming: bool,
    /// Tokens between two prints [default: 5]
    #[arg(help_heading = OUTPUT, long, value_parser = numbers::tokens)]
    pub streaming_interval: Option<usize>,
    /// Print all of an output each time, as run.py does, and not only what is new
    #[arg(help_heading = OUTPUT, long, alias = "return-all-generated-tokens")]
    pub streaming_whole: bool,
    /// Do not put the model's start token before prompts
    #[arg(help_heading = PROMPTS, long)]
    pub no_add_special_tokens: bool,
    /// Write generated ids, a line for each prompt and beam
    #[arg(help_heading = OUTPUT, long, value_name = "FILE")]
    pub output_csv: Option<PathBuf>,
    /// Write generated ids as i32 [prompts · beams, max_output_len], padded with -1
    #[arg(help_heading = OUTPUT, long, value_name = "FILE")]
    pub output_npy: Option<PathBuf>,
    /// Write logits as F_generation.npy, and F_context.npy if the engine gathers them
    #[arg(help_heading = OUTPUT, long, value_name = "F")]
    pub output_logits_npy: Option<PathBuf>,
    /// Run 10 times to warm up and 10 times for the mean latency
    #[arg(help_heading = FIGURES, long)]
    pub run_profiling: bool,
    /// Print tokens, latencies and rates
    #[arg(help_heading = FIGURES, long)]
    pub stats: bool,
    /// Print a hash of all logits that tokens were drawn from, which takes copying them
    #[arg(help_heading = FIGURES, long)]
    pub logits_hash: bool,
    /// Print how many tokens each expert was given
    #[arg(help_heading = FIGURES, long)]
    pub expert_stats: bool,
    /// Print one JSON object
    #[arg(help_heading = OUTPUT, long)]
    pub json: bool,
}

/// Where prompts come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompts {
    /// The command line.
    Texts(Vec<String>),
    /// A file. Its extension says which kind it is.
    File(PathBuf),
}

/// The validated options.
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
    /// Checks that the flags agree with each other.
    pub fn validate(mut self) -> Result<RunOptions, Usage> {
        if self.tokenizer_dir.is_some() && self.hf_model_dir.is_some() {
            say::warning("--hf-model-dir changes nothing beside --tokenizer-dir: no Hugging Face model is run");
        }
        self.tokenizer_dir = self.tokenizer_dir.or(self.hf_model_dir.take());
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
        self.warn_of_greedy();
        if self.json && self.streaming {
            usage!("--json prints one object at the end, --streaming prints as it goes; choose one");
        }
        if self.streaming_interval.is_some() && !self.streaming {
            say::warning("--streaming-interval changes nothing without --streaming");
        }
        if self.streaming_whole && !self.streaming {
            say::warning("--streaming-whole changes nothing without --streaming");
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

    /// Warns of flags that change nothing: with the default of --top-k the likeliest token is always taken, so flags
    /// that say how to draw have no effect.
    fn warn_of_greedy(&self) {
        let unused = [
            (self.temperature != 1.0 && self.temperature != 0.0, format!("--temperature {}", self.temperature)),
            (self.top_p > 0.0 && self.top_p < 1.0, format!("--top-p {}", self.top_p)),
            (self.min_p > 0.0, format!("--min-p {}", self.min_p)),
        ];
        let unused: Vec<String> = unused.into_iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).collect();
        if self.top_k == 1 && !unused.is_empty() {
            say::warning(format_args!(
                "{} changes nothing: --top-k 1, the default, always takes the likeliest token; add --top-k 0 to draw from all of them, or --top-k 40 from 40",
                unused.join(" ")
            ));
        }
    }
}
