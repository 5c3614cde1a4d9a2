//! Runs every case of the registry, on every instruction set, with one thread and with several.

use mixtral_cpu::{CpuBackend, CpuOptions, Isa};
use mixtral_engine::{BackendError, Weights};
use mixtral_model::DType;
use mixtral_testkit::cases::{self, Case};
use mixtral_testkit::large;

fn load(case: &Case, isa: Isa, threads: usize) -> Result<CpuBackend, BackendError> {
    let options = CpuOptions { kv_blocks: case.kv_blocks, threads, isa: Some(isa), ..CpuOptions::default() };
    CpuBackend::load(case.assembly.program.clone(), case.weights(), options)
}

/// Runs every case of a type on every instruction set.
fn check_all(dtype: DType) {
    let registry = cases::all().into_iter().filter(|case| case.assembly.program.dtype == dtype);
    check(registry.collect());
}

fn check(cases: Vec<Case>) {
    assert!(cases.len() > 60, "{} cases", cases.len());
    let mut failures = Vec::new();
    for case in cases {
        let expected = case.expected();
        for isa in Isa::available() {
            let threads = if isa == Isa::Portable { 1 } else { 3 };
            if let Err(failure) = case.check_within(&expected, case.tolerance(), |case| load(case, isa, threads)) {
                failures.push(format!("{isa:?}: {failure}"));
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn f32_cases_are_within_their_limits() {
    check_all(DType::F32);
}

#[test]
fn f16_cases_are_within_their_limits() {
    check_all(DType::F16);
}

#[test]
fn bf16_cases_are_within_their_limits() {
    check_all(DType::Bf16);
}

/// Operations of a small model, checked in the way in which real models' sizes are checked, and a few of those sizes.
#[test]
fn large_cases_are_within_their_limits() {
    let small = [DType::F16, DType::Bf16].into_iter().flat_map(|dtype| large::of(large::SMALL, dtype));
    let cheap = ["norm of", "route of", "rope_write_kv of", "combine of", "linear qkv of"];
    let real = large::of(large::MIXTRAL_8X7B, DType::Bf16);
    let real = real.filter(|case| cheap.iter().any(|name| case.name.starts_with(name)));
    let mut failures = Vec::new();
    for case in small.chain(real) {
        let options = CpuOptions { kv_blocks: case.kv_blocks, threads: 2, ..CpuOptions::default() };
        let mut backend = CpuBackend::load(case.program.clone(), case.weights(), options).unwrap();
        if let Err(failure) = case.check(case.tolerance(), &mut backend) {
            failures.push(failure.to_string());
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// Large cases check only a part of the outputs, but that suffices: with weights of another seed, every operation that
/// has weights fails.
#[test]
fn large_cases_of_other_weights_fail() {
    for case in large::of(large::SMALL, DType::Bf16).filter(|case| !case.program.weights.is_empty()) {
        let options = CpuOptions { kv_blocks: case.kv_blocks, ..CpuOptions::default() };
        let mut backend = CpuBackend::load(case.program.clone(), Weights::Dummy { seed: 99 }, options).unwrap();
        let failure = case.check(case.tolerance(), &mut backend).expect_err(&case.name).to_string();
        assert!(failure.contains("NMSE") || failure.contains("not the rounded reference"), "{failure}");
    }
}
