//! What the last bits of sums do to a decoder's logits, and what one rounding to 8 bits does: why the limits of whole decoders are what
//! they are. This runs on the CPU alone.

use std::time::Duration;

use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_engine::{Backend, BackendError, Inspect, Op, Program, StepInputs, StepOutputs, dummy};
use mixtral_model::{DType, ElemType};

use crate::steps::{KV_BLOCKS, LENGTHS, WEIGHTS, decoders, nmse, run, sequences, together};

/// What is changed of what operations compute.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Change {
    Nothing,
    /// Every sum (of linears, attention and norms) by a random part of itself, at most 1e-7, as another order of adding changes it.
    EverySum,
    /// One element of the first layer's input by a tenth, so that it is rounded to a neighbour. It belongs to the first token of the
    /// long sequence.
    OneElement,
}

/// The CPU backend with a change.
struct Changed {
    cpu: CpuBackend,
    ops: Vec<Op>,
    change: Change,
    /// Elements that came by so far.
    elements: u64,
}

/// The sequence whose first element is changed, and the row of its first token in the first step.
const LONG: (usize, usize) = (5, 49);

impl Changed {
    /// Changes what operation `op` has written.
    fn disturb(&mut self, op: usize, inputs: &StepInputs<'_>) -> Result<(), BackendError> {
        use Op::{Attention, ExpertDown, ExpertGateUp, Linear, Norm};
        let sums = matches!(
            self.ops[op],
            Linear { .. } | ExpertGateUp { .. } | ExpertDown { .. } | Attention { .. } | Norm { .. }
        );
        for name in self.ops[op].writes().into_iter().filter(|_| sums && self.change != Change::Nothing) {
            let program = self.cpu.program();
            let Some(buffer) = program.buffer(name).filter(|buffer| buffer.dtype == ElemType::F32) else { continue };
            let rows = program.num_rows(buffer.rows, inputs.num_tokens(), inputs.num_logits());
            let one = (self.elements == 0).then_some(LONG.1 * buffer.cols + 3);
            let mut bytes = self.cpu.read_buffer(name, 4 * rows * buffer.cols)?;
            for (at, word) in bytes.as_chunks_mut().0.iter_mut().enumerate() {
                let part = match self.change {
                    // Elements are at most 510 times their scale.
                    Change::EverySum => dummy::element(dummy::key(1, "sums"), self.elements, 1e-7 / 510.0),
                    _ => {
                        if one == Some(at) {
                            0.1
                        } else {
                            0.0
                        }
                    }
                };
                *word = (f32::from_le_bytes(*word) * (1.0 + part)).to_le_bytes();
                self.elements += 1;
            }
            self.cpu.write_buffer(name, &bytes)?;
        }
        Ok(())
    }
}

impl Backend for Changed {
    fn step(&mut self, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        let mut outputs = StepOutputs::default();
        for op in 0..self.ops.len() {
            outputs = self.cpu.run_ops(op..op + 1, inputs)?;
            self.disturb(op, inputs)?;
        }
        Ok(outputs)
    }

    fn kv_blocks(&self) -> usize {
        self.cpu.kv_blocks()
    }

    fn expert_counts(&self) -> Vec<Vec<u64>> {
        self.cpu.expert_counts()
    }

    fn op_times(&self) -> Vec<Duration> {
        self.cpu.op_times()
    }
}

/// The logits of each position of each sequence.
fn logits(program: &Program, change: Change) -> Vec<Vec<Vec<f32>>> {
    let options = CpuOptions { kv_blocks: KV_BLOCKS, ..CpuOptions::default() };
    let cpu = CpuBackend::load(program.clone(), WEIGHTS, options).unwrap();
    let mut backend = Changed { cpu, ops: program.ops.clone(), change, elements: 0 };
    run(&mut backend, program, &sequences(program), &together())
}

#[test]
fn last_bits_matter_where_they_decide_a_rounding() {
    for (name, program) in decoders(DType::F32) {
        let exact = logits(&program, Change::Nothing);
        let errors = |change, of: &[usize]| {
            let found = logits(&program, change);
            let at = |s: &usize| found[*s].iter().zip(&exact[*s]).map(|(a, b)| nmse(a, b)).collect::<Vec<_>>();
            of.iter().flat_map(at).collect::<Vec<f64>>()
        };
        let quantiles = |errors: &[f64]| {
            let mut errors = errors.to_vec();
            errors.sort_by(f64::total_cmp);
            [errors[errors.len() / 10], errors[errors.len() / 2], errors[errors.len() - 1]]
        };
        let all: Vec<usize> = (0..LENGTHS.len()).collect();
        let [early, median, largest] = quantiles(&errors(Change::EverySum, &all));
        println!(
            "{name}: every sum by 1e-7: NMSE of a tenth of the positions {early:.1e}, median {median:.1e}, largest {largest:.1e}"
        );
        let rounds = program.weights.iter().any(|weight| weight.format.is_fp8());
        if !rounds && program.kv.format.is_plain() {
            assert!(largest < 1e-11, "{name}: {largest:e}");
            continue;
        }
        assert!(early < 1e-8 && largest > 1e-8, "{name}: {early:e}, {largest:e}");
        if rounds {
            // Two layers' windows of 70 tokens reach 138 positions further.
            let after = errors(Change::OneElement, &[LONG.0]);
            let [early, median, largest] = quantiles(&after[1..139]);
            println!(
                "{name}: one rounding: NMSE of a tenth of the later positions {early:.1e}, median {median:.1e}, largest {largest:.1e}"
            );
            assert!(early > 1e-8 && after[139..] == [0.0; 61], "{name}: {early:e}");
        }
    }
}
