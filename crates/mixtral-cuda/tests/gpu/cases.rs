//! Every case of the registry, with the portable kernels and with those of the GPU's own family.

use mixtral_cuda::{CudaBackend, CudaOptions, KvBlocks};
use mixtral_engine::{BackendError, Op};
use mixtral_model::DType;
use mixtral_testkit::cases::{self, Case, Tolerance};

use crate::kernels::{Library, Machine};

fn load(case: &Case, library: &Library) -> Result<CudaBackend, BackendError> {
    let options = CudaOptions { kv_blocks: KvBlocks::Exactly(case.kv_blocks), ..CudaOptions::default() };
    let program = case.assembly.program.clone();
    let images = library.images(&program);
    CudaBackend::load(program, &case.weights(), &images, options)
}

/// Prefill rounds probabilities to 16 bit before it multiplies them with values, as its tensor cores take them: a third of its
/// outputs is the rounded reference's neighbour. The mean error still has to stay within the type's limit.
fn tolerance(case: &Case) -> Tolerance {
    let program = &case.assembly.program;
    let mut tolerance = Tolerance::default();
    if program.dtype != DType::F32 && program.ops.iter().any(|op| matches!(op, Op::Attention { .. })) {
        tolerance.half_unequal = 0.5;
    }
    tolerance
}

#[test]
fn all_cases_are_within_their_limits() {
    let Some(machine) = Machine::find() else { return };
    let only = std::env::var("MIXTRAL_CASES").unwrap_or_default();
    let cases: Vec<Case> = cases::all().into_iter().filter(|case| case.name.contains(&only)).collect();
    assert!(!cases.is_empty(), "no case's name contains `{only}`");
    let programs: Vec<_> = cases.iter().map(|case| &case.assembly.program).collect();
    let only = std::env::var("MIXTRAL_CODE").unwrap_or_default();
    let codes: Vec<_> = machine.codes().into_iter().filter(|c| only.is_empty() || c.to_string() == only).collect();
    assert!(!codes.is_empty(), "{} runs no `{only}`", machine.device.name);
    let mut failures = Vec::new();
    for code in codes {
        let (library, uncompiled) = machine.compile(code, &programs);
        failures.extend(uncompiled);
        let mut passed = 0;
        for case in &cases {
            match case.check_within(tolerance(case), |case| load(case, &library)) {
                Ok(()) => passed += 1,
                Err(failure) => {
                    let text = format!("{code}: {failure}");
                    println!("{text}");
                    let lost = text.contains("context is lost");
                    failures.push(text);
                    // Whatever comes after would fail for this one's sake.
                    assert!(!lost, "{} failures:\n{}", failures.len(), failures.join("\n"));
                }
            }
        }
        println!("{code} on {}: {passed} of {} cases", machine.device.name, cases.len());
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
