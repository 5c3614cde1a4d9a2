//! `all_reduce`, `all_gather`, `send`, `recv`, and what comes before them in a step.

use mixtral_engine::{Buffer, Op};

use super::elementwise::{VECTOR, epsilon, row_threads, rows};
use super::{LowerError, Lowering, count, int, launch, named, portable, type_name};
use crate::exchange::num_collectives;
use crate::step_block::Array;
use crate::{Arg, Exchange, ExchangeArg, Grid, Kernel, Launch};

const ALL_REDUCE: &str = "collective/all_reduce.cuh";
const ALL_GATHER: &str = "collective/all_gather.cuh";
const STAGE: &str = "collective/stage.cuh";

/// Threads of a CTA that gathers: `exchange::THREADS`.
const THREADS: usize = 512;

/// The first launch of a step.
pub(super) fn begin(lowering: &Lowering<'_>) -> Launch {
    let kernel = portable("collective/begin.cuh", "exchange::begin".to_owned(), 32);
    let args = named([
        ("done", Arg::Exchange(ExchangeArg::Done)),
        ("collectives", int(num_collectives(&lowering.program.ops))),
        ("steps", Arg::Exchange(ExchangeArg::Steps)),
        ("taken", Arg::Exchange(ExchangeArg::TakenBefore)),
    ]);
    launch(kernel, Grid::Fixed(1), args)
}

/// CTAs for rows of a buffer, `times` for each, that are all resident.
fn grid(lowering: &Lowering<'_>, buffer: &Buffer, times: usize) -> Grid {
    let program = lowering.program;
    let most = program.num_rows(buffer.rows, lowering.regime.max_tokens, program.limits.max_num_logits);
    // `exchange::per_sm`.
    let per_sm = if buffer.cols <= 512 * VECTOR || times > 1 { 2 } else { 1 };
    Grid::Persistent { per_sm, items: Some(count(most * times)) }
}

fn bytes(size: usize) -> Arg {
    Arg::U64(size as u64)
}

/// `ops` are the operation and all behind it.
pub(super) fn lower(lowering: &Lowering<'_>, ops: &[Op]) -> Result<Launch, LowerError> {
    let (op, program) = (&ops[0], lowering.program);
    let exchange = Exchange::new(program).unwrap_or_default();
    let header = ("header", Arg::Step(Array::Header));
    let word = |name: &'static str, what| (name, Arg::Exchange(what));
    let (stop, report) = (word("stop", ExchangeArg::Stop), word("report", ExchangeArg::Report));
    let steps = word("steps", ExchangeArg::Steps);
    let before = num_collectives(&program.ops) - num_collectives(ops);
    let inboxes = word("inboxes", ExchangeArg::Inboxes);
    let capacity = ("capacity", bytes(exchange.part_bytes));
    let rank = ("rank", int(program.rank % program.tp_size.max(1)));
    let (done, ordinal) = (word("done", ExchangeArg::Done), ("ordinal", Arg::Ordinal(before)));
    let of_stage = |name: &str, buffer: &Buffer, kind: &str| -> Kernel {
        let symbol = format!("exchange::{name}<{}, {}, {kind}>", type_name(buffer.dtype), buffer.cols);
        portable(STAGE, symbol, row_threads(buffer.cols))
    };
    Ok(match op {
        Op::AllReduce { input, residual, out, norm } => {
            let (_, buffer) = lowering.buffer(op, out)?;
            let (kind, times) = rows(lowering, buffer);
            let (dtype, cols, ranks) = (type_name(buffer.dtype), buffer.cols, program.tp_size);
            let (scale_type, scale, eps, normalized) = match norm {
                Some(norm) => {
                    let (index, weight) = lowering.weight(op, &norm.weight)?;
                    let scale = Arg::Weight { index, offset: 0 };
                    (type_name(weight.dtype), scale, epsilon(norm.eps), lowering.at(op, &norm.out)?)
                }
                // Not read.
                None => (dtype, lowering.at(op, out)?, Arg::F32(0.0), lowering.at(op, out)?),
            };
            let symbol = format!(
                "exchange::all_reduce<{dtype}, {scale_type}, {cols}, {ranks}, {kind}, {}, {}>",
                residual.is_some(),
                norm.is_some()
            );
            let args = named([
                header,
                ("times", int(times)),
                ("input", lowering.at(op, input)?),
                ("residual", lowering.at(op, residual.as_deref().unwrap_or(out))?),
                ("out", lowering.at(op, out)?),
                ("weight", scale),
                ("eps", eps),
                ("normalized", normalized),
                inboxes,
                capacity,
                rank,
                done,
                ordinal,
                stop,
                report,
            ]);
            launch(portable(ALL_REDUCE, symbol, row_threads(cols)), grid(lowering, buffer, 1), args)
        }
        Op::AllGather { input, out } => {
            let (_, buffer) = lowering.buffer(op, input)?;
            let (kind, times) = rows(lowering, buffer);
            let (dtype, cols, ranks) = (type_name(buffer.dtype), buffer.cols, program.tp_size);
            let symbol = format!("exchange::all_gather<{dtype}, {cols}, {ranks}, {kind}>");
            let args = named([
                header,
                ("times", int(times)),
                ("input", lowering.at(op, input)?),
                ("out", lowering.at(op, out)?),
                inboxes,
                capacity,
                rank,
                done,
                ordinal,
                stop,
                report,
            ]);
            let tiles = cols.div_ceil(VECTOR).div_ceil(THREADS);
            launch(portable(ALL_GATHER, symbol, THREADS), grid(lowering, buffer, tiles), args)
        }
        Op::Send { input, .. } => {
            let (_, buffer) = lowering.buffer(op, input)?;
            let (kind, times) = rows(lowering, buffer);
            let args = named([
                header,
                ("times", int(times)),
                ("input", lowering.at(op, input)?),
                word("inbox", ExchangeArg::NextInbox),
                ("capacity", bytes(exchange.stage_bytes)),
                steps,
                word("taken", ExchangeArg::Taken),
                stop,
                report,
            ]);
            launch(of_stage("send", buffer, kind), grid(lowering, buffer, 1), args)
        }
        Op::Recv { out, .. } => {
            let (_, buffer) = lowering.buffer(op, out)?;
            let (kind, times) = rows(lowering, buffer);
            let args = named([
                header,
                ("times", int(times)),
                ("out", lowering.at(op, out)?),
                word("inbox", ExchangeArg::StageInbox),
                ("capacity", bytes(exchange.stage_bytes)),
                steps,
                stop,
                report,
            ]);
            launch(of_stage("recv", buffer, kind), grid(lowering, buffer, 1), args)
        }
        _ => return Err(LowerError::Unsupported { op: op.name(), reason: "it speaks to no other rank".to_owned() }),
    })
}
