//! Gate/up linear of the experts + SiLU·mul → the linear's epilogue.

use mixtral_engine::{Op, Program};

use super::{Fused, num_readers, rewrite};

/// Runs the pass.
pub fn run(program: &mut Program) {
    rewrite(program, |program, ops| {
        let [
            Op::ExpertGateUp { input, weight, offsets, order, silu_mul: false, out, ladder },
            Op::SiluMul { input: gate_up, out: activated },
            ..,
        ] = ops
        else {
            return None;
        };
        if out != gate_up || num_readers(program, out) != 1 {
            return None;
        }
        let fused = Op::ExpertGateUp {
            input: input.clone(),
            weight: weight.clone(),
            offsets: offsets.clone(),
            order: order.clone(),
            silu_mul: true,
            out: activated.clone(),
            ladder: ladder.clone(),
        };
        Fused::one(2, fused)
    });
}
