//! The messages if the NVIDIA driver is missing, too old, of another version than its kernel module, or sees no GPU.
//! The tests have a driver of their own, so they run on any machine.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::kernels::has_nvrtc;
use crate::tool::{Said, binary, example_engine, root, said};

/// A folder with the tests' driver, compiled with these flags. `None`, and a printed reason, if the dynamic linker
/// would not take it.
pub fn driver(flags: &[&str]) -> Option<TempDir> {
    if !cfg!(target_os = "linux") {
        println!("skipped: what is said of NVIDIA drivers, which needs Linux");
        return None;
    }
    let folder = TempDir::new().unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"]).arg(folder.path().join("libcuda.so.1"));
    cc.args(flags).arg(root().join("tests/e2e/libcuda.c"));
    assert!(cc.status().expect("there is a C compiler").success(), "libcuda.c compiles");
    Some(folder)
}

/// Runs the tool in `dir` with the driver in `folder`. The variables tell the driver how to behave.
pub fn with_driver(folder: &Path, dir: &Path, line: &str, variables: &[(&str, &str)]) -> Said {
    let mut command = Command::new(binary());
    command.args(line.split_whitespace()).current_dir(dir).env("LD_LIBRARY_PATH", folder);
    said(command.envs(variables.iter().copied()).env_remove("RUST_BACKTRACE").output().expect("the binary starts"))
}

/// The message of a command that has to fail.
#[track_caller]
pub fn refused(said: Said, folder: &Path) -> String {
    assert_eq!(said.code, 1, "{}{}", said.out, said.err);
    assert!(!said.err.contains("panicked"), "{}", said.err);
    said.err.replace(&folder.display().to_string(), "DIR")
}

/// A command line that runs an engine: the one in `engine_outputs`, unless flags name another.
pub const RUN: &str = "run --backend cuda --max_output_len 2 --input_text KING";

#[test]
fn drivers_that_do_not_start() {
    let Some(folder) = driver(&[]) else { return };
    let at = folder.path();
    let dir = TempDir::new().unwrap();
    let mut text = String::new();
    // A build for this machine's GPUs needs neither an engine nor NVRTC to find that there is no GPU.
    let build = "build --model-config mixtral-8x7b --backend cuda";
    for variables in [
        [("DRIVER_VERSION", "11040"), ("DRIVER_INIT", "0")],
        [("DRIVER_VERSION", "12020"), ("DRIVER_INIT", "0")],
        [("DRIVER_VERSION", "13000"), ("DRIVER_INIT", "100")],
        [("DRIVER_VERSION", "12080"), ("DRIVER_INIT", "803")],
        [("DRIVER_VERSION", "13000"), ("DRIVER_INIT", "802")],
        [("DRIVER_VERSION", "13000"), ("DRIVER_INIT", "999")],
        // An error code for which the driver itself has no name.
        [("DRIVER_VERSION", "13000"), ("DRIVER_INIT", "35")],
        [("DRIVER_VERSION", "13000"), ("DRIVER_DEVICES", "0")],
    ] {
        let message = refused(with_driver(at, dir.path(), build, &variables), at);
        text.push_str(&format!("# {variables:?}\n{message}\n"));
    }
    // The linker finds these files first, but they are no libraries. The message is the same as without a driver.
    for name in ["libcuda.so.1", "libcuda.so"] {
        fs::write(at.join(name), "no library").unwrap();
    }
    let message = refused(with_driver(at, dir.path(), build, &[]), at);
    text.push_str(&format!("# no library\n{message}"));
    insta::assert_snapshot!(text);
}

#[test]
fn an_engine_says_what_its_driver_lacks() {
    let Some(folder) = driver(&[]) else { return };
    if !has_nvrtc() {
        return;
    }
    let at = folder.path();
    let engine = example_engine("--dtype auto", "--arch sm_90a");
    let mut text = String::new();
    for variables in [
        [("DRIVER_VERSION", "11040"), ("DRIVER_INIT", "0")],
        [("DRIVER_VERSION", "13000"), ("DRIVER_INIT", "100")],
        [("DRIVER_VERSION", "12080"), ("DRIVER_INIT", "803")],
        // The kernels are from a newer CUDA than the driver's.
        [("DRIVER_VERSION", "12040"), ("DRIVER_LOAD", "222")],
    ] {
        let message = refused(with_driver(at, engine.path(), RUN, &variables), at);
        text.push_str(&format!("# {variables:?}\n{message}\n"));
    }
    // The engine's linears need cuBLASLt. The linker finds these files first, but they are no libraries.
    let engine = example_engine("--dtype auto", "--arch sm_90a --gemm-plugin cublaslt");
    for name in ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"] {
        fs::write(at.join(name), "no library").unwrap();
    }
    let nowhere = at.join("nowhere").display().to_string();
    let message = refused(with_driver(at, engine.path(), RUN, &[("MIXTRAL_NVRTC", &nowhere)]), at);
    text.push_str(&format!("# no cuBLASLt\n{message}"));
    insta::assert_snapshot!(text);
}
