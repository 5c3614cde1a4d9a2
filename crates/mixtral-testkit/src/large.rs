//! Operations at the sizes of real models. Each has a program of its own and steps to run on it. Its weights are dummy
//! ones, which backends generate themselves. A random part of the outputs is compared with f64.

use mixtral_engine::op::FusedNorm;
use mixtral_engine::{BackendError, Epilogue, Inspect, KvScale, Op, Program, Rows, StepInputs, Weights};
use mixtral_model::{CacheFormat, DType, ElemType, MoeNormalization};

use crate::assembly::{Assembly, GUARD_BYTES};
use crate::batch::{self, Part};
use crate::cases::{Failure, lists};
use crate::decoder::weight;
use crate::elements::{from_bytes, ints_from_bytes, ints_to_bytes};
use crate::poison::{poison, sentinel};
use crate::sampled::{Contents, SEED, Sampled, Views, seeded};
use crate::tolerance::Tolerance;

/// A model's sizes.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// What it is called.
    pub name: &'static str,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of an expert.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Experts.
    pub num_experts: usize,
    /// Experts a token.
    pub top_k: usize,
    /// Vocabulary.
    pub vocab_size: usize,
    /// Tokens that each of attention's sequences has in the cache.
    pub contexts: [usize; 4],
}

/// Mixtral 8x7B.
pub const MIXTRAL_8X7B: Model = Model {
    name: "8x7B",
    hidden_size: 4096,
    intermediate_size: 14336,
    num_heads: 32,
    num_kv_heads: 8,
    head_dim: 128,
    num_experts: 8,
    top_k: 2,
    vocab_size: 32000,
    contexts: [1, 4095, 4097, 32768],
};

/// Mixtral 8x22B: six query heads share one head of keys and values.
pub const MIXTRAL_8X22B: Model = Model {
    name: "8x22B",
    hidden_size: 6144,
    intermediate_size: 16384,
    num_heads: 48,
    vocab_size: 32768,
    ..MIXTRAL_8X7B
};

/// Groups of three heads, and a number of experts that is no power of two.
pub const ODD: Model = Model { name: "odd", num_heads: 24, num_experts: 5, ..MIXTRAL_8X7B };

/// No real model. A machine without a GPU computes it in a moment.
pub const SMALL: Model = Model {
    name: "small",
    hidden_size: 192,
    intermediate_size: 320,
    num_heads: 6,
    num_kv_heads: 2,
    head_dim: 32,
    num_experts: 8,
    top_k: 2,
    vocab_size: 500,
    contexts: [1, 127, 129, 600],
};

/// An operation (or a few that backends compute together), and steps to run on it.
#[derive(Clone, Debug)]
pub struct Large {
    /// Operation, model and data type.
    pub name: String,
    /// The program. Buffers lie apart, with a guard behind each. Weights are dummy ones.
    pub program: Program,
    /// Blocks of the cache.
    pub kv_blocks: usize,
    /// Whether the operation's CTAs exchange data through memory. Such steps are repeated often, to find races.
    racy: bool,
    steps: Vec<StepCase>,
}

/// One step's inputs.
#[derive(Clone, Debug)]
struct StepCase {
    name: String,
    inputs: StepInputs<'static>,
    /// Contents of integer buffers. The contents of other buffers are seeded.
    ints: Vec<(String, Vec<i32>)>,
}

/// How often a step is run. The first number is for racy operations: for their last step, and for steps that write
/// little. The second is for all other steps.
const REPEATS: [usize; 2] = [100, 2];
/// A step that writes at most this many bytes writes little.
const LITTLE: usize = 1 << 20;

/// Tokens of a step with a prompt: more than the last rung has.
const PREFILL: usize = 720;
/// Tokens of the steps of linears and experts. The last step is repeated often.
const TOKENS: [usize; 6] = [1, 8, 256, 300, PREFILL, 64];
/// Tokens of the steps of routing. For the longest, several CTAs make the expert lists.
const ROUTED: [usize; 6] = [1, 8, 64, 300, 2100, PREFILL];

/// All operations of 8x7B and 8x22B in bf16 and f16, and those operations of an odd model that depend on heads or
/// experts.
pub fn all() -> impl Iterator<Item = Large> {
    let real = [MIXTRAL_8X7B, MIXTRAL_8X22B].into_iter();
    let odd = [attention, attention_fp8, attention_in_fp8, route, router, expert_gate_up, expert_down]
        .map(|case| case(&ODD, DType::Bf16));
    real.flat_map(|model| [DType::Bf16, DType::F16].into_iter().flat_map(move |dtype| of(model, dtype))).chain(odd)
}

/// All operations of a model.
pub fn of(model: Model, dtype: DType) -> impl Iterator<Item = Large> {
    let cases: [fn(&Model, DType) -> Large; 17] = [
        embed,
        norm,
        add,
        silu_mul,
        gather_rows,
        qkv,
        dense,
        lm_head,
        rope_write_kv,
        attention,
        attention_fp8,
        attention_in_fp8,
        route,
        router,
        expert_gate_up,
        expert_down,
        combine,
    ];
    cases.into_iter().map(move |case| case(&model, dtype))
}

fn text(name: &str) -> String {
    name.to_owned()
}

/// A program with a model's sizes, without operations.
fn assembly(model: &Model, dtype: DType, max_num_tokens: usize) -> Assembly {
    let mut a = Assembly::new(dtype);
    let p = &mut a.program;
    (p.vocab_size, p.num_experts, p.top_k) = (model.vocab_size, model.num_experts, model.top_k);
    let limits = &mut p.limits;
    (limits.max_batch_size, limits.max_num_tokens, limits.max_num_logits) = (8, max_num_tokens, 1);
    (limits.max_seq_len, limits.block_size) = (max_num_tokens, 64);
    a
}

impl Large {
    fn new(op: &str, model: &Model, mut a: Assembly, steps: Vec<StepCase>) -> Large {
        a.place_apart();
        let blocks = steps.iter().flat_map(|step| step.inputs.block_table.iter().max()).max();
        let kv_blocks = blocks.map_or(1, |&last| usize::try_from(last).expect("a block") + 1);
        let name = format!("{op} of {} in {}", model.name, a.program.dtype);
        Large { name, program: a.program, kv_blocks, racy: false, steps }
    }

    fn racy(mut self) -> Self {
        self.racy = true;
        self
    }

    /// Where backends get its weights.
    #[must_use]
    pub fn weights(&self) -> Weights {
        Weights::Dummy { seed: SEED }
    }

    /// How far a backend may be off. The f32 sums of thousands of products have errors, and such an error can round a
    /// result to the neighbouring value. An f16 is eight times as fine as a bf16, so this happens eight times as often.
    #[must_use]
    pub fn tolerance(&self) -> Tolerance {
        let usual = Tolerance::of(&self.program);
        let half_unequal: f64 = if self.program.dtype == DType::F16 { 0.08 } else { 0.01 };
        Tolerance { half_unequal: half_unequal.max(usual.half_unequal), ..usual }
    }

    /// Runs every step several times, and compares the first run with f64 and all others with the first.
    ///
    /// # Errors
    /// What the backend refused, or the first value out of its limits.
    pub fn check(&self, tolerance: Tolerance, backend: &mut impl Inspect) -> Result<(), Failure> {
        let cache = self.cache();
        for (index, step) in self.steps.iter().enumerate() {
            let case = format!("{}, {}", self.name, step.name);
            let given = self.given(step);
            let refused = |error| Failure::Backend { case: case.clone(), error };
            let wrong = |what: &str, problem| Failure::Wrong { case: case.clone(), what: text(what), problem };
            let found = self.run(step, &given, &cache, true, backend).map_err(refused)?;
            let little = found.values().map(Vec::len).sum::<usize>() <= LITTLE;
            let often = self.racy && (little || index + 1 == self.steps.len());
            for round in 1..if often { REPEATS[0] } else { REPEATS[1] } {
                let again = self.run(step, &given, &cache, false, backend).map_err(refused)?;
                if let Some(name) = found.keys().find(|name| found[*name] != again[*name]) {
                    return Err(wrong(name, format!("run {round} gave other bits")));
                }
            }
            self.compare(step, &given, &cache, &found, tolerance).map_err(|(what, problem)| wrong(&what, problem))?;
            for buffer in self.program.buffers.iter().filter(|b| b.name.starts_with("guard behind")) {
                if backend.read_buffer(&buffer.name, GUARD_BYTES).map_err(refused)? != sentinel(GUARD_BYTES) {
                    return Err(wrong(&buffer.name, text("was written")));
                }
            }
        }
        Ok(())
    }

    /// Bytes of a buffer in a step.
    fn len(&self, name: &str, step: &StepCase) -> usize {
        let buffer = self.program.buffer(name).expect("a buffer");
        let (tokens, logits) = (step.inputs.num_tokens(), step.inputs.num_logits());
        self.program.num_rows(buffer.rows, tokens, logits) * buffer.cols * buffer.dtype.size()
    }

    /// Contents of the buffers that the program reads before it writes them.
    fn given(&self, step: &StepCase) -> Contents {
        let (mut given, mut made) = (Contents::new(), Vec::new());
        for op in &self.program.ops {
            for name in op.reads() {
                if made.contains(&name) || given.contains_key(name) {
                    continue;
                }
                let dtype = self.program.buffer(name).expect("a buffer").dtype;
                let bytes = match dtype.float() {
                    Some(dtype) => {
                        let n = self.len(name, step) / dtype.size();
                        seeded(&format!("{} {name}", step.name), n, dtype.into())
                    }
                    None => {
                        let (_, ints) = step.ints.iter().find(|(other, _)| other == name).expect("integers");
                        ints_to_bytes(ints)
                    }
                };
                given.insert(text(name), bytes);
            }
            made.extend(op.writes());
        }
        given
    }

    /// Keys and values, if the program has attention.
    fn cache(&self) -> Contents {
        let reads = self.program.ops.iter().any(|op| matches!(op, Op::Attention { .. }));
        let kv = self.program.kv;
        let n = self.kv_blocks * kv.num_kv_heads * self.program.limits.block_size * kv.head_dim;
        let halves = ["cache k", "cache v"].into_iter().filter(|_| reads);
        halves.map(|half| (text(half), seeded(half, n, kv.elem()))).collect()
    }

    /// Runs a step and returns what it wrote. Before the first run everything is poisoned and the cache is written.
    /// Before the others, only those operands that the step has changed are written again.
    fn run(
        &self,
        step: &StepCase,
        given: &Contents,
        cache: &Contents,
        first: bool,
        backend: &mut impl Inspect,
    ) -> Result<Contents, BackendError> {
        if first {
            for buffer in &self.program.buffers {
                let guard = buffer.name.starts_with("guard behind");
                let mut bytes = if guard { sentinel(GUARD_BYTES) } else { vec![0; self.program.max_bytes(buffer)] };
                if !guard {
                    poison(&mut bytes);
                }
                backend.write_buffer(&buffer.name, &bytes)?;
            }
            if let (Some(keys), Some(values)) = (cache.get("cache k"), cache.get("cache v")) {
                backend.write_cache(0, keys, values)?;
            }
        }
        let written: Vec<&str> = self.program.ops.iter().flat_map(Op::writes).collect();
        for (name, bytes) in given.iter().filter(|(name, _)| first || written.contains(&name.as_str())) {
            backend.write_buffer(name, bytes)?;
        }
        backend.step(&step.inputs)?;
        let mut found = Contents::new();
        for name in written {
            found.insert(text(name), backend.read_buffer(name, self.len(name, step))?);
        }
        if self.program.ops.iter().any(|op| matches!(op, Op::RopeWriteKv { .. })) {
            let halves = ["cache k", "cache v"].into_iter().zip(backend.read_cache(0)?);
            found.extend(halves.map(|(half, bytes)| (text(half), bytes)));
        }
        Ok(found)
    }

    /// Compares each operation's outputs with those that f64 arithmetic gives for the same operands. The operands are
    /// the given ones, or outputs of the backend's earlier operations.
    fn compare(
        &self,
        step: &StepCase,
        given: &Contents,
        cache: &Contents,
        found: &Contents,
        tolerance: Tolerance,
    ) -> Result<(), (String, String)> {
        let both = given.iter().chain(cache);
        let mut operands: Views<'_> = both.map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        for op in &self.program.ops {
            let sampled = Sampled { program: &self.program, inputs: &step.inputs, operands: &operands, found };
            for sample in sampled.run(op) {
                let fails = |problem| (sample.name.clone(), problem);
                let (indices, expected): (Vec<usize>, Vec<f64>) = sample.points.iter().copied().unzip();
                let bytes = &found[&sample.name];
                let Some(dtype) = sample.dtype.float() else {
                    let all: Vec<f64> = ints_from_bytes(bytes).into_iter().map(f64::from).collect();
                    let wrong = indices.iter().zip(&expected).find(|&(&i, x)| all[i].to_bits() != x.to_bits());
                    match wrong {
                        Some((&i, x)) => return Err(fails(format!("element {i} is {}, expected {x}", all[i]))),
                        None => continue,
                    }
                };
                let size = dtype.size();
                let values: Vec<u8> = indices.iter().flat_map(|&i| &bytes[i * size..][..size]).copied().collect();
                tolerance.close(&from_bytes(dtype, &values), &expected, dtype).map_err(fails)?;
                // Elements that are not compared must at least have been written.
                let unwritten = bytes.chunks_exact(size).position(|element| element.iter().all(|&b| b == 0xff));
                if let Some(element) = unwritten {
                    return Err(fails(format!("element {element} was not written")));
                }
            }
            operands.extend(op.writes().into_iter().map(|name| (name, found[name].as_slice())));
        }
        Ok(())
    }
}

/// Steps of one prompt each.
fn prompts(a: &Assembly, tokens: &[usize]) -> Vec<StepCase> {
    let p = &a.program;
    let step = |&n: &usize| {
        let inputs = batch::prompt(&p.limits, p.vocab_size, p.limits.blocks_for(n), n);
        StepCase { name: format!("{n} tokens"), inputs, ints: Vec::new() }
    };
    tokens.iter().map(step).collect()
}

fn embed(model: &Model, dtype: DType) -> Large {
    let mut a = assembly(model, dtype, PREFILL);
    let table = weight(&mut a, "table", dtype, &[model.vocab_size, model.hidden_size]);
    let out = a.activation("out", Rows::Tokens, model.hidden_size);
    a.op(Op::Embed { table, vocab_start: 0, out });
    let steps = prompts(&a, &[1, PREFILL]);
    Large::new("embed", model, a, steps)
}

fn norm(model: &Model, dtype: DType) -> Large {
    let mut a = assembly(model, dtype, PREFILL);
    let scale = weight(&mut a, "scale", dtype, &[model.hidden_size]);
    let input = a.activation("x", Rows::Tokens, model.hidden_size);
    let out = a.activation("out", Rows::Tokens, model.hidden_size);
    a.op(Op::Norm { input, weight: scale, eps: 1e-5, out });
    let steps = prompts(&a, &[1, 8, PREFILL]);
    Large::new("norm", model, a, steps)
}

fn add(model: &Model, dtype: DType) -> Large {
    let mut a = assembly(model, dtype, PREFILL);
    let [x, y] = ["x", "y"].map(|name| a.activation(name, Rows::Tokens, model.hidden_size));
    a.op(Op::Add { a: x, b: y.clone(), out: y });
    let steps = prompts(&a, &[1, PREFILL]);
    Large::new("add", model, a, steps)
}

fn silu_mul(model: &Model, dtype: DType) -> Large {
    let mut a = assembly(model, dtype, 64);
    let input = a.activation("x", Rows::Assignments, 2 * model.intermediate_size);
    let out = a.activation("out", Rows::Assignments, model.intermediate_size);
    a.op(Op::SiluMul { input, out });
    let steps = prompts(&a, &[1, 64]);
    Large::new("silu_mul", model, a, steps)
}

fn gather_rows(model: &Model, dtype: DType) -> Large {
    let mut a = assembly(model, dtype, PREFILL);
    a.program.limits.max_num_logits = 8;
    let input = a.activation("x", Rows::Tokens, model.hidden_size);
    let out = a.activation("out", Rows::Logits, model.hidden_size);
    a.op(Op::GatherRows { input, out });
    let mut steps = prompts(&a, &[PREFILL]);
    steps[0].inputs.logits_indices = vec![0, 1, 17, 131, 132, 298, 299];
    Large::new("gather_rows", model, a, steps)
}

/// A linear over every token.
fn linear(name: &str, model: &Model, dtype: DType, [rows, cols]: [usize; 2], epilogue: Epilogue) -> Large {
    let mut a = assembly(model, dtype, PREFILL);
    let weight = weight(&mut a, name, dtype, &[rows, cols]);
    let input = a.activation("x", Rows::Tokens, cols);
    let out = a.activation("out", Rows::Tokens, rows);
    let residual = (epilogue == Epilogue::Residual).then(|| out.clone());
    a.op(Op::Linear { input, weight, rows: None, epilogue, residual, out, ladder: vec![] });
    let steps = prompts(&a, &TOKENS);
    Large::new(&format!("linear {name}"), model, a, steps)
}

fn qkv(model: &Model, dtype: DType) -> Large {
    let rows = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim;
    linear("qkv", model, dtype, [rows, model.hidden_size], Epilogue::Store)
}

fn dense(model: &Model, dtype: DType) -> Large {
    let cols = model.num_heads * model.head_dim;
    linear("dense", model, dtype, [model.hidden_size, cols], Epilogue::Residual)
}

fn lm_head(model: &Model, dtype: DType) -> Large {
    let mut a = assembly(model, dtype, 64);
    a.program.limits.max_num_logits = 64;
    let weight = weight(&mut a, "lm_head", dtype, &[model.vocab_size, model.hidden_size]);
    let input = a.activation("x", Rows::Logits, model.hidden_size);
    let out = a.buffer("out", ElemType::F32, Rows::Logits, model.vocab_size);
    let epilogue = Epilogue::F32;
    a.op(Op::Linear { input, weight, rows: None, epilogue, residual: None, out, ladder: vec![] });
    let steps = prompts(&a, &[1, 8, 64]);
    Large::new("linear lm_head", model, a, steps)
}

/// A program with a cache of the model's heads, and steps on sequences of the model's contexts: decodes of all, and
/// prompts that begin one sequence and continue others.
fn over_contexts(model: &Model, dtype: DType) -> (Assembly, Vec<StepCase>) {
    let mut a = assembly(model, dtype, PREFILL);
    let p = &mut a.program;
    (p.kv.num_kv_heads, p.kv.head_dim) = (model.num_kv_heads, model.head_dim);
    p.limits.max_seq_len = model.contexts[3];
    let blocks: usize = model.contexts.iter().map(|&len| p.limits.blocks_for(len)).sum();
    let sequences = batch::sequences(3, &model.contexts, &p.limits, p.vocab_size, blocks);
    let part = |s: usize, past: usize, new: usize| Part { sequence: &sequences[s], past, new };
    let last = |s: usize, new: usize| part(s, model.contexts[s] - new, new);
    let decodes = [0, 1, 2, 3].map(|s| last(s, 1));
    let third = model.contexts[1].min(PREFILL / 3);
    let steps = [
        ("a prompt", vec![part(2, 0, model.contexts[2].min(PREFILL))]),
        ("the ends of long prompts", vec![last(1, third), last(2, third), last(3, third)]),
        ("decodes beside a prompt", vec![last(0, 1), last(3, 1), last(2, 130.min(model.contexts[2]))]),
        ("decodes", decodes.to_vec()),
    ];
    let steps = steps.map(|(name, parts)| {
        let mut inputs = batch::step(&a.program.limits, &parts);
        inputs.logits_indices.truncate(1);
        inputs.return_logits = false;
        StepCase { name: text(name), inputs, ints: Vec::new() }
    });
    (a, steps.to_vec())
}

fn rope_write_kv(model: &Model, dtype: DType) -> Large {
    let (mut a, steps) = over_contexts(model, dtype);
    let heads = model.num_heads;
    let qkv = a.activation("qkv", Rows::Tokens, (heads + 2 * model.num_kv_heads) * model.head_dim);
    a.op(Op::RopeWriteKv { qkv, num_heads: heads, theta: 1e6, layer: 0, directions: None });
    Large::new("rope_write_kv", model, a, steps)
}

fn attention(model: &Model, dtype: DType) -> Large {
    let (mut a, steps) = over_contexts(model, dtype);
    let heads = model.num_heads;
    let query = a.activation("qkv", Rows::Tokens, (heads + 2 * model.num_kv_heads) * model.head_dim);
    let out = a.activation("out", Rows::Tokens, heads * model.head_dim);
    a.op(Op::Attention { query, num_heads: heads, window: None, fp8_context: false, layer: 0, out });
    Large::new("attention", model, a, steps).racy()
}

/// Attention with an fp8 cache.
fn attention_fp8(model: &Model, dtype: DType) -> Large {
    let mut case = attention(model, dtype);
    case.name = format!("{} with an fp8 cache", case.name);
    (case.program.kv.format, case.program.kv_scales) = (CacheFormat::Fp8, vec![KvScale { key: 0.9, value: 1.1 }]);
    case
}

/// Attention with an fp8 cache, of prompts in fp8.
fn attention_in_fp8(model: &Model, dtype: DType) -> Large {
    let mut case = attention_fp8(model, dtype);
    case.name += ", in fp8";
    case.program.attend_in_fp8();
    case
}

/// A program with the buffers of routing.
fn routed(model: &Model, dtype: DType, max_num_tokens: usize) -> Assembly {
    let mut a = assembly(model, dtype, max_num_tokens);
    a.buffer("ids", ElemType::I32, Rows::Tokens, model.top_k);
    a.buffer("weights", ElemType::F32, Rows::Tokens, model.top_k);
    a.buffer("offsets", ElemType::I32, Rows::One, model.num_experts + 1);
    a.buffer("order", ElemType::I32, Rows::Assignments, 1);
    a.buffer("logits", ElemType::F32, Rows::Tokens, model.num_experts);
    a
}

fn route_op(model: &Model) -> Op {
    Op::Route {
        logits: text("logits"),
        normalization: MoeNormalization::Renorm,
        layer: 0,
        experts: [0, model.num_experts],
        expert_ids: text("ids"),
        expert_weights: text("weights"),
        offsets: text("offsets"),
        order: text("order"),
    }
}

fn route(model: &Model, dtype: DType) -> Large {
    let mut a = routed(model, dtype, ROUTED[4]);
    a.op(route_op(model));
    let steps = prompts(&a, &ROUTED);
    Large::new("route", model, a, steps).racy()
}

/// Norm, router and routing, which GPUs compute together.
fn router(model: &Model, dtype: DType) -> Large {
    let mut a = routed(model, dtype, ROUTED[4]);
    let scale = weight(&mut a, "scale", dtype, &[model.hidden_size]);
    let router = weight(&mut a, "router", DType::F32, &[model.num_experts, model.hidden_size]);
    let input = a.activation("x", Rows::Tokens, model.hidden_size);
    let normalized = a.activation("normalized", Rows::Tokens, model.hidden_size);
    a.op(Op::Norm { input, weight: scale, eps: 1e-5, out: normalized.clone() });
    let (weight, epilogue, out) = (router, Epilogue::F32, text("logits"));
    a.op(Op::Linear { input: normalized, weight, rows: None, epilogue, residual: None, out, ladder: vec![] });
    a.op(route_op(model));
    let steps = prompts(&a, &[1, 8, PREFILL, 2100, 256]);
    Large::new("norm, router, route", model, a, steps).racy()
}

/// Steps with expert lists. Tokens are either spread over all experts but one, or crowded on as few as possible.
fn listed(model: &Model, a: &Assembly) -> Vec<StepCase> {
    let int = |n: usize| i32::try_from(n).expect("small");
    let (experts, k) = (model.num_experts, model.top_k);
    let spread = |t: usize| {
        let mut ids = batch::shuffled(u32::try_from(t).expect("small"), experts - 1);
        ids.truncate(k);
        // The third expert gets no tokens.
        ids.iter_mut().filter(|id| **id >= 2).for_each(|id| *id += 1);
        ids
    };
    let crowded = |_: usize| (experts - k..experts).collect();
    let steps = |kind: &str, of: &dyn Fn(usize) -> Vec<usize>| -> Vec<StepCase> {
        let with_lists = |mut step: StepCase| {
            let token = |t| {
                let mut ids = of(t);
                ids.sort_unstable();
                ids.into_iter().map(int)
            };
            let ids: Vec<i32> = (0..step.inputs.num_tokens()).flat_map(token).collect();
            let (offsets, order) = lists(&ids, [0, experts]);
            step.ints = vec![(text("ids"), ids), (text("offsets"), offsets), (text("order"), order)];
            StepCase { name: format!("{} {kind}", step.name), ..step }
        };
        prompts(a, &TOKENS).into_iter().map(with_lists).collect()
    };
    [steps("crowded", &crowded), steps("spread", &spread)].concat()
}

fn expert_gate_up(model: &Model, dtype: DType) -> Large {
    let mut a = routed(model, dtype, PREFILL);
    let shape = [model.num_experts, 2 * model.intermediate_size, model.hidden_size];
    let weight = weight(&mut a, "fc", dtype, &shape);
    let input = a.activation("x", Rows::Tokens, model.hidden_size);
    let out = a.activation("out", Rows::Assignments, model.intermediate_size);
    let (offsets, order) = (text("offsets"), text("order"));
    a.op(Op::ExpertGateUp { input, weight, offsets, order, silu_mul: true, out, ladder: vec![] });
    let steps = listed(model, &a);
    Large::new("expert_gate_up", model, a, steps).racy()
}

fn expert_down(model: &Model, dtype: DType) -> Large {
    let mut a = routed(model, dtype, PREFILL);
    let weight = weight(&mut a, "proj", dtype, &[model.num_experts, model.hidden_size, model.intermediate_size]);
    let input = a.activation("x", Rows::Assignments, model.intermediate_size);
    let out = a.activation("out", Rows::Assignments, model.hidden_size);
    let (offsets, order) = (text("offsets"), text("order"));
    a.op(Op::ExpertDown { input, weight, offsets, order, out, ladder: vec![] });
    let steps = listed(model, &a);
    Large::new("expert_down", model, a, steps).racy()
}

fn combine(model: &Model, dtype: DType) -> Large {
    let mut a = routed(model, dtype, PREFILL);
    let scale = weight(&mut a, "scale", dtype, &[model.hidden_size]);
    let input = a.activation("x", Rows::Assignments, model.hidden_size);
    let residual = a.activation("residual", Rows::Tokens, model.hidden_size);
    let norm = FusedNorm { weight: scale, eps: 1e-5, out: a.activation("normalized", Rows::Tokens, model.hidden_size) };
    let experts = [0, model.num_experts];
    a.op(Op::Combine {
        input,
        expert_ids: text("ids"),
        expert_weights: text("weights"),
        experts,
        residual: Some(residual.clone()),
        out: residual,
        norm: Some(norm),
    });
    let steps = listed(model, &a).split_off(TOKENS.len());
    Large::new("combine", model, a, steps)
}
