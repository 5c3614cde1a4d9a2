//! Every operation in f64, by the plainest loops. Of the roundings that the contract names, the reference does those
//! inside of an operation. It does not round the last operation's results, so that the rounding of a backend's result counts as part of
//! its error.

use std::collections::HashMap;

use mixtral_engine::{Epilogue, Op, Program, StepInputs, WeightSource};
use mixtral_model::{DType, MoeNormalization};

use crate::elements::{from_bytes, to_bytes};
use crate::fp8;
use crate::quantized;

/// Contents of a buffer: this step's rows.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// Elements of a float type.
    Floats(Vec<f64>),
    /// Elements of i32.
    Ints(Vec<i32>),
}

/// What a program reads and writes.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Buffers by name.
    pub buffers: HashMap<String, Values>,
    /// Keys and values of each layer, as they are stored, `[blocks, kv_heads, block_size, head_dim]`.
    pub cache: Vec<[Vec<f64>; 2]>,
}

impl State {
    fn floats(&self, name: &str) -> &[f64] {
        match &self.buffers[name] {
            Values::Floats(values) => values,
            Values::Ints(_) => panic!("`{name}` holds integers"),
        }
    }

    fn ints(&self, name: &str) -> &[i32] {
        match &self.buffers[name] {
            Values::Ints(values) => values,
            Values::Floats(_) => panic!("`{name}` holds floats"),
        }
    }

    fn set(&mut self, name: &str, values: Vec<f64>) {
        self.buffers.insert(name.to_owned(), Values::Floats(values));
    }

    fn set_ints(&mut self, name: &str, values: Vec<i32>) {
        self.buffers.insert(name.to_owned(), Values::Ints(values));
    }
}

fn at(value: i32) -> usize {
    usize::try_from(value).expect("an index")
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// The product of x with each row of a matrix.
fn times(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks(x.len()).map(|row| dot(row, x)).collect()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|x| x / sum).collect()
}

/// The values rounded to a type.
fn round(dtype: DType, values: &[f64]) -> Vec<f64> {
    from_bytes(dtype, &to_bytes(dtype, values))
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// One program, its weights and one step's inputs.
pub struct Reference<'a> {
    /// The program.
    pub program: &'a Program,
    /// Its weights.
    pub weights: &'a dyn WeightSource,
    /// The step.
    pub inputs: &'a StepInputs<'a>,
}

impl Reference<'_> {
    /// Runs every operation but `sample`.
    ///
    /// # Panics
    /// On a program or state that is not well formed.
    pub fn run(&self, state: &mut State) {
        for (index, op) in self.program.ops.iter().enumerate() {
            if index > 0 {
                self.round(state);
            }
            self.run_op(op, state);
        }
    }

    /// Rounds what operations hand over to the types of the buffers and of the cache.
    fn round(&self, state: &mut State) {
        let round = |values: &mut Vec<f64>, dtype| *values = from_bytes(dtype, &to_bytes(dtype, values));
        for buffer in &self.program.buffers {
            if let (Some(dtype), Some(Values::Floats(values))) =
                (buffer.dtype.float(), state.buffers.get_mut(&buffer.name))
            {
                round(values, dtype);
            }
        }
        let kv = self.program.kv;
        if kv.format.is_plain() {
            state.cache.iter_mut().flatten().for_each(|half| round(half, kv.dtype));
        }
    }

    fn weight(&self, name: &str) -> Vec<f64> {
        quantized::elements(self.program.weight(name).expect("a weight"), self.weights)
    }

    /// What inputs stand for when they are multiplied with a weight.
    fn multiplied(&self, weight: &str, inputs: &[f64]) -> Vec<f64> {
        fp8::input(self.program.weight(weight).expect("a weight"), self.weights, inputs)
    }

    /// The scales of a layer's keys and values, if the cache is fp8.
    fn cache_scales(&self, layer: usize) -> Option<[f32; 2]> {
        self.program.kv_scales.get(layer).map(|scale| [scale.key, scale.value])
    }

    fn cols(&self, buffer: &str) -> usize {
        self.program.buffer(buffer).expect("a buffer").cols
    }

    fn run_op(&self, op: &Op, state: &mut State) {
        let top_k = self.program.top_k;
        match op {
            Op::Embed { table, vocab_start, out } => {
                let (table, cols) = (self.weight(table), self.cols(out));
                let row = |&token: &i32| {
                    let row = at(token).checked_sub(*vocab_start).and_then(|r| table.chunks(cols).nth(r));
                    row.map_or(vec![0.0; cols], <[f64]>::to_vec)
                };
                state.set(out, self.inputs.token_ids.iter().flat_map(row).collect());
            }
            Op::Norm { input, weight, eps, out } => {
                let values = self.norm(state.floats(input), weight, *eps);
                state.set(out, values);
            }
            Op::Add { a, b, out } => {
                let sum = state.floats(a).iter().zip(state.floats(b)).map(|(a, b)| a + b).collect();
                state.set(out, sum);
            }
            Op::Linear { input, weight, rows, epilogue, residual, out, ladder: _ } => {
                let cols = self.cols(input);
                let inputs = self.multiplied(weight, state.floats(input));
                let weight = self.weight(weight);
                let rows = rows.unwrap_or([0, weight.len() / cols]);
                let weight = &weight[rows[0] * cols..rows[1] * cols];
                let mut values: Vec<f64> = inputs.chunks(cols).flat_map(|x| times(weight, x)).collect();
                if *epilogue == Epilogue::Residual {
                    values = round(self.program.dtype, &values);
                    let residual = state.floats(residual.as_ref().expect("a residual"));
                    values.iter_mut().zip(residual).for_each(|(v, r)| *v += r);
                }
                state.set(out, values);
            }
            Op::Rope { data, num_heads, theta } => {
                let mut values = state.floats(data).to_vec();
                self.rope(&mut values, self.cols(data), *num_heads, *theta);
                state.set(data, values);
            }
            Op::WriteKv { key, value, layer, directions } => {
                let directions = directions.as_ref().map(|found| self.turned(&found.weight, found.theta));
                for (half, name) in [key, value].into_iter().enumerate() {
                    let rows = state.floats(name).to_vec();
                    let scale = self.cache_scales(*layer).map(|scales| scales[half]);
                    let directions = directions.as_ref().filter(|_| half == 0);
                    self.write_kv(&rows, self.cols(name), 0, scale, directions, &mut state.cache[*layer][half]);
                }
            }
            Op::RopeWriteKv { qkv, num_heads, theta, layer, directions } => {
                let directions = directions.as_ref().map(|weight| self.turned(weight, *theta));
                let (kv, cols) = (self.program.kv, self.cols(qkv));
                let mut values = state.floats(qkv).to_vec();
                self.rope(&mut values, cols, num_heads + kv.num_kv_heads, *theta);
                for half in 0..2 {
                    let start = (num_heads + half * kv.num_kv_heads) * kv.head_dim;
                    let scale = self.cache_scales(*layer).map(|scales| scales[half]);
                    let directions = directions.as_ref().filter(|_| half == 0);
                    self.write_kv(&values, cols, start, scale, directions, &mut state.cache[*layer][half]);
                }
                state.set(qkv, values);
            }
            Op::Attention { query, num_heads, window, fp8_context, layer, out } => {
                let values = self.attention(state, query, *num_heads, *window, *fp8_context, *layer);
                state.set(out, values);
            }
            Op::Softmax { logits, probs } => {
                let values = state.floats(logits).chunks(self.cols(logits)).flat_map(softmax).collect();
                state.set(probs, values);
            }
            Op::TopK { probs, normalization, layer: _, expert_ids, expert_weights } => {
                let probs = state.floats(probs).to_vec();
                self.top_k(&probs, *normalization, expert_ids, expert_weights, state);
            }
            Op::ExpertSort { expert_ids, experts, offsets, order } => {
                self.expert_sort(expert_ids, *experts, offsets, order, state);
            }
            Op::Route { logits, normalization, layer: _, experts, expert_ids, expert_weights, offsets, order } => {
                let probs: Vec<f64> = state.floats(logits).chunks(self.cols(logits)).flat_map(softmax).collect();
                self.top_k(&probs, *normalization, expert_ids, expert_weights, state);
                self.expert_sort(expert_ids, *experts, offsets, order, state);
            }
            Op::ExpertGateUp { input, weight, offsets, order, silu_mul, out, ladder: _ } => {
                let inputs = self.multiplied(weight, state.floats(input));
                let (cols, weight) = (self.cols(input), self.weight(weight));
                let size = weight.len() / (state.ints(offsets).len() - 1);
                let mut values = state.floats(out).to_vec();
                for (e, edge) in state.ints(offsets).windows(2).enumerate() {
                    for p in at(edge[0])..at(edge[1]) {
                        let token = at(state.ints(order)[p]) / top_k;
                        let x = &inputs[token * cols..][..cols];
                        let mut row = times(&weight[e * size..][..size], x);
                        if *silu_mul {
                            row = round(self.program.dtype, &row);
                            let (up, gate) = row.split_at(row.len() / 2);
                            row = up.iter().zip(gate).map(|(up, gate)| silu(*gate) * up).collect();
                        }
                        values[p * row.len()..][..row.len()].copy_from_slice(&row);
                    }
                }
                state.set(out, values);
            }
            Op::SiluMul { input, out } => {
                let row = |row: &[f64]| -> Vec<f64> {
                    let (up, gate) = row.split_at(row.len() / 2);
                    up.iter().zip(gate).map(|(up, gate)| silu(*gate) * up).collect()
                };
                let values = state.floats(input).chunks(self.cols(input)).flat_map(row).collect();
                state.set(out, values);
            }
            Op::ExpertDown { input, weight, offsets, order, out, ladder: _ } => {
                let inputs = self.multiplied(weight, state.floats(input));
                let (cols, weight) = (self.cols(input), self.weight(weight));
                let size = weight.len() / (state.ints(offsets).len() - 1);
                let mut values = state.floats(out).to_vec();
                for (e, edge) in state.ints(offsets).windows(2).enumerate() {
                    for p in at(edge[0])..at(edge[1]) {
                        let row = times(&weight[e * size..][..size], &inputs[p * cols..][..cols]);
                        let to = at(state.ints(order)[p]);
                        values[to * row.len()..][..row.len()].copy_from_slice(&row);
                    }
                }
                state.set(out, values);
            }
            Op::Combine { input, expert_ids, expert_weights, experts, residual, out, norm } => {
                let cols = self.cols(out);
                let mut values = state.floats(residual.as_ref().expect("a residual")).to_vec();
                for (a, (&id, weight)) in state.ints(expert_ids).iter().zip(state.floats(expert_weights)).enumerate() {
                    if (experts[0]..experts[1]).contains(&at(id)) {
                        let row = &state.floats(input)[a * cols..][..cols];
                        let target = &mut values[a / top_k * cols..][..cols];
                        target.iter_mut().zip(row).for_each(|(t, x)| *t += weight * x);
                    }
                }
                if let Some(norm) = norm {
                    let normalized = self.norm(&round(self.program.dtype, &values), &norm.weight, norm.eps);
                    state.set(&norm.out, normalized);
                }
                state.set(out, values);
            }
            Op::GatherRows { input, out } => {
                let cols = self.cols(input);
                let row = |&i: &i32| state.floats(input)[at(i) * cols..][..cols].to_vec();
                let values = self.inputs.logits_indices.iter().flat_map(row).collect();
                state.set(out, values);
            }
            Op::Sample { .. } => {}
            // Tests of several ranks compare with a single rank instead.
            Op::AllReduce { .. } | Op::AllGather { .. } | Op::Send { .. } | Op::Recv { .. } => {
                panic!("{} has no reference of one rank", op.name())
            }
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a row's length")]
    fn norm(&self, x: &[f64], weight: &str, eps: f64) -> Vec<f64> {
        let weight = self.weight(weight);
        let row = |x: &[f64]| -> Vec<f64> {
            let inv = 1.0 / (dot(x, x) / x.len() as f64 + eps).sqrt();
            let normalized: Vec<f64> = x.iter().map(|x| x * inv).collect();
            round(self.program.dtype, &normalized).iter().zip(&weight).map(|(x, w)| x * w).collect()
        };
        x.chunks(weight.len()).flat_map(row).collect()
    }

    fn rope(&self, data: &mut [f64], cols: usize, num_heads: usize, theta: f64) {
        let d = self.program.kv.head_dim;
        for (row, position) in data.chunks_mut(cols).zip(&self.inputs.positions) {
            for head in row.chunks_mut(d).take(num_heads) {
                for i in 0..d / 2 {
                    #[expect(clippy::cast_precision_loss, reason = "a head's length")]
                    let angle = f64::from(*position) / theta.powf(2.0 * i as f64 / d as f64);
                    let (a, b) = (head[i], head[i + d / 2]);
                    head[i] = a * angle.cos() - b * angle.sin();
                    head[i + d / 2] = b * angle.cos() + a * angle.sin();
                }
            }
        }
    }

    /// Where a head's vector of a slot starts in a layer's keys or values.
    fn offset(&self, slot: usize, head: usize) -> usize {
        let (size, kv) = (self.program.limits.block_size, self.program.kv);
        ((slot / size * kv.num_kv_heads + head) * size + slot % size) * kv.head_dim
    }

    /// Directions of keys, turned to each token's position: a row of all heads for each token.
    fn turned(&self, weight: &str, theta: f64) -> Vec<f64> {
        let (kv, own) = (self.program.kv, self.weight(weight));
        let mut rows = own.repeat(self.inputs.positions.len());
        self.rope(&mut rows, own.len(), kv.num_kv_heads, theta);
        rows
    }

    #[expect(clippy::cast_possible_truncation, reason = "it was an f32")]
    fn write_kv(
        &self,
        data: &[f64],
        cols: usize,
        start: usize,
        scale: Option<f32>,
        directions: Option<&Vec<f64>>,
        cache: &mut [f64],
    ) {
        let kv = self.program.kv;
        let rows = data.chunks(cols).zip(&self.inputs.slot_mapping).enumerate();
        for (token, (row, &slot)) in rows.filter(|(_, (_, slot))| **slot >= 0) {
            for head in 0..kv.num_kv_heads {
                let vector = &row[start + head * kv.head_dim..][..kv.head_dim];
                // Keys are rounded to the model's type by their rotation, before they are rounded again.
                let rounded = || round(kv.dtype, vector).into_iter();
                let vector = match (scale, directions) {
                    (Some(scale), Some(directions)) => {
                        let scaled: Vec<f64> = rounded().map(|x| f64::from(x as f32 / scale)).collect();
                        let direction = &directions[(token * kv.num_kv_heads + head) * kv.head_dim..][..kv.head_dim];
                        fp8::by_direction(&scaled, direction).into_iter().map(fp8::from_bits).collect()
                    }
                    (Some(scale), None) => rounded().map(|x| fp8::round(x, scale)).collect(),
                    (None, _) => vector.to_vec(),
                };
                cache[self.offset(at(slot), head)..][..kv.head_dim].copy_from_slice(&vector);
            }
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a head's length")]
    fn attention(
        &self,
        state: &State,
        query: &str,
        num_heads: usize,
        window: Option<usize>,
        fp8_context: bool,
        layer: usize,
    ) -> Vec<f64> {
        let (kv, size, cols) = (self.program.kv, self.program.limits.block_size, self.cols(query));
        let d = kv.head_dim;
        let width = self.program.limits.max_blocks_per_seq();
        let scales = self.cache_scales(layer).unwrap_or([1.0; 2]).map(f64::from);
        let stored = |half: usize| state.cache[layer][half].iter().map(|x| x * scales[half]).collect::<Vec<f64>>();
        let (keys, values) = (stored(0), stored(1));
        let mut out = Vec::new();
        for (seq, edge) in self.inputs.cu_query_lens.windows(2).enumerate() {
            let blocks = &self.inputs.block_table[seq * width..][..width];
            let in_fp8 = fp8_context && seq >= self.inputs.num_decodes;
            for t in at(edge[0])..at(edge[1]) {
                let i = at(self.inputs.positions[t]);
                for head in 0..num_heads {
                    let mut q = state.floats(query)[t * cols + head * d..][..d].to_vec();
                    if in_fp8 {
                        q.iter_mut().for_each(|x| *x = fp8::round(*x, 1.0));
                    }
                    let kv_head = head * kv.num_kv_heads / num_heads;
                    let place = |j: usize| self.offset(at(blocks[j / size]) * size + j % size, kv_head);
                    let seen: Vec<usize> = (0..=i).filter(|j| window.is_none_or(|w| j + w > i)).collect();
                    let scores: Vec<f64> =
                        seen.iter().map(|&j| dot(&q, &keys[place(j)..][..d]) / (d as f64).sqrt()).collect();
                    let probs = if in_fp8 { fp8::probabilities(&scores) } else { softmax(&scores) };
                    let column =
                        |c: usize| seen.iter().zip(&probs).map(|(&j, p)| p * values[place(j) + c]).sum::<f64>();
                    out.extend((0..d).map(column));
                }
            }
        }
        out
    }

    fn top_k(&self, probs: &[f64], normalization: MoeNormalization, ids: &str, weights: &str, state: &mut State) {
        let (mut all_ids, mut all_weights) = (Vec::new(), Vec::new());
        for row in probs.chunks(self.program.num_experts) {
            let mut ranked: Vec<usize> = (0..row.len()).collect();
            ranked.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
            ranked.truncate(self.program.top_k);
            ranked.sort_unstable();
            let sum: f64 = match normalization {
                MoeNormalization::None => 1.0,
                MoeNormalization::Renorm => ranked.iter().map(|&e| row[e]).sum(),
            };
            all_ids.extend(ranked.iter().map(|&e| i32::try_from(e).expect("an expert")));
            all_weights.extend(ranked.iter().map(|&e| row[e] / sum));
        }
        state.set_ints(ids, all_ids);
        state.set(weights, all_weights);
    }

    fn expert_sort(&self, ids: &str, experts: [usize; 2], offsets: &str, order: &str, state: &mut State) {
        let ids = state.ints(ids).to_vec();
        let (mut ends, mut sorted) = (vec![0], Vec::new());
        for expert in experts[0]..experts[1] {
            sorted.extend((0i32..).zip(&ids).filter(|(_, id)| at(**id) == expert).map(|(a, _)| a));
            ends.push(i32::try_from(sorted.len()).expect("a count"));
        }
        // Entries past the last assignment stay as they were.
        let mut all = state.ints(order).to_vec();
        all[..sorted.len()].copy_from_slice(&sorted);
        state.set_ints(offsets, ends);
        state.set_ints(order, all);
    }
}
