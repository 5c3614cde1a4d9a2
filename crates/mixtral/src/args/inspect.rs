//! `mixtral inspect`.

use std::path::PathBuf;

/// What to look at.
#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    /// A checkpoint or an engine
    pub dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Leave out the list of tensors and the program
    #[arg(long)]
    pub summary: bool,
}
