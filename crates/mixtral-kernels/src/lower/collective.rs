//! `all_reduce`, `all_gather`, `send`, `recv`, and the launch that begins a step with them.

use mixtral_engine::op::FusedNorm;
use mixtral_engine::{Buffer, Op};

use super::elementwise::{VECTOR, epsilon, row_threads, rows};
use super::{LowerError, Lowering, all_named, count, int, launch, may_be_one, moe, named, portable, type_name};
use crate::exchange::{num_collectives, shares_from};
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

/// The grid for rows of a buffer, with `times` items for each row. All CTAs run at the same time.
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

/// The arguments for the exchange that every kernel of a collective has, in the order of its parameters.
fn exchanged(lowering: &Lowering<'_>, before: usize) -> [(&'static str, Arg); 8] {
    let program = lowering.program;
    let exchange = Exchange::new(program).unwrap_or_default();
    [
        word("inboxes", ExchangeArg::Inboxes),
        ("capacity", bytes(exchange.part_bytes)),
        ("rank", int(program.rank % program.tp_size.max(1))),
        // Whole, unless the loader finds ranks whose memory cannot be mapped.
        ("half", int(0)),
        word("done", ExchangeArg::Done),
        ("ordinal", Arg::Ordinal(before)),
        word("stop", ExchangeArg::Stop),
        word("report", ExchangeArg::Report),
    ]
}

fn word(name: &'static str, what: ExchangeArg) -> (&'static str, Arg) {
    (name, Arg::Exchange(what))
}

/// The launch of `all_reduce`, or of `combine_all_reduce` if this rank's part is a combine that nothing else reads.
/// `before` counts the step's collectives before this one.
fn all_reduce(lowering: &Lowering<'_>, combine: Option<&Op>, op: &Op, before: usize) -> Result<Launch, LowerError> {
    let Op::AllReduce { input, residual, out, norm } = op else {
        return Err(LowerError::Unsupported { op: op.name(), reason: "not an all-reduce".to_owned() });
    };
    let (_, buffer) = lowering.buffer(op, out)?;
    let (kind, times) = rows(lowering, buffer);
    let (dtype, cols, ranks) = (type_name(buffer.dtype), buffer.cols, lowering.program.tp_size);
    let (scale_type, scale, eps, normalized) = match norm {
        Some(norm) => {
            let (index, weight) = lowering.weight(op, &norm.weight)?;
            let scale = Arg::Weight { index, offset: 0 };
            (type_name(weight.dtype), scale, epsilon(norm.eps), lowering.at(op, &norm.out)?)
        }
        // Not read.
        None => (dtype, lowering.at(op, out)?, Arg::F32(0.0), lowering.at(op, out)?),
    };
    let with = format!("{}, {}", residual.is_some(), norm.is_some());
    let header = ("header", Arg::Step(Array::Header));
    let (symbol, first) = match combine {
        Some(op @ Op::Combine { input, expert_ids, expert_weights, experts: [first, last], .. }) => {
            let all = *first == 0 && *last >= lowering.program.num_experts;
            let k = lowering.program.top_k;
            let symbol = format!(
                "exchange::combine_all_reduce<{dtype}, {scale_type}, {cols}, {k}, {first}, {last}, {all}, {ranks}, {with}>"
            );
            let ids = ("expert_ids", lowering.at(op, expert_ids)?);
            let weights = ("expert_weights", lowering.at(op, expert_weights)?);
            (symbol, vec![header, ("input", lowering.at(op, input)?), ids, weights])
        }
        _ => {
            let symbol = format!("exchange::all_reduce<{dtype}, {scale_type}, {cols}, {ranks}, {kind}, {with}>");
            (symbol, vec![header, ("times", int(times)), ("input", lowering.at(op, input)?)])
        }
    };
    let rest = [
        ("residual", lowering.at(op, residual.as_deref().unwrap_or(out))?),
        ("out", lowering.at(op, out)?),
        ("weight", scale),
        ("eps", eps),
        ("normalized", normalized),
        ("shares_from", int(shares_from(buffer, ranks).unwrap_or(usize::MAX))),
    ];
    let args = first.into_iter().chain(rest).chain(exchanged(lowering, before));
    let kernel = portable(ALL_REDUCE, symbol, row_threads(cols));
    Ok(launch(kernel, grid(lowering, buffer, 1), all_named(args)))
}

/// If `combine`, `all_reduce`, a router's `linear` and `route` follow each other, fewer launches compute them: a
/// combine becomes part of the all-reduce after it, and an all-reduce's norm becomes part of the router after it.
/// Returns the number of operations and their launches.
pub(super) fn together(lowering: &Lowering<'_>, ops: &[Op]) -> Result<Option<(usize, Vec<Launch>)>, LowerError> {
    let (combine, behind) = match ops {
        [combine @ Op::Combine { out, residual: None, norm: None, .. }, reduce @ Op::AllReduce { input, .. }, ..]
            if input == out
                && may_be_one(lowering.program, &[combine, reduce])
                && lowering.program.ops.iter().all(|op| op == reduce || !op.reads().contains(&out.as_str())) =>
        {
            (Some(combine), &ops[1..])
        }
        [Op::AllReduce { .. }, ..] => (None, ops),
        _ => return Ok(None),
    };
    let before = num_collectives(&lowering.program.ops) - num_collectives(behind);
    let taken = ops.len() - behind.len() + 1;
    if let [Op::AllReduce { input, residual, out, norm: Some(norm) }, linear, route, ..] = behind {
        let FusedNorm { weight, eps, out: normed } = norm.clone();
        let norm = Op::Norm { input: out.clone(), weight, eps, out: normed };
        if let Some(routed) = moe::norm_router_route(lowering, &[norm, linear.clone(), route.clone()])? {
            let (input, residual, out) = (input.clone(), residual.clone(), out.clone());
            let alone = Op::AllReduce { input, residual, out, norm: None };
            let mut launches = vec![all_reduce(lowering, combine, &alone, before)?];
            launches.extend(routed);
            return Ok(Some((taken + 2, launches)));
        }
    }
    Ok(Some((taken, vec![all_reduce(lowering, combine, &behind[0], before)?])))
}

/// The launch of `all_gather`, `send` or `recv`. This operation is the first of `ops`, which are the rest of the
/// program.
pub(super) fn lower(lowering: &Lowering<'_>, ops: &[Op]) -> Result<Launch, LowerError> {
    let (op, program) = (&ops[0], lowering.program);
    let exchange = Exchange::new(program).unwrap_or_default();
    let header = ("header", Arg::Step(Array::Header));
    let (stop, report) = (word("stop", ExchangeArg::Stop), word("report", ExchangeArg::Report));
    let (steps, capacity) = (word("steps", ExchangeArg::Steps), ("capacity", bytes(exchange.stage_bytes)));
    let of_stage = |name: &str, buffer: &Buffer, kind: &str| -> Kernel {
        let symbol = format!("exchange::{name}<{}, {}, {kind}>", type_name(buffer.dtype), buffer.cols);
        portable(STAGE, symbol, row_threads(buffer.cols))
    };
    Ok(match op {
        Op::AllGather { input, out } => {
            let (_, buffer) = lowering.buffer(op, input)?;
            let (kind, times) = rows(lowering, buffer);
            let (dtype, cols, ranks) = (type_name(buffer.dtype), buffer.cols, program.tp_size);
            let symbol = format!("exchange::all_gather<{dtype}, {cols}, {ranks}, {kind}>");
            let before = num_collectives(&program.ops) - num_collectives(ops);
            let (input, out) = (("input", lowering.at(op, input)?), ("out", lowering.at(op, out)?));
            let args = [header, ("times", int(times)), input, out].into_iter().chain(exchanged(lowering, before));
            let tiles = cols.div_ceil(VECTOR).div_ceil(THREADS);
            launch(portable(ALL_GATHER, symbol, THREADS), grid(lowering, buffer, tiles), all_named(args))
        }
        Op::Send { input, .. } => {
            let (_, buffer) = lowering.buffer(op, input)?;
            let (kind, times) = rows(lowering, buffer);
            let inbox = word("inbox", ExchangeArg::NextInbox);
            let taken = word("taken", ExchangeArg::Taken);
            let input = ("input", lowering.at(op, input)?);
            let args = named([header, ("times", int(times)), input, inbox, capacity, steps, taken, stop, report]);
            launch(of_stage("send", buffer, kind), grid(lowering, buffer, 1), args)
        }
        Op::Recv { out, .. } => {
            let (_, buffer) = lowering.buffer(op, out)?;
            let (kind, times) = rows(lowering, buffer);
            let inbox = word("inbox", ExchangeArg::StageInbox);
            let out = ("out", lowering.at(op, out)?);
            let args = named([header, ("times", int(times)), out, inbox, capacity, steps, stop, report]);
            launch(of_stage("recv", buffer, kind), grid(lowering, buffer, 1), args)
        }
        _ => return Err(LowerError::Unsupported { op: op.name(), reason: "it speaks to no other rank".to_owned() }),
    })
}
