//! Every case of the registry, on every instruction set, with one thread and with several.

use mixtral_cpu::{CpuBackend, CpuOptions, Isa};
use mixtral_engine::{Backend as _, BackendError, StepInputs, StepOutputs};
use mixtral_testkit::cases::{self, Case, OpRunner};

struct Runner(CpuBackend);

impl OpRunner for Runner {
    fn write_buffer(&mut self, name: &str, bytes: &[u8]) -> Result<(), BackendError> {
        self.0.write_buffer(name, bytes)
    }

    fn read_buffer(&self, name: &str, len: usize) -> Result<Vec<u8>, BackendError> {
        Ok(self.0.buffer_bytes(name).expect("a buffer of the program")[..len].to_vec())
    }

    fn write_cache(&mut self, layer: usize, keys: &[u8], values: &[u8]) -> Result<(), BackendError> {
        let (k, v) = self.0.cache_bytes_mut(layer).expect("a layer of the program");
        k.copy_from_slice(keys);
        v.copy_from_slice(values);
        Ok(())
    }

    fn read_cache(&self, layer: usize) -> Result<[Vec<u8>; 2], BackendError> {
        let (keys, values) = self.0.cache_bytes(layer).expect("a layer of the program");
        Ok([keys.to_vec(), values.to_vec()])
    }

    fn run(&mut self, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        self.0.step(inputs)
    }
}

fn load(case: &Case, isa: Isa, threads: usize) -> Result<Runner, BackendError> {
    let options = CpuOptions { kv_blocks: case.kv_blocks, threads, isa: Some(isa), ..CpuOptions::default() };
    CpuBackend::load(case.assembly.program.clone(), case.weights(), options).map(Runner)
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
