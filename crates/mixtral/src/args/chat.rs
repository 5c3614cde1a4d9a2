//! `mixtral chat`.

use mixtral_engine::SamplingParams;

use super::Usage;
use super::model::ModelArgs;
use super::numbers;
use super::run::LENGTHS;
use super::sampling::SamplingArgs;
use super::steps::StepArgs;
use super::template::TemplateArgs;
use super::words::Words;

/// The flags as they were typed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  mixtral chat --engine-dir ./engine
  mixtral chat --engine-dir ./engine --system-prompt \"Answer in one sentence.\" --top-k 40 --temperature 0.7

What is typed is a turn of the user. /reset begins a new conversation; /exit, or Ctrl-D, ends the program. Ctrl-C stops
an answer. If standard input is no terminal, each of its lines is a turn.")]
pub struct ChatArgs {
    /// What runs, and where.
    #[command(flatten)]
    pub model: ModelArgs,
    /// How a conversation becomes a prompt.
    #[command(flatten)]
    pub template: TemplateArgs,
    /// Tokens of an answer at most
    #[arg(help_heading = LENGTHS, long, default_value = "1024", value_parser = numbers::tokens)]
    pub max_output_len: usize,
    /// How tokens are drawn.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Texts that end an answer, and texts that may not come up
    #[command(flatten)]
    pub words: Words,
    /// What a step holds, and when it is launched.
    #[command(flatten)]
    pub step: StepArgs,
    /// After each answer, print what was computed and how fast
    #[arg(help_heading = "Figures", long)]
    pub stats: bool,
}

/// The validated options.
#[derive(Debug)]
pub struct ChatOptions {
    /// Everything that needs no check of its own.
    pub args: ChatArgs,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
}

impl ChatArgs {
    /// Checks that the flags agree with each other.
    pub fn validate(mut self) -> Result<ChatOptions, Usage> {
        self.model.settle();
        self.sampling.warn_of_greedy();
        Ok(ChatOptions { sampling: self.sampling.params(), args: self })
    }
}
