//! `mixtral completions` and `mixtral man`: completions for a shell and manual pages, generated from the definitions of
//! the flags.

use std::fs;
use std::io::Write as _;

use anyhow::{Context, Result};
use clap::CommandFactory as _;
use clap_mangen::Man;

use crate::args::Cli;
use crate::args::shell::{CompletionsArgs, ManArgs};
use crate::say;

/// Prints the completions.
pub fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "mixtral", &mut script);
    Ok(std::io::stdout().write_all(&script)?)
}

/// Writes the page of every command into a directory, or prints the page of `mixtral`.
pub fn man(args: &ManArgs) -> Result<()> {
    let Some(dir) = &args.dir else {
        let mut page = Vec::new();
        Man::new(Cli::command()).render(&mut page)?;
        return Ok(std::io::stdout().write_all(&page)?);
    };
    let cannot = || format!("cannot write manual pages into {}", dir.display());
    fs::create_dir_all(dir).with_context(cannot)?;
    clap_mangen::generate_to(Cli::command(), dir).with_context(cannot)?;
    say::note(format_args!("wrote the manual pages into {}", dir.display()));
    Ok(())
}
