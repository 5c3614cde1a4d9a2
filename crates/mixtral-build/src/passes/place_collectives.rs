//! Places the collectives that make a whole out of the parts that tensor-parallel ranks hold.
//!
//! A linear or a combine over a sharded K gives a part of a sum, so an `all_reduce` follows. A residual is added after
//! the `all_reduce`, not before. An embedding with some of the vocabulary's rows gives a part of a sum too. An
//! embedding with some of the columns, and the vocabulary's logits, are parts of rows, so an `all_gather` follows. The
//! graph says how each weight is sharded.

use mixtral_engine::{Buffer, Op, Program};

use super::{Fused, rewrite};

/// Runs the pass.
pub fn run(program: &mut Program) {
    if program.tp_size > 1 {
        rewrite(program, place);
    }
    // The collectives say it from here on.
    program.weights.iter_mut().for_each(|weight| weight.sharded = None);
}

fn place(program: &Program, ops: &[Op]) -> Option<Fused> {
    match ops.first()? {
        op @ Op::Embed { table, out, .. } => {
            let weight = program.weight(table)?;
            match weight.sharded? {
                0 => reduce(program, op, out, None),
                _ => gather(program, op, out, weight.cols()),
            }
        }
        op @ Op::Linear { weight, rows, out, .. } => {
            let weight = program.weight(weight)?;
            if weight.sharded? + 1 == weight.shape.len() {
                reduce(program, op, out, None)
            } else if rows.is_none() && weight.rows() < program.buffer(out)?.cols {
                gather(program, op, out, weight.rows())
            } else {
                None
            }
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
