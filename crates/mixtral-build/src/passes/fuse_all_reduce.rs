//! All-reduce + residual add + the next RMSNorm → `all_reduce{add, norm}`.

use mixtral_engine::op::FusedNorm;
use mixtral_engine::{Op, Program};

use super::{Fused, num_readers, rewrite};

/// Runs the pass.
pub fn run(program: &mut Program) {
    rewrite(program, add);
    rewrite(program, norm);
}

fn add(program: &Program, ops: &[Op]) -> Option<Fused> {
    let [Op::AllReduce { input, residual: None, out, norm: None }, Op::Add { a, b, out: sum }, ..] = ops else {
        return None;
    };
    if out != a || out == b || num_readers(program, out) != 1 {
        return None;
    }
    let fused = Op::AllReduce { input: input.clone(), residual: Some(b.clone()), out: sum.clone(), norm: None };
    Fused::one(2, fused)
}

fn norm(_: &Program, ops: &[Op]) -> Option<Fused> {
    let [
        Op::AllReduce { input, residual, out, norm: None },
        Op::Norm { input: normed, weight, eps, out: norm_out },
        ..,
    ] = ops
    else {
        return None;
    };
    if out != normed {
        return None;
    }
    let norm = FusedNorm { weight: weight.clone(), eps: *eps, out: norm_out.clone() };
    let fused = Op::AllReduce { input: input.clone(), residual: residual.clone(), out: out.clone(), norm: Some(norm) };
    Fused::one(2, fused)
}
