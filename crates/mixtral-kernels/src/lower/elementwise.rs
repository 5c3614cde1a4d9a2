//! `embed`, `gather_rows`, `norm`, `add`, `silu_mul`.

use mixtral_engine::{Buffer, Op, Rows};

use super::{Context, LowerError, count, int, launch, portable, type_name};
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

/// Threads for so many items, of which each thread handles one or a few.
pub(super) fn threads_for(items: usize, most: usize) -> usize {
    items.next_multiple_of(32).clamp(32, most)
}

/// A type's constant in `step::Rows` and the rows for each.
fn rows(context: &Context<'_>, buffer: &Buffer) -> (&'static str, usize) {
    match buffer.rows {
        Rows::Tokens => ("step::Rows::TOKENS", 1),
        Rows::Assignments => ("step::Rows::TOKENS", context.program.top_k),
        Rows::Logits => ("step::Rows::LOGITS", 1),
        Rows::One => ("step::Rows::ONE", 1),
    }
}

/// `times` CTAs for each row of a buffer.
fn grid(context: &Context<'_>, buffer: &Buffer, times: usize) -> Grid {
    match buffer.rows {
        Rows::Tokens => Grid::Tokens { per: 1, times: count(times) },
        Rows::Assignments => Grid::Tokens { per: 1, times: count(times * context.program.top_k) },
        Rows::Logits => Grid::Logits { per: 1, times: count(times) },
        Rows::One => Grid::Fixed(count(times)),
    }
}

/// `out = a + b`, all of them of `buffer`'s rows and columns.
pub(super) fn add(context: &Context<'_>, buffer: &Buffer, [a, b, out]: [Arg; 3]) -> Launch {
    let (kind, times) = rows(context, buffer);
    let symbol = format!("elementwise::add<{}, {}, {kind}>", type_name(context.program.dtype), buffer.cols);
    let grid = grid(context, buffer, buffer.cols.div_ceil(VECTOR).div_ceil(THREADS));
    let args = vec![Arg::Step(Array::Header), int(times), a, b, out];
    launch(portable("elementwise/elementwise.cuh", symbol, THREADS), grid, args)
}

pub(super) fn lower(context: &Context<'_>, op: &Op) -> Result<Vec<Launch>, LowerError> {
    let dtype = type_name(context.program.dtype);
    let header = Arg::Step(Array::Header);
    let one = match op {
        Op::Embed { table, vocab_start, out } => {
            let (index, weight) = context.weight(op, table)?;
            let cols = weight.cols();
            let threads = threads_for(cols.div_ceil(VECTOR), THREADS);
            let symbol = format!("embed::embed<{dtype}, {}, {cols}, {threads}>", type_name(weight.dtype));
            let table = Arg::Weight { index, offset: 0 };
            let ids = Arg::Step(Array::TokenIds);
            let args = vec![header, ids, table, int(*vocab_start), int(weight.rows()), context.at(op, out)?];
            launch(portable("embed/embed.cuh", symbol, threads), Grid::Tokens { per: 1, times: 1 }, args)
        }
        Op::GatherRows { input, out } => {
            let (_, buffer) = context.buffer(op, out)?;
            let threads = threads_for(buffer.cols.div_ceil(VECTOR), THREADS);
            let symbol = format!("embed::gather_rows<{}, {}, {threads}>", type_name(buffer.dtype), buffer.cols);
            let indices = Arg::Step(Array::LogitsIndices);
            let args = vec![header, indices, context.at(op, input)?, context.at(op, out)?];
            launch(portable("embed/embed.cuh", symbol, threads), Grid::Logits { per: 1, times: 1 }, args)
        }
        Op::Norm { input, weight, eps, out } => {
            let (index, scale) = context.weight(op, weight)?;
            let (_, buffer) = context.buffer(op, out)?;
            let (kind, times) = rows(context, buffer);
            let symbol = format!("rms::norm<{dtype}, {}, {}, {kind}>", type_name(scale.dtype), buffer.cols);
            let weight = Arg::Weight { index, offset: 0 };
            let args = vec![header, int(times), context.at(op, input)?, weight, epsilon(*eps), context.at(op, out)?];
            let kernel = portable("norm/rms_norm.cuh", symbol, row_threads(buffer.cols));
            launch(kernel, grid(context, buffer, 1), args)
        }
        Op::Add { a, b, out } => {
            let operands = [context.at(op, a)?, context.at(op, b)?, context.at(op, out)?];
            add(context, context.buffer(op, out)?.1, operands)
        }
        Op::SiluMul { input, out } => {
            let (_, buffer) = context.buffer(op, out)?;
            let (kind, times) = rows(context, buffer);
            let symbol = format!("elementwise::silu_mul<{dtype}, {}, {kind}>", buffer.cols);
            let args = vec![header, int(times), context.at(op, input)?, context.at(op, out)?];
            let grid = grid(context, buffer, buffer.cols.div_ceil(VECTOR).div_ceil(THREADS));
            launch(portable("elementwise/elementwise.cuh", symbol, THREADS), grid, args)
        }
        _ => return Err(LowerError::Unsupported { op: op.name(), reason: "not an elementwise operation".to_owned() }),
    };
    Ok(vec![one])
}

/// A norm's epsilon, in the contract's f32.
#[expect(clippy::cast_possible_truncation, reason = "the contract's rounding to f32")]
pub(super) fn epsilon(eps: f64) -> Arg {
    Arg::F32(eps as f32)
}
