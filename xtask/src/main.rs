//! The workspace's own commands, `cargo xtask <command>`. Contributors and CI run the same ones.
//!
//! Reading order: [`workspace`] (where things are, running a program), [`steps`] (headings, timings, the table),
//! [`demo`], [`needs`] (what `test` installs), [`checks`] (`test`, `ci`, `bench`), [`gpu`], [`fuzz`], [`tidy`] (the rules
//! no compiler checks).
#![forbid(unsafe_code)]

mod checks;
mod demo;
mod fuzz;
mod gpu;
mod needs;
mod steps;
mod tidy;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::steps::Steps;
use crate::workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The workspace's own commands")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Convert, build and run examples/tiny-mixtral on the CPU, with the time each stage takes
    Demo,
    /// Everything a machine without a GPU can prove; installs what it lacks
    Test {
        /// Leave out the checks against transformers and the Python they need
        #[arg(long)]
        skip_python: bool,
    },
    /// What the tests need, installed if it is missing
    Needs,
    /// Formatting, clippy, rustdoc, tidy, demo and test
    Ci,
    /// The workspace's rules that no compiler checks: dependencies, unsafe code, names, lengths, links
    Tidy,
    /// The CPU benchmarks, in release mode
    Bench,
    /// Build the folder that a GPU machine without Rust checks and measures with; needs NVRTC, but no GPU
    Gpu(gpu::GpuArgs),
    /// The readers of foreign bytes under libFuzzer, on this toolchain; takes hours, and a C++ compiler
    Fuzz(fuzz::FuzzArgs),
}

fn main() -> ExitCode {
    let mut steps = Steps::default();
    match run(&Args::parse().command, &mut steps) {
        Ok(()) => {
            steps.print_table();
            ExitCode::SUCCESS
        }
        Err(error) => {
            steps.print_table();
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command, steps: &mut Steps) -> Result<()> {
    let workspace = Workspace::load()?;
    match command {
        Command::Demo => demo::demo(&workspace),
        Command::Test { skip_python } => checks::test(&workspace, steps, *skip_python),
        Command::Needs => checks::needs(&workspace),
        Command::Ci => checks::ci(&workspace, steps),
        Command::Tidy => tidy::tidy(&workspace),
        Command::Bench => checks::bench(&workspace),
        Command::Gpu(args) => gpu::gpu(&workspace, args),
        Command::Fuzz(args) => fuzz::fuzz(&workspace, args),
    }
}
