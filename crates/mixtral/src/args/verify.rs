//! `mixtral verify`.

use std::path::PathBuf;

use super::numbers;

/// What to read.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  mixtral verify ./ckpt
  mixtral verify ./engine --workers 4")]
pub struct VerifyArgs {
    /// A checkpoint or an engine
    pub dir: PathBuf,
    /// Threads [default: all cores]
    #[arg(long, value_parser = numbers::threads)]
    pub workers: Option<usize>,
}
