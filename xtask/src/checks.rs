//! `cargo xtask test`, `ci` and `bench`.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::demo::run_stages;
use crate::needs::{NEEDS, javascript, python, venv};
use crate::steps::{Captured, Steps};
use crate::tidy::tidy;
use crate::workspace::{Workspace, cargo};

/// A script of `tests/python`: either a check of the built tool, or that script's test of itself.
struct PythonCheck {
    name: &'static str,
    script: &'static str,
    self_test: bool,
    /// Whether it also runs a script of `tests/javascript`.
    javascript: bool,
}

/// The self-tests come first: they prove that the checks find planted errors. Then come the checks of the tool. The
/// self-test of parity.py is left out, since it takes minutes and compares transformers with itself.
const PYTHON_CHECKS: &[PythonCheck] = &[
    PythonCheck {
        name: "self-test of the reader",
        script: "tests/python/check_checkpoint.py",
        self_test: true,
        javascript: false,
    },
    PythonCheck {
        name: "self-test of the layouts",
        script: "tests/python/layouts.py",
        self_test: true,
        javascript: false,
    },
    PythonCheck { name: "source layouts", script: "tests/python/layouts.py", self_test: false, javascript: false },
    PythonCheck {
        name: "ids and text of tokenizers",
        script: "tests/python/text.py",
        self_test: false,
        javascript: false,
    },
    PythonCheck {
        name: "parity with transformers",
        script: "tests/python/parity.py",
        self_test: false,
        javascript: false,
    },
    PythonCheck { name: "fp8 in transformers", script: "tests/python/fp8.py", self_test: false, javascript: false },
    PythonCheck { name: "retrieval in fp8", script: "tests/python/retrieval.py", self_test: false, javascript: false },
    PythonCheck {
        name: "perplexity and choices",
        script: "tests/python/perplexity.py",
        self_test: false,
        javascript: false,
    },
    PythonCheck {
        name: "dummy weights in transformers",
        script: "tests/python/twin.py",
        self_test: false,
        javascript: false,
    },
    PythonCheck {
        name: "beams beside transformers",
        script: "tests/python/beams.py",
        self_test: false,
        javascript: false,
    },
    PythonCheck { name: "OpenAI's clients", script: "tests/python/clients.py", self_test: false, javascript: true },
];

/// Everything that can be tested on a machine without a GPU.
pub(crate) fn test(workspace: &Workspace, steps: &mut Steps, skip_python: bool) -> Result<()> {
    if skip_python {
        let skipped: Vec<_> = PYTHON_CHECKS.iter().map(|check| check.name).collect();
        println!("\nskipped, as asked: {}", skipped.join(", "));
        return steps.run(CARGO_TEST, || workspace.run(&mut cargo_test(workspace)));
    }
    steps.run(NEEDED, || needs(workspace))?;
    compile(workspace, steps)?;
    all_tests(workspace, steps)
}

/// Installs what the tests need and the machine lacks.
pub(crate) fn needs(workspace: &Workspace) -> Result<()> {
    NEEDS.iter().try_for_each(|need| need.meet(workspace))
}

/// The lints, the demo, and all that `test` does.
pub(crate) fn ci(workspace: &Workspace, steps: &mut Steps) -> Result<()> {
    steps.run("formatting", || workspace.cargo(&["fmt", "--all", "--check"]))?;
    steps.run("tidy", || tidy(workspace))?;
    beside(steps, NEEDED, needs_of_tests()?, |steps| {
        let clippy = ["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"];
        steps.run("clippy", || workspace.cargo(&clippy))?;
        let mut rustdoc = cargo();
        rustdoc.args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "--deny warnings");
        steps.run("rustdoc", || workspace.run(&mut rustdoc))?;
        compile(workspace, steps)
    })?;
    steps.run("demo", || run_stages(workspace))?;
    all_tests(workspace, steps)
}

/// The CPU benchmarks. They are a package of their own.
pub(crate) fn bench(workspace: &Workspace) -> Result<()> {
    if !workspace.has_package("benches") {
        bail!("the workspace has no package `benches`, so there is nothing to measure");
    }
    workspace.cargo(&["bench", "--package", "benches"])
}

const CARGO_TEST: &str = "cargo test";
const NEEDED: &str = "what the tests need";

/// Compiles the tests and the tool in one build. A second build with other features would compile half of the
/// dependencies again.
fn compile(workspace: &Workspace, steps: &mut Steps) -> Result<()> {
    steps.run("compiling", || workspace.run(cargo_test(workspace).arg("--no-run")))
}

/// Runs cargo's tests, and at the same time the checks in Python, which have a single thread and leave a core free. The
/// output of cargo's tests is printed last, so that the log ends with their results.
fn all_tests(workspace: &Workspace, steps: &mut Steps) -> Result<()> {
    let mut tests = cargo_test(workspace);
    tests.current_dir(&workspace.root);
    beside(steps, CARGO_TEST, tests, |steps| python_checks(workspace, steps))
}

/// Runs a program, and steps at the same time. The program's output is printed when both have ended. If both fail, the error is that of
/// the steps.
fn beside(
    steps: &mut Steps,
    name: &str,
    mut program: Command,
    others: impl FnOnce(&mut Steps) -> Result<()>,
) -> Result<()> {
    println!("\n({name}: at the same time as what follows)");
    std::thread::scope(|scope| {
        let program = scope.spawn(move || Captured::run(&mut program));
        let others = others(steps);
        let captured = program.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let added = steps.add(name, captured);
        others.and(added)
    })
}

/// The command that installs what the tests need. That waits for a network more than for a processor, so it runs beside compilers.
fn needs_of_tests() -> Result<Command> {
    let mut needs = Command::new(std::env::current_exe().context("finding this program")?);
    needs.arg("needs");
    Ok(needs)
}

/// The command that runs cargo's tests. If the Python environment was made, the tests find NVRTC there.
fn cargo_test(workspace: &Workspace) -> Command {
    let mut test = cargo();
    test.args(["test", "--workspace"]);
    if venv(workspace).exists() {
        test.env("VIRTUAL_ENV", venv(workspace));
    }
    test
}

fn python_checks(workspace: &Workspace, steps: &mut Steps) -> Result<()> {
    PYTHON_CHECKS.iter().try_for_each(|check| {
        let mut script = Command::new(python(workspace));
        script.arg("-u").arg(check.script);
        if check.self_test {
            script.arg("--self-test");
        } else {
            script.arg("--mixtral").arg(workspace.mixtral());
        }
        if check.javascript {
            script.arg("--javascript").arg(javascript(workspace));
        }
        steps.run(check.name, || workspace.run(&mut script))
    })
}
