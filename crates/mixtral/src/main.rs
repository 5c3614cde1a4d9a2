//! `mixtral`: from a Hugging Face checkpoint to text in three stages, `convert` → `build` → `run`.
//!
//! [`args`] turns what was typed into validated options, [`stages`] runs one stage with them. Errors are printed here
//! and nowhere else: exit code 0 is done, 1 the work failed, 2 wrong usage.
#![forbid(unsafe_code)]
#![allow(unreachable_pub, reason = "a binary has no outside; pub is what the other modules use")]

mod args;
mod diff;
mod progress;
mod run;
mod say;
mod stages;
mod version;

use std::process::ExitCode;

use args::{Cli, Command, NotParsed, Parsed, Usage};
use clap::error::ErrorKind;

fn main() -> ExitCode {
    let line: Vec<_> = std::env::args_os().collect();
    let is_long_version = line.iter().any(|arg| arg == "--version");
    let Parsed { cli: Cli { loudness, command }, left_out } = match args::parse(line) {
        Ok(parsed) => parsed,
        Err(NotParsed::Usage(usage)) => return refused(&usage),
        Err(NotParsed::Clap(error)) if error.kind() == ErrorKind::DisplayVersion && is_long_version => {
            println!("{}", version::long());
            return ExitCode::SUCCESS;
        }
        Err(NotParsed::Clap(error)) => {
            // Help and the short version come this way too; clap knows which is a success.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    say::set(loudness.level());
    if !left_out.is_empty() {
        let flags: Vec<_> = left_out.iter().map(|old| old.flag.as_str()).collect();
        say::warning(format_args!("accepted for old command lines, without effect here: {}", flags.join(", ")));
        left_out.iter().for_each(|old| say::detail(format_args!("  {}: {}", old.flag, old.why)));
    }
    let result = say::timed("all", || match command {
        Command::Convert(args) => args.validate().map(|options| stages::convert::main(&options)),
        Command::Build(args) => args.validate().map(|options| stages::build::main(&options)),
        Command::Run(args) => args.validate().map(|options| stages::run::main(&options)),
        Command::Bench(args) => args.validate().map(|args| stages::bench::main(&args)),
        Command::Diff(args) => args.validate().map(|options| stages::diff::main(&options)),
        Command::Inspect(args) => Ok(stages::inspect::main(&args)),
        Command::Verify(args) => Ok(stages::verify::main(&args)),
        Command::Completions(args) => Ok(stages::shell::completions(&args)),
        Command::Man(args) => Ok(stages::shell::man(&args)),
    });
    match result {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Ok(Err(error)) => match error.downcast_ref::<Usage>() {
            Some(usage) => refused(usage),
            None => {
                eprintln!("error: {}", args::chain(&error));
                ExitCode::FAILURE
            }
        },
        Err(usage) => refused(&usage),
    }
}

/// Says what is wrong with the command line.
fn refused(usage: &Usage) -> ExitCode {
    eprintln!("error: {usage}");
    ExitCode::from(2)
}

/// Whether the reader of our output went away (`mixtral inspect … | head`), which is no failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
