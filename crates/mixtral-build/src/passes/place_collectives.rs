//! Places the collectives that make a whole out of the parts that tensor-parallel ranks hold.
//!
//! A linear or a combine over a sharded K gives a part of a sum, so an `all_reduce` follows. A residual is added after
//! the `all_reduce`, not before. An embedding with some of the vocabulary's rows gives a part of a sum too. An
//! embedding with some of the columns, and the vocabulary's logits, are parts of rows, so an `all_gather` follows.

use mixtral_checkpoint::TensorId;
use mixtral_engine::{Buffer, Op, Program};

use super::{Fused, rewrite};

/// Runs the pass.
pub fn run(program: &mut Program) {
    if program.tp_size > 1 {
        rewrite(program, place);
    }
}

fn place(program: &Program, ops: &[Op]) -> Option<Fused> {
    match ops.first()? {
        op @ Op::Embed { table, out, .. } => {
            let weight = program.weight(table)?;
            if weight.cols() < program.buffer(out)?.cols {
                gather(program, op, out, weight.cols())
            } else if weight.rows() < program.vocab_size {
                reduce(program, op, out, None)
            } else {
                None
            }
        }
        op @ Op::Linear { weight, out, .. } if is_row_parallel(weight) => reduce(program, op, out, None),
        op @ Op::Linear { weight, out, .. } if *weight == TensorId::LmHead.to_string() => {
            gather(program, op, out, program.weight(weight)?.rows())
        }
        Op::Combine { input, expert_ids, expert_weights, experts, residual, out, norm: None } => {
            let part = Op::Combine {
                input: input.clone(),
                expert_ids: expert_ids.clone(),
                expert_weights: expert_weights.clone(),
                experts: *experts,
                residual: None,
                out: out.clone(),
                norm: None,
            };
            reduce(program, &part, out, residual.as_deref())
        }
        _ => None,
    }
}

/// Whether a linear's columns are sharded. They are in the output projection of attention, and in the second linear of
/// a dense feed-forward.
fn is_row_parallel(weight: &str) -> bool {
    let is = |id: fn(usize) -> TensorId| {
        // Tensors of all layers count, so only what follows the layer's number is compared.
        let end = |name: &str| name.rsplit_once(|c: char| c.is_ascii_digit()).map(|(_, end)| end.to_owned());
        end(weight).is_some_and(|e| Some(e) == end(&id(0).to_string()))
    };
    is(TensorId::Dense) || is(TensorId::Proj)
}

/// Has `op` write this rank's part, puts the sum over the ranks into `out`, and adds `residual` to it, if there is one.
fn reduce(program: &Program, op: &Op, out: &str, residual: Option<&str>) -> Option<Fused> {
    let part = Buffer { name: format!("{out}.part"), ..program.buffer(out)?.clone() };
    let sum = residual.map(|_| Buffer { name: format!("{out}.sum"), ..part.clone() });
    let total = sum.as_ref().map_or(out, |s| &s.name).to_owned();
    let mut ops = vec![
        redirect(op, out, &part.name),
        Op::AllReduce { input: part.name.clone(), residual: None, out: total.clone(), norm: None },
    ];
    if let Some(residual) = residual {
        ops.push(Op::Add { a: total, b: residual.to_owned(), out: out.to_owned() });
    }
    Some(Fused { taken: 1, ops, buffers: [Some(part), sum].into_iter().flatten().collect() })
}

/// Has `op` write this rank's `cols` columns, and gathers `out` from all ranks.
fn gather(program: &Program, op: &Op, out: &str, cols: usize) -> Option<Fused> {
    let part = Buffer { name: format!("{out}.part"), cols, ..program.buffer(out)?.clone() };
    let ops = vec![redirect(op, out, &part.name), Op::AllGather { input: part.name.clone(), out: out.to_owned() }];
    Some(Fused { taken: 1, ops, buffers: vec![part] })
}

/// The operation, writing `to` instead of `from`.
fn redirect(op: &Op, from: &str, to: &str) -> Op {
    let mut op = op.clone();
    if let Op::Embed { out, .. } | Op::Linear { out, .. } | Op::Combine { out, .. } = &mut op
        && out == from
    {
        to.clone_into(out);
    }
    op
}
