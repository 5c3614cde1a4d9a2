//! `mixtral run`.

use std::path::{Path, PathBuf};

use mixtral_runtime::{Beams, Policy};

use super::beams::BeamArgs;
use super::model::ModelArgs;
use super::numbers;
use super::request::RequestArgs;
use super::steps::StepArgs;
use super::template::TemplateArgs;
use super::words::Words;
use super::{Usage, spelling, usage};
use crate::say;

const PROMPTS: &str = "Prompts";
pub(super) const LENGTHS: &str = "Lengths and ends";
const CACHE: &str = "Cache";
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
    /// What runs, and where.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Prompts
    #[arg(help_heading = PROMPTS, long, num_args = 1.., action = clap::ArgAction::Set, value_name = "TEXT", value_parser = spelling::text)]
    pub input_text: Vec<String>,
    /// Prompts from a file: .txt (one a line), .csv (token ids), .npy (2-D token ids, negative is padding), .json (messages), .jsonl
    /// (a request a line: an object with prompt or messages, and flags of its own); - is standard input, a prompt a line
    #[arg(help_heading = PROMPTS, long, conflicts_with = "input_text")]
    pub input_file: Option<PathBuf>,
    /// Put each text into the model's chat template, as a turn of the user; messages of a .json file always are
    #[arg(help_heading = PROMPTS, long)]
    pub chat: bool,
    /// How a conversation becomes a prompt.
    #[command(flatten)]
    pub template: TemplateArgs,
    /// Cut prompts on the left to this many tokens [default: too long is an error]
    #[arg(help_heading = PROMPTS, long, value_parser = numbers::tokens)]
    pub max_input_length: Option<usize>,
    /// What each request asks for, unless it says otherwise itself.
    #[command(flatten)]
    pub request: RequestArgs,
    /// A beam search, instead of draws.
    #[command(flatten)]
    pub beams: BeamArgs,
    /// Texts that end a sequence, and texts that may not come up
    #[command(flatten)]
    pub words: Words,
    /// When a prompt joins those that are being answered: when there are blocks for all of its output, or for the prompt
    #[arg(help_heading = CACHE, long, value_enum, default_value = "guaranteed_no_evict")]
    pub scheduler_policy: SchedulerPolicy,
    /// Let prompts that begin alike use the same blocks of the cache
    #[arg(help_heading = CACHE, long)]
    pub kv_cache_enable_block_reuse: bool,
    /// What a step holds, and when it is launched.
    #[command(flatten)]
    pub step: StepArgs,
    /// The most tokens that attention sees, one number or one a layer (over again); on a GPU that has to be known when building
    #[arg(help_heading = CACHE, long, value_name = "N", num_args = 1.., action = clap::ArgAction::Set, value_parser = numbers::tokens)]
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
    /// Write the log-probabilities of generated tokens as f32 [prompts · beams, max_output_len], padded with NaN
    #[arg(help_heading = OUTPUT, long, value_name = "FILE")]
    pub output_log_probs_npy: Option<PathBuf>,
    /// Write their sums as f32 [prompts · beams]
    #[arg(help_heading = OUTPUT, long, value_name = "FILE")]
    pub output_cum_log_probs_npy: Option<PathBuf>,
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

/// TensorRT-LLM's names of the policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum SchedulerPolicy {
    /// When there are blocks for prompt and output
    GuaranteedNoEvict,
    /// When there are blocks for the prompt; if blocks run out, the youngest waits in the host's memory
    MaxUtilization,
}

impl From<SchedulerPolicy> for Policy {
    fn from(policy: SchedulerPolicy) -> Policy {
        match policy {
            SchedulerPolicy::GuaranteedNoEvict => Policy::GuaranteedNoEvict,
            SchedulerPolicy::MaxUtilization => Policy::MaxUtilization,
        }
    }
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
    /// The beam search that answers instead, if there is one.
    pub beams: Option<Beams>,
}

impl RunArgs {
    /// Checks that the flags agree with each other.
    pub fn validate(mut self) -> Result<RunOptions, Usage> {
        self.model.settle();
        self.request.validate()?;
        self.request.sampling.warn_of_greedy();
        let beams = self.beams.beams(self.request.num_return_sequences, self.streaming)?;
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
        self.check_chat(&prompts)?;
        Ok(RunOptions { args: self, prompts, beams })
    }

    /// Checks the flags of conversations.
    fn check_chat(&self, prompts: &Prompts) -> Result<(), Usage> {
        let is =
            |extensions: &[&str]| matches!(prompts, Prompts::File(path) if extensions.contains(&&*extension(path)));
        if self.chat && is(&["csv", "npy"]) {
            usage!("--chat puts texts into a chat template, and the prompts are token ids; leave it out");
        }
        let TemplateArgs { system_prompt, chat_template } = &self.template;
        if !self.chat && !is(&["json", "jsonl"]) && (system_prompt.is_some() || chat_template.is_some()) {
            usage!("--system-prompt and --chat-template are about conversations; add --chat");
        }
        if self.chat && self.no_add_special_tokens {
            say::warning(
                "--no-add-special-tokens changes nothing beside --chat: the template says what goes before a prompt",
            );
        }
        Ok(())
    }
}

/// A file's extension in lower case: the kind of prompts that it has. Standard input has texts.
pub fn extension(path: &Path) -> String {
    if path == Path::new("-") {
        return "txt".to_owned();
    }
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}
