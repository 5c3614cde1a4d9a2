//! What was typed → validated options.
//!
//! Flags are kebab-case; each also answers to its TensorRT-LLM spelling: underscores become hyphens before anything
//! else looks at them, and flags that were renamed have their old name as an alias. Flags of the old commands that mean
//! nothing here are taken out, with one warning.

pub mod bench;
pub mod build;
pub mod convert;
pub mod diff;
pub mod inspect;
pub mod legacy;
#[cfg(test)]
mod ranges;
pub mod rebuild;
pub mod run;
pub mod verify;

use std::ffi::OsString;
use std::str::FromStr;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use mixtral_model::DType;

use crate::interrupt::Output;

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "mixtral", version, about = "From a Hugging Face Mixtral checkpoint to text: convert, build, run")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The stages, and what looks at their directories.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Hugging Face model → checkpoint, cut for the ranks of a job
    #[command(alias = "quantize")]
    Convert(convert::ConvertArgs),
    /// Checkpoint → engine
    Build(build::BuildArgs),
    /// Engine and prompts → text
    Run(Box<run::RunArgs>),
    /// How fast an engine is: decode steps, prefill, throughput
    Bench(bench::BenchArgs),
    /// How far two engines, or one on two backends, are apart: operation by operation, on the same inputs
    Diff(diff::DiffArgs),
    /// What a checkpoint or an engine holds
    Inspect(inspect::InspectArgs),
    /// Whether a checkpoint or an engine is as it was written: reads every byte
    Verify(verify::VerifyArgs),
}

impl Command {
    /// The directory that the command writes, if it does.
    pub fn output(&self) -> Option<Output> {
        match self {
            Command::Convert(args) if !args.dry_run => {
                Some(Output { dir: args.output_dir.clone(), ownership: mixtral_checkpoint::writer::OWNERSHIP })
            }
            Command::Build(args) => {
                let dir = args.from_engine.as_ref().unwrap_or(&args.output_dir);
                Some(Output { dir: dir.clone(), ownership: mixtral_engine::dir::OWNERSHIP })
            }
            _ => None,
        }
    }
}

/// A command line and what was taken out of it.
#[derive(Debug)]
pub struct Parsed {
    /// The rest.
    pub cli: Cli,
    /// Old flags without meaning here, as typed.
    pub ignored: Vec<String>,
}

/// Flags that contradict each other or that this version cannot honour: exit code 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// `Err(Usage)` with a formatted message.
macro_rules! usage {
    ($($message:tt)*) => { return Err($crate::args::Usage(format!($($message)*))) };
}
pub(crate) use usage;

/// An error and its causes in one line. Many errors already say their cause, which is then not said again.
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
/// Wrong usage, help or version: clap's own error, to be printed.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Parsed, clap::Error> {
    let (args, ignored) = legacy::take_out(legacy::hyphenate(args));
    let matches = Cli::command().try_get_matches_from(args)?;
    if let Some(problem) = rebuild::contradiction(&matches) {
        return Err(Cli::command().error(clap::error::ErrorKind::ArgumentConflict, problem));
    }
    Ok(Parsed { cli: Cli::from_arg_matches(&matches)?, ignored })
}

/// `auto`, or a data type in any spelling.
pub fn dtype_or_auto(text: &str) -> Result<Option<DType>, String> {
    if text == "auto" {
        return Ok(None);
    }
    DType::from_str(text).map(Some).map_err(|e| format!("{e}, or auto"))
}

/// A real number that is at least 0.
pub fn non_negative(text: &str) -> Result<f32, String> {
    real(text, |x| x >= 0.0, "at least 0")
}

/// A real number above 0.
pub fn positive(text: &str) -> Result<f32, String> {
    real(text, |x| x > 0.0, "above 0")
}

/// A probability.
pub fn probability(text: &str) -> Result<f32, String> {
    real(text, |x| (0.0..=1.0).contains(&x), "from 0 to 1")
}

/// Any finite real number.
pub fn finite(text: &str) -> Result<f32, String> {
    real(text, |_| true, "finite")
}

fn real(text: &str, fits: impl Fn(f32) -> bool, range: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(x) if x.is_finite() && fits(x) => Ok(x),
        _ => Err(format!("expected a number {range}")),
    }
}

/// A count of at least 1.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("expected a whole number of at least 1".to_owned()),
    }
}
