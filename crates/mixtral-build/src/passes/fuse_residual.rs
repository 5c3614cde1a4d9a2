//! Linear + residual add → the linear's epilogue.

use mixtral_engine::{Epilogue, Op, Program};

use super::{Fused, num_readers, rewrite};

/// Runs the pass.
pub fn run(program: &mut Program) {
    rewrite(program, |program, ops| {
        let [
            Op::Linear { input, weight, rows, epilogue: Epilogue::Store, residual: None, out, ladder },
            Op::Add { a, b, out: sum },
            ..,
        ] = ops
        else {
            return None;
        };
        if out != a || out == b || num_readers(program, out) != 1 {
            return None;
        }
        let fused = Op::Linear {
            input: input.clone(),
            weight: weight.clone(),
            rows: *rows,
            epilogue: Epilogue::Residual,
            residual: Some(b.clone()),
            out: sum.clone(),
            ladder: ladder.clone(),
        };
        Fused::one(2, fused)
    });
}
