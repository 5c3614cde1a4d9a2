//! The registry of operation cases (one operation, a shape, a data type, seeded operands), and the code that runs a
//! case on a backend and compares the result with the f64 reference.

use mixtral_engine::op::FusedNorm;
use mixtral_engine::{BackendError, Epilogue, Inspect, KvScale, Op, Rows, StepInputs, Weights};
use mixtral_model::{CacheFormat, DType, ElemType, MoeNormalization};

use crate::assembly::{Assembly, GUARD_BYTES};
use crate::batch::{self, Part};
use crate::elements::{from_bytes, ints_from_bytes, ints_to_bytes, to_bytes, values};
use crate::fp8;
use crate::poison::{poison, sentinel};
use crate::quantized;
use crate::reference::{Reference, State, Values};
use crate::tolerance::Tolerance;

/// One operation (or a few) on given operands.
#[derive(Clone, Debug)]
pub struct Case {
    /// Operation, shape and data type.
    pub name: String,
    /// Program and weights. Buffers lie apart, with a guard behind each.
    pub assembly: Assembly,
    /// Blocks of the cache.
    pub kv_blocks: usize,
    /// The step.
    pub inputs: StepInputs<'static>,
    /// Contents before the step. Buffers that are not given are poisoned.
    pub initial: State,
}

/// How a case failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The backend refused.
    #[error("{case}: {error}")]
    Backend {
        /// The case.
        case: String,
        /// Its error.
        error: BackendError,
    },
    /// The values are not the reference's.
    #[error("{case}: `{what}`: {problem}")]
    Wrong {
        /// The case.
        case: String,
        /// The buffer.
        what: String,
        /// What is wrong.
        problem: String,
    },
}

impl Case {
    pub(crate) fn new(name: String, assembly: Assembly, inputs: StepInputs<'static>) -> Case {
        Case::over_blocks(KV_BLOCKS, name, assembly, inputs)
    }

    fn over_blocks(kv_blocks: usize, name: String, mut assembly: Assembly, inputs: StepInputs<'static>) -> Case {
        assembly.place_apart();
        let program = &assembly.program;
        let mut initial = State::default();
        for buffer in &program.buffers {
            let n = program.num_rows(buffer.rows, inputs.num_tokens(), inputs.num_logits()) * buffer.cols;
            let values = match buffer.dtype {
                ElemType::I32 | ElemType::U8 | ElemType::F8E4M3 => Values::Ints(vec![-1; n]),
                _ => Values::Floats(vec![f64::NAN; n]),
            };
            initial.buffers.insert(buffer.name.clone(), values);
        }
        let kv = program.kv;
        let n = kv_blocks * kv.num_kv_heads * program.limits.block_size * kv.head_dim;
        initial.cache = vec![[vec![f64::NAN; n], vec![f64::NAN; n]]; kv.num_layers];
        let name = format!("{name} {}", program.dtype);
        Case { name, assembly, kv_blocks, inputs, initial }
    }

    /// Fills a float buffer with seeded values, rounded to its type.
    pub(crate) fn fill(mut self, name: &str, scale: f32) -> Self {
        let buffer = self.assembly.program.buffer(name).expect("a buffer");
        let dtype = buffer.dtype.float().expect("a float buffer");
        let Some(Values::Floats(contents)) = self.initial.buffers.get_mut(name) else { panic!("no floats `{name}`") };
        *contents =
            from_bytes(dtype, &to_bytes(dtype, &values(&format!("{}{name}", self.name), contents.len(), scale)));
        self
    }

    pub(crate) fn ints(mut self, name: &str, contents: Vec<i32>) -> Self {
        self.initial.buffers.insert(name.to_owned(), Values::Ints(contents));
        self
    }

    pub(crate) fn floats(mut self, name: &str, contents: Vec<f64>) -> Self {
        self.initial.buffers.insert(name.to_owned(), Values::Floats(contents));
        self
    }

    /// Fills the slots that the step's sequences occupy with seeded keys and values. All other slots stay NaN.
    fn fill_cache(mut self) -> Self {
        let program = &self.assembly.program;
        let (kv, size, width) = (program.kv, program.limits.block_size, program.limits.max_blocks_per_seq());
        for half in 0..2 {
            let n = self.initial.cache[0][half].len();
            let seeded = values(&format!("{} cache {half}", self.name), n, 1.0);
            let seeded = from_bytes(kv.dtype, &to_bytes(kv.dtype, &seeded));
            for (seq, &len) in self.inputs.seq_lens.iter().enumerate() {
                for j in 0..usize::try_from(len).expect("a length") {
                    let block = usize::try_from(self.inputs.block_table[seq * width + j / size]).expect("a block");
                    for head in 0..kv.num_kv_heads {
                        let at = ((block * kv.num_kv_heads + head) * size + j % size) * kv.head_dim;
                        let (from, to) = (&seeded[at..at + kv.head_dim], at..at + kv.head_dim);
                        self.initial.cache[0][half][to].copy_from_slice(from);
                    }
                }
            }
        }
        self
    }

    /// The same case before the step's own tokens are in the cache.
    fn without_newest(mut self) -> Self {
        let program = &self.assembly.program;
        let (kv, size) = (program.kv, program.limits.block_size);
        for &slot in &self.inputs.slot_mapping {
            let slot = usize::try_from(slot).expect("a slot");
            for head in 0..kv.num_kv_heads {
                let at = ((slot / size * kv.num_kv_heads + head) * size + slot % size) * kv.head_dim;
                self.initial.cache[0].iter_mut().for_each(|half| half[at..at + kv.head_dim].fill(f64::NAN));
            }
        }
        self
    }

    /// The same case with another cache. What is in it becomes the nearest that the cache can hold.
    pub(crate) fn with_cache(mut self, format: CacheFormat, scale: KvScale) -> Self {
        let program = &mut self.assembly.program;
        (program.kv.format, program.kv_scales) = (format, vec![scale; program.kv.num_layers]);
        for layer in &mut self.initial.cache {
            for (half, scale) in layer.iter_mut().zip([scale.key, scale.value]) {
                half.iter_mut().for_each(|x| *x = fp8::round(*x, scale));
            }
        }
        self.name = format!("{} with a cache of {format:?}, {} and {}", self.name, scale.key, scale.value);
        self
    }

    /// The same case with directions by which keys are rounded.
    pub(crate) fn with_directions(mut self) -> Self {
        let kv = self.assembly.program.kv;
        let shape = [kv.num_kv_heads, kv.head_dim];
        let own = values(&format!("{} directions", self.name), shape.iter().product(), 1.0);
        let weight = self.assembly.weight("directions", DType::F32, &shape, &own);
        for op in &mut self.assembly.program.ops {
            if let Op::RopeWriteKv { directions, .. } = op {
                *directions = Some(weight.clone());
            }
        }
        self.name += " by directions";
        self
    }

    /// The bytes of the cache's contents.
    fn cache_bytes(&self, values: &[f64]) -> Vec<u8> {
        let kv = self.assembly.program.kv;
        match kv.format {
            CacheFormat::Plain => to_bytes(kv.dtype, values),
            CacheFormat::Fp8 => values.iter().map(|&x| fp8::to_bits(x)).collect(),
        }
    }

    /// Compares a cache's contents with the reference's. Those of an fp8 cache are the same, but where a value lies so near to
    /// the middle of two numbers that its last bit decides.
    fn compare_cache(&self, found: &[u8], expected: &[f64], tolerance: Tolerance) -> Result<(), String> {
        let kv = self.assembly.program.kv;
        if kv.format == CacheFormat::Plain {
            return tolerance.close(&from_bytes(kv.dtype, found), expected, kv.dtype);
        }
        let expected: Vec<u8> = expected.iter().map(|&x| fp8::to_bits(x)).collect();
        let unequal: Vec<usize> = (0..found.len()).filter(|&i| found[i] != expected[i]).collect();
        if let Some(&i) = unequal.iter().find(|&&i| found[i].abs_diff(expected[i]) > 1) {
            return Err(format!("byte {i} is {:#x}, expected {:#x}", found[i], expected[i]));
        }
        if unequal.len() > 2 + found.len() / 2000 {
            return Err(format!("{} of {} bytes differ", unequal.len(), found.len()));
        }
        Ok(())
    }

    /// The bytes of a buffer's contents.
    fn bytes(&self, name: &str, values: &Values) -> Vec<u8> {
        match values {
            Values::Ints(values) => ints_to_bytes(values),
            Values::Floats(values) => {
                let buffer = self.assembly.program.buffer(name).expect("a buffer");
                to_bytes(buffer.dtype.float().expect("a float buffer"), values)
            }
        }
    }

    /// Loads the case's program, runs it twice from the same contents, and compares the result with the reference.
    ///
    /// # Errors
    /// What the backend refused, or the first value out of its limits.
    pub fn check<B: Inspect>(&self, load: impl FnOnce(&Case) -> Result<B, BackendError>) -> Result<(), Failure> {
        self.check_within(&self.expected(), self.tolerance(), load)
    }

    /// How far from the reference a backend may be that rounds where the contract does.
    #[must_use]
    pub fn tolerance(&self) -> Tolerance {
        Tolerance::of(&self.assembly.program)
    }

    /// The same case, with the attention of prompts in fp8.
    pub(crate) fn with_fp8_context(mut self) -> Self {
        self.assembly.program.attend_in_fp8();
        self.name += ", in fp8";
        self
    }

    /// What the reference makes of the initial contents.
    #[must_use]
    pub fn expected(&self) -> State {
        let mut expected = self.initial.clone();
        let Assembly { program, weights, .. } = &self.assembly;
        Reference { program, weights, inputs: &self.inputs }.run(&mut expected);
        expected
    }

    /// The same as [`Case::check`], for a caller that has [`Case::expected`], and limits of its own.
    ///
    /// # Errors
    /// As [`Case::check`].
    pub fn check_within<B: Inspect>(
        &self,
        expected: &State,
        tolerance: Tolerance,
        load: impl FnOnce(&Case) -> Result<B, BackendError>,
    ) -> Result<(), Failure> {
        let refused = |error| Failure::Backend { case: self.name.clone(), error };
        let wrong =
            |what: &str, problem: String| Failure::Wrong { case: self.name.clone(), what: what.to_owned(), problem };
        let mut backend = load(self).map_err(refused)?;
        let first = self.run_on(&mut backend).map_err(refused)?;
        let again = self.run_on(&mut backend).map_err(refused)?;
        let program = &self.assembly.program;
        for ((name, found), (_, again)) in first.iter().zip(&again) {
            if found != again {
                return Err(wrong(name, "the second run gave other bits".to_owned()));
            }
            if let Some(layer) = name.strip_prefix("cache ") {
                let layer: usize = layer[..layer.len() - 2].parse().expect("a layer");
                let half = usize::from(name.ends_with('v'));
                self.compare_cache(found, &expected.cache[layer][half], tolerance).map_err(|p| wrong(name, p))?;
                continue;
            }
            match &expected.buffers[name] {
                Values::Ints(expected) => {
                    let found = ints_from_bytes(found);
                    if &found != expected {
                        return Err(wrong(name, format!("found {found:?}, expected {expected:?}")));
                    }
                }
                Values::Floats(expected) => {
                    let buffer = program.buffer(name).expect("a buffer");
                    let dtype = buffer.dtype.float().expect("a float buffer");
                    let defined = self.defined_cols(name, buffer.cols);
                    let part = |all: &[f64]| -> Vec<f64> {
                        all.chunks(buffer.cols).flat_map(|row| row[..defined].to_vec()).collect()
                    };
                    let found = part(&from_bytes(dtype, found));
                    tolerance.close(&found, &part(expected), dtype).map_err(|p| wrong(name, p))?;
                }
            }
        }
        for buffer in program.buffers.iter().filter(|b| b.name.starts_with("guard behind")) {
            if backend.read_buffer(&buffer.name, GUARD_BYTES).map_err(refused)? != sentinel(GUARD_BYTES) {
                return Err(wrong(&buffer.name, "was written".to_owned()));
            }
        }
        Ok(())
    }

    /// Columns of a buffer that are defined after the program has run. Behind attention, queries need not be rotated: a kernel may rotate
    /// them for itself.
    fn defined_cols(&self, name: &str, cols: usize) -> usize {
        let attends = |op: &Op| matches!(op, Op::Attention { query, .. } if query == name);
        let qkv = self.assembly.program.ops.iter().find_map(|op| match op {
            Op::RopeWriteKv { qkv, .. } if qkv == name && self.assembly.program.ops.iter().any(attends) => Some(0),
            Op::RopeWriteKv { qkv, num_heads, .. } if qkv == name => {
                Some(num_heads * self.assembly.program.kv.head_dim)
            }
            _ => None,
        });
        qkv.unwrap_or(cols)
    }

    /// Writes the initial contents, runs, and reads every buffer that has rows, and the cache.
    fn run_on(&self, backend: &mut impl Inspect) -> Result<Vec<(String, Vec<u8>)>, BackendError> {
        let program = &self.assembly.program;
        for buffer in &program.buffers {
            let mut bytes = vec![0; program.max_bytes(buffer)];
            poison(&mut bytes);
            backend.write_buffer(&buffer.name, &bytes)?;
            let contents = match buffer.name.starts_with("guard behind") {
                true => sentinel(GUARD_BYTES),
                false => self.bytes(&buffer.name, &self.initial.buffers[&buffer.name]),
            };
            backend.write_buffer(&buffer.name, &contents)?;
        }
        for (layer, [keys, values]) in self.initial.cache.iter().enumerate() {
            backend.write_cache(layer, &self.cache_bytes(keys), &self.cache_bytes(values))?;
        }
        backend.step(&self.inputs)?;
        let mut found = Vec::new();
        for buffer in program.buffers.iter().filter(|b| !b.name.starts_with("guard behind")) {
            let len = self.bytes(&buffer.name, &self.initial.buffers[&buffer.name]).len();
            found.push((buffer.name.clone(), backend.read_buffer(&buffer.name, len)?));
        }
        for layer in 0..program.kv.num_layers {
            let [keys, values] = backend.read_cache(layer)?;
            found.push((format!("cache {layer} k"), keys));
            found.push((format!("cache {layer} v"), values));
        }
        Ok(found)
    }
}

/// Blocks of a case's cache.
const KV_BLOCKS: usize = 40;
/// Tokens of most cases: more than a register tile, and no multiple of one.
pub(crate) const T: usize = 37;

/// All cases.
#[must_use]
pub fn all() -> Vec<Case> {
    [DType::F32, DType::F16, DType::Bf16]
        .into_iter()
        .flat_map(|dtype| {
            let attention = [attention(dtype), attention_by_tiles(dtype), decodes_by_tiles(dtype)].concat();
            let caches = [fp8::caches(dtype), fp8::contexts(dtype)].concat();
            let quantized = [quantized::cases(dtype), fp8::linears(dtype)].concat();
            [dense(dtype), long_linears(dtype), attention, caches, routing(dtype), experts(dtype), quantized].concat()
        })
        .chain(many_decodes())
        .collect()
}

/// Linears of more tokens than any rung has. Their sizes are multiples of 8 and of little else: cuBLASLt takes no
/// others of 16-bit types.
#[must_use]
pub fn long_linears(dtype: DType) -> Vec<Case> {
    let (n, k, weight_rows) = (520, 104, 136);
    let mut cases = Vec::new();
    for (epilogue, in_place, rows) in [
        (Epilogue::Store, false, [0, 136]),
        (Epilogue::Store, false, [24, 96]),
        (Epilogue::Residual, false, [0, 136]),
        (Epilogue::Residual, true, [56, 136]),
        (Epilogue::F32, false, [0, 136]),
    ] {
        let mut a = Assembly::new(dtype);
        (a.program.limits.max_num_tokens, a.program.limits.max_seq_len) = (544, 544);
        let weight = a.weight("w", dtype, &[weight_rows, k], &values("w", weight_rows * k, 0.3));
        let input = a.activation("x", Rows::Tokens, k);
        let cols = rows[1] - rows[0];
        let out = match epilogue {
            Epilogue::F32 => a.buffer("out", ElemType::F32, Rows::Tokens, cols),
            _ => a.activation("out", Rows::Tokens, cols),
        };
        let residual = match (epilogue, in_place) {
            (Epilogue::Residual, true) => Some(out.clone()),
            (Epilogue::Residual, false) => Some(a.activation("residual", Rows::Tokens, cols)),
            _ => None,
        };
        let added = residual.clone();
        a.op(Op::Linear { input, weight, rows: Some(rows), epilogue, residual, out, ladder: vec![] });
        let inputs = tokens(&a, n);
        let name = format!("long linear {n}x{k}x{rows:?} {epilogue:?} {in_place}");
        let case = Case::new(name, a, inputs).fill("x", 1.0);
        cases.push(if let Some(added) = added { case.fill(&added, 1.0) } else { case });
    }
    cases
}

fn name(text: &str) -> String {
    text.to_owned()
}

pub(crate) fn tokens(assembly: &Assembly, n: usize) -> StepInputs<'static> {
    let program = &assembly.program;
    batch::prompt(&program.limits, program.vocab_size, KV_BLOCKS, n)
}

fn dense(dtype: DType) -> Vec<Case> {
    let mut cases = Vec::new();
    for vocab_start in [0, 7] {
        let mut a = Assembly::new(dtype);
        let table = a.weight("table", dtype, &[20, 33], &values("table", 20 * 33, 1.0));
        let out = a.activation("out", Rows::Tokens, 33);
        a.op(Op::Embed { table, vocab_start, out });
        let inputs = tokens(&a, T);
        cases.push(Case::new(format!("embed from {vocab_start}"), a, inputs));
    }
    for cols in [1, 16, 100] {
        let mut a = Assembly::new(dtype);
        let weight = a.weight("scale", dtype, &[cols], &values("scale", cols, 1.0));
        let (input, out) = (a.activation("x", Rows::Tokens, cols), a.activation("out", Rows::Tokens, cols));
        a.op(Op::Norm { input, weight, eps: 1e-5, out });
        let inputs = tokens(&a, T);
        cases.push(Case::new(format!("norm {cols}"), a, inputs).fill("x", 3.0));
    }
    for in_place in [false, true] {
        let mut a = Assembly::new(dtype);
        let (x, y) = (a.activation("x", Rows::Tokens, 19), a.activation("y", Rows::Tokens, 19));
        let out = if in_place { y.clone() } else { a.activation("out", Rows::Tokens, 19) };
        a.op(Op::Add { a: x, b: y, out });
        let inputs = tokens(&a, T);
        cases.push(Case::new(format!("add in place {in_place}"), a, inputs).fill("x", 1.0).fill("y", 1.0));
    }
    for (n, k, rows) in [(1, 100, 40), (2, 17, 33), (3, 1, 5), (4, 64, 64), (5, 100, 40), (37, 33, 70), (200, 48, 9)] {
        for epilogue in [Epilogue::Store, Epilogue::Residual, Epilogue::F32] {
            for in_place in [false, true] {
                let mut a = Assembly::new(dtype);
                let weight_type = if epilogue == Epilogue::F32 { DType::F32 } else { dtype };
                let weight = a.weight("w", weight_type, &[rows, k], &values("w", rows * k, 0.3));
                let input = a.activation("x", Rows::Tokens, k);
                let out = match epilogue {
                    Epilogue::F32 => a.buffer("out", ElemType::F32, Rows::Tokens, rows),
                    _ => a.activation("out", Rows::Tokens, rows),
                };
                let residual = match (epilogue, in_place) {
                    (Epilogue::Residual, true) => Some(out.clone()),
                    (Epilogue::Residual, false) => Some(a.activation("residual", Rows::Tokens, rows)),
                    (_, true) => continue,
                    _ => None,
                };
                let added = residual.clone();
                a.op(Op::Linear { input, weight, rows: None, epilogue, residual, out, ladder: vec![] });
                let inputs = tokens(&a, n);
                let mut case =
                    Case::new(format!("linear {n}x{k}x{rows} {epilogue:?} {in_place}"), a, inputs).fill("x", 1.0);
                if let Some(added) = added {
                    case = case.fill(&added, 1.0);
                }
                cases.push(case);
            }
        }
    }
    let mut a = Assembly::new(dtype);
    let weight = a.weight("w", dtype, &[3, 10, 20], &values("w", 600, 0.3));
    let (input, out) = (a.activation("x", Rows::Tokens, 20), a.activation("out", Rows::Tokens, 13));
    let (rows, epilogue) = (Some([9, 22]), Epilogue::Store);
    a.op(Op::Linear { input, weight, rows, epilogue, residual: None, out, ladder: vec![] });
    let inputs = tokens(&a, T);
    cases.push(Case::new(name("linear of some rows of three dimensions"), a, inputs).fill("x", 1.0));

    let mut a = Assembly::new(dtype);
    let (input, out) = (a.activation("x", Rows::Tokens, 20), a.activation("out", Rows::Logits, 20));
    a.op(Op::GatherRows { input, out });
    let mut inputs = tokens(&a, T);
    inputs.logits_indices = vec![0, 5, 36];
    cases.push(Case::new(name("gather_rows"), a, inputs).fill("x", 1.0));
    cases
}

/// A step of four sequences of different lengths, decodes first: one with a long past, one at the edge of a block, and
/// whole prompts.
fn ragged(assembly: &Assembly) -> StepInputs<'static> {
    let program = &assembly.program;
    let sequences = batch::sequences(3, &[101, 17, 64, 40], &program.limits, program.vocab_size, KV_BLOCKS);
    let news = [1, 1, 64, 23];
    let parts: Vec<Part<'_>> =
        sequences.iter().zip(news).map(|(s, new)| Part { sequence: s, past: s.tokens.len() - new, new }).collect();
    let mut inputs = batch::step(&program.limits, &parts);
    inputs.logits_indices.truncate(1);
    inputs
}

pub(crate) fn attention(dtype: DType) -> Vec<Case> {
    let mut cases = Vec::new();
    for (kv_heads, group, d) in [(2, 1, 16), (1, 2, 32), (2, 3, 10), (1, 6, 128), (1, 30, 16)] {
        let heads = kv_heads * group;
        let mut base = Assembly::new(dtype);
        (base.program.kv.num_kv_heads, base.program.kv.head_dim) = (kv_heads, d);
        let inputs = ragged(&base);
        for window in [None, Some(1), Some(21), Some(1000)] {
            let mut a = base.clone();
            // The queries are the first columns of wider rows.
            let query = a.activation("qkv", Rows::Tokens, (heads + 2 * kv_heads) * d);
            let out = a.activation("out", Rows::Tokens, heads * d);
            a.op(Op::Attention { query, num_heads: heads, window, fp8_context: false, layer: 0, out });
            let text = format!("attention {kv_heads}x{group}x{d} window {window:?}");
            cases.push(Case::new(text, a, inputs.clone()).fill("qkv", 1.0).fill_cache());
        }
        let mut inputs = inputs;
        inputs.slot_mapping[5] = -1;
        let mut a = base.clone();
        let qkv = a.activation("qkv", Rows::Tokens, (heads + 2 * kv_heads) * d);
        a.op(Op::RopeWriteKv { qkv, num_heads: heads, theta: 1e4, layer: 0, directions: None });
        cases.push(Case::new(format!("rope_write_kv {kv_heads}x{group}x{d}"), a, inputs.clone()).fill("qkv", 1.0));
        let mut a = base.clone();
        let data = a.activation("q", Rows::Tokens, (heads + 1) * d);
        a.op(Op::Rope { data, num_heads: heads, theta: 1e6 });
        cases.push(Case::new(format!("rope {heads}x{d}"), a, inputs.clone()).fill("q", 1.0));
        let mut a = base;
        let key = a.activation("k", Rows::Tokens, kv_heads * d);
        let value = a.activation("v", Rows::Tokens, kv_heads * d);
        a.op(Op::WriteKv { key, value, layer: 0, directions: None });
        cases.push(Case::new(format!("write_kv {kv_heads}x{d}"), a, inputs).fill("k", 1.0).fill("v", 1.0));
    }
    cases
}

/// Attention over blocks as large as a tile of keys, with heads of a width that tensor cores take. The step has a
/// decode, chunks that begin in the middle of a tile (one of three tiles of queries, one of a part of a tile), and a
/// prompt of one whole tile and a part.
pub(crate) fn attention_by_tiles(dtype: DType) -> Vec<Case> {
    const BLOCKS: usize = 11;
    let mut cases = Vec::new();
    for (kv_heads, group, d) in [(2, 1, 64), (1, 3, 128), (2, 2, 128), (1, 6, 64), (1, 3, 64), (1, 1, 128)] {
        let heads = kv_heads * group;
        let mut base = Assembly::new(dtype);
        let program = &mut base.program;
        (program.kv.num_kv_heads, program.kv.head_dim, program.limits.block_size) = (kv_heads, d, 64);
        let sequences = batch::sequences(5, &[65, 167, 130, 70], &program.limits, program.vocab_size, BLOCKS);
        let parts = [(64, 1), (37, 130), (100, 30), (0, 70)];
        let parts: Vec<Part<'_>> =
            sequences.iter().zip(parts).map(|(sequence, (past, new))| Part { sequence, past, new }).collect();
        let mut inputs = batch::step(&program.limits, &parts);
        inputs.logits_indices.truncate(1);
        for window in [None, Some(21), Some(100)] {
            let mut a = base.clone();
            let query = a.activation("qkv", Rows::Tokens, (heads + 2 * kv_heads) * d);
            let out = a.activation("out", Rows::Tokens, heads * d);
            a.op(Op::Attention { query, num_heads: heads, window, fp8_context: false, layer: 0, out });
            let text = format!("attention by tiles {kv_heads}x{group}x{d} window {window:?}");
            cases.push(Case::over_blocks(BLOCKS, text, a, inputs.clone()).fill("qkv", 1.0).fill_cache());
        }
    }
    cases
}

/// Decodes alone. Their sequences fill the last tile of keys or hardly begin it, and have one split or several.
/// With "rope" in the name, attention is behind `rope_write_kv`.
fn decodes(name: &str, mut base: Assembly, lengths: &[usize], group: usize, windows: &[Option<usize>]) -> Vec<Case> {
    let (program, ropes) = (&mut base.program, name.starts_with("rope"));
    let (kv_heads, d) = (program.kv.num_kv_heads, program.kv.head_dim);
    (program.limits.block_size, program.limits.max_seq_len) = (if ropes && d == 64 { 128 } else { 64 }, 1024);
    let blocks = lengths.iter().map(|len| len.div_ceil(64)).sum::<usize>() + 1;
    let sequences = batch::sequences(7, lengths, &program.limits, program.vocab_size, blocks);
    let parts: Vec<Part<'_>> =
        sequences.iter().map(|sequence| Part { sequence, past: sequence.tokens.len() - 1, new: 1 }).collect();
    let mut inputs = batch::step(&program.limits, &parts);
    if ropes {
        // Kernels for steps of decodes alone need a row of logits for each.
        assert_eq!((inputs.num_decodes, inputs.num_logits()), (lengths.len(), lengths.len()), "a step of decodes");
    } else {
        inputs.logits_indices.truncate(1);
    }
    let case = |&window: &Option<usize>| {
        let mut a = base.clone();
        let query = a.activation("qkv", Rows::Tokens, (group + 2) * kv_heads * d);
        let (out, num_heads) = (a.activation("out", Rows::Tokens, group * kv_heads * d), group * kv_heads);
        if ropes {
            a.op(Op::RopeWriteKv { qkv: query.clone(), num_heads, theta: 1e4, layer: 0, directions: None });
        }
        a.op(Op::Attention { query, num_heads, window, fp8_context: false, layer: 0, out });
        let text = format!("{name} {kv_heads}x{group}x{d} window {window:?}");
        let case = Case::over_blocks(blocks, text, a, inputs.clone()).fill("qkv", 1.0).fill_cache();
        if ropes { case.without_newest() } else { case }
    };
    windows.iter().map(case).collect()
}

/// Steps of decodes whose attention takes tiles of the cache, alone and behind rope.
#[must_use]
pub fn decodes_by_tiles(dtype: DType) -> Vec<Case> {
    let shapes = [(2, 1, 64), (1, 4, 128), (1, 6, 128), (1, 8, 64), (1, 12, 128), (1, 30, 64)];
    let of = |name: &'static str, windows: &'static [Option<usize>]| {
        move |(kv_heads, group, d)| {
            let mut base = Assembly::new(dtype);
            (base.program.kv.num_kv_heads, base.program.kv.head_dim) = (kv_heads, d);
            decodes(name, base, &[600, 1, 16, 64, 65, 97, 256, 257], group, windows)
        }
    };
    let plain = shapes.into_iter().flat_map(of("decodes by tiles", &[None, Some(1), Some(21), Some(300)]));
    let roped = [(2, 4, 128), (1, 8, 64), (1, 12, 128)];
    plain.chain(roped.into_iter().flat_map(of("rope_write_kv and decodes", &[None, Some(21)]))).collect()
}

/// More splits of decodes than a GPU has CTAs. So a CTA computes several that follow each other, shares its first and its last
/// sequence with others, and meets splits that no window sees.
fn many_decodes() -> Vec<Case> {
    let of = |(kv_heads, group, d)| {
        let mut base = Assembly::new(DType::Bf16);
        (base.program.kv.num_kv_heads, base.program.kv.head_dim) = (kv_heads, d);
        let lengths: Vec<usize> = (0..base.program.limits.max_batch_size).map(|i| i * 211 % 1000 + 1).collect();
        decodes("many decodes", base, &lengths, group, &[None, Some(300)])
    };
    [(9, 2, 64), (4, 4, 128), (3, 30, 64)].into_iter().flat_map(of).collect()
}

/// Buffers of the routing operations.
pub(crate) fn routed(dtype: DType, experts: usize, top_k: usize, local: [usize; 2]) -> Assembly {
    let mut a = Assembly::new(dtype);
    (a.program.num_experts, a.program.top_k) = (experts, top_k);
    a.buffer("ids", ElemType::I32, Rows::Tokens, top_k);
    a.buffer("weights", ElemType::F32, Rows::Tokens, top_k);
    a.buffer("offsets", ElemType::I32, Rows::One, local[1] - local[0] + 1);
    a.buffer("order", ElemType::I32, Rows::Assignments, 1);
    a
}

fn routing(dtype: DType) -> Vec<Case> {
    let mut cases = Vec::new();
    for (experts, top_k, local) in [(8, 2, [0, 8]), (5, 1, [0, 5]), (5, 3, [2, 4]), (4, 4, [3, 4]), (64, 4, [0, 64])] {
        for normalization in [MoeNormalization::None, MoeNormalization::Renorm] {
            let text = format!("{top_k} of {experts} at {local:?} {normalization:?}");
            let mut a = routed(dtype, experts, top_k, local);
            let logits = a.buffer("logits", ElemType::F32, Rows::Tokens, experts);
            a.op(Op::Route {
                logits,
                normalization,
                layer: 0,
                experts: local,
                expert_ids: name("ids"),
                expert_weights: name("weights"),
                offsets: name("offsets"),
                order: name("order"),
            });
            let inputs = tokens(&a, T);
            cases.push(Case::new(format!("route {text}"), a, inputs.clone()).fill("logits", 2.0));

            let mut a = routed(dtype, experts, top_k, local);
            let probs = a.buffer("probs", ElemType::F32, Rows::Tokens, experts);
            let (expert_ids, expert_weights) = (name("ids"), name("weights"));
            a.op(Op::TopK { probs, normalization, layer: 0, expert_ids, expert_weights });
            // The values are coarse, so most rows have ties, also between the k-th and the next.
            let coarse = values("coarse", T * experts, 1.0).iter().map(|x| ((x * 2.0).round() + 9.0) / 16.0).collect();
            cases.push(Case::new(format!("top_k with ties {text}"), a, inputs.clone()).floats("probs", coarse));
        }
        let mut a = routed(dtype, experts, top_k, local);
        let (offsets, order) = (name("offsets"), name("order"));
        a.op(Op::ExpertSort { expert_ids: name("ids"), experts: local, offsets, order });
        let inputs = tokens(&a, T);
        let case = Case::new(format!("expert_sort {top_k} of {experts} at {local:?}"), a, inputs);
        cases.push(case.ints("ids", assignments(experts, top_k)));
    }
    let mut a = routed(dtype, 8, 2, [0, 8]);
    let logits = a.buffer("logits", ElemType::F32, Rows::Tokens, 8);
    let probs = a.buffer("probs", ElemType::F32, Rows::Tokens, 8);
    a.op(Op::Softmax { logits, probs });
    let inputs = tokens(&a, T);
    cases.push(Case::new(name("softmax"), a, inputs).fill("logits", 5.0));
    cases
}

/// Distinct ascending experts for each of [`T`] tokens. The last expert is never among them, unless `top_k` is all
/// experts.
pub(crate) fn assignments(experts: usize, top_k: usize) -> Vec<i32> {
    let used = (experts - 1).max(top_k);
    let int = |e: usize| i32::try_from(e).unwrap_or(0);
    let token = |t: usize| {
        let mut ids: Vec<usize> = batch::shuffled(u32::try_from(t).unwrap_or(0), used);
        ids.truncate(top_k);
        ids.sort_unstable();
        ids.into_iter().map(int)
    };
    (0..T).flat_map(token).collect()
}

/// The offsets and the order of expert lists for some assignments.
pub(crate) fn lists(ids: &[i32], local: [usize; 2]) -> (Vec<i32>, Vec<i32>) {
    let (mut offsets, mut order) = (vec![0], Vec::new());
    for expert in local[0]..local[1] {
        order.extend((0i32..).zip(ids).filter(|(_, id)| usize::try_from(**id) == Ok(expert)).map(|(a, _)| a));
        offsets.push(i32::try_from(order.len()).unwrap_or(0));
    }
    order.resize(ids.len(), -1);
    (offsets, order)
}

fn experts(dtype: DType) -> Vec<Case> {
    let mut cases = Vec::new();
    let (hidden, inter) = (36, 20);
    for (experts, top_k, local) in [(8, 2, [0, 8]), (5, 1, [0, 5]), (5, 3, [1, 4]), (6, 4, [5, 6])] {
        let spread = assignments(experts, top_k);
        // Every token goes to the first experts.
        let int = |e: usize| i32::try_from(e).unwrap_or(0);
        let crowded: Vec<i32> = (0..T).flat_map(|_| (0..top_k).map(int)).collect();
        for (kind, ids) in [("spread", spread), ("crowded", crowded)] {
            let text = format!("{top_k} of {experts} at {local:?} {kind}");
            let num_local = local[1] - local[0];
            let (offsets, order) = lists(&ids, local);
            let given = |case: Case| {
                case.ints("ids", ids.clone()).ints("offsets", offsets.clone()).ints("order", order.clone())
            };
            let base = routed(dtype, experts, top_k, local);
            let inputs = tokens(&base, T);
            for silu_mul in [false, true] {
                let mut a = base.clone();
                let n = num_local * 2 * inter * hidden;
                let weight = a.weight("fc", dtype, &[num_local, 2 * inter, hidden], &values("fc", n, 0.2));
                let input = a.activation("x", Rows::Tokens, hidden);
                let out = a.activation("out", Rows::Assignments, if silu_mul { inter } else { 2 * inter });
                let (offsets, order) = (name("offsets"), name("order"));
                a.op(Op::ExpertGateUp { input, weight, offsets, order, silu_mul, out, ladder: vec![] });
                let text = format!("expert_gate_up {text} silu {silu_mul}");
                cases.push(given(Case::new(text, a, inputs.clone())).fill("x", 1.0));
            }
            let mut a = base.clone();
            let n = num_local * inter * hidden;
            let weight = a.weight("proj", dtype, &[num_local, hidden, inter], &values("proj", n, 0.2));
            let input = a.activation("x", Rows::Assignments, inter);
            let out = a.activation("out", Rows::Assignments, hidden);
            let (offsets, order) = (name("offsets"), name("order"));
            a.op(Op::ExpertDown { input, weight, offsets, order, out, ladder: vec![] });
            cases.push(given(Case::new(format!("expert_down {text}"), a, inputs.clone())).fill("x", 1.0));

            for (in_place, with_norm) in [(false, false), (true, false), (false, true), (true, true)] {
                let mut a = base.clone();
                let input = a.activation("x", Rows::Assignments, hidden);
                let residual = a.activation("residual", Rows::Tokens, hidden);
                let out = if in_place { residual.clone() } else { a.activation("out", Rows::Tokens, hidden) };
                let norm = with_norm.then(|| FusedNorm {
                    weight: a.weight("scale", dtype, &[hidden], &values("scale", hidden, 1.0)),
                    eps: 1e-5,
                    out: a.activation("normalized", Rows::Tokens, hidden),
                });
                let (expert_ids, expert_weights) = (name("ids"), name("weights"));
                let residual = Some(residual);
                a.op(Op::Combine { input, expert_ids, expert_weights, experts: local, residual, out, norm });
                let text = format!("combine {text} in place {in_place} norm {with_norm}");
                let case = given(Case::new(text, a, inputs.clone())).fill("x", 1.0).fill("weights", 0.3);
                cases.push(case.fill("residual", 1.0));
            }
        }
    }
    let mut a = Assembly::new(dtype);
    let (input, out) = (a.activation("x", Rows::Tokens, 2 * inter), a.activation("out", Rows::Tokens, inter));
    a.op(Op::SiluMul { input, out });
    let inputs = tokens(&a, T);
    cases.push(Case::new(name("silu_mul"), a, inputs).fill("x", 2.0));
    cases
}

impl Case {
    /// The case's weights in the form that a backend takes.
    #[must_use]
    pub fn weights(&self) -> Weights {
        self.assembly.weights.clone().into_weights()
    }
}
