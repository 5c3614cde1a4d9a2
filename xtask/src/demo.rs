//! `cargo xtask demo`: the three stages on the model in this repository, as a user would type them.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::workspace::{Workspace, output, shell_word};

const MODEL: &str = "examples/tiny-mixtral";
const PROMPT: &str = "ROMEO:\n";

/// Flags that make the model draw its tokens: greedy text of so small a model soon repeats itself.
const SAMPLING: &[&str] = &["--temperature", "0.8", "--top_k", "0", "--top_p", "0.95", "--random_seed", "1"];

/// Builds the tool, then runs the stages.
pub(crate) fn demo(workspace: &Workspace) -> Result<()> {
    workspace.cargo(&["build", "--package", "mixtral"])?;
    run_stages(workspace)
}

/// Runs the stages with the built tool, with `target/demo` as output. The generated text is printed last.
pub(crate) fn run_stages(workspace: &Workspace) -> Result<()> {
    let directory = workspace.target.join("demo");
    if directory.exists() {
        fs::remove_dir_all(&directory).with_context(|| format!("emptying {}", directory.display()))?;
    }
    fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;

    let directory = workspace.shown(&directory).to_string_lossy();
    let mut printed = String::new();
    let mut sum = Duration::ZERO;
    for stage in stages(&directory) {
        let words: Vec<String> = stage.iter().map(|word| shell_word(word)).collect();
        println!("\n$ mixtral {}", words.join(" "));
        let start = Instant::now();
        printed = output(Command::new(workspace.mixtral()).args(&stage).current_dir(&workspace.root))?;
        println!("  {:.2} s", start.elapsed().as_secs_f64());
        sum += start.elapsed();
    }
    println!("\nthree stages in {:.2} s\n\n{}", sum.as_secs_f64(), printed.trim_end());
    Ok(())
}

/// The arguments of each stage, in the spelling of the toolchain that `mixtral` replaces.
fn stages(directory: &str) -> [Vec<String>; 3] {
    let (checkpoint, engine) = (format!("{directory}/checkpoint"), format!("{directory}/engine"));
    let stages: [&[&str]; 3] = [
        &["convert", "--model_dir", MODEL, "--output_dir", &checkpoint, "--dtype", "bfloat16"],
        &["build", "--checkpoint_dir", &checkpoint, "--output_dir", &engine],
        &[&["run", "--engine_dir", &engine, "--max_output_len", "96"][..], SAMPLING, &["--input_text", PROMPT]]
            .concat(),
    ];
    stages.map(|words| words.iter().map(|&word| word.to_owned()).collect())
}
