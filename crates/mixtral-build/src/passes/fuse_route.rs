//! Router softmax + top-k + expert sort → `route`.

use mixtral_engine::{Op, Program};

use super::{Fused, num_readers, rewrite};

/// Runs the pass.
pub fn run(program: &mut Program) {
    rewrite(program, |program, ops| {
        let [
            Op::Softmax { logits, probs },
            Op::TopK { probs: top_probs, normalization, layer, expert_ids, expert_weights },
            Op::ExpertSort { expert_ids: sorted_ids, experts, offsets, order },
            ..,
        ] = ops
        else {
            return None;
        };
        if probs != top_probs || expert_ids != sorted_ids || num_readers(program, probs) != 1 {
            return None;
        }
        let fused = Op::Route {
            logits: logits.clone(),
            normalization: *normalization,
            layer: *layer,
            experts: *experts,
            expert_ids: expert_ids.clone(),
            expert_weights: expert_weights.clone(),
            offsets: offsets.clone(),
            order: order.clone(),
        };
        Fused::one(3, fused)
    });
}
