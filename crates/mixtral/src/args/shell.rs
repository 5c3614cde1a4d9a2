//! `mixtral completions` and `mixtral man`.

use std::path::PathBuf;

/// What to complete for.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  source <(mixtral completions bash)
  mixtral completions zsh > ~/.zfunc/_mixtral")]
pub struct CompletionsArgs {
    /// The shell
    pub shell: clap_complete::Shell,
}

/// Where the pages go.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  mixtral man | man -l -
  mixtral man ~/.local/share/man/man1")]
pub struct ManArgs {
    /// A directory for the page of every command [default: the page of `mixtral` itself, on stdout]
    pub dir: Option<PathBuf>,
}
