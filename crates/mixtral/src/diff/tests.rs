//! Engines that are the same, and engines with one operation made wrong.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_engine::{Backend, BackendError, Inspect, Op, Program, StepInputs, StepOutputs, Weights};
use mixtral_model::DType;
use mixtral_testkit::batch::{self, Part};
use mixtral_testkit::decoder::{self, Geometry};

use super::difference::Tolerance;
use super::{Findings, Lockstep, find, same_operations};

const KV_BLOCKS: usize = 16;

/// A CPU backend that computes norm, router and routing together, as GPUs do, and rotation and attention. Of the latter it leaves the
/// queries as they were.
struct Coarse(CpuBackend);

impl Backend for Coarse {
    fn step(&mut self, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        self.0.step(inputs)
    }

    fn kv_blocks(&self) -> usize {
        self.0.kv_blocks()
    }

    fn expert_counts(&self) -> Vec<Vec<u64>> {
        self.0.expert_counts()
    }

    fn op_times(&self) -> Vec<Duration> {
        self.0.op_times()
    }
}

impl Inspect for Coarse {
    fn program(&self) -> &Program {
        self.0.program()
    }

    fn boundaries(&self) -> Vec<usize> {
        let ops = &self.program().ops;
        let inside = |at: usize| {
            let route = |at: usize| matches!(ops.get(at), Some(Op::Route { .. }));
            route(at) || route(at + 1) || matches!(ops.get(at), Some(Op::Attention { .. }))
        };
        (0..=ops.len()).filter(|&at| !inside(at)).collect()
    }

    fn run_ops(&mut self, ops: Range<usize>, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        let boundaries = self.boundaries();
        assert!(boundaries.contains(&ops.start) && boundaries.contains(&ops.end), "{ops:?}");
        let program = self.program();
        let queries = match &program.ops[ops.start] {
            Op::RopeWriteKv { qkv, .. } => {
                let len = program.max_bytes(program.buffer(qkv).unwrap());
                Some((qkv.clone(), self.0.read_buffer(qkv, len)?))
            }
            _ => None,
        };
        let outputs = self.0.run_ops(ops, inputs)?;
        if let Some((qkv, before)) = queries {
            self.0.write_buffer(&qkv, &before)?;
        }
        Ok(outputs)
    }

    fn read_buffer(&self, name: &str, len: usize) -> Result<Vec<u8>, BackendError> {
        self.0.read_buffer(name, len)
    }

    fn write_buffer(&mut self, name: &str, bytes: &[u8]) -> Result<(), BackendError> {
        self.0.write_buffer(name, bytes)
    }

    fn read_cache(&self, layer: usize) -> Result<[Vec<u8>; 2], BackendError> {
        self.0.read_cache(layer)
    }

    fn write_cache(&mut self, layer: usize, keys: &[u8], values: &[u8]) -> Result<(), BackendError> {
        self.0.write_cache(layer, keys, values)
    }
}

fn program(dtype: DType) -> Program {
    decoder::program(&Geometry { num_layers: 3, ..Geometry::small(dtype) }, true)
}

fn load(program: &Program, coarse: bool) -> Box<dyn Inspect> {
    let options = CpuOptions { kv_blocks: KV_BLOCKS, ..CpuOptions::default() };
    let backend = CpuBackend::load(program.clone(), Weights::Dummy { seed: 5 }, options).unwrap();
    if coarse { Box::new(Coarse(backend)) } else { Box::new(backend) }
}

/// Runs a prompt, a decode together with a prompt, and decodes. Returns the findings and the reference's outputs.
fn diff(
    a: (&Program, bool),
    b: (&Program, bool),
    first: Option<&str>,
    last: Option<&str>,
) -> (Findings, Vec<StepOutputs>) {
    same_operations(a.0, b.0).unwrap();
    let findings = Arc::new(Mutex::new(Findings::new(Tolerance { f32: 1e-10, half: 1e-5 })));
    let compared = find(a.0, first, last).unwrap();
    let mut both = Lockstep::new(load(a.0, a.1), load(b.0, b.1), compared, Arc::clone(&findings));
    let outputs = steps(a.0).iter().map(|inputs| both.step(inputs).unwrap()).collect();
    drop(both);
    (Arc::into_inner(findings).unwrap().into_inner().unwrap(), outputs)
}

fn steps(program: &Program) -> Vec<StepInputs<'static>> {
    let sequences = batch::sequences(3, &[20, 9], &program.limits, program.vocab_size, KV_BLOCKS);
    let steps = [vec![(0, 0, 17)], vec![(0, 17, 1), (1, 0, 7)], vec![(0, 18, 1), (1, 7, 1)]];
    let step = |parts: &Vec<(usize, usize, usize)>| {
        let part = |&(s, past, new): &(usize, usize, usize)| Part { sequence: &sequences[s], past, new };
        let mut inputs = batch::step(&program.limits, &parts.iter().map(part).collect::<Vec<_>>());
        inputs.samples = (0..inputs.num_logits()).map(batch::greedy).collect();
        inputs
    };
    steps.iter().map(step).collect()
}

/// Whether each of the two backends computes some operations together.
const COARSE: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

#[test]
fn equal_engines_do_not_differ_by_a_bit() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let a = program(dtype);
        // The same program, with every second buffer in another place.
        let mut b = a.clone();
        let shift = b.arena_bytes;
        b.buffers.iter_mut().step_by(2).for_each(|buffer| buffer.offset += shift);
        b.arena_bytes *= 2;
        let mut alone = load(&a, false);
        let expected: Vec<StepOutputs> = steps(&a).iter().map(|inputs| alone.step(inputs).unwrap()).collect();
        for (coarse_a, coarse_b) in COARSE {
            let (findings, outputs) = diff((&a, coarse_a), (&b, coarse_b), None, None);
            assert_eq!((findings.verdict(), findings.exceeded()), (None, 0));
            assert_eq!(outputs, expected, "the reference goes its own way");
            let json = findings.to_json();
            let rows = json["operations"].as_array().unwrap();
            assert!(rows.iter().all(|row| row["max"] == 0.0), "{json:#}");
            // Every buffer that is written, keys and values of each layer, and the tokens; rotated queries only where both say what they are.
            let written: usize = a.ops.iter().map(|op| op.writes().len()).sum();
            let rotated = if coarse_a || coarse_b { 3 } else { 0 };
            assert_eq!(rows.len(), written + 2 * 3 + 1 - rotated);
        }
    }
}

/// The operations that the verdict names when `change` was made to one engine.
fn named(change: impl Fn(&mut Program)) -> Vec<String> {
    let a = program(DType::Bf16);
    let mut b = a.clone();
    change(&mut b);
    let mut alone = load(&a, false);
    let expected: Vec<StepOutputs> = steps(&a).iter().map(|inputs| alone.step(inputs).unwrap()).collect();
    let of = |(coarse_a, coarse_b)| {
        let (findings, outputs) = diff((&a, coarse_a), (&b, coarse_b), None, None);
        assert_eq!(outputs, expected, "the reference goes its own way");
        let json = findings.to_json();
        let rows = json["operations"].as_array().unwrap();
        let wrong: Vec<&str> =
            rows.iter().filter(|r| r["exceeded"] != 0).map(|r| r["buffer"].as_str().unwrap()).collect();
        let verdict = findings.verdict().expect("a difference");
        assert!(verdict.contains(&format!("`{}`", wrong[0])), "{verdict}");
        wrong.join(" ")
    };
    COARSE.map(of).to_vec()
}

/// Other values for a weight.
fn other_weight(program: &mut Program, name: &str) {
    let weight = program.weights.iter_mut().find(|w| w.name == name).expect("a weight");
    weight.pieces[0].source += " of another model";
}

#[test]
fn a_wrong_operation_is_named_and_no_other() {
    let everywhere = |name: &str| vec![name.to_owned(); 4];
    assert_eq!(named(|p| other_weight(p, "1.qkv.weight")), everywhere("1.qkv"));
    assert_eq!(named(|p| other_weight(p, "1.fc.weight")), everywhere("1.gated"));
    assert_eq!(named(|p| other_weight(p, "2.proj.weight")), everywhere("2.down"));
    assert_eq!(named(|p| other_weight(p, "embed_tokens.weight")), everywhere("embedded"));
    let window = |p: &mut Program| {
        let attentions =
            p.ops.iter_mut().filter_map(|op| if let Op::Attention { window, .. } = op { Some(window) } else { None });
        attentions.skip(2).for_each(|window| *window = Some(3));
    };
    assert_eq!(named(window), everywhere("2.attended"));
    let theta = |p: &mut Program| {
        let thetas =
            p.ops.iter_mut().filter_map(|op| if let Op::RopeWriteKv { theta, .. } = op { Some(theta) } else { None });
        thetas.take(1).for_each(|theta| *theta *= 2.0);
    };
    let rotated = named(theta);
    assert_eq!(rotated[0], "0.qkv layer0.keys");
    assert_eq!(rotated[1..], vec!["layer0.keys 0.attended".to_owned(); 3]);
    // If both backends compute the router together with the operations after it, those are wrong too; else only the
    // router is.
    let mut router = named(|p| other_weight(p, "1.router.weight"));
    let together = router.pop().unwrap();
    assert_eq!(router, vec!["1.logits".to_owned(); 3]);
    assert!(together.starts_with("1.logits ") && together.contains("1.ids"), "{together}");
    let eps = |p: &mut Program| {
        let norms = p.ops.iter_mut().filter_map(|op| if let Op::Norm { eps, .. } = op { Some(eps) } else { None });
        norms.skip(2).take(1).for_each(|eps| *eps = 0.5);
    };
    assert_eq!(named(eps)[..3], vec!["1.post".to_owned(); 3]);
}

#[test]
fn operations_outside_of_the_range_are_not_compared() {
    let a = program(DType::F32);
    let mut b = a.clone();
    other_weight(&mut b, "1.qkv.weight");
    let verdict = |first, last| diff((&a, false), (&b, true), first, last).0.verdict().is_some();
    assert!(verdict(None, None) && verdict(Some("1.qkv"), Some("1.qkv")));
    assert!(!verdict(None, Some("0.next")) && !verdict(Some("1.attended"), None));
    assert!(verdict(None, Some("1.post")) && verdict(Some("3"), None));
    let refused = |first, last| find(&a, Some(first), Some(last)).unwrap_err().to_string();
    assert!(refused("1.qvk", "5").starts_with("there is no operation `1.qvk`"));
    assert!(refused("1.qkv", "0.qkv").starts_with("--stop names operation 2, which is before operation"));
}

#[test]
fn programs_of_other_operations_are_refused() {
    let a = program(DType::F32);
    let refused = |b: &Program| same_operations(&a, b).unwrap_err().to_string();
    let b = decoder::program(&Geometry { num_layers: 3, ..Geometry::small(DType::F32) }, false);
    assert!(refused(&b).contains("the other has no buffer"), "{}", refused(&b));
    assert!(refused(&program(DType::F16)).contains("the cache is f32 in the reference and f16 in the other"));
    let mut b = a.clone();
    b.ops.swap(0, 1);
    assert!(
        refused(&b)
            .contains("operation 0 is `embed` of `embedded` in the reference and `norm` of `normalized` in the other"),
        "{}",
        refused(&b)
    );
}

/// A program of the first layers alone computes the same as those layers do in the whole program.
#[test]
fn a_program_of_the_first_layers_is_the_beginning_of_the_whole() {
    let whole = program(DType::Bf16);
    let short = whole.first_layers(2).unwrap();
    short.check().unwrap();
    assert!(short.weight_bytes() < whole.weight_bytes() && short.kv.num_layers == 2);
    let expected = decoder::program(&Geometry { num_layers: 2, ..Geometry::small(DType::Bf16) }, true);
    assert_eq!(short.ops.len(), expected.ops.len());
    let inputs = &steps(&whole)[0];
    let (mut a, mut b) = (load(&whole, false), load(&short, false));
    let end = short.ops.iter().position(|op| matches!(op, Op::GatherRows { .. })).unwrap();
    a.run_ops(0..end, inputs).unwrap();
    b.step(inputs).unwrap();
    let cache = |backend: &dyn Inspect| [0, 1].map(|layer| backend.read_cache(layer).unwrap());
    assert_eq!(cache(a.as_ref()), cache(b.as_ref()));
    let hidden = |name: &str, backend: &dyn Inspect| backend.read_buffer(name, 17 * 40 * 2).unwrap();
    assert_eq!(hidden("embedded", a.as_ref()), hidden("embedded", b.as_ref()));
    assert_eq!(whole.first_layers(3).unwrap(), whole);
    assert!(whole.first_layers(4).is_err() && whole.first_layers(0).is_err());
}

#[test]
fn a_step_that_breaks_a_rule_reaches_no_backend() {
    let program = program(DType::F32);
    let findings = Arc::new(Mutex::new(Findings::new(Tolerance { f32: 1e-10, half: 1e-5 })));
    let compared = find(&program, None, None).unwrap();
    let mut both = Lockstep::new(load(&program, false), load(&program, true), compared, findings);
    let changes: [fn(&mut StepInputs<'static>); 3] =
        [|i| i.block_table[0] = -1, |i| i.positions[0] += 1, |i| i.slot_mapping[1] += 1];
    for change in changes {
        let mut inputs = steps(&program).swap_remove(1);
        change(&mut inputs);
        // What a backend says comes with its name and an operation's.
        assert!(matches!(both.step(&inputs), Err(BackendError::Inputs(_))));
    }
}
