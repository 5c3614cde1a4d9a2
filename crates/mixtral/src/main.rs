//! `mixtral`: from a Hugging Face checkpoint to text in three stages, `convert` → `build` → `run`.
//!
//! [`args`] turns what was typed into validated options, and [`stages`] runs one stage with them. Errors are printed
//! here and nowhere else. Exit code 0 means done, 1 that the work failed, 2 wrong usage, 130 or 143 interrupted.
#![forbid(unsafe_code)]
#![allow(unreachable_pub, reason = "a binary has no outside; pub is what the other modules use")]

mod args;
mod diff;
mod eval;
mod interrupt;
mod kernels;
mod progress;
mod run;
mod say;
mod stages;
mod version;
mod warnings;

use std::process::ExitCode;

use args::{Cli, Command, NotParsed, Parsed, Usage};
use clap::error::ErrorKind;
use interrupt::Output;
use mixtral_checkpoint::staged::note_failure;

/// Exit code of wrong usage.
const WRONG_USAGE: u8 = 2;

fn main() -> ExitCode {
    let line: Vec<_> = std::env::args_os().collect();
    let is_long_version = line.iter().any(|arg| arg == "--version");
    let Parsed { cli: Cli { loudness, command }, left_out } = match args::parse(line) {
        Ok(parsed) => parsed,
        Err(NotParsed::Usage(usage)) => {
            eprintln!("error: {usage}");
            return ExitCode::from(WRONG_USAGE);
        }
        Err(NotParsed::Clap(error)) if error.kind() == ErrorKind::DisplayVersion && is_long_version => {
            println!("{}", version::long());
            return ExitCode::SUCCESS;
        }
        Err(NotParsed::Clap(error)) => {
            // For clap, help and the short version are errors too. It knows that their exit code is 0.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(WRONG_USAGE));
        }
    };
    say::set(loudness.level());
    warnings::print();
    if !left_out.is_empty() {
        let flags: Vec<_> = left_out.iter().map(|old| old.flag.as_str()).collect();
        say::warning(format_args!("accepted for old command lines, without effect here: {}", flags.join(", ")));
        left_out.iter().for_each(|old| say::detail(format_args!("  {}: {}", old.flag, old.why)));
    }
    let output = command.output();
    if let Some(Err(error)) = output.clone().map(interrupt::watch) {
        say::warning(args::chain(&error));
    }
    let result = say::timed("all", || match command {
        Command::Convert(args) => args.validate().map(|options| stages::convert::main(&options)),
        Command::Build(args) => match args.rebuild() {
            Ok(Some(options)) => Ok(stages::rebuild::main(&options)),
            Ok(None) => args.validate().map(|options| stages::build::main(&options)),
            Err(usage) => Err(usage),
        },
        Command::Run(args) => args.validate().map(|options| stages::run::main(&options)),
        Command::Chat(args) => args.validate().map(|options| stages::chat::main(&options)),
        Command::Serve(args) => args.validate().map(|options| stages::serve::main(&options)),
        Command::Bench(args) => args.validate().map(|args| stages::bench::main(&args)),
        Command::Eval(args) => args.validate().map(|options| stages::eval::main(&options)),
        Command::Diff(args) => args.validate().map(|options| stages::diff::main(&options)),
        Command::Inspect(args) => Ok(stages::inspect::main(&args)),
        Command::Verify(args) => Ok(stages::verify::main(&args)),
        Command::Completions(args) => Ok(stages::shell::completions(&args)),
        Command::Man(args) => Ok(stages::shell::man(&args)),
    });
    interrupt::settle();
    let (message, code) = match result {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(error)) if is_broken_pipe(&error) => return ExitCode::SUCCESS,
        Ok(Err(error)) if error.is::<Usage>() => (error.to_string(), ExitCode::from(WRONG_USAGE)),
        Ok(Err(error)) => (args::chain(&error), ExitCode::FAILURE),
        Err(usage) => (usage.to_string(), ExitCode::from(WRONG_USAGE)),
    };
    eprintln!("error: {message}");
    if let Some(Output { dir, ownership }) = output {
        // If an older output is still there, the next stage will say that this run failed.
        note_failure(&dir, ownership, message.lines().next().unwrap_or_default());
    }
    code
}

/// Whether the reader of our output went away (`mixtral inspect … | head`). That is no failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
