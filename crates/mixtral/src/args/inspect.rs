//! `mixtral inspect`.

use std::path::PathBuf;

/// What to look at.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  mixtral inspect ./ckpt --summary
  mixtral inspect ./engine --json")]
pub struct InspectArgs {
    /// A checkpoint or an engine
    pub dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Leave out the list of tensors and the program
    #[arg(long, conflicts_with = "json")]
    pub summary: bool,
}
