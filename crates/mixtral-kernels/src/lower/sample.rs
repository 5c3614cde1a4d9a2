//! `sample`.

use mixtral_engine::Op;

use super::{Context, LowerError, launch, portable};
use crate::step_block::Array;
use crate::{Arg, Grid, Launch};

/// Vocabulary that the kernel's sums hold.
const MAX_VOCAB: usize = 1 << 18;
/// Threads of a draw: `sample::THREADS`.
const THREADS: usize = 1024;

pub(super) fn lower(context: &Context<'_>, op: &Op) -> Result<Vec<Launch>, LowerError> {
    let Op::Sample { logits } = op else {
        return Err(LowerError::Unsupported { op: op.name(), reason: "not a draw".to_owned() });
    };
    let (_, buffer) = context.buffer(op, logits)?;
    let vocab = context.program.vocab_size;
    if vocab > MAX_VOCAB {
        let reason = format!("a vocabulary of {vocab}; at most {MAX_VOCAB} can be drawn from");
        return Err(LowerError::Unsupported { op: op.name(), reason });
    }
    let symbol = format!("sample::draw<{vocab}, {}>", buffer.cols);
    let args = vec![
        Arg::Step(Array::Header),
        Arg::Step(Array::Samples),
        Arg::Step(Array::Adjustments),
        context.at(op, logits)?,
        Arg::Scratch(context.scratch.sampling),
        Arg::Step(Array::Drawn),
    ];
    // Where there are more draws than rows, a CTA makes several.
    let grid = Grid::Logits { per: 1, times: 1 };
    Ok(vec![launch(portable("sample/draw.cuh", symbol, THREADS), grid, args)])
}
