//! Every case of the registry, on every instruction set, with one thread and with several.

use mixtral_cpu::{CpuBackend, CpuOptions, Isa};
use mixtral_engine::BackendError;
use mixtral_testkit::cases::{self, Case};

fn load(case: &Case, isa: Isa, threads: usize) -> Result<CpuBackend, BackendError> {
    let options = CpuOptions { kv_blocks: case.kv_blocks, threads, isa: Some(isa), ..CpuOptions::default() };
    CpuBackend::load(case.assembly.program.clone(), case.weights(), options)
}

#[test]
fn all_cases_are_within_their_limits() {
    let cases = cases::all();
    assert!(cases.len() > 200, "{} cases", cases.len());
    let mut failures = Vec::new();
    for isa in Isa::available() {
        for case in &cases {
            let threads = if isa == Isa::Portable { 1 } else { 3 };
            if let Err(failure) = case.check(|case| load(case, isa, threads)) {
                failures.push(format!("{isa:?}: {failure}"));
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
