//! Beam search: which continuations of a prompt live on, and which are its best answers. It holds no tokens, and knows
//! nothing of blocks or steps.
//!
//! It is the search of Hugging Face transformers' `generate`. In each round every beam offers its most likely next tokens.
//! Of all of them the best few by the sum of their log-probabilities are looked at: a few more than there are beams, so
//! that enough go on when some end. Those that end and are among the first `width` may become answers. The best `width`
//! that do not end are the next beams.

use mixtral_model::TokenId;

use crate::request::{Beams, EarlyStopping};

/// A beam's continuation by one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Continuation {
    /// Which of the beams it continues.
    pub parent: usize,
    /// The token.
    pub token: TokenId,
    /// The token's log-probability.
    pub logprob: f32,
    /// The sum of the log-probabilities of all tokens of its output.
    pub sum: f32,
}

/// An answer found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer<T> {
    /// Its score: the sum of its log-probabilities over its length to the power of the length penalty.
    pub score: f32,
    /// What its caller made of it.
    pub output: T,
}

/// The search of one request. `T` is what its caller keeps of an answer.
#[derive(Clone, Debug)]
pub struct BeamSearch<T> {
    beams: Beams,
    end_ids: Vec<TokenId>,
    max_output_len: usize,
    /// Sums of the beams' log-probabilities.
    sums: Vec<f32>,
    /// Tokens of each beam's output.
    len: usize,
    answers: Vec<Answer<T>>,
    /// Whether a beam could still become better than the worst answer.
    can_improve: bool,
}

impl<T> BeamSearch<T> {
    /// A search that begins with the prompt as its only beam.
    #[must_use]
    pub fn new(beams: Beams, end_ids: &[TokenId], max_output_len: usize) -> Self {
        let end_ids = end_ids.to_vec();
        BeamSearch { beams, end_ids, max_output_len, sums: vec![0.0], len: 0, answers: Vec::new(), can_improve: true }
    }

    /// Goes on by one token. `candidates` are, for each beam, its most likely tokens with their log-probabilities, best
    /// first. `keep` makes what is kept of a continuation that ended, which becomes an answer.
    pub fn advance(
        &mut self,
        candidates: &[Vec<(TokenId, f32)>],
        mut keep: impl FnMut(&Continuation) -> T,
    ) -> Vec<Continuation> {
        let Beams { width, length_penalty, early_stopping, diversity_rate } = self.beams;
        let mut all: Vec<(f32, Continuation)> = Vec::new();
        for (parent, (tokens, &sum)) in candidates.iter().zip(&self.sums).enumerate() {
            for (rank, &(token, logprob)) in tokens.iter().enumerate() {
                let sum = sum + logprob;
                // A diversity rate prefers continuations that are not their beam's first choice. It counts in this round
                // only.
                #[expect(clippy::cast_precision_loss, reason = "a rank is below 2^24")]
                let preferred = sum + diversity_rate * rank as f32;
                all.push((preferred, Continuation { parent, token, logprob, sum }));
            }
        }
        // A stable sort: of equals, the earlier beam's and the more likely go first.
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        all.truncate(self.beams.candidates(self.end_ids.len()));
        self.len += 1;
        let ends = |c: &Continuation| self.len >= self.max_output_len || self.end_ids.contains(&c.token);
        let full = self.answers.len() == width;
        let power =
            |len: usize| f64::powf(f64::from(u32::try_from(len).unwrap_or(u32::MAX)), f64::from(length_penalty));
        #[expect(clippy::cast_possible_truncation, reason = "rounded once")]
        let score = |sum: f32, len: usize| (f64::from(sum) / power(len)) as f32;
        if self.can_improve && !(full && early_stopping == EarlyStopping::Yes) {
            for (_, ended) in all.iter().take(width).filter(|(_, c)| ends(c)) {
                self.answers.push(Answer { score: score(ended.sum, self.len), output: keep(ended) });
            }
            self.answers.sort_by(|a, b| b.score.total_cmp(&a.score));
            self.answers.truncate(width);
        }
        let beams: Vec<Continuation> = all.iter().map(|(_, c)| *c).filter(|c| !ends(c)).take(width).collect();
        let full = self.answers.len() == width;
        if let (Some(best), Some(worst)) = (beams.first(), self.answers.last()) {
            let reach = match early_stopping {
                EarlyStopping::Never if length_penalty > 0.0 => self.max_output_len,
                _ => self.len,
            };
            self.can_improve &= !full || score(best.sum, reach) > worst.score;
        }
        self.sums = beams.iter().map(|beam| beam.sum).collect();
        let over = !self.can_improve || full && early_stopping == EarlyStopping::Yes;
        if over { Vec::new() } else { beams }
    }

    /// The answers, best first.
    #[must_use]
    pub fn into_answers(self) -> Vec<Answer<T>> {
        self.answers
    }
}
