//! `mixtral verify`.

use std::path::PathBuf;

use super::at_least_one;

/// What to read.
#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    /// A checkpoint or an engine
    pub dir: PathBuf,
    /// Threads [default: all cores]
    #[arg(long, value_parser = at_least_one)]
    pub workers: Option<usize>,
}
