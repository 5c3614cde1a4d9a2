//! Dense linears computed by cuBLASLt, in engines that were built with it.

use mixtral_cuda::{CudaBackend, CudaOptions, KvBlocks};
use mixtral_engine::{BackendError, Op, Program};
use mixtral_kernels::{Family, LinearPlan, select};
use mixtral_model::DType;
use mixtral_testkit::cases::{self, Case};
use mixtral_testkit::large::{self, MIXTRAL_8X7B};

use crate::kernels::{Library, Machine};

/// Has cuBLASLt compute every linear that it can. Returns whether there is one.
fn with_cublaslt(program: &mut Program, family: Family) -> bool {
    let ladders: Vec<_> = program.ops.iter().map(|op| select::ladder(program, op, family, true)).collect();
    let plan = LinearPlan::CublasLt.to_string();
    let mut found = false;
    for (op, rungs) in program.ops.iter_mut().zip(ladders) {
        if let Op::Linear { ladder, .. } = op {
            found |= rungs.iter().any(|rung| rung.plan == plan);
            *ladder = rungs;
        }
    }
    found
}

fn load(
    program: &Program,
    weights: &mixtral_engine::Weights,
    kv: usize,
    library: &Library,
) -> Result<CudaBackend, BackendError> {
    let (kv_blocks, options) = (KvBlocks::Exactly(kv), CudaOptions::default());
    let executable = library.executable(program).map_err(BackendError::Other)?;
    CudaBackend::load(program.clone(), weights, &executable, kv_blocks, options)
}

/// Whether cuBLASLt is missing on this machine. If so, prints that the test is skipped.
fn is_missing(error: &BackendError) -> bool {
    let missing = error.to_string().starts_with("libcublasLt");
    if missing {
        println!("no cuBLASLt: skipped ({error})");
    }
    missing
}

#[test]
fn linears_by_cublaslt_are_within_their_limits() {
    let Some(machine) = Machine::find() else { return };
    for code in machine.codes() {
        let mut cases: Vec<Case> = [DType::F16, DType::Bf16].into_iter().flat_map(cases::long_linears).collect();
        for case in &mut cases {
            assert!(with_cublaslt(&mut case.assembly.program, code.family()), "{}", case.name);
        }
        let programs: Vec<_> = cases.iter().map(|case| &case.assembly.program).collect();
        let (library, failures) = machine.compile(code, &programs);
        assert!(failures.is_empty(), "{}", failures.join("\n"));
        for case in &cases {
            let loaded = load(&case.assembly.program, &case.weights(), case.kv_blocks, &library);
            if loaded.as_ref().err().is_some_and(is_missing) {
                return;
            }
            case.check(|_| loaded).unwrap_or_else(|failure| panic!("{code}: {failure}"));
        }
        println!("{code} on {}: {} of {} cases", machine.device.name, cases.len(), cases.len());
    }
}

/// The linears of Mixtral 8x7B, in steps of every size. Steps of up to 256 tokens keep their own kernels.
#[test]
fn large_linears_by_cublaslt_are_within_their_limits() {
    let Some(machine) = Machine::find() else { return };
    let code = *machine.codes().last().expect("a code");
    let mut passed = 0;
    for dtype in [DType::F16, DType::Bf16] {
        for mut case in large::of(MIXTRAL_8X7B, dtype) {
            if !with_cublaslt(&mut case.program, code.family()) {
                continue;
            }
            let (library, failures) = machine.compile(code, &[&case.program]);
            assert!(failures.is_empty(), "{}", failures.join("\n"));
            let mut backend = match load(&case.program, &case.weights(), case.kv_blocks, &library) {
                Err(error) if is_missing(&error) => return,
                loaded => loaded.unwrap_or_else(|error| panic!("{}: {error}", case.name)),
            };
            case.check(case.tolerance(), &mut backend).unwrap_or_else(|failure| panic!("{code}: {failure}"));
            passed += 1;
        }
    }
    // q/k/v and the attention's output, in both types. (The router is f32.)
    assert_eq!(passed, 4);
    println!("{code} on {}: {passed} of {passed} large cases", machine.device.name);
}
