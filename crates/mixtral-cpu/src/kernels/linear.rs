//! Matrix products by the contract's dot, and the epilogues of their accumulators.
//!
//! With few tokens, the weight's rows are streamed from where they lie, once for all tokens. With more tokens, the
//! product is cut into blocks of rows × tokens × K. In a block, a worker widens its rows once for all tokens; it keeps
//! its accumulators, lane by lane, in cache from one block of K to the next. In both cases lane l of a dot computes the
//! same chain of operations, so the bits are the same. With fp8 the chain begins anew every 128 columns.

use std::ops::Range;

use mixtral_engine::BackendError;
use mixtral_model::{DType, WeightFormat, fp8};
use rayon::prelude::*;

use super::workers::Workers;
use crate::memory::{Memory, take};
use crate::simd::{BLOCK_ROWS, LANES, STREAM_COLUMNS};
use crate::weights::Matrix;

/// Tokens of a block.
const TOKENS: usize = 192;
/// Weight rows of a block.
const ROWS: usize = 32;
/// The most weight rows of a streamed task.
const STREAMED_ROWS: usize = 1024;
/// Columns of a block of K.
const DEPTH: usize = 512;
/// Columns of fp8 whose products are summed from zero. These sums are added up in ascending order.
const FP8_DEPTH: usize = 128;
/// Quantized rows that are decoded before they are streamed: few enough for the cache, and enough for the widest tile of rows.
const DECODED_ROWS: usize = 4;

/// The memory of a product. All workers share it.
pub(crate) struct Workspace {
    /// Widened activations: `[token][column]` for streamed products, else packed block by block of K.
    x: Memory,
    /// Accumulators, `[task][token][row of the task]`.
    acc: Memory,
    /// Workspaces for products that are computed at the same time.
    apart: Vec<Workspace>,
}

impl Workspace {
    pub(crate) fn new() -> Result<Workspace, BackendError> {
        Ok(Workspace { x: Memory::empty()?, acc: Memory::empty()?, apart: Vec::new() })
    }

    /// Workspaces for `count` products at the same time.
    pub(crate) fn apart(&mut self, count: usize) -> Result<&mut [Workspace], BackendError> {
        while self.apart.len() < count {
            self.apart.push(Workspace::new()?);
        }
        Ok(&mut self.apart[..count])
    }
}

/// Columns of a block of K of a matrix of this format.
fn depth(format: WeightFormat) -> usize {
    if format.is_fp8() { FP8_DEPTH } else { DEPTH }
}

/// For each token i: `acc[r] = dot(inputs[i], weight[r])` for all rows, then `finish(acc, outs[i], scratch)`. `finish`
/// may overwrite the accumulators. `scratch` has `extra` f32.
pub(crate) fn linear(
    workers: &Workers<'_>,
    work: &mut Workspace,
    weight: Matrix<'_>,
    inputs: &[&[u8]],
    outs: &mut [&mut [u8]],
    extra: usize,
    finish: impl Fn(&mut [f32], &mut [u8], &mut [f32]) + Sync,
) -> Result<(), BackendError> {
    let rows = weight.num_rows();
    let padded = weight.cols.next_multiple_of(LANES);
    let blocked = (ROWS + 1) * DEPTH.min(padded) + TOKENS.min(inputs.len()) * ROWS * LANES;
    let streamed = DECODED_ROWS * weight.cols;
    workers.reserve_scratch((blocked.max(streamed) + weight.decode_scratch()).max(rows + extra))?;
    for (inputs, outs) in inputs.chunks(TOKENS).zip(outs.chunks_mut(TOKENS)) {
        let n = inputs.len();
        let streamed = n <= STREAM_COLUMNS;
        // Each worker has a few tasks. So if one worker is interrupted, the others do not wait long.
        let share = rows.div_ceil(4 * workers.num_workers()).next_multiple_of(ROWS);
        let task_rows = if streamed { share.min(STREAMED_ROWS) } else { ROWS };
        work.x.reserve_floats(n * padded)?;
        work.acc.reserve_floats(n * rows.next_multiple_of(task_rows))?;
        let x = &mut work.x.floats_mut()[..n * padded];
        let acc = &mut work.acc.floats_mut()[..n * rows.next_multiple_of(task_rows)];
        let mut scales = [1.0; TOKENS];
        if weight.format.is_fp8() {
            let of_input = |input: &&[u8]| weight.input_scale(workers.simd, workers.dtype, input);
            scales.iter_mut().zip(inputs).for_each(|(scale, input)| *scale = of_input(input));
        }
        let scales = &scales[..n];
        if streamed {
            widen_inputs(workers, inputs, weight, scales, x);
        } else {
            pack_inputs(workers, inputs, weight, scales, x);
        }
        let x = &*x;
        workers.for_chunks(acc, task_rows * n, rows * padded * n, |task, acc| {
            let rows = weight.rows(task * task_rows, ((task + 1) * task_rows).min(rows));
            if streamed {
                stream(workers, rows, x, n, acc, task_rows);
            } else {
                workers.with_scratch(|scratch| block(workers, rows, x, n, acc, scratch));
            }
        });
        let acc = &*acc;
        let finish_one = |i: usize, out: &mut [u8]| {
            workers.with_scratch(|mut scratch| {
                let (row, extra) = (take(&mut scratch, rows), take(&mut scratch, extra));
                for (task, row) in row.chunks_mut(task_rows).enumerate() {
                    row.copy_from_slice(&acc[(task * n + i) * task_rows..][..row.len()]);
                }
                if weight.format.is_fp8() {
                    weight.scale_sums(scales[i], row);
                }
                finish(row, out, extra);
            });
        };
        if n > 1 && workers.is_parallel(n * rows) {
            outs.par_iter_mut().enumerate().for_each(|(i, out)| finish_one(i, out));
        } else {
            outs.iter_mut().enumerate().for_each(|(i, out)| finish_one(i, out));
        }
    }
    Ok(())
}

/// Fills `x[token][column]` with widened inputs. Rows are padded with −0, which changes no accumulator.
fn widen_inputs(workers: &Workers<'_>, inputs: &[&[u8]], weight: Matrix<'_>, scales: &[f32], x: &mut [f32]) {
    let cols = weight.cols;
    let padded = cols.next_multiple_of(LANES);
    workers.for_chunks(x, padded, inputs.len() * padded, |token, x| {
        widen(workers, inputs[token], weight, scales[token], &mut x[..cols]);
        x[cols..].fill(-0.0);
    });
}

/// The same, but packed, one block of K after another.
fn pack_inputs(workers: &Workers<'_>, inputs: &[&[u8]], weight: Matrix<'_>, scales: &[f32], x: &mut [f32]) {
    let (n, cols, size, block_depth) = (inputs.len(), weight.cols, workers.dtype.size(), depth(weight.format));
    let padded = cols.next_multiple_of(LANES);
    workers.for_chunks(x, n * block_depth, n * padded, |block, x| {
        let start = block * block_depth;
        let (end, depth) = ((start + block_depth).min(cols), block_depth.min(padded - start));
        for (token, input) in inputs.iter().enumerate() {
            let input = &input[start * size..end * size];
            if weight.format.is_fp8() {
                let mut rounded = [0.0; FP8_DEPTH];
                let rounded = &mut rounded[..end - start];
                widen(workers, input, weight, scales[token], rounded);
                workers.simd.pack_column(DType::F32, bytemuck::cast_slice(rounded), token, n, depth, x);
            } else {
                workers.simd.pack_column(workers.dtype, input, token, n, depth, x);
            }
        }
    });
}

/// Widens inputs of a matrix. Those of an fp8 matrix are rounded to e4m3: `x = e4m3(x / scale)`.
fn widen(workers: &Workers<'_>, input: &[u8], weight: Matrix<'_>, scale: f32, x: &mut [f32]) {
    workers.simd.widen(workers.dtype, input, x);
    if weight.format.is_fp8() {
        x.iter_mut().for_each(|x| *x = fp8::round(*x / scale));
    }
}

/// `out[token · stride + row] = dot(rows[row], x[token])`, for few tokens. Quantized rows are decoded a few at a time, into the cache.
/// Rows of fp8 are decoded and multiplied block by block.
fn stream(workers: &Workers<'_>, rows: Matrix<'_>, x: &[f32], n: usize, out: &mut [f32], stride: usize) {
    let (simd, cols) = (workers.simd, rows.cols);
    let padded = cols.next_multiple_of(LANES);
    if rows.format == WeightFormat::Plain {
        return simd.stream(rows.dtype, rows.bytes, cols, x, padded, n, out, stride);
    }
    let depth = if rows.format.is_fp8() { FP8_DEPTH } else { cols };
    workers.with_scratch(|mut scratch| {
        let decoded = take(&mut scratch, DECODED_ROWS * cols);
        for first in (0..rows.num_rows()).step_by(DECODED_ROWS) {
            let count = DECODED_ROWS.min(rows.num_rows() - first);
            for start in (0..cols).step_by(depth) {
                let block = start..(start + depth).min(cols);
                let decoded = &mut decoded[..count * block.len()];
                for (row, decoded) in decoded.chunks_exact_mut(block.len()).enumerate() {
                    decode(workers, rows, first + row, block.clone(), scratch, decoded);
                }
                let decoded = bytemuck::cast_slice(decoded);
                if start == 0 {
                    simd.stream(DType::F32, decoded, block.len(), x, padded, n, &mut out[first..], stride);
                    continue;
                }
                let mut sums = [0.0; STREAM_COLUMNS * DECODED_ROWS];
                simd.stream(DType::F32, decoded, block.len(), &x[start..], padded, n, &mut sums, DECODED_ROWS);
                for (token, sums) in sums.chunks_exact(DECODED_ROWS).take(n).enumerate() {
                    let out = &mut out[token * stride + first..][..count];
                    out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                }
            }
        }
    });
}

/// Columns `cols` of a row that is not plain, as f32.
fn decode(
    workers: &Workers<'_>,
    rows: Matrix<'_>,
    row: usize,
    cols: Range<usize>,
    scratch: &mut [f32],
    out: &mut [f32],
) {
    match rows.format {
        WeightFormat::Plain => {}
        WeightFormat::Fp8 | WeightFormat::Fp8Rows(_) => {
            let bytes = &rows.bytes[row * rows.cols..][cols];
            out.iter_mut().zip(bytes).for_each(|(out, &byte)| *out = fp8::from_bits(byte));
        }
        WeightFormat::Quantized(quantization) => rows.decode(workers.simd, quantization, row, cols, scratch, out),
    }
}

/// `out[token][row] = dot(rows[row], x[token])`. `out` has a row stride of [`ROWS`].
fn block(workers: &Workers<'_>, rows: Matrix<'_>, x: &[f32], n: usize, out: &mut [f32], mut scratch: &mut [f32]) {
    let (num_rows, cols, size) = (rows.num_rows(), rows.cols, rows.dtype.size());
    let (tile_rows, padded) = (num_rows.next_multiple_of(BLOCK_ROWS), cols.next_multiple_of(LANES));
    let block_depth = depth(rows.format);
    let acc = take(&mut scratch, n * tile_rows * LANES);
    let w = take(&mut scratch, ROWS * block_depth.min(padded));
    let decoded = take(&mut scratch, block_depth.min(padded));
    acc.fill(0.0);
    for start in (0..cols).step_by(block_depth) {
        let (end, depth) = ((start + block_depth).min(cols), block_depth.min(padded - start));
        for r in 0..num_rows {
            if rows.format == WeightFormat::Plain {
                let row = &rows.bytes[r * cols * size..];
                workers.simd.pack_row(rows.dtype, &row[start * size..end * size], r, depth, w);
            } else {
                let decoded = &mut decoded[..end - start];
                decode(workers, rows, r, start..end, scratch, decoded);
                workers.simd.pack_row(DType::F32, bytemuck::cast_slice(decoded), r, depth, w);
            }
        }
        // Rows behind the last one hold old data; their accumulators are not read.
        workers.simd.block(w, tile_rows, &x[start * n..][..n * depth], n, depth, acc);
        if rows.format.is_fp8() {
            for (acc, out) in acc.chunks_exact(tile_rows * LANES).zip(out.chunks_exact_mut(ROWS)) {
                let mut sums = [0.0; ROWS];
                workers.simd.reduce(acc, &mut sums[..num_rows]);
                let out = &mut out[..num_rows];
                if start == 0 {
                    out.copy_from_slice(&sums[..num_rows]);
                } else {
                    out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                }
            }
            acc.fill(0.0);
        }
    }
    if !rows.format.is_fp8() {
        for (acc, out) in acc.chunks_exact(tile_rows * LANES).zip(out.chunks_exact_mut(ROWS)) {
            workers.simd.reduce(acc, &mut out[..num_rows]);
        }
    }
}

/// `out = round(acc)`.
pub(crate) fn store(workers: &Workers<'_>, acc: &[f32], out: &mut [u8]) {
    workers.simd.narrow(workers.dtype, acc, out);
}

/// `out = acc`.
pub(crate) fn store_f32(workers: &Workers<'_>, acc: &[f32], out: &mut [u8]) {
    workers.simd.narrow(DType::F32, acc, out);
}

/// `out = round(round(acc) + residual)`, where `out` holds the residual. `scratch` is as long as `acc`.
pub(crate) fn store_residual(workers: &Workers<'_>, acc: &mut [f32], out: &mut [u8], scratch: &mut [f32]) {
    workers.simd.round(workers.dtype, acc);
    workers.simd.widen(workers.dtype, out, scratch);
    acc.iter_mut().zip(scratch).for_each(|(acc, residual)| *acc += *residual);
    workers.simd.narrow(workers.dtype, acc, out);
}
