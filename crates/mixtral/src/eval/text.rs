//! The perplexity of a text.
//!
//! The text is encoded once, with the model's start token before it. A window of `context` tokens slides over it in steps
//! of `stride`. Each window scores the tokens that no window before it scored, so every token but the first is scored once.
//! A token is scored after at least `context - stride` others, but for those of the first window. If the steps are as long as
//! the windows, the first token of each window is not scored.

use std::fmt;

use mixtral_model::TokenId;
use serde::Serialize;

use super::score::Sequence;
use crate::run::report::f;

/// The windows over a text of these tokens.
pub fn windows(ids: &[TokenId], context: usize, stride: usize) -> Vec<Sequence> {
    let mut windows = Vec::new();
    // Tokens up to here are scored. The first token has none before it.
    let mut done = 1;
    for start in (0..ids.len()).step_by(stride) {
        let end = ids.len().min(start + context);
        let scored = (end - done.min(end)).min(end - start - 1);
        if scored > 0 {
            windows.push(Sequence { ids: ids[start..end].to_vec(), scored });
        }
        done = done.max(end);
        if end == ids.len() {
            break;
        }
    }
    windows
}

/// How well an engine predicts a text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    /// e to the power of the mean.
    pub perplexity: f64,
    /// The mean of the tokens' negative log-probabilities.
    pub nats_per_token: f64,
    /// Tokens scored.
    pub tokens: usize,
    /// Windows.
    pub windows: usize,
    /// Tokens of a window.
    pub context: usize,
    /// Tokens from one window to the next.
    pub stride: usize,
}

impl Perplexity {
    /// Of windows with these sums of log-probabilities.
    pub fn new(windows: &[Sequence], sums: &[f64], context: usize, stride: usize) -> Perplexity {
        let tokens = windows.iter().map(|window| window.scored).sum();
        let nats_per_token = -sums.iter().sum::<f64>() / f(tokens);
        let perplexity = nats_per_token.exp();
        Perplexity { perplexity, nats_per_token, tokens, windows: windows.len(), context, stride }
    }
}

impl fmt::Display for Perplexity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Perplexity { perplexity, nats_per_token, tokens, windows, context, stride } = self;
        write!(
            f,
            "perplexity {perplexity:.4} ({nats_per_token:.6} nats a token) over {tokens} token(s), in {windows} window(s) of up to {context}, {stride} apart"
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ids(count: usize) -> Vec<TokenId> {
        (0..).take(count).map(TokenId).collect()
    }

    #[test]
    fn a_window_scores_what_is_new_in_it() {
        let scored = |count, context, stride| {
            windows(&ids(count), context, stride)
                .iter()
                .map(|w| (w.ids[0].0, w.ids.len(), w.scored))
                .collect::<Vec<_>>()
        };
        assert_eq!(scored(10, 20, 10), [(0, 10, 9)]);
        assert_eq!(scored(10, 6, 3), [(0, 6, 5), (3, 6, 3), (6, 4, 1)]);
        assert_eq!(scored(10, 5, 5), [(0, 5, 4), (5, 5, 4)]);
        assert_eq!(scored(6, 5, 5), [(0, 5, 4)], "a window of one token scores none");
        assert_eq!(scored(1, 5, 5), []);
    }

    proptest! {
        #[test]
        fn every_token_but_the_first_is_scored_once(count in 2usize..200, context in 2usize..50, step in 1usize..50) {
            let stride = step.min(context - 1);
            let mut scored: Vec<u32> = Vec::new();
            for (at, window) in windows(&ids(count), context, stride).iter().enumerate() {
                prop_assert!(window.ids.len() <= context && window.scored < window.ids.len());
                prop_assert!(at == 0 || window.ids.len() - window.scored >= context - stride);
                scored.extend(window.ids[window.ids.len() - window.scored..].iter().map(|id| id.0));
            }
            prop_assert_eq!(scored, (1..u32::try_from(count).unwrap()).collect::<Vec<_>>());
        }
    }
}
