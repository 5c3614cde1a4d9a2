//! `mixtral eval`.

use std::path::{Path, PathBuf};

use super::numbers;
use super::place::{ENGINE, PlaceArgs};
use super::{Usage, usage};

const TEXT: &str = "Perplexity of a text";
const QUESTIONS: &str = "Questions";

/// The flags as they were typed.
#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("what").args(["text", "choices"]).required(true),
    after_help = "\
Examples:
  mixtral eval --engine-dir ./engine --text book.txt
  mixtral eval --engine-dir ./engine --engine-dir ./engine-int4 --text book.txt --context 2048 --stride 512 --json
  mixtral eval --engine-dir ./engine --choices questions.jsonl

Engines that were built with --gather-context-logits score many tokens a step; others score as many as their batch."
)]
pub struct EvalArgs {
    /// Engine; given twice, both are measured, and the second is compared with the first
    #[arg(help_heading = ENGINE, long, value_name = "DIR", default_value = "engine_outputs")]
    pub engine_dir: Vec<PathBuf>,
    /// Directory of tokenizer.json [default: the first engine's]
    #[arg(help_heading = ENGINE, long)]
    pub tokenizer_dir: Option<PathBuf>,
    /// Where it runs.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Text whose perplexity is measured
    #[arg(help_heading = TEXT, long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens of a window [default: the engines' longest sequence, but at most 2048]
    #[arg(help_heading = TEXT, long, value_name = "N", conflicts_with = "choices", value_parser = numbers::tokens)]
    pub context: Option<usize>,
    /// Tokens from one window to the next; each token is scored once, after as many as its window has [default: half of
    /// --context]
    #[arg(help_heading = TEXT, long, value_name = "N", conflicts_with = "choices", value_parser = numbers::tokens)]
    pub stride: Option<usize>,
    /// Questions, a JSON object a line: context (a text), choices (texts), answer (the right one's number, from 0)
    #[arg(help_heading = QUESTIONS, long, value_name = "FILE")]
    pub choices: Option<PathBuf>,
    /// Do not put the model's start token before texts
    #[arg(help_heading = TEXT, long)]
    pub no_add_special_tokens: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What is measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Measure {
    /// The perplexity of a text, in windows.
    Text {
        /// The text.
        file: PathBuf,
        /// Tokens of a window.
        context: Option<usize>,
        /// Tokens from one window to the next.
        stride: Option<usize>,
    },
    /// How many questions are answered.
    Choices(PathBuf),
}

/// The validated options.
#[derive(Debug)]
pub struct EvalOptions {
    /// Everything that needs no check of its own.
    pub args: EvalArgs,
    /// What is measured.
    pub measure: Measure,
}

impl EvalArgs {
    /// Checks that the flags agree with each other.
    pub fn validate(self) -> Result<EvalOptions, Usage> {
        if self.engine_dir.len() > 2 {
            usage!("--engine-dir was given {} times; one or two engines are measured", self.engine_dir.len());
        }
        let measure = match (&self.text, &self.choices) {
            (Some(file), _) => Measure::Text { file: file.clone(), context: self.context, stride: self.stride },
            (None, Some(file)) => Measure::Choices(file.clone()),
            (None, None) => usage!("give a --text or --choices"),
        };
        if let (Some(context), Some(stride)) = (self.context, self.stride)
            && stride > context
        {
            usage!(
                "--stride {stride} leaves out tokens between windows of --context {context}; it may be at most that"
            );
        }
        Ok(EvalOptions { args: self, measure })
    }

    /// The directory of the tokenizer's files.
    pub fn tokenizer_dir(&self) -> &Path {
        self.tokenizer_dir.as_ref().unwrap_or(&self.engine_dir[0])
    }
}
