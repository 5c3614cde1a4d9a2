//! Log-probabilities of given tokens.

use anyhow::{Context, Result};
use mixtral_model::TokenId;
use mixtral_runtime::{Request, Session};

/// A sequence whose last tokens are scored, each after all tokens before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Its tokens.
    pub ids: Vec<TokenId>,
    /// How many tokens at its end are scored; fewer than there are.
    pub scored: usize,
}

/// The requests that score sequences.
pub fn requests(sequences: &[Sequence]) -> Vec<Request> {
    let request =
        |sequence: &Sequence| Request { prompt: sequence.ids.clone(), prompt_logprobs: Some(0), ..Request::default() };
    sequences.iter().map(request).collect()
}

/// The sum of the log-probabilities of each sequence's scored tokens, in nats.
pub fn sums(session: &mut Session, sequences: &[Sequence]) -> Result<Vec<f64>> {
    let mut first = None;
    for (index, request) in requests(sequences).into_iter().enumerate() {
        let id = session.submit(request).with_context(|| format!("sequence {index} of the measurement"))?;
        first.get_or_insert(id.0);
    }
    let mut logprobs = vec![Vec::new(); sequences.len()];
    while !session.is_idle() {
        for event in session.step()? {
            let event = event.ok()?;
            let index = event.id.0 - first.unwrap_or(0);
            logprobs[index].extend(event.prompt_logprobs.iter().map(|token| f64::from(token.logprob)));
        }
    }
    let sum = |(all, sequence): (&Vec<f64>, &Sequence)| all[all.len() - sequence.scored..].iter().sum();
    Ok(logprobs.iter().zip(sequences).map(sum).collect())
}
