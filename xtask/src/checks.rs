//! `cargo xtask test`, `ci` and `bench`.

use std::process::Command;

use anyhow::{Result, bail};

use crate::demo::demo;
use crate::needs::{NEEDS, python};
use crate::steps::Steps;
use crate::tidy::tidy;
use crate::workspace::{Workspace, cargo};

/// The checks in `tests/python` of the built tool: what each shows, and its script.
const PYTHON_CHECKS: &[(&str, &str)] = &[
    ("parity with transformers", "tests/python/parity.py"),
    ("source layouts and checkpoints", "tests/python/layouts.py"),
];

/// Everything a machine without a GPU can prove.
pub(crate) fn test(workspace: &Workspace, steps: &mut Steps, skip_python: bool) -> Result<()> {
    if !skip_python {
        meet_needs(workspace, steps)?;
    }
    cargo_test(workspace, steps)?;
    if skip_python {
        println!("\nskipped, as asked: {}", PYTHON_CHECKS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "));
        return Ok(());
    }
    python_checks(workspace, steps)
}

/// The lints, the demo, and all that `test` does. Cargo's tests come last, so that their results are the log's end.
pub(crate) fn ci(workspace: &Workspace, steps: &mut Steps) -> Result<()> {
    steps.run("formatting", || workspace.cargo(&["fmt", "--all", "--check"]))?;
    let clippy = ["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    steps.run("clippy", || workspace.cargo(&clippy))?;
    let mut rustdoc = cargo();
    rustdoc.args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "--deny warnings");
    steps.run("rustdoc", || workspace.run(&mut rustdoc))?;
    steps.run("tidy", || tidy(workspace))?;
    steps.run("demo", || demo(workspace))?;
    meet_needs(workspace, steps)?;
    python_checks(workspace, steps)?;
    cargo_test(workspace, steps)
}

/// The CPU benchmarks; they are a package of their own.
pub(crate) fn bench(workspace: &Workspace) -> Result<()> {
    if !workspace.has_package("benches") {
        bail!("the workspace has no package `benches`, so there is nothing to measure");
    }
    workspace.cargo(&["bench", "--package", "benches"])
}

fn meet_needs(workspace: &Workspace, steps: &mut Steps) -> Result<()> {
    steps.run("what the tests need", || NEEDS.iter().try_for_each(|need| need.meet(workspace)))
}

fn cargo_test(workspace: &Workspace, steps: &mut Steps) -> Result<()> {
    steps.run("cargo test", || workspace.cargo(&["test", "--workspace"]))
}

fn python_checks(workspace: &Workspace, steps: &mut Steps) -> Result<()> {
    steps.run("the tool that Python checks", || workspace.cargo(&["build", "--package", "mixtral"]))?;
    PYTHON_CHECKS.iter().try_for_each(|(name, script)| {
        let mut check = Command::new(python(workspace));
        check.arg("-u").arg(script).arg("--mixtral").arg(workspace.mixtral());
        steps.run(name, || workspace.run(&mut check))
    })
}
