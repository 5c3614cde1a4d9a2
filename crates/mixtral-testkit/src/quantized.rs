//! Weights of integers and scales: seeded ones, what they stand for by plain scalar code, and the cases of operations that multiply
//! with them.

use mixtral_engine::{Epilogue, Op, Rows, TensorSpec, Weight, WeightSource, dummy};
use mixtral_model::{Bits, DType, ElemType, PartKind, Quantization, WeightFormat};

use crate::assembly::Assembly;
use crate::cases::{Case, assignments, lists, routed, tokens};
use crate::elements::{from_bytes, to_bytes};
use crate::fp8;

/// A format of every kind.
pub const FORMATS: [&str; 7] = [
    "int8:row:f32",
    "int4:g128:bf16",
    "int4:g64:f16:zeros",
    "int4:g32:f16",
    "int4:row:f32",
    "int8:g32:bf16:zeros",
    "int8:row:bf16:zeros",
];

/// A format of [`FORMATS`].
///
/// # Panics
/// If it is none.
#[must_use]
pub fn format(word: &str) -> WeightFormat {
    word.parse().expect("a format")
}

impl Assembly {
    /// Adds a weight of integers and scales. All integers of the format occur, some scales are negative, and one is zero. Or a weight
    /// of fp8, in which all finite numbers occur.
    ///
    /// # Panics
    /// On a plain format.
    pub fn quantized(&mut self, name: &str, format: WeightFormat, shape: &[usize], scale: f32) -> String {
        let bits = match format {
            WeightFormat::Plain => panic!("{format} has no integers"),
            WeightFormat::Fp8 | WeightFormat::Fp8Rows(_) => return self.fp8(name, format, shape, scale),
            WeightFormat::Quantized(Quantization { bits, .. }) => bits,
        };
        let dtype = self.program.dtype;
        self.declare(name, dtype, shape);
        let weight = self.program.weights.last_mut().expect("just declared");
        weight.format = format;
        let key = dummy::key(0x7e57, name);
        let scale = f64::from(scale) / f64::from(bits.middle());
        for (part, TensorSpec { name, elem, shape }) in format.parts(dtype, shape).iter().zip(weight.tensors()) {
            let n = shape.iter().product::<usize>() as u64;
            let byte = |index: u64| (dummy::word(key, index) & 0xff) as u8;
            let bytes = match (part.kind, elem.float()) {
                (PartKind::Scales, Some(dtype)) => {
                    let scales = (0..n).map(|i| f64::from(i32::from(byte(i << 20)) - 64) / 128.0 * scale);
                    to_bytes(dtype, &scales.collect::<Vec<_>>())
                }
                (PartKind::Zeros, _) => (0..n).map(|i| byte(i << 40) % bits.max()).collect(),
                _ => (0..n).map(byte).collect(),
            };
            self.weights.insert(&name, elem, &shape, bytes);
        }
        name.to_owned()
    }

    /// Adds a weight of fp8. The experts, or rows, have different scales.
    fn fp8(&mut self, name: &str, format: WeightFormat, shape: &[usize], scale: f32) -> String {
        let dtype = self.program.dtype;
        self.declare(name, dtype, shape);
        let weight = self.program.weights.last_mut().expect("just declared");
        weight.format = format;
        let key = dummy::key(0x7e57, name);
        for (part, TensorSpec { name, elem, shape }) in format.parts(dtype, shape).iter().zip(weight.tensors()) {
            let n = shape.iter().product::<usize>() as u64;
            let byte = |index: u64| (dummy::word(key, index) & 0xff) as u8;
            let finite = |byte: u8| if byte & 0x7f == 0x7f { byte ^ 1 } else { byte };
            let bytes = match part.kind {
                PartKind::Values => (0..n).map(|i| finite(byte(i))).collect(),
                PartKind::Scales => {
                    let scales = (0..n).map(|i| f64::from(scale) / 448.0 * (1.0 + f64::from(byte(i << 20)) / 64.0));
                    to_bytes(DType::F32, &scales.collect::<Vec<_>>())
                }
                _ => fp8::INPUT_SCALE.to_le_bytes().to_vec(),
            };
            self.weights.insert(&name, elem, &shape, bytes);
        }
        name.to_owned()
    }
}

/// The floats of a part of a weight.
pub(crate) fn floats(weight: &Weight, source: &dyn WeightSource, part: usize) -> Vec<f64> {
    let tensor = &weight.tensors()[part];
    from_bytes(tensor.elem.float().expect("floats"), source.weight(&tensor.name).expect("a tensor").bytes)
}

/// The elements that a weight stands for.
///
/// # Panics
/// If the source lacks a part of it.
#[must_use]
pub fn elements(weight: &Weight, source: &dyn WeightSource) -> Vec<f64> {
    let parts: Vec<Vec<u8>> =
        weight.tensors().iter().map(|t| source.weight(&t.name).expect("a tensor").bytes.to_vec()).collect();
    let quantization = match weight.format {
        WeightFormat::Plain => return from_bytes(weight.dtype, &parts[0]),
        WeightFormat::Fp8 | WeightFormat::Fp8Rows(_) => {
            let scales = floats(weight, source, 1);
            let scale = |index: usize| scales[index / (parts[0].len() / scales.len())];
            return parts[0].iter().enumerate().map(|(index, &byte)| fp8::from_bits(byte) * scale(index)).collect();
        }
        WeightFormat::Quantized(quantization) => quantization,
    };
    let Quantization { bits, scale, .. } = quantization;
    let (cols, scales) = (weight.cols(), from_bytes(scale, &parts[1]));
    let (row_bytes, groups) = (quantization.row_bytes(cols), quantization.groups(cols));
    let element = |row: usize, col: usize| {
        let group = row * groups + col / quantization.group_len(cols);
        let byte = parts[0][row * row_bytes + col / bits.per_byte()];
        let integer = match bits {
            Bits::Four => byte >> (col % 2 * 4) & 15,
            Bits::Eight => byte,
        };
        let zero = parts.get(2).map_or(bits.middle(), |zeros| zeros[group]);
        (f64::from(integer) - f64::from(zero)) * scales[group]
    };
    (0..weight.rows())
        .flat_map(|row| (0..cols).map(move |col| (row, col)))
        .map(|(row, col)| element(row, col))
        .collect()
}

/// Linears and experts with weights of every format.
#[must_use]
pub fn cases(dtype: DType) -> Vec<Case> {
    FORMATS.into_iter().flat_map(|word| cases_of(dtype, word, [160, 80])).collect()
}

/// Linears and experts with weights of one format, by the widths of tokens and of what lies between an expert's two linears.
pub(crate) fn cases_of(dtype: DType, word: &str, widths: [usize; 2]) -> Vec<Case> {
    let sizes = [(1, 256, 48), (3, 200, 33), (9, 640, 64), (37, 72, 70), (200, 144, 24), (520, 272, 136)];
    let long = if dtype == DType::Bf16 && LONG.contains(&word) { long_cases(word) } else { Vec::new() };
    [linears(dtype, word, &sizes), vec![linear_of_some_rows(dtype, word)], experts(dtype, word, widths), long].concat()
}

/// Formats of [`long_cases`]: a chain for each row, for 128 elements and for 32.
pub const LONG: [&str; 3] = ["int8:row:f32", "int4:g128:bf16", "int4:g32:f16"];

/// Linears and experts in bf16 whose K has more blocks of 128 elements than the ring of the tile that computes them on Hopper has stages,
/// for every tile that a Mixtral's linears take. TMA takes rows of packed weights if K is a multiple of 16.
#[must_use]
pub fn long_cases(word: &str) -> Vec<Case> {
    let sizes = [
        (5, 2960, 24),
        (12, 2192, 24),
        (20, 1680, 24),
        (9, 1936, 4240),
        (17, 1552, 4240),
        (40, 2064, 72),
        (33, 1168, 4240),
        (33, 1168, 6400),
        (150, 656, 24),
        (180, 656, 24),
        (270, 656, 24),
        (520, 400, 136),
    ];
    let linears = linears(DType::Bf16, word, &sizes).into_iter().step_by(EPILOGUES.len());
    let steps = [
        (40, [1168, 32]),
        (56, [1168, 32]),
        (80, [912, 32]),
        (100, [912, 32]),
        (200, [656, 32]),
        (300, [528, 32]),
        (40, [32, 1168]),
        (200, [32, 656]),
    ];
    linears.chain(steps.into_iter().flat_map(|(tokens, widths)| long_step(DType::Bf16, word, widths, tokens))).collect()
}

const EPILOGUES: [Epilogue; 3] = [Epilogue::Store, Epilogue::Residual, Epilogue::F32];

/// Linears with weights of one format, by numbers of tokens, inputs and outputs.
pub(crate) fn linears(dtype: DType, word: &str, sizes: &[(usize, usize, usize)]) -> Vec<Case> {
    let mut cases = Vec::new();
    for &(n, k, rows) in sizes {
        for epilogue in EPILOGUES {
            let mut a = assembly(dtype, n);
            let weight = a.quantized("w", format(word), &[rows, k], 0.3);
            let input = a.activation("x", Rows::Tokens, k);
            let out = match epilogue {
                Epilogue::F32 => a.buffer("out", ElemType::F32, Rows::Tokens, rows),
                _ => a.activation("out", Rows::Tokens, rows),
            };
            let residual = (epilogue == Epilogue::Residual).then(|| a.activation("residual", Rows::Tokens, rows));
            let added = residual.clone();
            a.op(Op::Linear { input, weight, rows: None, epilogue, residual, out, ladder: vec![] });
            let inputs = tokens(&a, n);
            let case = Case::new(format!("linear {word} {n}x{k}x{rows} {epilogue:?}"), a, inputs).fill("x", 1.0);
            cases.push(if let Some(added) = added { case.fill(&added, 1.0) } else { case });
        }
    }
    cases
}

fn linear_of_some_rows(dtype: DType, word: &str) -> Case {
    let mut a = Assembly::new(dtype);
    let weight = a.quantized("w", format(word), &[80, 128], 0.3);
    let (input, out) = (a.activation("x", Rows::Tokens, 128), a.activation("out", Rows::Tokens, 48));
    let (rows, epilogue) = (Some([16, 64]), Epilogue::Store);
    a.op(Op::Linear { input, weight, rows, epilogue, residual: None, out, ladder: vec![] });
    let inputs = tokens(&a, 5);
    Case::new(format!("linear {word} of some rows"), a, inputs).fill("x", 1.0)
}

/// A program for steps of `tokens` tokens.
fn assembly(dtype: DType, tokens: usize) -> Assembly {
    let mut a = Assembly::new(dtype);
    with_room(&mut a, tokens);
    a
}

fn with_room(a: &mut Assembly, tokens: usize) {
    let limits = &mut a.program.limits;
    limits.max_num_tokens = limits.max_num_tokens.max(tokens.next_multiple_of(32));
    limits.max_seq_len = limits.max_seq_len.max(limits.max_num_tokens);
}

/// Experts with weights of one format, by the widths of tokens and of what lies between an expert's two linears.
pub(crate) fn experts(dtype: DType, word: &str, widths: [usize; 2]) -> Vec<Case> {
    let mut cases = Vec::new();
    for (experts, top_k, local) in [(8, 2, [0, 8]), (5, 3, [1, 4])] {
        // Every token goes to the first experts, or to any.
        let crowded: Vec<i32> = (0..T).flat_map(|_| (0..top_k).map(|e| i32::try_from(e).unwrap_or(0))).collect();
        for (kind, ids) in [("spread", assignments(experts, top_k)), ("crowded", crowded)] {
            cases.extend(by_expert(dtype, word, kind, widths, (experts, top_k, local), &ids));
        }
    }
    cases.extend(long_step(dtype, word, widths, 600));
    cases
}

/// The experts' operations in a long step: two experts have several tiles of tokens, the last one has none, and the others share the
/// rest.
pub(crate) fn long_step(dtype: DType, word: &str, widths: [usize; 2], tokens: i32) -> Vec<Case> {
    let ids: Vec<i32> = (0..tokens).flat_map(|t| [2 * t / tokens, 2 + t % 5]).collect();
    by_expert(dtype, word, &format!("{tokens} uneven"), widths, (8, 2, [0, 8]), &ids)
}

/// The experts' operations on tokens that go to the experts `ids`.
fn by_expert(
    dtype: DType,
    word: &str,
    kind: &str,
    [hidden, inter]: [usize; 2],
    (experts, top_k, local): (usize, usize, [usize; 2]),
    ids: &[i32],
) -> Vec<Case> {
    let mut cases = Vec::new();
    let text = format!("{word} {hidden}x{inter} {top_k} of {experts} at {local:?} {kind}");
    let num_local = local[1] - local[0];
    let (offsets, order) = lists(ids, local);
    let given =
        |case: Case| case.ints("ids", ids.to_vec()).ints("offsets", offsets.clone()).ints("order", order.clone());
    let mut base = routed(dtype, experts, top_k, local);
    with_room(&mut base, ids.len() / top_k);
    let inputs = tokens(&base, ids.len() / top_k);
    for silu_mul in [false, true] {
        let mut a = base.clone();
        let weight = a.quantized("fc", format(word), &[num_local, 2 * inter, hidden], 0.2);
        let input = a.activation("x", Rows::Tokens, hidden);
        let out = a.activation("out", Rows::Assignments, if silu_mul { inter } else { 2 * inter });
        let (offsets, order) = ("offsets".to_owned(), "order".to_owned());
        a.op(Op::ExpertGateUp { input, weight, offsets, order, silu_mul, out, ladder: vec![] });
        let text = format!("expert_gate_up {text} silu {silu_mul}");
        cases.push(given(Case::new(text, a, inputs.clone())).fill("x", 1.0));
    }
    let mut a = base;
    let weight = a.quantized("proj", format(word), &[num_local, hidden, inter], 0.2);
    let input = a.activation("x", Rows::Assignments, inter);
    let out = a.activation("out", Rows::Assignments, hidden);
    let (offsets, order) = ("offsets".to_owned(), "order".to_owned());
    a.op(Op::ExpertDown { input, weight, offsets, order, out, ladder: vec![] });
    cases.push(given(Case::new(format!("expert_down {text}"), a, inputs)).fill("x", 1.0));
    cases
}

/// Tokens of a step of experts: as many as [`assignments`] are for.
const T: usize = crate::cases::T;
