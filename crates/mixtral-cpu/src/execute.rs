//! Runs resolved operations: takes their operands from the arena and calls their kernels.

use std::borrow::Cow;
use std::ops::Range;

use mixtral_engine::{BackendError, Collectives, Program, StepInputs, StepOutputs};
use mixtral_model::{DType, MoeNormalization};

use crate::cache::KvCache;
use crate::kernels::experts::ExpertLists;
use crate::kernels::kv::Heads;
use crate::kernels::linear::Workspace;
use crate::kernels::rope::RopeTable;
use crate::kernels::workers::{Workers, index};
use crate::kernels::{
    attention, collective, combine, elementwise, embed, experts, kv, linear, norm, rope, routing, sample,
};
use crate::resolve::{BufferId, Chosen, Directions, Finish, Norm, Residual, ResolvedOp};
use crate::weights::Matrix;

/// Everything that the operations of one step read or write.
pub(crate) struct Machine<'a> {
    pub(crate) program: &'a Program,
    pub(crate) workers: Workers<'a>,
    pub(crate) inputs: &'a StepInputs<'a>,
    /// The ids of its tokens, those included that the step before drew.
    pub(crate) token_ids: Cow<'a, [i32]>,
    pub(crate) weights: Vec<Matrix<'a>>,
    /// Tables of the program's rotary bases at this step's positions.
    pub(crate) rope: Vec<RopeTable>,
    pub(crate) arena: &'a mut [u8],
    pub(crate) cache: &'a mut KvCache,
    pub(crate) work: &'a mut Workspace,
    /// How many tokens each expert got, if that is counted.
    pub(crate) counts: Option<&'a mut [Vec<u64>]>,
    /// The other ranks, if there are any.
    pub(crate) ranks: Option<&'a dyn Collectives>,
    pub(crate) outputs: StepOutputs,
}

impl<'a> Machine<'a> {
    /// Where a buffer's rows of this step are in the arena.
    fn span(&self, buffer: BufferId) -> Range<usize> {
        let buffer = &self.program.buffers[buffer];
        let rows = self.program.num_rows(buffer.rows, self.inputs.num_tokens(), self.inputs.num_logits());
        buffer.offset..buffer.offset + rows * buffer.cols * buffer.dtype.size()
    }

    fn cols(&self, buffer: BufferId) -> usize {
        self.program.buffers[buffer].cols
    }

    /// The rows of different buffers as separate slices.
    fn carve<const N: usize>(&mut self, buffers: [BufferId; N]) -> Result<[&mut [u8]; N], BackendError> {
        let spans = buffers.map(|buffer| self.span(buffer));
        carve(self.arena, spans)
    }

    /// Copies the contents of buffer `original` into buffer `copy`, if there is an `original`.
    fn copy(&mut self, original: Option<BufferId>, copy: BufferId) -> Result<(), BackendError> {
        if let Some(original) = original {
            let [original, copy] = self.carve([original, copy])?;
            copy.copy_from_slice(original);
        }
        Ok(())
    }

    /// Fills the buffer `out` with what a sum will be added to.
    fn begin_sum(&mut self, residual: Residual, out: BufferId) -> Result<(), BackendError> {
        match residual {
            Residual::InPlace => {}
            Residual::Buffer(original) => self.copy(Some(original), out)?,
            Residual::None => {
                let [out] = self.carve([out])?;
                out.fill(0);
            }
        }
        Ok(())
    }

    fn ranks(&self) -> Result<&'a dyn Collectives, BackendError> {
        self.ranks
            .ok_or_else(|| BackendError::Other("the program speaks to other ranks, but there are none".to_owned()))
    }

    pub(crate) fn run(&mut self, op: &ResolvedOp) -> Result<(), BackendError> {
        let workers = self.workers;
        let inputs = self.inputs;
        let top_k = self.program.top_k;
        match op {
            ResolvedOp::Embed { table, vocab_start, out } => {
                let table = self.weights[*table];
                let span = self.span(*out);
                embed::embed(&workers, table, *vocab_start, &self.token_ids, &mut self.arena[span]);
            }
            ResolvedOp::Norm(norm) => self.norm(norm)?,
            ResolvedOp::Add { a, b, out } => {
                self.copy(*b, *out)?;
                let cols = self.cols(*out);
                let [a, out] = self.carve([*a, *out])?;
                elementwise::add(&workers, a, cols, out);
            }
            ResolvedOp::Linear { input, weight, rows, finish, out } => {
                self.linear(*input, *weight, *rows, *finish, *out)?
            }
            ResolvedOp::Rope { data, num_heads, theta } => self.rope(*data, *num_heads, *theta)?,
            ResolvedOp::WriteKv { key, value, layer, directions } => {
                let floats = self.floats_of(*directions);
                let spans = [self.span(*key), self.span(*value)];
                let shape = self.cache.shape();
                let stride = workers.row_bytes(shape.num_kv_heads * shape.head_dim);
                let [key, value] = carve(self.arena, spans)?;
                let scale = self.cache.scale(*layer);
                let (keys, values) = self.cache.layer_mut(*layer);
                let directions =
                    floats.as_ref().map(|(of_heads, theta)| kv::Directions { of_heads, table: &self.rope[*theta] });
                for (bytes, scale, directions, cache) in
                    [(key, scale.key, directions, keys), (value, scale.value, None, values)]
                {
                    let heads = Heads { bytes, start: 0, stride };
                    kv::write_kv(&workers, heads, &inputs.slot_mapping, shape, scale, directions, cache);
                }
            }
            ResolvedOp::RopeWriteKv { qkv, num_heads, theta, layer, directions } => {
                let floats = self.floats_of(*directions);
                let (shape, span) = (self.cache.shape(), self.span(*qkv));
                self.rope(*qkv, num_heads + shape.num_kv_heads, *theta)?;
                let stride = workers.row_bytes(self.cols(*qkv));
                let bytes = &self.arena[span];
                let (first_value, scale) = (num_heads + shape.num_kv_heads, self.cache.scale(*layer));
                let (keys, values) = self.cache.layer_mut(*layer);
                let directions =
                    floats.as_ref().map(|(of_heads, theta)| kv::Directions { of_heads, table: &self.rope[*theta] });
                for (head, scale, directions, cache) in
                    [(*num_heads, scale.key, directions, keys), (first_value, scale.value, None, values)]
                {
                    let heads = Heads { bytes, start: workers.row_bytes(head * shape.head_dim), stride };
                    kv::write_kv(&workers, heads, &inputs.slot_mapping, shape, scale, directions, cache);
                }
            }
            ResolvedOp::Attention { query, num_heads, window, fp8_context, layer, out } => {
                let (cols, spans) = (self.cols(*query), [self.span(*query), self.span(*out)]);
                let [query, out] = carve(self.arena, spans)?;
                let cache = self.cache.layer(*layer);
                let heads = attention::Heads { num: *num_heads, window: *window, fp8_context: *fp8_context };
                attention::attention(&workers, inputs, query, cols, heads, cache, out)?;
            }
            ResolvedOp::Softmax { logits, probs } => {
                let cols = self.cols(*logits);
                let [logits, probs] = self.carve([*logits, *probs])?;
                let rows = floats(logits).chunks_exact(cols).zip(floats_mut(probs).chunks_exact_mut(cols));
                rows.for_each(|(logits, probs)| routing::softmax_row(logits, probs));
            }
            ResolvedOp::TopK { probs, normalization, layer, chosen } => {
                self.top_k(*probs, *normalization, *chosen, false)?;
                self.count(*layer, *chosen);
            }
            ResolvedOp::ExpertSort { expert_ids, experts, lists } => {
                let [ids, offsets, order] = self.carve([*expert_ids, lists.offsets, lists.order])?;
                routing::expert_sort(ints(ids), experts, ints_mut(offsets), ints_mut(order));
            }
            ResolvedOp::Route { logits, normalization, layer, experts, chosen, lists } => {
                self.top_k(*logits, *normalization, *chosen, true)?;
                self.count(*layer, *chosen);
                let [ids, offsets, order] = self.carve([chosen.ids, lists.offsets, lists.order])?;
                routing::expert_sort(ints(ids), experts, ints_mut(offsets), ints_mut(order));
            }
            ResolvedOp::ExpertGateUp { input, weight, lists, silu_mul, out } => {
                let spans = [*input, lists.offsets, lists.order, *out].map(|b| self.span(b));
                let [input, offsets, order, out] = carve(self.arena, spans)?;
                let lists = ExpertLists { offsets: ints(offsets), order: ints(order) };
                let weight = self.weights[*weight];
                experts::expert_gate_up(&workers, self.work, input, weight, lists, top_k, *silu_mul, out)?;
            }
            ResolvedOp::SiluMul { input, out } => {
                let cols = self.cols(*out);
                let [input, out] = self.carve([*input, *out])?;
                elementwise::silu_mul(&workers, input, cols, out);
            }
            ResolvedOp::ExpertDown { input, weight, lists, out } => {
                let spans = [*input, lists.offsets, lists.order, *out].map(|b| self.span(b));
                let [input, offsets, order, out] = carve(self.arena, spans)?;
                let lists = ExpertLists { offsets: ints(offsets), order: ints(order) };
                experts::expert_down(&workers, self.work, input, self.weights[*weight], lists, out)?;
            }
            ResolvedOp::Combine { input, chosen, experts, residual, out, norm } => {
                self.begin_sum(*residual, *out)?;
                let cols = self.cols(*out);
                let [input, ids, weights, out] = self.carve([*input, chosen.ids, chosen.weights, *out])?;
                combine::combine(&workers, input, ints(ids), floats(weights), experts, cols, out);
                if let Some(norm) = norm {
                    self.norm(norm)?;
                }
            }
            ResolvedOp::AllReduce { input, residual, out, norm } => {
                self.begin_sum(*residual, *out)?;
                let (ranks, tp_size, cols) = (self.ranks()?, self.program.tp_size, self.cols(*out));
                let [input, out] = self.carve([*input, *out])?;
                let mut parts = vec![0; tp_size * input.len()];
                ranks.all_gather(input, &mut parts)?;
                collective::add_sum(&workers, &parts, cols, matches!(residual, Residual::None), out);
                if let Some(norm) = norm {
                    self.norm(norm)?;
                }
            }
            ResolvedOp::AllGather { input, out } => {
                let (ranks, tp_size) = (self.ranks()?, self.program.tp_size);
                let row_bytes = self.cols(*input) * self.program.buffers[*input].dtype.size();
                let [input, out] = self.carve([*input, *out])?;
                let mut parts = vec![0; tp_size * input.len()];
                ranks.all_gather(input, &mut parts)?;
                collective::join_columns(&parts, tp_size, row_bytes, out);
            }
            ResolvedOp::Send { input, to } => {
                let ranks = self.ranks()?;
                let [input] = self.carve([*input])?;
                ranks.send(*to, input)?;
            }
            ResolvedOp::Recv { out, from } => {
                let ranks = self.ranks()?;
                let [out] = self.carve([*out])?;
                ranks.recv(*from, out)?;
            }
            ResolvedOp::GatherRows { input, out } => {
                let row_bytes = workers.row_bytes(self.cols(*out));
                let [input, out] = self.carve([*input, *out])?;
                embed::gather_rows(input, &inputs.logits_indices, row_bytes, out);
            }
            ResolvedOp::Sample { logits } => {
                let (cols, vocab_size, span) = (self.cols(*logits), self.program.vocab_size, self.span(*logits));
                let logits = floats(&self.arena[span]);
                let dtype = self.program.dtype;
                sample::sample(logits, cols, vocab_size, dtype, inputs, &mut self.outputs);
                if inputs.return_logits {
                    self.outputs.logits =
                        logits.chunks_exact(cols).flat_map(|row| &row[..vocab_size]).copied().collect();
                }
            }
        }
        Ok(())
    }

    fn norm(&mut self, op: &Norm) -> Result<(), BackendError> {
        let (workers, weight) = (self.workers, self.weights[op.weight]);
        let [input, out] = self.carve([op.input, op.out])?;
        norm::norm(&workers, input, weight, op.eps, out);
        Ok(())
    }

    fn linear(
        &mut self,
        input: BufferId,
        weight: usize,
        rows: [usize; 2],
        finish: Finish,
        out: BufferId,
    ) -> Result<(), BackendError> {
        if let Finish::Residual(residual) = finish {
            self.copy(residual, out)?;
        }
        let workers = self.workers;
        let (in_bytes, num_rows) = (workers.row_bytes(self.cols(input)), rows[1] - rows[0]);
        let out_bytes = num_rows * self.program.buffers[out].dtype.size();
        let spans = [self.span(input), self.span(out)];
        let [input, out] = carve(self.arena, spans)?;
        let inputs: Vec<&[u8]> = input.chunks_exact(in_bytes).collect();
        let mut outs: Vec<&mut [u8]> = out.chunks_exact_mut(out_bytes).collect();
        let weight = self.weights[weight].rows(rows[0], rows[1]);
        let work = &mut *self.work;
        match finish {
            Finish::Store => linear::linear(&workers, work, weight, &inputs, &mut outs, 0, |acc, out, _| {
                linear::store(&workers, acc, out);
            }),
            Finish::F32 => linear::linear(&workers, work, weight, &inputs, &mut outs, 0, |acc, out, _| {
                linear::store_f32(&workers, acc, out);
            }),
            Finish::Residual(_) => {
                linear::linear(&workers, work, weight, &inputs, &mut outs, num_rows, |acc, out, scratch| {
                    linear::store_residual(&workers, acc, out, scratch);
                })
            }
        }
    }

    fn rope(&mut self, data: BufferId, num_heads: usize, theta: usize) -> Result<(), BackendError> {
        let (workers, cols, head_dim, span) =
            (self.workers, self.cols(data), self.program.kv.head_dim, self.span(data));
        rope::rope(&workers, &self.rope[theta], num_heads, head_dim, cols, &mut self.arena[span]);
        Ok(())
    }

    /// Directions of keys as floats, and which table of angles turns them.
    fn floats_of(&self, directions: Option<Directions>) -> Option<(Vec<f32>, usize)> {
        directions.map(|found| (DType::F32.widen(self.weights[found.weight].bytes), found.theta))
    }

    /// Top-k of probabilities, or of the softmax of logits.
    fn top_k(
        &mut self,
        probs: BufferId,
        normalization: MoeNormalization,
        chosen: Chosen,
        softmax: bool,
    ) -> Result<(), BackendError> {
        let (cols, top_k) = (self.cols(probs), self.program.top_k);
        let [probs, ids, weights] = self.carve([probs, chosen.ids, chosen.weights])?;
        let chosen = ints_mut(ids).chunks_exact_mut(top_k).zip(floats_mut(weights).chunks_exact_mut(top_k));
        let mut row = vec![0.0; cols];
        for (probs, (ids, weights)) in floats(probs).chunks_exact(cols).zip(chosen) {
            if softmax {
                routing::softmax_row(probs, &mut row);
                routing::top_k_row(&row, normalization, ids, weights);
            } else {
                routing::top_k_row(probs, normalization, ids, weights);
            }
        }
        Ok(())
    }

    /// Counts how many live tokens each expert gets.
    fn count(&mut self, layer: usize, chosen: Chosen) {
        let span = self.span(chosen.ids);
        let Some(counts) = self.counts.as_mut() else { return };
        let ids = ints(&self.arena[span]).chunks_exact(self.program.top_k);
        for (ids, _) in ids.zip(&self.inputs.slot_mapping).filter(|(_, slot)| **slot >= 0) {
            ids.iter().for_each(|&id| counts[layer][index(id)] += 1);
        }
    }
}

/// Slices of the arena, which may not overlap.
fn carve<const N: usize>(arena: &mut [u8], spans: [Range<usize>; N]) -> Result<[&mut [u8]; N], BackendError> {
    arena.get_disjoint_mut(spans).map_err(|_| BackendError::Other("operands of one operation overlap".to_owned()))
}

fn floats(bytes: &[u8]) -> &[f32] {
    bytemuck::cast_slice(bytes)
}

fn floats_mut(bytes: &mut [u8]) -> &mut [f32] {
    bytemuck::cast_slice_mut(bytes)
}

fn ints(bytes: &[u8]) -> &[i32] {
    bytemuck::cast_slice(bytes)
}

fn ints_mut(bytes: &mut [u8]) -> &mut [i32] {
    bytemuck::cast_slice_mut(bytes)
}
