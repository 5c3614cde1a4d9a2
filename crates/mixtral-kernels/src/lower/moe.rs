//! `softmax`, `top_k`, `expert_sort`, `route`, `combine`; also a kernel that fuses norm, router and routing, and one
//! that puts tokens into expert order.

use mixtral_engine::{Epilogue, Op};
use mixtral_model::{DType, ElemType, MoeNormalization};

use super::elementwise::{VECTOR, epsilon, row_threads};
use super::{LowerError, Lowering, all_named, count, launch, may_be_one, named, portable, rounded, type_name};
use crate::step_block::Array;
use crate::{Arg, Grid, Launch};

/// Assignments of a chunk, and threads of the kernels that list them: `moe::CHUNK`.
pub(crate) const CHUNK: usize = 1024;
/// Assignments that one CTA lists.
const ONE_CTA: usize = 4 * CHUNK;
/// Up to this many tokens, the router kernel also chooses the experts and lists the assignments.
const CHOOSE: usize = 512;
/// Up to this many experts, the router is fused with the norm before it.
const FUSED_EXPERTS: usize = 64;
/// Threads of the kernels in which each warp takes one token: `moe::THREADS`.
const THREADS: usize = 256;

const ROUTE: &str = "moe/route.cuh";

pub(super) fn lower(lowering: &Lowering<'_>, op: &Op) -> Result<Vec<Launch>, LowerError> {
    match op {
        Op::Softmax { logits, probs } => {
            let (_, buffer) = lowering.buffer(op, probs)?;
            let args = named([
                ("header", Arg::Step(Array::Header)),
                ("logits", lowering.at(op, logits)?),
                ("probs", lowering.at(op, probs)?),
            ]);
            let kernel = portable(ROUTE, format!("moe::softmax<{}>", buffer.cols), THREADS);
            Ok(vec![launch(kernel, WARP_A_TOKEN, args)])
        }
        Op::TopK { probs, normalization, layer, expert_ids, expert_weights } => {
            Ok(vec![choose(lowering, op, (probs, false), *normalization, *layer, (expert_ids, expert_weights))?])
        }
        Op::ExpertSort { expert_ids, experts, offsets, order } => {
            list(lowering, op, expert_ids, *experts, (offsets, order))
        }
        Op::Route { logits, normalization, layer, experts, expert_ids, expert_weights, offsets, order } => {
            let choice = choose(lowering, op, (logits, true), *normalization, *layer, (expert_ids, expert_weights))?;
            let mut launches = vec![choice];
            launches.extend(list(lowering, op, expert_ids, *experts, (offsets, order))?);
            Ok(launches)
        }
        Op::Combine { .. } => Ok(vec![combine(lowering, op)?]),
        _ => Err(LowerError::Unsupported { op: op.name(), reason: "not an operation of experts".to_owned() }),
    }
}

/// A warp for each token.
const WARP_A_TOKEN: Grid = Grid::Tokens { per: 8, times: 1 };

fn is_renorm(normalization: MoeNormalization) -> bool {
    normalization == MoeNormalization::Renorm
}

/// The launch that chooses experts, from probabilities or (with `softmax`) from logits.
fn choose(
    lowering: &Lowering<'_>,
    op: &Op,
    (input, softmax): (&str, bool),
    normalization: MoeNormalization,
    layer: usize,
    (ids, weights): (&str, &str),
) -> Result<Launch, LowerError> {
    let (_, buffer) = lowering.buffer(op, input)?;
    let (experts, k, renorm) = (buffer.cols, lowering.program.top_k, is_renorm(normalization));
    let symbol = format!("moe::choose<{experts}, {k}, {softmax}, {renorm}>");
    let args = named([
        ("header", Arg::Step(Array::Header)),
        ("slots", Arg::Step(Array::SlotMapping)),
        ("input", lowering.at(op, input)?),
        ("expert_ids", lowering.at(op, ids)?),
        ("expert_weights", lowering.at(op, weights)?),
        ("counts", Arg::ExpertCounts(layer)),
    ]);
    Ok(launch(portable(ROUTE, symbol, THREADS), WARP_A_TOKEN, args))
}

/// The launches that list the assignments of local experts: one launch of one CTA, or two launches of one CTA for each
/// chunk.
fn list(
    lowering: &Lowering<'_>,
    op: &Op,
    ids: &str,
    [first, last]: [usize; 2],
    (offsets, order): (&str, &str),
) -> Result<Vec<Launch>, LowerError> {
    let k = lowering.program.top_k;
    let (header, ids) = (("header", Arg::Step(Array::Header)), ("expert_ids", lowering.at(op, ids)?));
    let (offsets, order) = (("offsets", lowering.at(op, offsets)?), ("order", lowering.at(op, order)?));
    let kernel = |name: &str| portable(ROUTE, format!("moe::{name}<{k}, {first}, {last}>"), CHUNK);
    let assignments = lowering.regime.max_tokens * k;
    if assignments <= ONE_CTA {
        return Ok(vec![launch(kernel("list"), Grid::Fixed(1), named([header, ids, offsets, order]))]);
    }
    let chunks = Grid::Fixed(count(assignments.div_ceil(CHUNK)));
    let sizes = ("sizes", Arg::Scratch(lowering.scratch.chunk_sizes));
    Ok(vec![
        launch(kernel("count_chunks"), chunks, named([header.clone(), ids.clone(), sizes.clone()])),
        launch(kernel("place_chunks"), chunks, named([header, ids, sizes, offsets, order])),
    ])
}

fn combine(lowering: &Lowering<'_>, op: &Op) -> Result<Launch, LowerError> {
    let Op::Combine { input, expert_ids, expert_weights, experts: [first, last], residual, out, norm } = op else {
        return Err(LowerError::Unsupported { op: op.name(), reason: "not a combine".to_owned() });
    };
    let (_, buffer) = lowering.buffer(op, out)?;
    let (cols, k, dtype) = (buffer.cols, lowering.program.top_k, type_name(lowering.program.dtype));
    let all = *first == 0 && *last >= lowering.program.num_experts;
    let (scale_type, scale, eps, normalized) = match norm {
        Some(norm) => {
            let (index, weight) = lowering.weight(op, &norm.weight)?;
            let scale = Arg::Weight { index, offset: 0 };
            (type_name(weight.dtype), scale, epsilon(norm.eps), lowering.at(op, &norm.out)?)
        }
        // Without a norm, the kernel does not read these.
        None => (dtype, lowering.at(op, out)?, Arg::F32(0.0), lowering.at(op, out)?),
    };
    let (rounds, rest) = rounded::of_producer(lowering, op, [scale.clone(), normalized.clone()]);
    let symbol = format!(
        "moe::combine<{dtype}, {scale_type}, {cols}, {k}, {first}, {last}, {all}, {}, {}{}>",
        residual.is_some(),
        norm.is_some(),
        if rounds { ", true" } else { "" }
    );
    let own = [
        ("header", Arg::Step(Array::Header)),
        ("input", lowering.at(op, input)?),
        ("expert_ids", lowering.at(op, expert_ids)?),
        ("expert_weights", lowering.at(op, expert_weights)?),
        ("residual", lowering.at(op, residual.as_deref().unwrap_or(out))?),
        ("out", lowering.at(op, out)?),
        ("weight", scale),
        ("eps", eps),
        ("normalized", normalized),
    ];
    let args = all_named(own.into_iter().chain(rest));
    Ok(launch(portable("moe/combine.cuh", symbol, row_threads(cols)), Grid::Tokens { per: 1, times: 1 }, args))
}

/// Lowers `norm`, the router's `linear` and `route` together, where each reads what the one before it wrote. Steps of
/// up to a few hundred tokens take one launch, longer ones three or four.
pub(super) fn norm_router_route(lowering: &Lowering<'_>, ops: &[Op]) -> Result<Option<Vec<Launch>>, LowerError> {
    let [
        norm @ Op::Norm { input, weight, eps, out },
        linear @ Op::Linear { input: x, weight: router, rows: None, epilogue: Epilogue::F32, out: made, .. },
        route @ Op::Route { logits, normalization, layer, experts, expert_ids, expert_weights, offsets, order },
        ..,
    ] = ops
    else {
        return Ok(None);
    };
    let (router_index, router) = lowering.weight(linear, router)?;
    let one = may_be_one(lowering.program, &[norm, linear, route]);
    if !one || x != out || logits != made || router.dtype != DType::F32 || router.rows() > FUSED_EXPERTS {
        return Ok(None);
    }
    let (scale_index, scale) = lowering.weight(norm, weight)?;
    let (_, normalized) = lowering.buffer(norm, out)?;
    let (cols, num_experts, k) = (normalized.cols, router.rows(), lowering.program.top_k);
    let chooses = lowering.regime.max_tokens <= CHOOSE;
    let (weight, normalized) = (Arg::Weight { index: scale_index, offset: 0 }, lowering.at(norm, out)?);
    let (rounds, rest) = rounded::of_producer(lowering, norm, [weight.clone(), normalized.clone()]);
    let symbol = format!(
        "moe::router<{}, {}, {cols}, {num_experts}, {chooses}, {k}, {}, {}, {}{}>",
        type_name(lowering.program.dtype),
        type_name(scale.dtype),
        is_renorm(*normalization),
        experts[0],
        experts[1],
        if rounds { ", true" } else { "" }
    );
    let own = [
        ("header", Arg::Step(Array::Header)),
        ("input", lowering.at(norm, input)?),
        ("weight", weight),
        ("eps", epsilon(*eps)),
        ("router_weight", Arg::Weight { index: router_index, offset: 0 }),
        ("normalized", normalized),
        ("logits", lowering.at(linear, logits)?),
        ("slots", Arg::Step(Array::SlotMapping)),
        ("expert_ids", lowering.at(route, expert_ids)?),
        ("expert_weights", lowering.at(route, expert_weights)?),
        ("counts", Arg::ExpertCounts(*layer)),
        ("offsets", lowering.at(route, offsets)?),
        ("order", lowering.at(route, order)?),
        ("ticket", Arg::Scratch(lowering.scratch.counters)),
    ];
    let args = all_named(own.into_iter().chain(rest));
    let grid = Grid::Persistent { per_sm: 1, items: Some(count(lowering.regime.max_tokens)) };
    let mut launches = vec![launch(portable("moe/router.cuh", symbol, row_threads(cols)), grid, args)];
    if !chooses {
        launches.extend(lower(lowering, route)?);
    }
    Ok(Some(launches))
}

/// The launch that puts tokens into expert order: row p of the scratch region becomes row `order[p] / k` of `input`,
/// for the assignments of local experts. It comes before a linear that needs its tokens in consecutive rows.
pub(super) fn permute(
    lowering: &Lowering<'_>,
    (input, dtype, cols): (Arg, ElemType, usize),
    (experts, offsets, order): (usize, Arg, Arg),
) -> Launch {
    let k = lowering.program.top_k;
    let threads = super::elementwise::threads_for(cols.div_ceil(VECTOR), THREADS);
    let symbol = format!("moe::permute<{}, {cols}, {k}, {experts}, {threads}>", type_name(dtype));
    let out = Arg::Scratch(lowering.scratch.permuted);
    let args = named([("input", input), ("offsets", offsets), ("order", order), ("out", out)]);
    launch(portable(ROUTE, symbol, threads), Grid::Tokens { per: 1, times: count(k) }, args)
}
