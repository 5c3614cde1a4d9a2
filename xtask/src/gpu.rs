//! `cargo xtask gpu`: makes one folder with everything that a GPU machine needs to check and measure what was built
//! here. The machine needs neither Rust nor a network: it runs the folder's `run.sh`.
//!
//! The files lie in the folder as in the workspace, so that a script finds its files in both.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::needs::venv;
use crate::workspace::{Workspace, cargo, output, run};

#[derive(clap::Args)]
pub(crate) struct GpuArgs {
    /// Build in release mode: slower to build, and without debug assertions
    #[arg(long)]
    release: bool,
    /// The architecture that the engines are compiled for
    #[arg(long, default_value = "sm_90a")]
    arch: String,
}

/// Files and folders of the workspace that are copied into it.
const FILES: &[&str] = &[
    "benches/peers",
    "crates/mixtral-engine/src/snapshots",
    "examples/tiny-mixtral",
    "tests/python/calib_gpu.py",
    "tests/python/common.py",
    "tests/python/crowd.py",
    "tests/python/deaths.py",
    "tests/python/determinism.py",
    "tests/python/gpu_ranks.py",
    "tests/python/hosts.py",
    "tests/python/load.py",
    "tests/python/parity.py",
    "tests/python/perplexity.py",
    "tests/python/prefixes.py",
    "tests/python/server.py",
    "tests/python/serving.py",
    "tests/python/sessions.py",
    "tests/python/soak.py",
    "tests/python/tool.py",
    "tests/python/twin.py",
];

/// The script that runs there. It lies in the folder's root.
const SCRIPT: &str = "tests/gpu/run.sh";

/// Names and flags of engines with dummy weights. Such engines hold nothing but programs and kernels.
const ENGINES: &[(&str, &[&[&str]])] = &[
    ("8x7b", &[MEASURED]),
    ("8x7b-tp2", &[MEASURED, &["--tp-size", "2"]]),
    ("8x7b-portable", &[MEASURED, PORTABLE]),
    ("8x7b-cublaslt", &[MEASURED, &["--gemm-plugin", "cublaslt"]]),
    ("8x7b-logits", &[GATHERED]),
    ("8x7b-portable-logits", &[GATHERED, PORTABLE]),
];
const MEASURED: &[&str] = &["--max-batch-size", "512", "--max-num-tokens", "16384", "--max-seq-len", "4608"];
const GATHERED: &[&str] = &["--gather-context-logits", "--max-num-tokens", "2048", "--max-seq-len", "4096"];
const PORTABLE: &[&str] = &["--gemm-plugin", "disable", "--moe-plugin", "disable"];

/// The most bytes that the folder may have, since it is sent to another machine.
const MAX_BYTES: u64 = 60_000_000;

/// Makes `target/gpu` from scratch.
pub(crate) fn gpu(workspace: &Workspace, args: &GpuArgs) -> Result<()> {
    let profile: &[&str] = if args.release { &["--release"] } else { &[] };
    let mixtral = built(workspace, &[&["build", "--package", "mixtral"], profile].concat(), "mixtral")?;
    let tests = built(
        workspace,
        &[&["test", "--package", "mixtral-cuda", "--test", "gpu", "--no-run"], profile].concat(),
        "gpu",
    )?;

    let folder = workspace.target.join("gpu");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("emptying {}", folder.display()))?;
    }
    for (from, to) in [(&mixtral, "bin/mixtral"), (&tests, "bin/gpu-tests")] {
        let to = folder.join(to);
        copy(from, &to)?;
        run(Command::new("strip").arg(&to)).context("strip comes with a C compiler")?;
    }
    for file in FILES {
        copy(&workspace.root.join(file), &folder.join(file))?;
    }
    copy(&workspace.root.join(SCRIPT), &folder.join("run.sh"))?;

    let binary = folder.join("bin/mixtral");
    for (name, flags) in ENGINES {
        let mut build = Command::new(&binary);
        build.args(["build", "--model-config", "mixtral-8x7b", "--dtype", "bfloat16", "--arch", &args.arch]);
        build.args(flags.concat()).arg("--output-dir").arg(folder.join("engines").join(name));
        // If there is no CUDA toolkit, NVRTC is in the Python environment of the checks against transformers.
        if std::env::var_os("VIRTUAL_ENV").is_none() {
            build.env("VIRTUAL_ENV", venv(workspace));
        }
        run(&mut build)?;
    }

    let bytes = size(&folder)?;
    println!(
        "\n{}: {} MB; there, `./run.sh` checks and measures",
        workspace.shown(&folder).display(),
        bytes.div_ceil(1_000_000)
    );
    if bytes > MAX_BYTES {
        bail!("{} has {bytes} bytes, at most {MAX_BYTES} are meant to travel", folder.display());
    }
    Ok(())
}

/// Runs cargo, and returns the program that it made for the target of that name.
fn built(workspace: &Workspace, args: &[&str], target: &str) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(args).args(["--message-format", "json-render-diagnostics"]).current_dir(&workspace.root);
    let messages = output(&mut command)?;
    executable(&messages, target).with_context(|| format!("cargo names no program of the target `{target}`"))
}

/// The program of a target, found in cargo's messages (one JSON object per line).
fn executable(messages: &str, target: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut of_target = messages.filter(|m| m["reason"] == "compiler-artifact" && m["target"]["name"] == target);
    of_target.find_map(|m| m["executable"].as_str().map(PathBuf::from))
}

/// Copies a file, or a folder with everything in it except Python's caches.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if !from.is_dir() {
        let folder = to.parent().unwrap_or(to);
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        fs::copy(from, to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
        return Ok(());
    }
    for entry in fs::read_dir(from).with_context(|| format!("listing {}", from.display()))? {
        let name = entry.with_context(|| format!("listing {}", from.display()))?.file_name();
        if name != "__pycache__" {
            copy(&from.join(&name), &to.join(&name))?;
        }
    }
    Ok(())
}

/// Bytes of all files of a folder.
fn size(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))? {
        let entry = entry.with_context(|| format!("listing {}", folder.display()))?;
        let metadata = entry.metadata().with_context(|| format!("reading {}", entry.path().display()))?;
        bytes += if metadata.is_dir() { size(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_of_a_target_is_found_in_cargos_messages() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"gpu"},"executable":null}"#,
            "\nwarning: not JSON\n",
            r#"{"reason":"compiler-artifact","target":{"name":"other"},"executable":"/t/other"}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"gpu"},"executable":"/t/gpu-1"}"#,
            "\n",
        );
        assert_eq!(executable(messages, "gpu"), Some(PathBuf::from("/t/gpu-1")));
        assert_eq!(executable(messages, "third"), None);
    }

    #[test]
    fn folders_are_copied_without_what_python_left() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let (from, to) = (root.path().join("a"), root.path().join("b/c"));
        for file in ["x", "d/y", "__pycache__/z"] {
            let path = from.join(file);
            fs::create_dir_all(path.parent().expect("a folder")).expect("creatable");
            fs::write(path, "12").expect("writable");
        }
        copy(&from, &to).expect("copied");
        assert_eq!(size(&to).expect("readable"), 4);
        assert!(to.join("d/y").exists() && !to.join("__pycache__").exists());
    }
}
