//! Which kernel rounds the input of a linear with fp8 weights: that of the norm before it, or one of its own.

use mixtral_engine::{Op, Program};
use mixtral_model::WeightFormat;

use super::Lowering;
use crate::Arg;
use crate::weight::Packing;

/// Input and weight of an operation that reads what is rounded token by token.
fn operands<'a>(program: &Program, op: &'a Op) -> Option<(&'a str, &'a str)> {
    let (Op::Linear { input, weight, .. } | Op::ExpertGateUp { input, weight, .. }) = op else { return None };
    let is_fp8 = program.weight(weight).is_some_and(|found| found.format == WeightFormat::Fp8);
    is_fp8.then_some((input.as_str(), weight.as_str()))
}

/// The norm whose kernel rounds the input of operation `index`. There is none if something else wrote the input, or if the
/// workspace was used for another one since.
pub(super) fn producer(program: &Program, index: usize) -> Option<usize> {
    let wanted = operands(program, program.ops.get(index)?)?;
    for (before, op) in program.ops[..index].iter().enumerate().rev() {
        let normalized = match op {
            Op::Norm { out, .. } => Some(out),
            Op::Combine { norm: Some(norm), .. } => Some(&norm.out),
            _ => None,
        };
        if normalized.is_some_and(|out| out == wanted.0) {
            return Some(before);
        }
        let is_used_otherwise = operands(program, op).is_some_and(|other| other != wanted);
        if is_used_otherwise || op.writes().contains(&wanted.0) {
            return None;
        }
    }
    None
}

/// Whether the kernel of `op`, a norm, rounds, and what it takes beside its own operands: the scale of a linear's input, and
/// the place for the rounded rows. A kernel that does not round takes `unused`.
pub(super) fn of_norm(lowering: &Lowering<'_>, op: &Op, unused: [Arg; 2]) -> (bool, [(&'static str, Arg); 2]) {
    let program = lowering.program;
    // An operation that is no part of the program was put together for a kernel of several.
    let index = program.ops.iter().position(|found| std::ptr::eq(found, op));
    let linear =
        index.and_then(|index| (index + 1..program.ops.len()).find(|&behind| producer(program, behind) == Some(index)));
    let scale = linear.and_then(|linear| {
        let (_, name) = operands(program, &program.ops[linear])?;
        let weight = program.weights.iter().position(|weight| weight.name == name)?;
        Some(Arg::Weight { index: weight, offset: Packing::of(program, weight)?.input_scale() })
    });
    let rounds = scale.is_some();
    let [divisor, rounded] = match scale {
        Some(scale) => [scale, Arg::Scratch(lowering.scratch.rounded)],
        None => unused,
    };
    (rounds, [("divisor", divisor), ("rounded", rounded)])
}
