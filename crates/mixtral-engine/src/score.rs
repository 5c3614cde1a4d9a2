//! Log-probabilities of tokens, from rows of logits. This is the definition: every backend gives the same floats.
//!
//! A token's log-probability is its logit's distance from the largest one, less the logarithm of the sum of all tokens'
//! weights. The weights are the integers of [`crate::sampling`] at temperature 1, so their sum does not depend
//! on the order of summation.

use mixtral_model::TokenId;

use crate::{NonFinite, SampleRequest, StepInputs, sampling};

/// The most tokens that a score can name.
pub const MAX_BEST: usize = 1024;

/// What is to be scored in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoreRequest {
    /// Which token, in which row of logits.
    pub of: Scored,
    /// How many of the row's most likely tokens are wanted too.
    pub best: usize,
}

/// A token in a row of logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scored {
    /// This token. The row is as the model computed it.
    Token {
        /// Row of `logits_indices`.
        row: usize,
        /// The token.
        token: TokenId,
    },
    /// The token that a draw of the step gives, in the draw's row as the model computed it: before bias, penalties, bans
    /// and temperature.
    Draw(usize),
    /// No token: only the most likely ones, in the row of this draw after its bias, penalties and bans.
    Candidates(usize),
}

/// The answer to a [`ScoreRequest`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Score {
    /// Natural logarithm of the token's probability; 0 for [`Scored::Candidates`].
    pub logprob: f32,
    /// The most likely tokens and the logarithms of their probabilities, most likely first; of equals, the lower id.
    /// Banned tokens are not among them.
    pub best: Vec<(TokenId, f32)>,
}

impl Scored {
    /// The row of logits that it needs. `samples` are those of the step.
    #[must_use]
    pub fn row(&self, samples: &[SampleRequest<'_>]) -> Option<usize> {
        match self {
            Scored::Token { row, .. } => Some(*row),
            Scored::Draw(sample) | Scored::Candidates(sample) => samples.get(*sample).map(|s| s.row),
        }
    }
}

/// Answers a request of a step that passed [`StepInputs::check`]. `row` gives a row of logits without padding; `drawn`
/// are the tokens that the step drew.
///
/// # Errors
/// A logit that is not finite. [`NonFinite::dtype`] is for the caller to set.
pub fn score<'l>(
    request: &ScoreRequest,
    inputs: &StepInputs<'_>,
    row: impl Fn(usize) -> &'l [f32],
    drawn: &[TokenId],
) -> Result<Score, NonFinite> {
    let index = request.of.row(&inputs.samples).unwrap_or_default();
    let logits = row(index);
    NonFinite::find(index, logits)?;
    let scored = |logits: &[f32], token: Option<TokenId>| {
        let max = logits[sampling::argmax(logits)];
        let sum = logits.iter().map(|&logit| sampling::weight(logit - max)).sum();
        let logit = token.map(|token| logits[(token.0 as usize).min(logits.len() - 1)]);
        Score::from(Found { max, sum, logit, best: best(logits, request.best) })
    };
    Ok(match request.of {
        Scored::Token { token, .. } => scored(logits, Some(token)),
        Scored::Draw(sample) => scored(logits, drawn.get(sample).copied()),
        Scored::Candidates(sample) => {
            let mut adjusted = logits.to_vec();
            sampling::adjust(&mut adjusted, &inputs.samples[sample]);
            scored(&adjusted, None)
        }
    })
}

/// What a score is made of: integers and logits, which every backend finds to the bit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// The row's largest logit.
    pub max: f32,
    /// The sum of all tokens' weights at temperature 1.
    pub sum: u64,
    /// The token's logit; none for [`Scored::Candidates`].
    pub logit: Option<f32>,
    /// The most likely tokens and their logits, most likely first.
    pub best: Vec<(TokenId, f32)>,
}

impl From<Found> for Score {
    fn from(Found { max, sum, logit, best }: Found) -> Score {
        // The largest logit alone weighs 2^40. A vocabulary has fewer than 2^24 tokens, so the sum has no more bits than
        // an f64 can nearly hold.
        #[expect(clippy::cast_precision_loss, reason = "the relative error is 2^-53")]
        let log_sum = (sum as f64 / f64::from(sampling::ONE)).ln();
        #[expect(clippy::cast_possible_truncation, reason = "rounded once")]
        let logprob = |logit: f32| (f64::from(logit - max) - log_sum) as f32;
        Score {
            logprob: logit.map_or(0.0, logprob),
            best: best.into_iter().map(|(token, logit)| (token, logprob(logit))).collect(),
        }
    }
}

/// The most likely tokens and their logits.
fn best(logits: &[f32], count: usize) -> Vec<(TokenId, f32)> {
    let mut ranked: Vec<usize> = (0..logits.len()).filter(|&t| logits[t] > f32::NEG_INFINITY).collect();
    let order = |&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]).then(a.cmp(&b));
    if count == 0 {
        return Vec::new();
    }
    if count < ranked.len() {
        ranked.select_nth_unstable_by(count - 1, order);
        ranked.truncate(count);
    }
    ranked.sort_unstable_by(order);
    ranked.into_iter().map(|t| (TokenId(u32::try_from(t).unwrap_or(u32::MAX)), logits[t])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RandomKey, SamplingParams};

    fn step(request: SampleRequest<'static>) -> StepInputs<'static> {
        StepInputs { samples: vec![request], ..StepInputs::default() }
    }

    fn draw() -> SampleRequest<'static> {
        let (params, key) = (SamplingParams::default(), RandomKey::default());
        SampleRequest { row: 0, params, key, tokens: (&[]).into(), prompt_len: 0, bias: vec![], banned: vec![] }
    }

    fn scored(logits: &[f32], of: Scored, best: usize, request: SampleRequest<'static>) -> Score {
        score(&ScoreRequest { of, best }, &step(request), |_| logits, &[TokenId(2)]).unwrap()
    }

    #[test]
    fn log_probabilities_are_those_of_a_softmax() {
        let logits: Vec<f32> = (0..50_000u16).map(|i| (f32::from(i) * 0.37).sin() * 9.0).collect();
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        for token in [0u32, 4, 777, 49_999] {
            let found = scored(&logits, Scored::Token { row: 0, token: TokenId(token) }, 0, draw()).logprob;
            let expected = f64::from(logits[token as usize]) - sum.ln();
            assert!((f64::from(found) - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn the_best_are_the_most_likely_and_the_lower_of_equals() {
        let logits = [1.0, 3.0, 2.0, 3.0, -1.0];
        let Score { logprob, best } = scored(&logits, Scored::Draw(0), 3, draw());
        assert_eq!(best.iter().map(|(token, _)| token.0).collect::<Vec<_>>(), [1, 3, 2]);
        // The token drawn has the same float among the best.
        assert_eq!((best[2].1, best[0].1), (logprob, best[1].1));
        assert_eq!(scored(&logits, Scored::Draw(0), 9, draw()).best.len(), 5);
    }

    #[test]
    fn candidates_are_what_could_be_drawn() {
        let request = SampleRequest { banned: vec![TokenId(1)], bias: vec![(TokenId(0), 9.0)], ..draw() };
        let found = scored(&[1.0, 3.0, 2.0], Scored::Candidates(0), 3, request.clone());
        assert_eq!(found.best.iter().map(|(token, _)| token.0).collect::<Vec<_>>(), [0, 2]);
        let sum: f32 = found.best.iter().map(|(_, logprob)| logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        // What the model itself says does not change.
        assert_eq!(
            scored(&[1.0, 3.0, 2.0], Scored::Draw(0), 3, request),
            scored(&[1.0, 3.0, 2.0], Scored::Draw(0), 3, draw())
        );
    }

    #[test]
    fn a_row_that_is_not_finite_has_no_score() {
        let request = ScoreRequest { of: Scored::Token { row: 3, token: TokenId(0) }, best: 0 };
        let wrong = score(&request, &StepInputs::default(), |_| &[1.0, f32::INFINITY], &[]).unwrap_err();
        assert_eq!((wrong.row, wrong.token), (3, 1));
    }
}
