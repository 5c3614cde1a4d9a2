//! Combine (with its residual) + the next RMSNorm → `combine{norm}`.

use mixtral_engine::op::FusedNorm;
use mixtral_engine::{Op, Program};

use super::{Fused, rewrite};

/// Runs the pass.
pub fn run(program: &mut Program) {
    rewrite(program, |_, ops| {
        let [
            Op::Combine { input, expert_ids, expert_weights, experts, residual, out, norm: None },
            Op::Norm { input: normed, weight, eps, out: norm_out },
            ..,
        ] = ops
        else {
            return None;
        };
        if out != normed {
            return None;
        }
        let fused = Op::Combine {
            input: input.clone(),
            expert_ids: expert_ids.clone(),
            expert_weights: expert_weights.clone(),
            experts: *experts,
            residual: residual.clone(),
            out: out.clone(),
            norm: Some(FusedNorm { weight: weight.clone(), eps: *eps, out: norm_out.clone() }),
        };
        Fused::one(2, fused)
    });
}
