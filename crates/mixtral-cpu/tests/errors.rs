//! What the backend refuses, and with which messages.

use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_engine::{
    Backend as _, BackendError, Epilogue, Inspect as _, Op, Program, Rows, ScoreRequest, Scored, StepInputs, Weights,
};
use mixtral_model::{DType, TokenId};
use mixtral_testkit::assembly::Assembly;
use mixtral_testkit::batch;
use mixtral_testkit::decoder::{self, Geometry};

const OPTIONS: CpuOptions = CpuOptions { kv_blocks: 20, threads: 2, count_experts: false, time_ops: false, isa: None };

fn small() -> Program {
    decoder::program(&Geometry::small(DType::F32), true)
}

fn refused(program: Program, weights: Weights, options: CpuOptions) -> BackendError {
    CpuBackend::load(program, weights, options).err().expect("to be refused")
}

/// One linear, and its weights.
fn linear() -> Assembly {
    let mut a = Assembly::new(DType::F32);
    let weight = a.weight("w", DType::F32, &[4, 3], &[0.5; 12]);
    let (input, out) = (a.activation("x", Rows::Tokens, 3), a.activation("y", Rows::Tokens, 4));
    a.op(Op::Linear { input, weight, rows: None, epilogue: Epilogue::Store, residual: None, out, ladder: vec![] });
    a.place_apart();
    a
}

#[test]
fn a_missing_weight_is_named() {
    let mut a = linear();
    a.weights.remove("w");
    let error = refused(a.program, a.weights.into_weights(), OPTIONS).to_string();
    assert_eq!(error, "the weight file has no tensor `w`; the engine is incomplete, build it again");
}

#[test]
fn a_weight_of_another_type_shape_or_size_is_named() {
    for (dtype, shape, bytes) in [(DType::F16, [4, 3], 24), (DType::F32, [3, 4], 48), (DType::F32, [4, 3], 47)] {
        let mut a = linear();
        a.weights.insert("w", dtype, &shape, vec![0; bytes]);
        let error = refused(a.program, a.weights.into_weights(), OPTIONS).to_string();
        let expected = format!(
            "weight `w` is {dtype} {shape:?} of {bytes} bytes, but the program expects f32 [4, 3] of 48 bytes; the \
             engine's files do not belong together, build it again"
        );
        assert_eq!(error, expected);
    }
}

#[test]
fn a_program_that_breaks_its_rules_is_refused() {
    let mut a = linear();
    a.program.buffers[0].cols = 5;
    let error = refused(a.program, a.weights.into_weights(), OPTIONS).to_string();
    assert_eq!(error, "program: operation 0 (linear): columns: found 5, expected 3");
}

#[test]
fn operands_in_the_same_memory_are_refused() {
    let mut a = linear();
    let y = a.program.buffers.iter().position(|b| b.name == "y").unwrap();
    a.program.buffers[y].offset = 0;
    let error = refused(a.program, a.weights.into_weights(), OPTIONS).to_string();
    assert_eq!(error, "program: buffers `x` and `y` overlap in the arena, and operation 0 (linear) needs both");
}

#[test]
fn memory_that_cannot_be_had_is_an_error() {
    let enormous = CpuOptions { kv_blocks: 1 << 40, ..OPTIONS };
    let error = refused(small(), Weights::Dummy { seed: 0 }, enormous);
    assert!(matches!(error, BackendError::OutOfMemory { what: "the KV cache", .. }), "{error}");
    let overflowing = CpuOptions { kv_blocks: usize::MAX, ..OPTIONS };
    let error = refused(small(), Weights::Dummy { seed: 0 }, overflowing);
    assert!(matches!(error, BackendError::OutOfMemory { what: "the KV cache", .. }), "{error}");
    let mut program = small();
    program.arena_bytes = 1 << 50;
    let error = refused(program, Weights::Dummy { seed: 0 }, OPTIONS);
    assert!(
        matches!(error, BackendError::OutOfMemory { what: "the arena", needed: 0x4_0000_0000_0000, .. }),
        "{error}"
    );
    let mut a = linear();
    a.declare("vast", DType::F32, &[1 << 24, 1 << 24, 1 << 8]);
    let error = refused(a.program, Weights::Dummy { seed: 0 }, OPTIONS);
    assert!(matches!(error, BackendError::OutOfMemory { what: "the dummy weights", .. }), "{error}");
    // A program with a weight whose number of bytes overflows does not pass its check.
    let mut a = linear();
    a.declare("vaster", DType::F32, &[1 << 24, 1 << 24, 1 << 24]);
    let error = refused(a.program, Weights::Dummy { seed: 0 }, OPTIONS).to_string();
    assert!(error.starts_with("program: a weight's number of elements is "), "{error}");
}

#[test]
fn a_step_over_the_limits_is_refused() {
    let mut backend = CpuBackend::load(small(), Weights::Dummy { seed: 0 }, OPTIONS).unwrap();
    let limits = backend.program().limits;
    let inputs = batch::prompt(&limits, 61, 20, limits.max_num_tokens + 1);
    let error = backend.step(&inputs).unwrap_err();
    assert!(matches!(error, BackendError::Inputs(_)), "{error}");
    let mut inputs = batch::prompt(&limits, 61, 20, 5);
    inputs.slot_mapping[4] = 20 * 16;
    let error = backend.step(&inputs).unwrap_err();
    assert_eq!(error.to_string(), "step input `slot_mapping`[4] is 320, expected -1 to 319");
    let changes: [fn(&mut StepInputs<'static>); 6] = [
        |inputs| inputs.block_table[0] = -1,
        |inputs| inputs.block_table[0] = 20,
        |inputs| inputs.positions[2] = 3,
        |inputs| inputs.positions[2] = -1,
        |inputs| inputs.slot_mapping[2] = -1,
        |inputs| inputs.slot_mapping[2] += 1,
    ];
    for change in changes {
        let mut inputs = batch::prompt(&limits, 61, 20, 5);
        change(&mut inputs);
        let error = backend.step(&inputs).unwrap_err();
        assert!(matches!(error, BackendError::Inputs(_)), "{error}");
    }
    // A refused step changes nothing: the next one runs.
    assert!(backend.step(&batch::prompt(&limits, 61, 20, 5)).is_ok());
}

#[test]
fn logits_that_are_not_finite_are_told_by_row() {
    let program = small();
    let mut backend = CpuBackend::load(program, Weights::Dummy { seed: 0 }, OPTIONS).unwrap();
    let mut inputs = batch::prompt(&backend.program().limits, 61, 20, 5);
    inputs.samples = [0, 4].map(batch::greedy).to_vec();
    backend.step(&inputs).unwrap();
    // Overwrites the logits of the second draw after the last linear has written them.
    let last = backend.program().ops.len() - 1;
    let mut logits: Vec<f32> = vec![1.0; 5 * 64];
    logits[4 * 64 + 60] = f32::NAN;
    // Columns behind the vocabulary are padding, so their contents do not matter.
    logits[61] = f32::INFINITY;
    let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    backend.write_buffer("vocabulary", &bytes).unwrap();
    inputs.scores = [Scored::Draw(0), Scored::Draw(1)].map(|of| ScoreRequest { of, best: 0 }).to_vec();
    let outputs = backend.run_ops(last..last + 1, &inputs).unwrap();
    // The first draw is as if nothing had happened.
    assert_eq!(outputs.tokens[0], TokenId(0));
    assert!((outputs.scores[0].logprob + 61f32.ln()).abs() < 1e-6);
    let [wrong] = outputs.non_finite[..] else { panic!("{:?}", outputs.non_finite) };
    assert_eq!((wrong.row, wrong.token), (4, 60));
}

#[test]
fn ranges_and_names_outside_the_program_are_refused() {
    let mut backend = CpuBackend::load(small(), Weights::Dummy { seed: 0 }, OPTIONS).unwrap();
    let inputs = batch::prompt(&backend.program().limits, 61, 20, 5);
    assert!(backend.run_ops(0..1000, &inputs).is_err());
    assert!(backend.write_buffer("nothing", &[]).is_err());
    assert!(backend.write_buffer("embedded", &vec![0; 1 << 20]).is_err());
    assert!(backend.read_buffer("nothing", 0).is_err() && backend.read_cache(2).is_err());
}

#[test]
fn expert_lists_that_are_none_are_refused() {
    let mut backend = CpuBackend::load(small(), Weights::Dummy { seed: 0 }, OPTIONS).unwrap();
    let inputs = batch::prompt(&backend.program().limits, 61, 20, 5);
    let down = backend.program().ops.iter().position(|op| matches!(op, Op::ExpertDown { .. })).unwrap();
    for (offsets, order) in
        [([0, 10, 10, 10, 10, 10], [0; 10]), ([0, 11, 11, 11, 11, 11], [1; 10]), ([0, 1, 1, 1, 1, 1], [99; 10])]
    {
        let bytes = |ints: &[i32]| -> Vec<u8> { ints.iter().flat_map(|x| x.to_le_bytes()).collect() };
        backend.write_buffer("0.offsets", &bytes(&offsets)).unwrap();
        backend.write_buffer("0.order", &bytes(&order)).unwrap();
        let error = backend.run_ops(down..down + 1, &inputs).unwrap_err().to_string();
        assert!(error.starts_with("the expert lists "), "{error}");
    }
}
