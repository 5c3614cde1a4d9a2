//! `attention`: causal, paged, grouped, with an optional window.
//!
//! A task is one KV head and a few consecutive tokens of one sequence, with all their query rows, which read the same
//! keys. It first computes the scores of all visible keys, block by block with the dot product of the linears. Then it
//! computes each row's maximum, exponentials and their sum, then the weighted values. Nothing in a row depends on its
//! neighbours.

use std::ops::Range;

use mixtral_engine::{BackendError, StepInputs};
use mixtral_model::{DType, fp8};
use rayon::prelude::*;

use super::workers::{Workers, index};
use crate::cache::KvView;
use crate::memory::take;
use crate::simd::{BLOCK_ROWS, LANES, WEIGHTED_ROWS};

/// Query rows of a task, unless the group of heads is larger. They share each widened block of keys and values.
const QUERY_ROWS: usize = 24;
/// Keys of a block of scores.
const KEYS: usize = 64;

/// The queries that one task answers.
struct Task<'o> {
    seq: usize,
    kv_head: usize,
    /// First token of the step, and its position.
    token: usize,
    position: usize,
    /// For each token, the output of the group's heads.
    outs: Vec<&'o mut [u8]>,
}

/// What the operation says of its query heads.
pub(crate) struct Heads {
    pub(crate) num: usize,
    pub(crate) window: Option<usize>,
    pub(crate) fp8_context: bool,
}

/// The sizes of the operation.
#[derive(Clone, Copy)]
struct Shape {
    /// Heads that share a KV head.
    group: usize,
    head_dim: usize,
    /// `head_dim` rounded up to whole vectors.
    padded: usize,
    window: Option<usize>,
    /// Blocks of a row of the block table.
    table_width: usize,
}

impl Shape {
    /// Keys that the query at a position sees.
    fn visible(&self, position: usize) -> Range<usize> {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1
    }
}

/// Computes the operation. `query` has rows of `query_cols` elements; the first `heads.num · d` of them are the
/// queries.
pub(crate) fn attention(
    workers: &Workers<'_>,
    inputs: &StepInputs<'_>,
    query: &[u8],
    query_cols: usize,
    heads: Heads,
    (keys, values): (KvView<'_>, KvView<'_>),
    out: &mut [u8],
) -> Result<(), BackendError> {
    let head_dim = keys.shape.head_dim;
    let shape = Shape {
        group: heads.num / keys.shape.num_kv_heads,
        head_dim,
        padded: head_dim.next_multiple_of(LANES),
        window: heads.window,
        table_width: inputs.block_table.len() / inputs.num_seqs().max(1),
    };
    let tokens_per_task = (QUERY_ROWS / shape.group).max(1);
    let mut outs = out.chunks_exact_mut(workers.row_bytes(shape.group * head_dim));
    let mut tasks: Vec<Task<'_>> = Vec::new();
    let (mut longest, mut work) = (0, 0);
    for (seq, edge) in inputs.cu_query_lens.windows(2).enumerate() {
        let (start, end) = (index(edge[0]), index(edge[1]));
        let first_position = index(inputs.seq_lens[seq]) - (end - start);
        for token in (start..end).step_by(tokens_per_task) {
            let (n, position) = (tokens_per_task.min(end - token), first_position + token - start);
            let first = tasks.len();
            tasks.extend((0..keys.shape.num_kv_heads).map(|kv_head| Task {
                seq,
                kv_head,
                token,
                position,
                outs: vec![],
            }));
            for _ in 0..n {
                for task in &mut tasks[first..] {
                    task.outs.extend(outs.next());
                }
            }
            let span = shape.visible(position + n - 1).end - shape.visible(position).start;
            longest = longest.max(span);
            work += n * heads.num * span * head_dim;
        }
    }
    let rows = tokens_per_task * shape.group;
    let block = KEYS * shape.padded;
    workers.reserve_scratch(rows * (2 * shape.padded + KEYS * LANES + KEYS + longest) + block)?;
    let run = |task: Task<'_>| {
        let blocks = &inputs.block_table[task.seq * shape.table_width..];
        let in_fp8 = heads.fp8_context && task.seq >= inputs.num_decodes;
        let tile = Tile { workers, shape, keys, values, blocks, in_fp8 };
        let queries = &query[task.token * workers.row_bytes(query_cols)..];
        workers.with_scratch(|scratch| tile.run(task, queries, workers.row_bytes(query_cols), scratch));
    };
    if workers.is_parallel(work) {
        tasks.into_par_iter().with_max_len(1).for_each(run);
    } else {
        tasks.into_iter().for_each(run);
    }
    Ok(())
}

/// What a task reads.
struct Tile<'a> {
    workers: &'a Workers<'a>,
    shape: Shape,
    keys: KvView<'a>,
    values: KvView<'a>,
    /// The sequence's row of the block table.
    blocks: &'a [i32],
    /// Whether queries and probabilities are rounded to fp8.
    in_fp8: bool,
}

impl Tile<'_> {
    fn run(&self, task: Task<'_>, queries: &[u8], query_stride: usize, mut scratch: &mut [f32]) {
        let Shape { group, head_dim, padded, .. } = self.shape;
        let workers = self.workers;
        let rows = task.outs.len() * group;
        let visible: Vec<Range<usize>> = (0..rows).map(|row| self.shape.visible(task.position + row / group)).collect();
        // All keys that some row sees.
        let span = visible[0].start..visible[rows - 1].end;
        let len = span.len();

        let q = take(&mut scratch, rows * padded);
        let block = take(&mut scratch, KEYS * padded);
        let lanes = take(&mut scratch, rows * KEYS * LANES);
        let dots = take(&mut scratch, rows * KEYS);
        let scores = take(&mut scratch, rows * len);
        let acc = take(&mut scratch, rows * padded);

        for row in 0..rows {
            let head = task.kv_head * group + row % group;
            let first = row / group * query_stride + workers.row_bytes(head * head_dim);
            let query = &queries[first..][..workers.row_bytes(head_dim)];
            if self.in_fp8 {
                let mut rounded = vec![0.0; head_dim];
                workers.simd.widen(workers.dtype, query, &mut rounded);
                rounded.iter_mut().for_each(|x| *x = fp8::round(*x));
                workers.simd.pack_column(DType::F32, bytemuck::cast_slice(&rounded), row, rows, padded, q);
            } else {
                workers.simd.pack_column(workers.dtype, query, row, rows, padded, q);
            }
        }

        #[expect(clippy::cast_precision_loss, reason = "the contract's f32 constant")]
        let scale = 1.0 / (head_dim as f32).sqrt() * self.keys.scale;
        for keys in self.key_blocks(&span) {
            let n = self.pack_keys(task.kv_head, &keys, block);
            let lanes = &mut lanes[..rows * n * LANES];
            lanes.fill(0.0);
            workers.simd.block(block, n, q, rows, padded, lanes);
            let dots = &mut dots[..rows * n];
            workers.simd.reduce(lanes, dots);
            for (dots, scores) in dots.chunks_exact(n).zip(scores.chunks_exact_mut(len)) {
                let scores = &mut scores[keys.start - span.start..keys.end - span.start];
                scores.iter_mut().zip(dots).for_each(|(score, dot)| *score = dot * scale);
            }
        }

        let local = |range: &Range<usize>| range.start - span.start..range.end - span.start;
        for (scores, visible) in scores.chunks_exact_mut(len).zip(&visible) {
            let scores = &mut scores[local(visible)];
            let max = workers.simd.max(scores);
            if self.in_fp8 {
                workers.simd.exp(scores, whole_power(max));
                scores.iter_mut().for_each(|p| *p = fp8::round(*p * 256.0) / 256.0);
            } else {
                workers.simd.exp(scores, max);
            }
        }

        acc.fill(0.0);
        for keys in self.key_blocks(&span) {
            self.widen_values(task.kv_head, &keys, block);
            for first in (0..rows).step_by(WEIGHTED_ROWS) {
                let tile = first..(first + WEIGHTED_ROWS).min(rows);
                self.add_values(tile, &visible, &span, &keys, scores, block, acc);
            }
        }

        let sums: Vec<f32> = ascending_sums(scores.chunks_exact(len).zip(&visible).map(|(s, v)| &s[local(v)]));
        for (token, out) in task.outs.into_iter().enumerate() {
            for (head, out) in out.chunks_exact_mut(workers.row_bytes(head_dim)).enumerate() {
                let row = token * group + head;
                let acc = &mut acc[row * padded..][..head_dim];
                acc.iter_mut().for_each(|x| *x = *x / sums[row] * self.values.scale);
                workers.simd.narrow(workers.dtype, acc, out);
            }
        }
    }

    /// Cuts the span into pieces that each lie in one block of the cache and hold at most [`KEYS`] keys.
    fn key_blocks(&self, span: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let (size, end) = (self.keys.shape.block_size, span.end);
        let mut start = span.start;
        std::iter::from_fn(move || {
            let piece = start..end.min(start + KEYS).min((start / size + 1) * size);
            start = piece.end;
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// The vectors of a piece in the cache, `[n, head_dim]`.
    fn vectors<'a>(&self, cache: KvView<'a>, kv_head: usize, keys: &Range<usize>) -> std::slice::ChunksExact<'a, u8> {
        let size = cache.shape.block_size;
        let rows = cache.rows(index(self.blocks[keys.start / size]), kv_head, keys.start % size, keys.len());
        rows.chunks_exact(self.shape.head_dim * cache.shape.elem.size())
    }

    /// Packs the keys of a piece as rows. Returns the number of rows, rounded up to whole tiles.
    fn pack_keys(&self, kv_head: usize, keys: &Range<usize>, panel: &mut [f32]) -> usize {
        let (simd, padded, is_plain) = (self.workers.simd, self.shape.padded, self.keys.shape.elem.float().is_some());
        let mut widened = vec![0.0; if is_plain { 0 } else { self.shape.head_dim }];
        for (row, key) in self.vectors(self.keys, kv_head, keys).enumerate() {
            if is_plain {
                simd.pack_row(self.workers.dtype, key, row, padded, panel);
            } else {
                widen_fp8(key, &mut widened);
                simd.pack_row(DType::F32, bytemuck::cast_slice(&widened), row, padded, panel);
            }
        }
        keys.len().next_multiple_of(BLOCK_ROWS)
    }

    /// Widens the values of a piece to `[n, padded]`.
    fn widen_values(&self, kv_head: usize, keys: &Range<usize>, out: &mut [f32]) {
        let values = self.vectors(self.values, kv_head, keys);
        for (value, out) in values.zip(out.chunks_exact_mut(self.shape.padded)) {
            let (head, padding) = out.split_at_mut(self.shape.head_dim);
            match self.values.shape.elem.float() {
                Some(dtype) => self.workers.simd.widen(dtype, value, head),
                None => widen_fp8(value, head),
            }
            padding.fill(0.0);
        }
    }

    /// Adds the piece's weighted values to a tile of rows. Keys that all rows see are added for all rows together. Keys
    /// before and behind these, which only some rows see, are added row by row. Every row's sum ascends.
    fn add_values(
        &self,
        tile: Range<usize>,
        visible: &[Range<usize>],
        span: &Range<usize>,
        keys: &Range<usize>,
        scores: &[f32],
        values: &[f32],
        acc: &mut [f32],
    ) {
        let (padded, len) = (self.shape.padded, span.len());
        let mut add = |rows: Range<usize>, part: Range<usize>| {
            if !part.is_empty() {
                let p = &scores[rows.start * len + part.start - span.start..];
                let v = &values[(part.start - keys.start) * padded..];
                let acc = &mut acc[rows.start * padded..rows.end * padded];
                self.workers.simd.weighted_rows(p, len, rows.len(), part.len(), v, padded, acc);
            }
        };
        let clip = |range: &Range<usize>| range.start.max(keys.start)..range.end.min(keys.end);
        // Later rows start and end later.
        let common = clip(&(visible[tile.end - 1].start..visible[tile.start].end));
        if common.is_empty() {
            tile.for_each(|row| add(row..row + 1, clip(&visible[row])));
            return;
        }
        tile.clone().for_each(|row| add(row..row + 1, clip(&visible[row]).start..common.start));
        add(tile.clone(), common.clone());
        tile.for_each(|row| add(row..row + 1, common.end..clip(&visible[row]).end));
    }
}

/// A score rounded up to a multiple of ln 2, the logarithm of a power of two.
fn whole_power(score: f32) -> f32 {
    (score * std::f32::consts::LOG2_E).ceil() * std::f32::consts::LN_2
}

/// The numbers of e4m3 bytes.
fn widen_fp8(bytes: &[u8], out: &mut [f32]) {
    out.iter_mut().zip(bytes).for_each(|(out, &byte)| *out = fp8::from_bits(byte));
}

/// Each row's sum in ascending order. Four rows are summed side by side, because each addition of a single sum waits
/// for the one before it.
fn ascending_sums<'a>(rows: impl Iterator<Item = &'a [f32]>) -> Vec<f32> {
    let rows: Vec<&[f32]> = rows.collect();
    let mut sums = Vec::with_capacity(rows.len());
    for rows in rows.chunks(4) {
        let mut four = [0f32; 4];
        let [a, b, c, d] = std::array::from_fn(|i| rows.get(i).copied().unwrap_or(&[]));
        let common = a.len().min(b.len()).min(c.len()).min(d.len());
        for j in 0..common {
            four[0] += a[j];
            four[1] += b[j];
            four[2] += c[j];
            four[3] += d[j];
        }
        for (sum, row) in four.iter_mut().zip([a, b, c, d]) {
            for p in &row[common.min(row.len())..] {
                *sum += p;
            }
        }
        sums.extend(&four[..rows.len()]);
    }
    sums
}
