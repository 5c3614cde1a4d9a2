//! A random part of an operation's outputs in f64, for shapes with too many outputs to compute them all. The weights
//! are dummy ones, and only the rows that are needed are generated.

use std::collections::HashMap;

use mixtral_engine::{Epilogue, KvScale, Op, Program, StepInputs, dummy};
use mixtral_model::{ElemType, MoeNormalization};

use crate::batch::shuffled;
use crate::elements::{from_bytes, ints_from_bytes, to_bytes};
use crate::fp8;

/// Seed of the dummy weights.
pub(crate) const SEED: u64 = 5;

/// Bytes of buffers by name, and of a layer's keys (`cache k`) and values (`cache v`).
pub(crate) type Contents = HashMap<String, Vec<u8>>;

/// The same contents, borrowed.
pub(crate) type Views<'a> = HashMap<&'a str, &'a [u8]>;

/// The values that some elements of an output should have.
pub(crate) struct Sample {
    /// The buffer, or `cache k`, `cache v`.
    pub(crate) name: String,
    pub(crate) dtype: ElemType,
    /// Elements of the buffer, counted over its rows, and their values.
    pub(crate) points: Vec<(usize, f64)>,
}

/// One operation, its operands, and the part of its outputs that is wanted.
pub(crate) struct Sampled<'a> {
    pub(crate) program: &'a Program,
    pub(crate) inputs: &'a StepInputs<'a>,
    /// What the operation reads.
    pub(crate) operands: &'a Views<'a>,
    /// The backend's outputs, for an operation that reads its own rounded output.
    pub(crate) found: &'a Contents,
}

/// One in this many rows is computed, if there are more than a few.
const ROWS: usize = 4;
/// One in this many columns is computed.
const COLS: usize = 25;
/// Heads that are computed of a token.
const HEADS: usize = 4;

/// About one in `every` of `0..n`, ascending, but at least `least`. The first and the last are among them.
fn pick(n: usize, every: usize, least: usize) -> Vec<usize> {
    let wanted = n.div_ceil(every).max(least).min(n);
    let mut some = shuffled(u32::try_from(n).unwrap_or(0), n);
    some.truncate(wanted);
    some.extend([0, n - 1]);
    some.sort_unstable();
    some.dedup();
    some
}

/// Calls `f` with each item, on all cores.
fn parallel<I: Sync, T: Send>(items: &[I], f: impl Fn(&I) -> T + Sync) -> Vec<T> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let chunk = items.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let f = &f;
        let parts: Vec<_> =
            items.chunks(chunk).map(|items| scope.spawn(move || items.iter().map(f).collect::<Vec<T>>())).collect();
        parts.into_iter().flat_map(|part| part.join().expect("no panic")).collect()
    })
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    for (x, y) in x.chunks(8).zip(y.chunks(8)) {
        lanes.iter_mut().zip(x).zip(y).for_each(|((lane, x), y)| *lane += x * y);
    }
    lanes.iter().sum()
}

fn at(value: i32) -> usize {
    usize::try_from(value).expect("an index")
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|x| x / sum).collect()
}

impl Sampled<'_> {
    fn cols(&self, name: &str) -> usize {
        self.program.buffer(name).expect("a buffer").cols
    }

    fn dtype(&self, name: &str) -> ElemType {
        self.program.buffer(name).expect("a buffer").dtype
    }

    /// A row of a buffer's contents.
    fn row_of(&self, bytes: &[u8], name: &str, row: usize) -> Vec<f64> {
        let dtype = self.dtype(name).float().expect("floats");
        let size = self.cols(name) * dtype.size();
        from_bytes(dtype, &bytes[row * size..][..size])
    }

    fn row(&self, name: &str, row: usize) -> Vec<f64> {
        self.row_of(self.operands[name], name, row)
    }

    fn ints(&self, name: &str) -> Vec<i32> {
        ints_from_bytes(self.operands[name])
    }

    fn num_rows(&self, name: &str) -> usize {
        let rows = self.program.buffer(name).expect("a buffer").rows;
        self.program.num_rows(rows, self.inputs.num_tokens(), self.inputs.num_logits())
    }

    /// Some rows of a buffer, or all if they are few.
    fn rows(&self, name: &str) -> Vec<usize> {
        pick(self.num_rows(name), ROWS, 8)
    }

    /// A row of a weight that is one dummy tensor.
    fn weight_row(&self, name: &str, row: usize) -> Vec<f64> {
        let weight = self.program.weight(name).expect("a weight");
        let mut values = vec![0f32; weight.cols()];
        dummy::fill_row(SEED, &weight.pieces[0], row, weight.dtype, &mut values);
        values.into_iter().map(f64::from).collect()
    }

    fn round(&self, values: &[f64]) -> Vec<f64> {
        from_bytes(self.program.dtype, &to_bytes(self.program.dtype, values))
    }

    fn sample(&self, name: &str, points: Vec<(usize, f64)>) -> Sample {
        Sample { name: name.to_owned(), dtype: self.dtype(name), points }
    }

    /// All elements of some rows, each row computed by `f`.
    fn whole_rows(&self, name: &str, rows: &[usize], f: impl Fn(usize) -> Vec<f64> + Sync) -> Sample {
        let cols = self.cols(name);
        let points = parallel(rows, |&row| (0..).map(|col| row * cols + col).zip(f(row)).collect::<Vec<_>>());
        self.sample(name, points.concat())
    }

    /// Computes the samples of each of the operation's outputs.
    pub(crate) fn run(&self, op: &Op) -> Vec<Sample> {
        match op {
            Op::Embed { table, vocab_start, out } => {
                let row = |t: usize| self.weight_row(table, at(self.inputs.token_ids[t]) - vocab_start);
                vec![self.whole_rows(out, &self.rows(out), row)]
            }
            Op::Norm { input, weight, eps, out } => {
                let scale = self.weight_row(weight, 0);
                vec![self.whole_rows(out, &self.rows(out), |t| self.norm(&self.row(input, t), &scale, *eps))]
            }
            Op::Add { a, b, out } => {
                let sum = |t: usize| self.row(a, t).iter().zip(self.row(b, t)).map(|(a, b)| a + b).collect();
                vec![self.whole_rows(out, &self.rows(out), sum)]
            }
            Op::SiluMul { input, out } => {
                let row = |p: usize| {
                    let row = self.row(input, p);
                    let (up, gate) = row.split_at(row.len() / 2);
                    up.iter().zip(gate).map(|(up, gate)| gate / (1.0 + (-gate).exp()) * up).collect()
                };
                vec![self.whole_rows(out, &self.rows(out), row)]
            }
            Op::GatherRows { input, out } => {
                vec![self.whole_rows(out, &self.rows(out), |l| self.row(input, at(self.inputs.logits_indices[l])))]
            }
            Op::Linear { input, weight, rows: None, epilogue, residual, out, ladder: _ } => {
                let value = |row: usize, col: usize, acc: f64| match (epilogue, residual) {
                    (Epilogue::Residual, Some(residual)) => self.round(&[acc])[0] + self.row(residual, row)[col],
                    _ => acc,
                };
                let rows = self.rows(out).into_iter().map(|row| (row, row, 0)).collect();
                vec![self.products(input, weight, rows, &|weight, x| dot(weight, x), 1, out, value)]
            }
            Op::ExpertGateUp { input, weight, offsets, order, silu_mul: true, out, ladder: _ } => {
                let order = self.ints(order);
                let rows = self.lists(offsets).into_iter().map(|(p, e)| (p, at(order[p]) / self.program.top_k, e));
                let product = |weight: &[f64], x: &[f64]| {
                    let (up, gate) = weight.split_at(weight.len() / 2);
                    let rounded = self.round(&[dot(up, x), dot(gate, x)]);
                    rounded[1] / (1.0 + (-rounded[1]).exp()) * rounded[0]
                };
                vec![self.products(input, weight, rows.collect(), &product, 2, out, |_, _, acc| acc)]
            }
            Op::ExpertDown { input, weight, offsets, order, out, ladder: _ } => {
                let order = self.ints(order);
                let rows = self.lists(offsets).into_iter().map(|(p, e)| (at(order[p]), p, e)).collect();
                vec![self.products(input, weight, rows, &|weight, x| dot(weight, x), 1, out, |_, _, acc| acc)]
            }
            Op::Combine { input, expert_weights, residual: Some(residual), out, norm, .. } => {
                let k = self.program.top_k;
                let rows = self.rows(out);
                let combined = |t: usize| {
                    let mut sum = self.row(residual, t);
                    for (j, weight) in self.row(expert_weights, t).iter().enumerate() {
                        sum.iter_mut().zip(self.row(input, t * k + j)).for_each(|(sum, x)| *sum += weight * x);
                    }
                    sum
                };
                let mut samples = vec![self.whole_rows(out, &rows, combined)];
                if let Some(norm) = norm {
                    let scale = self.weight_row(&norm.weight, 0);
                    let normalized = |t: usize| self.norm(&self.row_of(&self.found[out], out, t), &scale, norm.eps);
                    samples.push(self.whole_rows(&norm.out, &rows, normalized));
                }
                samples
            }
            Op::Route { logits, normalization, expert_ids, expert_weights, offsets, order, .. } => {
                self.route(logits, *normalization, [expert_ids, expert_weights, offsets, order])
            }
            Op::RopeWriteKv { qkv, num_heads, theta, .. } => self.rope_write_kv(qkv, *num_heads, *theta),
            Op::Attention { query, num_heads, window, fp8_context, layer, out } => {
                vec![self.attention(query, *num_heads, *window, *fp8_context, *layer, out)]
            }
            _ => panic!("no sampled reference of {op:?}"),
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a row's length")]
    fn norm(&self, x: &[f64], scale: &[f64], eps: f64) -> Vec<f64> {
        let inv = 1.0 / (dot(x, x) / x.len() as f64 + eps).sqrt();
        let normalized: Vec<f64> = x.iter().map(|x| x * inv).collect();
        self.round(&normalized).iter().zip(scale).map(|(x, w)| x * w).collect()
    }

    /// Some places in the expert lists, each with its expert.
    fn lists(&self, offsets: &str) -> Vec<(usize, usize)> {
        let offsets = self.ints(offsets);
        let expert = |p: usize| offsets.partition_point(|&start| at(start) <= p) - 1;
        pick(at(offsets[offsets.len() - 1]), ROWS, 16).into_iter().map(|p| (p, expert(p))).collect()
    }

    /// Some columns of the given `(row of the output, row of the input, expert)`. `product` takes the expert's weights
    /// for a column (one row, or a pair half the expert's matrix apart) and the input's row. `finish` turns the product
    /// into the element of the output.
    #[expect(clippy::too_many_arguments, reason = "one shape for every kind of linear")]
    fn products(
        &self,
        input: &str,
        weight: &str,
        rows: Vec<(usize, usize, usize)>,
        product: &(dyn Fn(&[f64], &[f64]) -> f64 + Sync),
        per_col: usize,
        out: &str,
        finish: impl Fn(usize, usize, f64) -> f64 + Sync,
    ) -> Sample {
        let cols = self.cols(out);
        let inputs: Vec<Vec<f64>> = rows.iter().map(|(_, from, _)| self.row(input, *from)).collect();
        let points = parallel(&pick(cols, COLS, 64), |&col| {
            let mut weights: HashMap<usize, Vec<f64>> = HashMap::new();
            let mut points = Vec::new();
            for ((to, _, expert), x) in rows.iter().zip(&inputs) {
                let weight = weights.entry(*expert).or_insert_with(|| {
                    let first = expert * per_col * cols + col;
                    (0..per_col).flat_map(|part| self.weight_row(weight, first + part * cols)).collect()
                });
                points.push((to * cols + col, finish(*to, col, product(weight, x))));
            }
            points
        });
        self.sample(out, points.concat())
    }

    /// All outputs of the routing, since they are few.
    fn route(
        &self,
        logits: &str,
        normalization: MoeNormalization,
        [ids, weights, offsets, order]: [&str; 4],
    ) -> Vec<Sample> {
        let k = self.program.top_k;
        let (mut all_ids, mut all_weights) = (Vec::new(), Vec::new());
        for t in 0..self.inputs.num_tokens() {
            let probs = softmax(&self.row(logits, t));
            let mut ranked: Vec<usize> = (0..probs.len()).collect();
            ranked.sort_by(|&a, &b| probs[b].total_cmp(&probs[a]).then(a.cmp(&b)));
            ranked.truncate(k);
            ranked.sort_unstable();
            let sum: f64 =
                if normalization == MoeNormalization::Renorm { ranked.iter().map(|&e| probs[e]).sum() } else { 1.0 };
            all_weights.extend(ranked.iter().map(|&e| probs[e] / sum));
            all_ids.extend(ranked.iter().map(|&e| i32::try_from(e).expect("an expert")));
        }
        let (starts, listed) = crate::cases::lists(&all_ids, [0, self.program.num_experts]);
        let ints =
            |name: &str, values: &[i32]| self.sample(name, values.iter().map(|&x| f64::from(x)).enumerate().collect());
        let weights = self.sample(weights, all_weights.into_iter().enumerate().collect());
        vec![ints(ids, &all_ids), weights, ints(offsets, &starts), ints(order, &listed)]
    }

    /// Where a head's vector of a slot starts in a layer's keys or values.
    fn offset(&self, slot: usize, head: usize) -> usize {
        let (size, kv) = (self.program.limits.block_size, self.program.kv);
        ((slot / size * kv.num_kv_heads + head) * size + slot % size) * kv.head_dim
    }

    /// Angles are computed in f32, as the contract says: at large positions they differ from those of f64.
    #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "the contract's roundings")]
    fn rope_write_kv(&self, qkv: &str, num_heads: usize, theta: f64) -> Vec<Sample> {
        let (kv, cols) = (self.program.kv, self.cols(qkv));
        let d = kv.head_dim;
        let inverse: Vec<f32> =
            (0..d / 2).map(|i| 1.0 / theta.powf(f64::from((2 * i) as f32 / d as f32)) as f32).collect();
        let [mut queries, mut keys, mut values] = [const { Vec::new() }; 3];
        for t in self.rows(qkv) {
            let mut row = self.row(qkv, t);
            let position = self.inputs.positions[t] as f32;
            for head in row.chunks_mut(d).take(num_heads + kv.num_kv_heads) {
                for (i, inverse) in inverse.iter().enumerate() {
                    let (sin, cos) = f64::from(position * inverse).sin_cos();
                    let (a, b) = (head[i], head[i + d / 2]);
                    (head[i], head[i + d / 2]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
            let slot = at(self.inputs.slot_mapping[t]);
            for (h, head) in row.chunks(d).enumerate() {
                let (points, start) = match h.checked_sub(num_heads) {
                    None => (&mut queries, t * cols + h * d),
                    Some(h) if h < kv.num_kv_heads => (&mut keys, self.offset(slot, h)),
                    Some(h) => (&mut values, self.offset(slot, h - kv.num_kv_heads)),
                };
                points.extend((start..).zip(head.iter().copied()));
            }
        }
        let cache = |half: &str, points| Sample { name: format!("cache {half}"), dtype: kv.dtype.into(), points };
        vec![self.sample(qkv, queries), cache("k", keys), cache("v", values)]
    }

    #[expect(clippy::cast_precision_loss, reason = "a head's length")]
    fn attention(
        &self,
        query: &str,
        num_heads: usize,
        window: Option<usize>,
        fp8_context: bool,
        layer: usize,
        out: &str,
    ) -> Sample {
        let (kv, size, width) =
            (self.program.kv, self.program.limits.block_size, self.program.limits.max_blocks_per_seq());
        let (d, cols) = (kv.head_dim, self.cols(out));
        let tokens = pick(self.inputs.num_tokens(), 4 * ROWS, 8);
        let heads = pick(num_heads, num_heads, HEADS);
        let pairs: Vec<(usize, usize)> = tokens.iter().flat_map(|&t| heads.iter().map(move |&h| (t, h))).collect();
        let vector = |half: &str, slot: usize, head: usize| {
            let size = kv.elem().size();
            let bytes = &self.operands[half][self.offset(slot, head) * size..][..d * size];
            match kv.elem().float() {
                Some(dtype) => from_bytes(dtype, bytes),
                None => bytes.iter().map(|&byte| fp8::from_bits(byte)).collect(),
            }
        };
        let scale = self.program.kv_scales.get(layer).copied().unwrap_or(KvScale { key: 1.0, value: 1.0 });
        let [key_scale, value_scale] = [scale.key, scale.value].map(f64::from);
        let points = parallel(&pairs, |&(t, head)| {
            let token = i32::try_from(t).expect("a token");
            let seq = self.inputs.cu_query_lens.partition_point(|&start| start <= token) - 1;
            let blocks = &self.inputs.block_table[seq * width..][..width];
            let (i, kv_head) = (at(self.inputs.positions[t]), head * kv.num_kv_heads / num_heads);
            let slot = |j: usize| at(blocks[j / size]) * size + j % size;
            let in_fp8 = fp8_context && seq >= self.inputs.num_decodes;
            let mut q = self.row(query, t)[head * d..][..d].to_vec();
            if in_fp8 {
                q.iter_mut().for_each(|x| *x = fp8::round(*x, 1.0));
            }
            let first = window.map_or(0, |window| (i + 1).saturating_sub(window));
            let scores: Vec<f64> = (first..=i)
                .map(|j| dot(&q, &vector("cache k", slot(j), kv_head)) / (d as f64).sqrt() * key_scale)
                .collect();
            let mut sum = vec![0.0; d];
            let probs = if in_fp8 { fp8::probabilities(&scores) } else { softmax(&scores) };
            for (j, p) in (first..=i).zip(probs) {
                sum.iter_mut()
                    .zip(vector("cache v", slot(j), kv_head))
                    .for_each(|(sum, v)| *sum += p * v * value_scale);
            }
            (t * cols + head * d..).zip(sum).collect::<Vec<_>>()
        });
        self.sample(out, points.concat())
    }
}

/// Seeded floats of standard deviation 1, as bytes of a float type.
pub(crate) fn seeded(name: &str, n: usize, elem: ElemType) -> Vec<u8> {
    const CHUNK: usize = 1 << 16;
    let (key, scale) = (dummy::key(SEED, name), dummy::scale(1));
    let starts: Vec<usize> = (0..n).step_by(CHUNK).collect();
    let chunk = |&start: &usize| {
        let element = |i: usize| f64::from(dummy::element(key, i as u64, scale));
        let values: Vec<f64> = (start..(start + CHUNK).min(n)).map(element).collect();
        match elem.float() {
            Some(dtype) => to_bytes(dtype, &values),
            None => values.into_iter().map(fp8::to_bits).collect(),
        }
    };
    parallel(&starts, chunk).concat()
}
