//! `sample`.

use mixtral_engine::{BackendError, StepInputs, sampling};
use mixtral_model::{DType, TokenId};
use rayon::prelude::*;

/// Draws one token for each of the step's sample requests, in their order. `logits` is `[L, cols]`.
pub(crate) fn sample(
    logits: &[f32],
    cols: usize,
    vocab_size: usize,
    dtype: DType,
    inputs: &StepInputs<'_>,
) -> Result<Vec<TokenId>, BackendError> {
    let draw = |(sample, request): (usize, &mixtral_engine::SampleRequest<'_>)| {
        let mut row = logits[request.row * cols..][..vocab_size].to_vec();
        if let Some(token) = row.iter().position(|x| !x.is_finite()) {
            return Err(BackendError::NonFinite { sample, token, value: row[token], dtype });
        }
        Ok(sampling::sample(&mut row, request))
    };
    inputs.samples.par_iter().enumerate().map(draw).collect()
}
