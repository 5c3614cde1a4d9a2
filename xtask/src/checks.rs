//! `cargo xtask test`, `ci` and `bench`.

use std::process::Command;

use anyhow::{Result, bail};

use crate::demo::demo;
use crate::needs::{NEEDS, python, venv};
use crate::steps::Steps;
use crate::tidy::tidy;
use crate::workspace::{Workspace, cargo};

/// A script of `tests/python`: either a check of the built tool, or that script's test of itself.
struct PythonCheck {
    name: &'static str,
    script: &'static str,
    self_test: bool,
}

/// First that the checks catch what is planted for them, then the tool. The self-test of parity.py is left out: it
/// takes minutes, and compares transformers with itself.
const PYTHON_CHECKS: &[PythonCheck] = &[
    PythonCheck { name: "self-test of the reader", script: "tests/python/check_checkpoint.py", self_test: true },
    PythonCheck { name: "self-test of the layouts", script: "tests/python/layouts.py", self_test: true },
    PythonCheck { name: "source layouts", script: "tests/python/layouts.py", self_test: false },
    PythonCheck { name: "parity with transformers", script: "tests/python/parity.py", self_test: false },
    PythonCheck { name: "dummy weights in transformers", script: "tests/python/twin.py", self_test: false },
];

/// Everything a machine without a GPU can prove.
pub(crate) fn test(workspace: &Workspace, steps: &mut Steps, skip_python: bool) -> Result<()> {
    if !skip_python {
        meet_needs(workspace, steps)?;
    }
    cargo_test(workspace, steps)?;
    if skip_python {
        println!(
            "\nskipped, as asked: {}",
            PYTHON_CHECKS.iter().map(|check| check.name).collect::<Vec<_>>().join(", ")
        );
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

/// The tests find NVRTC in the Python environment, if that was made.
fn cargo_test(workspace: &Workspace, steps: &mut Steps) -> Result<()> {
    let mut test = cargo();
    test.args(["test", "--workspace"]);
    if venv(workspace).exists() {
        test.env("VIRTUAL_ENV", venv(workspace));
    }
    steps.run("cargo test", || workspace.run(&mut test))
}

fn python_checks(workspace: &Workspace, steps: &mut Steps) -> Result<()> {
    steps.run("the tool that Python checks", || workspace.cargo(&["build", "--package", "mixtral"]))?;
    PYTHON_CHECKS.iter().try_for_each(|check| {
        let mut script = Command::new(python(workspace));
        script.arg("-u").arg(check.script);
        if check.self_test {
            script.arg("--self-test");
        } else {
            script.arg("--mixtral").arg(workspace.mixtral());
        }
        steps.run(check.name, || workspace.run(&mut script))
    })
}
