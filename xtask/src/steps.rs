//! Named steps, one after another: a heading before each, its time after, the table of all of them at the end.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// The steps that ran so far.
#[derive(Default)]
pub(crate) struct Steps(Vec<Step>);

struct Step {
    name: String,
    time: Duration,
    failed: bool,
}

impl Steps {
    /// Runs one step; its failure names it.
    pub(crate) fn run(&mut self, name: &str, step: impl FnOnce() -> Result<()>) -> Result<()> {
        println!("\n== {name} ==");
        let start = Instant::now();
        let result = step();
        self.0.push(Step { name: name.to_owned(), time: start.elapsed(), failed: result.is_err() });
        result.with_context(|| format!("step `{name}`"))
    }

    /// Prints what ran and how long it took; commands of a single step have no table.
    pub(crate) fn print_table(&self) {
        if !self.0.is_empty() {
            print!("\n{}", self.table());
        }
    }

    fn table(&self) -> String {
        let width = self.0.iter().map(|s| s.name.len()).max().unwrap_or(0);
        let mut table = String::new();
        for Step { name, time, failed } in &self.0 {
            let verdict = if *failed { "  FAILED" } else { "" };
            let _ = writeln!(table, "{name:width$}  {:>8.1} s{verdict}", time.as_secs_f64());
        }
        let sum: Duration = self.0.iter().map(|s| s.time).sum();
        let _ = writeln!(table, "{:width$}  {:>8.1} s", "all", sum.as_secs_f64());
        table
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
}
