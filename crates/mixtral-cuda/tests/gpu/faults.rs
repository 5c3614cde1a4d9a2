//! A GPU that fails in the middle of a step, and kernels that it cannot take.

use std::process::Command;

use mixtral_cuda::{CudaBackend, CudaOptions, KvBlocks};
use mixtral_engine::{Backend as _, Weights};
use mixtral_kernels::Compiled;
use mixtral_model::DType;
use mixtral_testkit::batch::{self, Part};
use mixtral_testkit::decoder::{self, Geometry};

use crate::kernels::Machine;

/// Set in the process whose GPU context will be lost. That process can do nothing else afterwards.
const CHILD: &str = "MIXTRAL_TRAP";

#[test]
fn a_kernel_that_traps_is_an_error_with_its_step() {
    if std::env::var_os(CHILD).is_none() {
        let test = "faults::a_kernel_that_traps_is_an_error_with_its_step";
        let mut child = Command::new(std::env::current_exe().unwrap());
        let output = child.args(["--exact", test, "--nocapture"]).env(CHILD, "1").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        print!("{said}");
        assert!(output.status.success(), "{}", output.status);
        return;
    }
    let Some(machine) = Machine::find() else { return };
    let program = decoder::program(&Geometry::small(DType::F32), true);
    let sequences = batch::sequences(3, &[5], &program.limits, program.vocab_size, 8);
    let mut inputs = batch::step(&program.limits, &[Part { sequence: &sequences[0], past: 0, new: 5 }]);
    inputs.samples = (0..inputs.num_logits()).map(batch::greedy).collect();
    let code = machine.codes()[0];
    let (library, failures) = machine.compile(code, &[&program]);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let load = |library: &crate::kernels::Library| {
        let (kv_blocks, options) = (KvBlocks::Exactly(8), CudaOptions::default());
        let executable = library.executable(&program).unwrap();
        CudaBackend::load(program.clone(), &Weights::Dummy { seed: 5 }, &executable, kv_blocks, options).unwrap()
    };
    load(&library).step(&inputs).unwrap();

    let mut backend = load(&library.with("moe::combine", &machine.trap(code, &program, "moe::combine")));
    // The driver says so when the step is waited for, or before that if the device was quick.
    inputs.return_logits = false;
    let first = backend.launch(&inputs).and_then(|_| backend.collect()).unwrap_err().to_string();
    println!("{first}");
    assert!(first.starts_with("the GPU failed in step "), "{first}");
    assert!(first.contains("context is lost") && first.contains("compute-sanitizer"), "{first}");
    // The next step fails with an error as well, and dropping the backend does not panic.
    let again = backend.step(&inputs).unwrap_err().to_string();
    assert!(again.contains("context is lost"), "{again}");
}

#[test]
fn kernels_of_a_newer_cuda_are_refused() {
    let Some(machine) = Machine::find() else { return };
    let program = decoder::program(&Geometry::small(DType::F32), true);
    let code = machine.codes()[0];
    let (library, failures) = machine.compile(code, &[&program]);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let text = ".version 99.9\n.target sm_90\n.address_size 64\n.visible .entry newer() { ret; }\n\0";
    let newer = Compiled {
        image: text.as_bytes().to_vec(),
        entry: "newer".to_owned(),
        resources: None,
        defects: vec![],
        log: String::new(),
    };
    let executable = library.with("moe::combine", &newer).executable(&program).unwrap();
    let (kv_blocks, options) = (KvBlocks::Exactly(8), CudaOptions::default());
    let loaded = CudaBackend::load(program, &Weights::Dummy { seed: 5 }, &executable, kv_blocks, options);
    let error = loaded.err().expect("no driver knows PTX 99.9").to_string();
    println!("{error}");
    assert!(error.contains("cannot load the kernels of this engine") && error.contains("newer driver"), "{error}");
}
