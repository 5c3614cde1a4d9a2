//! Which kernel rounds the input of a linear with fp8 weights: that of the norm or of the attention before it, for `expert_down`
//! in steps of few tokens that of `expert_gate_up`, or one of its own.

use mixtral_engine::{Op, Program};
use mixtral_model::{Fp8Input, WeightFormat};

use super::Lowering;
use super::linear::Linear;
use crate::weight::Packing;
use crate::{Arg, LinearPlan};

/// Input and weight of an operation that reads what is rounded token by token.
fn operands<'a>(program: &Program, op: &'a Op) -> Option<(&'a str, &'a str)> {
    let (Op::Linear { input, weight, .. } | Op::ExpertGateUp { input, weight, .. }) = op else { return None };
    let is_fp8 = program.weight(weight).is_some_and(|found| found.format.is_fp8());
    is_fp8.then_some((input.as_str(), weight.as_str()))
}

/// Whether a weight's input is rounded by one scale, so that the kernel that writes it can round it too. (A scale of a token is known only
/// when its whole row is.)
fn has_one_scale(program: &Program, weight: &str) -> bool {
    let format = program.weight(weight).map(|found| found.format);
    matches!(format, Some(WeightFormat::Fp8 | WeightFormat::Fp8Rows(Fp8Input::Static)))
}

/// The norm or attention whose kernel rounds the input of operation `index`. There is none if something else wrote the input, if the
/// workspace was used for another one since, or if tokens have scales of their own.
pub(super) fn producer(program: &Program, index: usize) -> Option<usize> {
    let wanted = operands(program, program.ops.get(index)?).filter(|(_, weight)| has_one_scale(program, weight))?;
    for (before, op) in program.ops[..index].iter().enumerate().rev() {
        let made = match op {
            Op::Norm { out, .. } | Op::Attention { out, .. } => Some(out),
            Op::Combine { norm: Some(norm), .. } => Some(&norm.out),
            _ => None,
        };
        if made.is_some_and(|out| out == wanted.0) {
            return Some(before);
        }
        let is_used_otherwise = operands(program, op).is_some_and(|other| other != wanted);
        if is_used_otherwise || op.writes().contains(&wanted.0) {
            return None;
        }
    }
    None
}

/// Whether the kernels of `op`, a norm or attention, round, and what they take beside their own operands: the scale of a linear's
/// input, and the place for the rounded rows. A kernel that does not round takes `unused`.
pub(super) fn of_producer(lowering: &Lowering<'_>, op: &Op, unused: [Arg; 2]) -> (bool, [(&'static str, Arg); 2]) {
    let program = lowering.program;
    // An operation that is no part of the program was put together for a kernel of several.
    let index = program.ops.iter().position(|found| std::ptr::eq(found, op));
    let linear =
        index.and_then(|index| (index + 1..program.ops.len()).find(|&behind| producer(program, behind) == Some(index)));
    let scale = linear.and_then(|linear| input_scale(program, operands(program, &program.ops[linear])?.1));
    taken(scale, lowering.scratch.rounded, unused)
}

/// The scale of an fp8 weight's input.
fn input_scale(program: &Program, weight: &str) -> Option<Arg> {
    let index = program.weights.iter().position(|found| found.name == weight)?;
    Some(Arg::Weight { index, offset: Packing::of(program, index)?.input_scale() })
}

fn taken(scale: Option<Arg>, rounded: usize, unused: [Arg; 2]) -> (bool, [(&'static str, Arg); 2]) {
    let rounds = scale.is_some();
    let [divisor, rounded] = match scale {
        Some(scale) => [scale, Arg::Scratch(rounded)],
        None => unused,
    };
    (rounds, [("divisor", divisor), ("rounded", rounded)])
}

/// Up to this many tokens, `expert_gate_up` rounds for `expert_down`. Its divisions are hidden behind the weights' bytes there.
/// In longer steps products are the limit, and a kernel of its own is faster.
const FEW: usize = 512;

/// The `expert_down` of fp8 weights that reads what `op`, an `expert_gate_up`, writes, if the kernel of `op` rounds for it.
fn down<'a>(lowering: &Lowering<'a>, op: &Op) -> Option<&'a Op> {
    let program = lowering.program;
    let index = program.ops.iter().position(|found| std::ptr::eq(found, op))?;
    let (Op::ExpertGateUp { out, silu_mul: true, .. }, Some(behind @ Op::ExpertDown { input, weight, .. })) =
        (op, program.ops.get(index + 1))
    else {
        return None;
    };
    if !has_one_scale(program, weight) || input != out || lowering.regime.max_tokens > FEW {
        return None;
    }
    let plan = Linear::new(lowering, op).ok()?.plan().ok()?;
    matches!(plan, LinearPlan::Wgmma { .. }).then_some(behind)
}

/// Whether the kernel of `op` rounds for `expert_down`, as [`of_producer`].
pub(super) fn of_gate_up(lowering: &Lowering<'_>, op: &Op, unused: [Arg; 2]) -> (bool, [(&'static str, Arg); 2]) {
    let scale = match down(lowering, op) {
        Some(Op::ExpertDown { weight, .. }) => input_scale(lowering.program, weight),
        _ => None,
    };
    taken(scale, lowering.scratch.rounded_by_expert, unused)
}

/// Whether an `expert_gate_up` rounds the input of `op`, an `expert_down`.
pub(super) fn by_gate_up(lowering: &Lowering<'_>, op: &Op) -> bool {
    let ops = &lowering.program.ops;
    let before = ops.iter().position(|found| std::ptr::eq(found, op)).and_then(|index| ops.get(index.checked_sub(1)?));
    before.is_some_and(|before| down(lowering, before).is_some())
}
