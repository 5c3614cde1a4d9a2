//! `sample`.

use mixtral_engine::Op;

use super::{LowerError, Lowering, launch, named, portable};
use crate::step_block::Array;
use crate::{Arg, Grid, Launch};

/// The largest vocabulary for which the kernel's sums cannot overflow.
const MAX_VOCAB: usize = 1 << 18;
/// Threads of a draw and of a score: `sample::THREADS`.
const THREADS: usize = 1024;

pub(super) fn lower(lowering: &Lowering<'_>, op: &Op) -> Result<Vec<Launch>, LowerError> {
    let Op::Sample { logits } = op else {
        return Err(LowerError::Unsupported { op: op.name(), reason: "not a draw".to_owned() });
    };
    let (_, buffer) = lowering.buffer(op, logits)?;
    let vocab = lowering.program.vocab_size;
    if vocab > MAX_VOCAB {
        let reason = format!("a vocabulary of {vocab}; at most {MAX_VOCAB} can be drawn from");
        return Err(LowerError::Unsupported { op: op.name(), reason });
    }
    let symbol = format!("sample::draw<{vocab}, {}>", buffer.cols);
    let args = named([
        ("header", Arg::Step(Array::Header)),
        ("samples", Arg::Step(Array::Samples)),
        ("adjustments", Arg::Step(Array::Adjustments)),
        ("logits", lowering.at(op, logits)?),
        ("copies", Arg::Scratch(lowering.scratch.sampling)),
        ("drawn", Arg::Step(Array::Drawn)),
    ]);
    // One CTA for each row of logits. If there are more draws than rows, a CTA makes several draws.
    let grid = Grid::Logits { per: 1, times: 1 };
    let draw = launch(portable("sample/draw.cuh", symbol, THREADS), grid, args);
    let symbol = format!("sample::score<{vocab}, {}>", buffer.cols);
    let args = named([
        ("header", Arg::Step(Array::Header)),
        ("asked", Arg::Step(Array::Scores)),
        ("samples", Arg::Step(Array::Samples)),
        ("drawn", Arg::Step(Array::Drawn)),
        ("logits", lowering.at(op, logits)?),
        ("copies", Arg::Scratch(lowering.scratch.sampling)),
        ("scored", Arg::Step(Array::Scored)),
        ("best", Arg::Step(Array::Best)),
    ]);
    Ok(vec![draw, launch(portable("sample/score.cuh", symbol, THREADS), grid, args)])
}
