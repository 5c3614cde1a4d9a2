//! `sample`.

use mixtral_engine::{NonFinite, Score, StepInputs, StepOutputs, sampling, score};
use mixtral_model::{DType, TokenId};
use rayon::prelude::*;

/// Draws a token for each of the step's sample requests, and answers its score requests, in their order. `logits` is
/// `[L, cols]`.
pub(crate) fn sample(
    logits: &[f32],
    cols: usize,
    vocab_size: usize,
    dtype: DType,
    inputs: &StepInputs<'_>,
    outputs: &mut StepOutputs,
) {
    let row = |row: usize| &logits[row * cols..][..vocab_size];
    let mut non_finite = Vec::new();
    let drawn: Vec<_> = inputs
        .samples
        .par_iter()
        .map(|request| {
            NonFinite::find(request.row, row(request.row))?;
            Ok(sampling::sample(&mut row(request.row).to_vec(), request))
        })
        .collect();
    outputs.tokens =
        drawn.into_iter().map(|drawn| drawn.unwrap_or_else(|e| failed(&mut non_finite, e, TokenId(0)))).collect();
    let scored: Vec<_> =
        inputs.scores.par_iter().map(|request| score::score(request, inputs, row, &outputs.tokens)).collect();
    outputs.scores = scored
        .into_iter()
        .map(|scored| scored.unwrap_or_else(|e| failed(&mut non_finite, e, Score::default())))
        .collect();
    non_finite.sort_unstable_by_key(|wrong| wrong.row);
    non_finite.dedup_by_key(|wrong| wrong.row);
    outputs.non_finite = non_finite.into_iter().map(|wrong| NonFinite { dtype, ..wrong }).collect();
}

fn failed<T>(rows: &mut Vec<NonFinite>, row: NonFinite, instead: T) -> T {
    rows.push(row);
    instead
}
