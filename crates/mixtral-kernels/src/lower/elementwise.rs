//! `embed`, `gather_rows`, `norm`, `add`, `silu_mul`.

use mixtral_engine::{Buffer, Op, Rows};

use super::{LowerError, Lowering, all_named, count, int, launch, named, portable, rounded, type_name};
use crate::step_block::Array;
use crate::{Arg, Grid, Launch};

/// Elements of a vector in `kernels/base/vector.cuh`.
pub(super) const VECTOR: usize = 8;
/// Threads of an elementwise kernel.
const THREADS: usize = 256;

/// Threads of a CTA that holds a row in registers: `rms::threads` of `kernels/norm/row.cuh`.
pub(super) fn row_threads(cols: usize) -> usize {
    32 * cols.div_ceil(VECTOR).div_ceil(32).min(16)
}

/// Threads for `items` items, of which each thread handles one or a few.
pub(super) fn threads_for(items: usize, most: usize) -> usize {
    items.next_multiple_of(32).clamp(32, most)
}

/// The constant in `step::Rows` for a buffer's kind of rows, and how many rows the buffer has for each such row.
pub(super) fn rows(lowering: &Lowering<'_>, buffer: &Buffer) -> (&'static str, usize) {
    match buffer.rows {
        Rows::Tokens => ("step::Rows::TOKENS", 1),
        Rows::Assignments => ("step::Rows::TOKENS", lowering.program.top_k),
        Rows::Logits => ("step::Rows::LOGITS", 1),
        Rows::One => ("step::Rows::ONE", 1),
    }
}

/// `times` CTAs for each row of a buffer.
fn grid(lowering: &Lowering<'_>, buffer: &Buffer, times: usize) -> Grid {
    match buffer.rows {
        Rows::Tokens => Grid::Tokens { per: 1, times: count(times) },
        Rows::Assignments => Grid::Tokens { per: 1, times: count(times * lowering.program.top_k) },
        Rows::Logits => Grid::Logits { per: 1, times: count(times) },
        Rows::One => Grid::Fixed(count(times)),
    }
}

/// `out = a + b`. All three have `buffer`'s rows and columns.
pub(super) fn add(lowering: &Lowering<'_>, buffer: &Buffer, [a, b, out]: [Arg; 3]) -> Launch {
    let (kind, times) = rows(lowering, buffer);
    let symbol = format!("elementwise::add<{}, {}, {kind}>", type_name(lowering.program.dtype), buffer.cols);
    let grid = grid(lowering, buffer, buffer.cols.div_ceil(VECTOR).div_ceil(THREADS));
    let args = named([("header", Arg::Step(Array::Header)), ("times", int(times)), ("a", a), ("b", b), ("out", out)]);
    launch(portable("elementwise/elementwise.cuh", symbol, THREADS), grid, args)
}

/// By what rows are divided before they are rounded to 8 bits.
pub(super) enum RoundedBy {
    /// The number that is there.
    One(Arg),
    /// Their own scales, which are stored there.
    Own(Arg),
}

/// Rounds the rows of buffer `input` to 8 bits.
pub(super) fn round(lowering: &Lowering<'_>, input: usize, by: RoundedBy, out: Arg) -> Launch {
    let buffer = &lowering.program.buffers[input];
    let (kind, times) = rows(lowering, buffer);
    let (name, scale, threads, ctas) = match by {
        RoundedBy::One(scale) => {
            ("round_rows", ("scale", scale), THREADS, buffer.cols.div_ceil(VECTOR).div_ceil(THREADS))
        }
        RoundedBy::Own(scales) => ("round_tokens", ("scales", scales), row_threads(buffer.cols), 1),
    };
    let symbol = format!("elementwise::{name}<{}, {}, {kind}>", type_name(buffer.dtype), buffer.cols);
    let args = named([
        ("header", Arg::Step(Array::Header)),
        ("times", int(times)),
        ("input", Arg::Buffer(input)),
        scale,
        ("out", out),
    ]);
    launch(portable("elementwise/round.cuh", symbol, threads), grid(lowering, buffer, ctas), args)
}

pub(super) fn lower(lowering: &Lowering<'_>, op: &Op) -> Result<Vec<Launch>, LowerError> {
    let dtype = type_name(lowering.program.dtype);
    let header = Arg::Step(Array::Header);
    let one = match op {
        Op::Embed { table, vocab_start, out } => {
            let (index, weight) = lowering.weight(op, table)?;
            let cols = weight.cols();
            let threads = threads_for(cols.div_ceil(VECTOR), THREADS);
            let symbol = format!("embed::embed<{dtype}, {}, {cols}, {threads}>", type_name(weight.dtype));
            let table = Arg::Weight { index, offset: 0 };
            let args = named([
                ("header", header),
                ("token_ids", Arg::Step(Array::TokenIds)),
                ("drawn", Arg::Step(Array::Drawn)),
                ("table", table),
                ("vocab_start", int(*vocab_start)),
                ("num_rows", int(weight.rows())),
                ("out", lowering.at(op, out)?),
            ]);
            launch(portable("embed/embed.cuh", symbol, threads), Grid::Tokens { per: 1, times: 1 }, args)
        }
        Op::GatherRows { input, out } => {
            let (_, buffer) = lowering.buffer(op, out)?;
            let threads = threads_for(buffer.cols.div_ceil(VECTOR), THREADS);
            let symbol = format!("embed::gather_rows<{}, {}, {threads}>", type_name(buffer.dtype), buffer.cols);
            let args = named([
                ("header", header),
                ("indices", Arg::Step(Array::LogitsIndices)),
                ("input", lowering.at(op, input)?),
                ("out", lowering.at(op, out)?),
            ]);
            launch(portable("embed/embed.cuh", symbol, threads), Grid::Logits { per: 1, times: 1 }, args)
        }
        Op::Norm { input, weight, eps, out } => {
            let (index, scale) = lowering.weight(op, weight)?;
            let (_, buffer) = lowering.buffer(op, out)?;
            let (kind, times) = rows(lowering, buffer);
            let (weight, out) = (Arg::Weight { index, offset: 0 }, lowering.at(op, out)?);
            let (rounds, rest) = rounded::of_producer(lowering, op, [weight.clone(), out.clone()]);
            let symbol = format!(
                "rms::norm<{dtype}, {}, {}, {kind}{}>",
                type_name(scale.dtype),
                buffer.cols,
                if rounds { ", true" } else { "" }
            );
            let own = [
                ("header", header),
                ("times", int(times)),
                ("input", lowering.at(op, input)?),
                ("weight", weight),
                ("eps", epsilon(*eps)),
                ("out", out),
            ];
            let args = all_named(own.into_iter().chain(rest));
            let kernel = portable("norm/rms_norm.cuh", symbol, row_threads(buffer.cols));
            launch(kernel, grid(lowering, buffer, 1), args)
        }
        Op::Add { a, b, out } => {
            let operands = [lowering.at(op, a)?, lowering.at(op, b)?, lowering.at(op, out)?];
            add(lowering, lowering.buffer(op, out)?.1, operands)
        }
        Op::SiluMul { input, out } => {
            let (_, buffer) = lowering.buffer(op, out)?;
            let (kind, times) = rows(lowering, buffer);
            let symbol = format!("elementwise::silu_mul<{dtype}, {}, {kind}>", buffer.cols);
            let args = named([
                ("header", header),
                ("times", int(times)),
                ("input", lowering.at(op, input)?),
                ("out", lowering.at(op, out)?),
            ]);
            let grid = grid(lowering, buffer, buffer.cols.div_ceil(VECTOR).div_ceil(THREADS));
            launch(portable("elementwise/elementwise.cuh", symbol, THREADS), grid, args)
        }
        _ => return Err(LowerError::Unsupported { op: op.name(), reason: "not an elementwise operation".to_owned() }),
    };
    Ok(vec![one])
}

/// A norm's epsilon, rounded to f32 as the contract says.
#[expect(clippy::cast_possible_truncation, reason = "the contract's rounding to f32")]
pub(super) fn epsilon(eps: f64) -> Arg {
    Arg::F32(eps as f32)
}
