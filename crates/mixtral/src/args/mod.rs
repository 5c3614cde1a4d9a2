//! Turns what was typed into validated options.
//!
//! Flags are kebab-case, and TensorRT-LLM's spellings work too: underscores become hyphens before the command line is
//! parsed, and renamed flags have their old name as an alias ([`spelling`]). Flags of the old commands that mean
//! nothing here are either taken out, with one warning for all, or refused ([`old_flags`]). If a flag is given twice,
//! the last one counts.

pub mod beams;
pub mod bench;
pub mod beside;
pub mod build;
pub mod calibration;
pub mod chat;
pub mod convert;
pub mod diff;
pub mod eval;
pub mod geometry;
pub mod inspect;
pub mod loudness;
pub mod model;
pub mod numbers;
pub mod old_flags;
#[cfg(test)]
mod old_flags_tests;
pub mod parallel;
pub mod place;
#[cfg(test)]
mod ranges;
pub mod rebuild;
pub mod request;
pub mod run;
pub mod sampling;
pub mod serve;
pub mod shell;
pub mod spelling;
pub mod steps;
pub mod template;
pub mod verify;
pub mod weight_only;
pub mod words;

use std::ffi::OsString;
use std::str::FromStr;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use mixtral_model::DType;

use crate::interrupt::Output;
use old_flags::OldFlag;

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "mixtral",
    version = crate::version::SHORT,
    about = "From a Hugging Face Mixtral checkpoint to text: convert, build, run",
    args_override_self = true,
    max_term_width = 120,
    after_help = "\
Examples:
  mixtral convert --model-dir ./Mixtral-8x7B-v0.1 --output-dir ./ckpt --dtype bf16
  mixtral build --checkpoint-dir ./ckpt --output-dir ./engine
  mixtral run --engine-dir ./engine --input-text \"I love french quiche\"

The command lines of TensorRT-LLM's convert_checkpoint.py, trtllm-build and run.py work with the program's name changed."
)]
pub struct Cli {
    /// How much is said.
    #[command(flatten)]
    pub loudness: loudness::Loudness,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The stages, and what looks at their directories.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Hugging Face model → checkpoint, cut for the ranks of a job
    Convert(convert::ConvertArgs),
    /// Checkpoint → engine
    Build(build::BuildArgs),
    /// Engine and prompts → text
    Run(Box<run::RunArgs>),
    /// Engine and a conversation → answers, turn by turn
    Chat(Box<chat::ChatArgs>),
    /// An engine → answers over HTTP, as OpenAI's API gives them
    Serve(serve::ServeArgs),
    /// How fast an engine is: decode steps, prefill, throughput
    Bench(bench::BenchArgs),
    /// How well an engine predicts a text, or answers questions; one engine, or two side by side
    Eval(eval::EvalArgs),
    /// How far two engines, or one on two backends, are apart: operation by operation, on the same inputs
    Diff(diff::DiffArgs),
    /// What a checkpoint or an engine holds
    Inspect(inspect::InspectArgs),
    /// Whether a checkpoint or an engine is as it was written: reads every byte
    Verify(verify::VerifyArgs),
    /// The completions of a shell, to be sourced by it
    Completions(shell::CompletionsArgs),
    /// The manual pages
    Man(shell::ManArgs),
}

impl Command {
    /// The directory that the command writes, if it writes one.
    pub fn output(&self) -> Option<Output> {
        match self {
            Command::Convert(args) if !args.dry_run => {
                Some(Output { dir: args.output_dir.clone(), ownership: mixtral_checkpoint::writer::OWNERSHIP })
            }
            Command::Build(args) if !args.dry_run => {
                let dir = args.from_engine.as_ref().unwrap_or(&args.output_dir);
                Some(Output { dir: dir.clone(), ownership: mixtral_engine::dir::OWNERSHIP })
            }
            _ => None,
        }
    }
}

/// A parsed command line, and the flags that were taken out before.
#[derive(Debug)]
pub struct Parsed {
    /// The command line without those flags.
    pub cli: Cli,
    /// Old flags that change nothing here.
    pub left_out: Vec<&'static OldFlag>,
}

/// Wrong usage: flags that contradict each other or a directory, or flags that this version cannot honour. The exit
/// code is 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Usage {}

/// `Err(Usage)` with a formatted message.
macro_rules! usage {
    ($($message:tt)*) => { return Err($crate::args::Usage(format!($($message)*))) };
}
pub(crate) use usage;

/// Why a command line was not parsed.
#[derive(Debug)]
pub enum NotParsed {
    /// Wrong usage as clap sees it, help or version.
    Clap(clap::Error),
    /// An old flag that cannot be honoured.
    Usage(Usage),
}

/// An error and its causes in one line. A cause that is already part of the text is not repeated.
pub fn chain(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text {
        text if text.is_empty() => cause,
        text if text.contains(&cause) => text,
        text => format!("{text}: {cause}"),
    })
}

/// Parses a command line.
///
/// # Errors
/// Wrong usage, help or version.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Parsed, NotParsed> {
    let spelling::Line { args, left_out } = spelling::read(args).map_err(NotParsed::Usage)?;
    let matches = Cli::command().try_get_matches_from(args).map_err(NotParsed::Clap)?;
    if let Some(problem) = rebuild::contradiction(&matches) {
        return Err(NotParsed::Usage(Usage(problem)));
    }
    let cli = Cli::from_arg_matches(&matches).map_err(NotParsed::Clap)?;
    Ok(Parsed { cli, left_out })
}

/// `auto`, or a data type in any spelling.
pub fn dtype_or_auto(text: &str) -> Result<Option<DType>, String> {
    if text == "auto" {
        return Ok(None);
    }
    DType::from_str(text).map(Some).map_err(|e| format!("{e}, or auto"))
}
