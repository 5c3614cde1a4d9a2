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

/// Attention multiplies probabilities with values on the tensor cores, which take them in 16 bit: half of the outputs may then
/// be the neighbour of the rounded reference, and the mean error still has to stay within the type's limit.
fn tolerance(case: &Case) -> Tolerance {
    let program = &case.assembly.program;
    let attends = program.ops.iter().any(|op| matches!(op, Op::Attention { .. }));
    let half_unequal = if attends && program.dtype != DType::F32 { 0.5 } else { Tolerance::default().half_unequal };
    Tolerance { half_unequal, ..Tolerance::default() }
}

#[test]
fn all_cases_are_within_their_limits() {
    let Some(machine) = Machine::find() else { return };
    let only = std::env::var("MIXTRAL_CASES").unwrap_or_default();
    let cases: Vec<Case> = cases::all().into_iter().filter(|case| case.name.contains(&only)).collect();
    assert!(!cases.is_empty(), "no case's name contains `{only}`");
    let programs: Vec<_> = cases.iter().map(|case| &case.assembly.program).collect();
    let mut failures = Vec::new();
    for code in machine.codes() {
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
