//! `cargo xtask fuzz`: runs the package `fuzz` under libFuzzer, which looks for inputs that reach new code.
//!
//! Coverage comes from a pass of LLVM, which stable compilers have too. Only sanitizers need a nightly compiler, and
//! safe code needs no sanitizer. The package and its dependencies are built once more for this, in a target directory
//! of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::workspace::{Workspace, cargo, output, run};

#[derive(clap::Args)]
pub(crate) struct FuzzArgs {
    /// The readers, all of them if none is named
    readers: Vec<String>,
    /// Inputs to try on each
    #[arg(long, default_value_t = 1_000_000)]
    runs: u64,
    /// Put what was found of use into the committed corpora
    #[arg(long)]
    keep: bool,
}

/// Compiler flags that make LLVM count edges in the way that libFuzzer reads.
const COVERAGE: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
];

const CORPORA: &str = "fuzz/corpus";

/// Bytes of the longest input.
const MAX_INPUT: usize = 8192;

/// Inputs that fuzzing may add to a committed corpus.
const MAX_KEPT: usize = 24;

/// Runs the readers one after another and prints what each did.
pub(crate) fn fuzz(workspace: &Workspace, args: &FuzzArgs) -> Result<()> {
    let target = workspace.target.join("fuzz");
    let binary = build(workspace, &target)?;
    let scratch = scratch()?;
    let mut table =
        format!("{:22} {:>10} {:>8} {:>7} {:>7} {:>8}\n", "reader", "inputs", "/s", "edges", "MB", "slowest");
    let mut failed = Vec::new();
    for reader in readers(workspace, &args.readers)? {
        let committed = workspace.root.join(CORPORA).join(&reader);
        let found = target.join("corpus").join(&reader);
        fs::create_dir_all(&found).with_context(|| format!("creating {}", found.display()))?;
        let report = target.join(format!("{reader}.log"));
        let artifacts = format!("-artifact_prefix={}/{reader}-", target.display());
        println!("{reader}: {} inputs, reported in {}", args.runs, workspace.shown(&report).display());
        let libfuzzer = |options: &[String], folders: &[&Path], log: &Path| {
            let log = fs::File::create(log).with_context(|| format!("creating {}", log.display()))?;
            let mut command = Command::new(&binary);
            command.env("FUZZ_READER", &reader).env("TMPDIR", &scratch).args(options).args(folders);
            command.arg(format!("-max_len={MAX_INPUT}")).stdout(Stdio::null()).stderr(log);
            run(&mut command)
        };
        let limits = ["-timeout=1", "-rss_limit_mb=2048", "-print_final_stats=1", &artifacts].map(str::to_owned);
        let options = [&[format!("-runs={}", args.runs)][..], &limits].concat();
        let done = libfuzzer(&options, &[&found, &committed], &report);
        let text = fs::read_to_string(&report).with_context(|| format!("reading {}", report.display()))?;
        if done.is_err() {
            let tail: Vec<&str> = text.lines().rev().take(30).collect();
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
            eprintln!("{reader} FAILED; `cargo run -p fuzz -- {reader} FILE` reads the input once more");
            failed.push(reader);
            continue;
        }
        let row = row(&reader, &text).with_context(|| format!("{} has no figures", report.display()))?;
        println!("{row}");
        table += &format!("{row}\n");
        if args.keep {
            let merged = target.join("merged").join(&reader);
            let _ = fs::remove_dir_all(&merged);
            fs::create_dir_all(&merged).with_context(|| format!("creating {}", merged.display()))?;
            let options = ["-set_cover_merge=1".to_owned()];
            libfuzzer(&options, &[&merged, &found, &committed], &target.join(format!("{reader}.merge.log")))?;
            keep(&merged, &committed)?;
        }
    }
    fs::remove_dir_all(&scratch).with_context(|| format!("removing {}", scratch.display()))?;
    print!("\n{table}");
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn build(workspace: &Workspace, target: &Path) -> Result<PathBuf> {
    let version = output(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
    let mut command = cargo();
    // If a target is named, cargo does not apply the flags to build scripts and macros.
    command.args(["build", "--package", "fuzz", "--bin", "fuzz", "--target", host, "--target-dir"]).arg(target);
    workspace.run(command.env("RUSTFLAGS", COVERAGE.join(" ")))?;
    Ok(target.join(host).join("debug/fuzz"))
}

/// A folder in memory if possible, since readers of files read a new file for each input.
fn scratch() -> Result<PathBuf> {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let folder = parent.join(format!("mixtral-fuzz-{}", std::process::id()));
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    Ok(folder)
}

/// The readers that were asked for, or all. A reader is known if it has a corpus.
fn readers(workspace: &Workspace, asked: &[String]) -> Result<Vec<String>> {
    let corpora = workspace.root.join(CORPORA);
    let list = || -> std::io::Result<Vec<String>> {
        fs::read_dir(&corpora)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    let mut all = list().with_context(|| format!("listing {}", corpora.display()))?;
    all.sort();
    if let Some(unknown) = asked.iter().find(|name| !all.contains(name)) {
        bail!("there is no reader `{unknown}`; there are {}", all.join(", "));
    }
    Ok(if asked.is_empty() { all } else { asked.to_vec() })
}

/// The row of the table for what libFuzzer prints at its end.
fn row(reader: &str, text: &str) -> Option<String> {
    let stat =
        |name: &str| text.lines().find_map(|line| line.strip_prefix("stat::")?.strip_prefix(name)?.strip_prefix(':'));
    let edges = text.lines().rev().find_map(|line| line.split_once("cov: ")?.1.split_whitespace().next())?;
    let (inputs, rate) = (stat("number_of_executed_units")?.trim(), stat("average_exec_per_sec")?.trim());
    let (memory, slowest) = (stat("peak_rss_mb")?.trim(), stat("slowest_unit_time_sec")?.trim());
    Some(format!("{reader:22} {inputs:>10} {rate:>8} {edges:>7} {memory:>7} {slowest:>6} s"))
}

/// Replaces the inputs that fuzzing found in a committed corpus by some inputs of a merged corpus, from the smallest to
/// the largest. Inputs written by hand have other names and stay.
fn keep(merged: &Path, committed: &Path) -> Result<()> {
    let inputs = |folder: &Path| -> std::io::Result<Vec<(u64, PathBuf)>> {
        let sized = fs::read_dir(folder)?.map(|entry| entry.and_then(|e| Ok((e.metadata()?.len(), e.path()))));
        sized.collect()
    };
    let mut found = inputs(merged).with_context(|| format!("listing {}", merged.display()))?;
    found.sort();
    if found.is_empty() {
        bail!("{} is empty; the committed corpus stays", merged.display());
    }
    for (_, old) in inputs(committed).with_context(|| format!("listing {}", committed.display()))? {
        if is_found(&old) {
            fs::remove_file(&old).with_context(|| format!("removing {}", old.display()))?;
        }
    }
    let step = found.len().div_ceil(MAX_KEPT);
    for (_, input) in found.into_iter().rev().step_by(step).filter(|(_, input)| is_found(input)) {
        let to = committed.join(input.file_name().unwrap_or_default());
        fs::copy(&input, &to).with_context(|| format!("writing {}", to.display()))?;
    }
    Ok(())
}

/// Whether libFuzzer named the file. It names files by a hash of their contents.
fn is_found(input: &Path) -> bool {
    let name = input.file_name().unwrap_or_default().to_string_lossy();
    name.len() == 40 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_found() {
        let text = "#1\tINITED cov: 12 ft: 14 corp: 1/1b\n#8\tDONE   cov: 345 ft: 500 corp: 9/1kb\nDone 8 runs\n\
                    stat::number_of_executed_units: 8\nstat::average_exec_per_sec:     4\nstat::new_units_added: 1\n\
                    stat::slowest_unit_time_sec:    0\nstat::peak_rss_mb:              61\n";
        let words: Vec<String> = row("step", text).expect("figures").split_whitespace().map(str::to_owned).collect();
        assert_eq!(words, ["step", "8", "4", "345", "61", "0", "s"]);
        assert_eq!(row("step", "cut short"), None);
    }
}
