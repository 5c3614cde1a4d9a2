//! Steps that break the rules of their inputs are refused before anything is launched. No GPU is needed: this test
//! starts itself again with the mock driver of the end-to-end tests, on which kernels do nothing.

use std::process::Command;

use mixtral_cuda::{CudaBackend, CudaOptions, KvBlocks};
use mixtral_engine::{Backend as _, BackendError, StepInputs, Weights};
use mixtral_kernels::{Arch, Code, Compiled, Executable, Family, KernelImages, Schedule, Target};
use mixtral_model::DType;
use mixtral_testkit::batch;
use mixtral_testkit::decoder::{self, Geometry};

/// Set in the process that runs with the mock driver.
const CHILD: &str = "MIXTRAL_TEST_WITH_DRIVER";

#[test]
fn a_step_that_breaks_the_rules_is_refused() {
    if std::env::var_os(CHILD).is_some() {
        return with_driver();
    }
    if !cfg!(target_os = "linux") {
        return println!("skipped: a driver of the tests, which needs Linux");
    }
    let folder = tempfile::tempdir().unwrap();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/e2e/libcuda.c");
    let library = folder.path().join("libcuda.so.1");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(library).arg(source).status();
    assert!(built.expect("there is a C compiler").success(), "libcuda.c compiles");
    let test = std::env::current_exe().unwrap();
    let mut child = Command::new(test);
    child.args(["--exact", "a_step_that_breaks_the_rules_is_refused", "--nocapture"]);
    let output = child.env(CHILD, "1").env("LD_LIBRARY_PATH", folder.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("refused all"), "{said}");
}

fn with_driver() {
    let program = decoder::program(&Geometry::small(DType::F32), true);
    let schedule = Schedule::new(&program, Target { family: Family::Portable }).unwrap();
    let nothing =
        Compiled { image: vec![0; 64], entry: "none".to_owned(), resources: None, defects: vec![], log: String::new() };
    let kernels = schedule.kernels().into_iter().map(|kernel| (kernel, &nothing));
    let images = KernelImages::new(Code::Sass(Arch::BASE), kernels);
    let executable = Executable { schedule, images };
    let (kv_blocks, options) = (KvBlocks::Exactly(20), CudaOptions::default());
    let load =
        || CudaBackend::load(program.clone(), &Weights::Dummy { seed: 0 }, &executable, kv_blocks, options).unwrap();
    let mut backend = load();
    let good = batch::prompt(&program.limits, program.vocab_size, 20, 5);
    backend.step(&good).unwrap();
    let changes: [fn(&mut StepInputs<'static>); 6] = [
        |inputs| inputs.block_table[0] = -1,
        |inputs| inputs.block_table[0] = 20,
        |inputs| inputs.positions[2] = 3,
        |inputs| inputs.positions[2] = -1,
        |inputs| inputs.slot_mapping[2] = -1,
        |inputs| inputs.slot_mapping[2] += 1,
    ];
    for change in changes {
        let mut inputs = good.clone();
        change(&mut inputs);
        let error = backend.step(&inputs).unwrap_err();
        assert!(matches!(error, BackendError::Inputs(_)), "{error}");
    }
    // A refused step changes nothing: the next one runs.
    backend.step(&good).unwrap();
    println!("refused all");
}
