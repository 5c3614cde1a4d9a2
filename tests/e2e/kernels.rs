//! Engines with CUDA kernels, as far as they can be tested without a GPU: what is built, what is cached, and what the
//! messages say if something is missing.

use std::fs;
use std::path::Path;

use mixtral_kernels::{Nvrtc, Search};
use serde_json::Value;
use tempfile::TempDir;

use crate::tool::{Said, example_engine, mixtral_in, mixtral_with, root};

/// Whether there is an NVRTC. If not, it prints that the test is skipped.
pub fn has_nvrtc() -> bool {
    let found = Nvrtc::load(&Search::from_environment());
    if let Err(error) = &found {
        println!("skipped: {error} (cargo xtask test installs it)");
    }
    found.is_ok()
}

/// A checkpoint of the example model.
fn checkpoint(flags: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    let model = root().join("examples/tiny-mixtral");
    mixtral_in(dir.path(), &format!("convert --model_dir {} {flags}", model.display()), &[]).ok();
    dir
}

/// Builds an engine for GPUs, with the kernel cache in `cache`.
fn build(dir: &Path, cache: &Path, flags: &str) -> Said {
    mixtral_with(dir, &[("MIXTRAL_KERNEL_CACHE", cache)], &format!("build --workers 2 {flags}"), &[])
}

/// How many kernels were compiled, and how many were found in the cache.
#[track_caller]
fn counts(said: &Said) -> (usize, usize) {
    assert_eq!(said.code, 0, "{}{}", said.out, said.err);
    let line = said.err.lines().find(|line| line.starts_with("kernels: ")).expect("it says so");
    let number = |text: &str| text.split(' ').next_back().unwrap().parse().unwrap();
    (number(line.split(" compiled").next().unwrap()), number(line.split(" found").next().unwrap()))
}

#[test]
fn an_engine_holds_the_kernels_of_its_architectures() {
    if !has_nvrtc() {
        return;
    }
    let dir = checkpoint("--dtype auto");
    let (at, cache) = (dir.path(), dir.path().join("cache"));
    let said = build(at, &cache, "--arch sm_80,sm_90a --explain");
    let (compiled, from_cache) = counts(&said);
    assert!(compiled > 20 && from_cache == 0, "{}", said.err);
    for part in ["kernels for sm_90a: ", "  moe::", "[wgmma:", "op attention "] {
        assert!(said.out.contains(part), "no `{part}` in:\n{}", said.out);
    }

    let said = mixtral_in(at, "inspect engine_outputs --json", &[]).ok();
    let value: Value = serde_json::from_str(&said).unwrap();
    let targets = ["sm_80", "sm_90a", "compute_80"];
    assert_eq!(value["config"]["targets"], serde_json::json!(["cpu", "sm_80", "sm_90a", "compute_80"]));
    for (index, target) in targets.iter().enumerate() {
        let held = &value["ranks"][0]["kernels"][index];
        assert_eq!(held["target"], *target);
        let kernels = held["kernels"].as_array().unwrap();
        let registers = kernels.iter().map(|kernel| kernel["resources"]["registers"].as_u64());
        assert!(registers.clone().all(|r| r.is_some() == target.starts_with("sm_")), "{target}");
    }
    let table = mixtral_in(at, "inspect engine_outputs", &[]).ok();
    assert!(table.contains("kernels for sm_80: ") && table.contains(" linear::mma_"), "{table}");
    mixtral_in(at, "verify engine_outputs", &[]).ok();

    // On the CPU, the engine computes the same as an engine built for the CPU.
    let run = "run --backend cpu --max_output_len 12 --engine-dir";
    let prompt = ["--input_text", "KING RICHARD III:\nWhat"];
    let said = mixtral_in(at, &format!("{run} engine_outputs"), &prompt).ok();
    mixtral_in(at, "build --backend cpu --output-dir plain", &[]).ok();
    assert_eq!(said, mixtral_in(at, &format!("{run} plain"), &prompt).ok());

    // A second build takes all kernels from the cache and gives the same engine.
    let first = fs::read(at.join("engine_outputs/rank0.engine")).unwrap();
    assert_eq!(counts(&build(at, &cache, "--arch sm_80,sm_90a")), (0, compiled));
    assert!(fs::read(at.join("engine_outputs/rank0.engine")).unwrap() == first);

    // A third build finds two damaged entries in the cache.
    let entries = fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path());
    for entry in entries.take(2) {
        fs::write(entry, "damaged").unwrap();
    }
    let said = build(at, &cache, "--arch sm_80,sm_90a");
    assert_eq!(counts(&said), (2, compiled - 2));
    assert!(said.err.contains("is damaged; it is compiled again"), "{}", said.err);
    assert!(fs::read(at.join("engine_outputs/rank0.engine")).unwrap() == first);
}

#[test]
fn disabled_plugins_give_portable_kernels_and_say_so() {
    if !has_nvrtc() {
        return;
    }
    let dir = checkpoint("--dtype f32");
    // A file lies where the cache should be. That gives no more than a warning.
    let cache = dir.path().join("tllm_checkpoint/config.json");
    let said = build(dir.path(), &cache, "--arch sm_90a --gemm-plugin disable --moe-plugin disable");
    assert_eq!(said.code, 0, "{}", said.err);
    for part in [
        "warning: compiled kernels cannot be kept in ",
        "warning: --gemm-plugin disable, --moe-plugin disable: the portable kernels,",
        " compiled for sm_90, compute_80, 0 found in the cache",
    ] {
        assert!(said.err.contains(part), "no `{part}` in:\n{}", said.err);
    }
}

#[test]
fn cublaslt_is_for_long_steps_and_says_what_it_costs() {
    if !has_nvrtc() {
        return;
    }
    let dir = checkpoint("--dtype auto");
    let (at, cache) = (dir.path(), dir.path().join("cache"));
    let warnings = |said: &Said| -> Vec<String> {
        let lines = said.err.lines().filter(|line| line.starts_with("warning: ") && line.contains("cublaslt"));
        lines.map(str::to_owned).collect()
    };
    let said = build(at, &cache, "--arch sm_90a --gemm-plugin cublaslt --explain");
    counts(&said);
    let first = warnings(&said);
    let [decode, prefill] = ["decode of 1 token: ", "prefill: "].map(|part| said.out.split(part).nth(1).unwrap());
    assert!(!decode.split("prefill: ").next().unwrap().contains("cublaslt"), "{}", said.out);
    // The linears of q/k/v and of attention's output, once for the layers that are printed as one and once for the last
    // layer.
    assert_eq!(prefill.matches(" [cublaslt]").count(), 4, "{}", said.out);
    let inspected = mixtral_in(at, "inspect engine_outputs", &[]).ok();
    assert!(inspected.contains("\"plan\":\"cublaslt\""), "{inspected}");

    let short = warnings(&build(at, &cache, "--arch sm_90a --gemm-plugin cublaslt --max-num-tokens 256"));
    let cpu = warnings(&build(at, &cache, "--backend cpu --gemm-plugin cublaslt"));
    insta::assert_snapshot!([first, short, cpu].concat().join("\n"));
}

#[test]
fn what_is_missing_is_said_and_leaves_the_engine_that_was_there() {
    let dir = example_engine("--dtype auto", "--backend cpu");
    let nowhere = dir.path().join("nowhere");
    let said = mixtral_with(dir.path(), &[("MIXTRAL_NVRTC", &nowhere)], "build --arch sm_90a", &[]);
    assert_eq!(said.code, 1, "{}{}", said.out, said.err);
    let message = said.err.replace(&dir.path().display().to_string(), "DIR");
    insta::assert_snapshot!(message);
    mixtral_in(dir.path(), "verify engine_outputs", &[]).ok();
}

#[test]
fn every_rank_has_its_kernels() {
    if !has_nvrtc() {
        return;
    }
    let dir = checkpoint("--dtype auto --tp_size 2");
    mixtral_in(dir.path(), "build --arch sm_90a", &[]).ok();
    let said = mixtral_in(dir.path(), "inspect engine_outputs --json", &[]).ok();
    let value: Value = serde_json::from_str(&said).unwrap();
    let kernels = [0, 1].map(|rank| &value["ranks"][rank]["kernels"]);
    assert_eq!(kernels[0][0]["target"], "sm_90a");
    // The ranks' programs differ in what they are told, and not in what they run.
    assert_eq!(kernels[0], kernels[1]);
}
