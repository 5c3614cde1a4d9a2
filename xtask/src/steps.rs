//! Runs named steps one after another: a heading is printed before each, its time after it, and a table of all steps at
//! the end. A program can run at the same time as the steps; its output is printed when it has ended.

use std::fmt::Write as _;
use std::io::{Read as _, Seek as _};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::workspace::run;

/// The steps that ran so far.
pub(crate) struct Steps {
    began: Instant,
    steps: Vec<Step>,
}

impl Default for Steps {
    /// No steps yet. The clock starts now.
    fn default() -> Self {
        Steps { began: Instant::now(), steps: Vec::new() }
    }
}

struct Step {
    name: String,
    time: Duration,
    failed: bool,
}

impl Steps {
    /// Runs one step. If it fails, the error names it.
    pub(crate) fn run(&mut self, name: &str, step: impl FnOnce() -> Result<()>) -> Result<()> {
        println!("\n== {name} ==");
        let start = Instant::now();
        let result = step();
        self.steps.push(Step { name: name.to_owned(), time: start.elapsed(), failed: result.is_err() });
        result.with_context(|| format!("step `{name}`"))
    }

    /// Prints the output of a program that ran at the same time as other steps, as a step of its own.
    pub(crate) fn add(&mut self, name: &str, captured: Captured) -> Result<()> {
        println!("\n== {name} ==\n{}", captured.output);
        self.steps.push(Step {
            name: format!("{name} (beside)"),
            time: captured.time,
            failed: captured.result.is_err(),
        });
        captured.result.with_context(|| format!("step `{name}`"))
    }

    /// Prints which steps ran and how long they took. Commands without steps have no table.
    pub(crate) fn print_table(&self) {
        if !self.steps.is_empty() {
            print!("\n{}", self.table());
        }
    }

    fn table(&self) -> String {
        let width = self.steps.iter().map(|s| s.name.len()).max().unwrap_or(0);
        let mut table = String::new();
        for Step { name, time, failed } in &self.steps {
            let verdict = if *failed { "  FAILED" } else { "" };
            let _ = writeln!(table, "{name:width$}  {:>8.1} s{verdict}", time.as_secs_f64());
        }
        let _ = writeln!(table, "{:width$}  {:>8.1} s", "all", self.began.elapsed().as_secs_f64());
        table
    }
}

/// A program that has run, with all that it printed.
pub(crate) struct Captured {
    output: String,
    time: Duration,
    result: Result<()>,
}

impl Captured {
    /// Runs a program and keeps what it prints, in order.
    pub(crate) fn run(command: &mut Command) -> Result<Self> {
        let start = Instant::now();
        let mut file = tempfile::tempfile().context("making a temporary file")?;
        command.stdout(file.try_clone()?).stderr(file.try_clone()?);
        let result = run(command);
        let mut output = Vec::new();
        file.rewind()?;
        file.read_to_end(&mut output)?;
        Ok(Captured { output: String::from_utf8_lossy(&output).into_owned(), time: start.elapsed(), result })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_is_named_and_shown() {
        let mut steps = Steps::default();
        steps.run("one", || Ok(())).expect("it succeeds");
        let error = steps.run("another", || anyhow::bail!("no")).expect_err("it fails");
        assert_eq!(format!("{error:#}"), "step `another`: no");
        assert_eq!(steps.table(), "one           0.0 s\nanother       0.0 s  FAILED\nall           0.0 s\n");
    }
    #[test]
    fn what_a_program_beside_printed_is_kept_in_order() {
        let captured =
            Captured::run(Command::new("sh").args(["-c", "echo a; echo b >&2; echo c; exit 3"])).expect("runs");
        assert_eq!(captured.output, "a\nb\nc\n");
        let mut steps = Steps::default();
        let error = steps.add("it", captured).expect_err("it fails");
        assert!(format!("{error:#}").starts_with("step `it`: `sh -c"), "{error:#}");
        assert!(steps.table().contains("it (beside)"), "{}", steps.table());
    }
}
