//! Draws the next token from a row of logits. This is the definition: backends that sample on a device draw the same
//! token from the same bits of logits.
//!
//! Order: bias, repetition penalty (prompt and output tokens), presence and frequency penalties (output tokens), banned
//! tokens, temperature, top-k, top-p, min-p. A token's weight is the integer `round(2^40 · exp((x − max)))`, where x is
//! the scaled logit. Sums of integers do not depend on the order of summation. Ties always go to the lower token id.

use mixtral_model::TokenId;
use serde::{Deserialize, Serialize};

use crate::{SampleRequest, math};

/// How a sequence's tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// Divisor of the logits; 0 is greedy.
    pub temperature: f32,
    /// Only this many of the most likely tokens are candidates. 1 is greedy, 0 is off.
    pub top_k: usize,
    /// Only the smallest set of most likely candidates whose probability reaches this stays; 0 or 1 is off.
    pub top_p: f32,
    /// Candidates less likely than this fraction of the most likely one are dropped; 0 is off.
    pub min_p: f32,
    /// Logits of tokens seen in prompt or output are divided (if positive) or multiplied by it; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens seen in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once for every time a token was seen in the output; 0 is off.
    pub frequency_penalty: f32,
}

impl Default for SamplingParams {
    /// Greedy.
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_k: 1,
            top_p: 0.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
        }
    }
}

impl SamplingParams {
    /// Whether the draw depends on the tokens so far.
    #[must_use]
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Whether the most likely token is always taken.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.top_k == 1 || self.temperature == 0.0
    }
}

/// What a draw's random bits depend on. The same key gives the same bits, whatever was drawn before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RandomKey {
    /// `--random-seed`.
    pub seed: u64,
    /// Which prompt.
    pub prompt: u32,
    /// Which of the sequences generated for the prompt.
    pub hypothesis: u32,
    /// Which position of the output.
    pub position: u32,
}

impl RandomKey {
    /// 64 uniform bits: the finalizer of a 64-bit multiply-xorshift hash, chained over the key's parts.
    #[must_use]
    pub fn bits(&self) -> u64 {
        [u64::from(self.prompt), u64::from(self.hypothesis), u64::from(self.position)]
            .iter()
            .fold(mix(self.seed), |state, part| mix(state ^ mix(*part)))
    }
}

const fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Applies the three penalties in place. `tokens` is the sequence so far; its first `prompt_len` tokens are the prompt.
pub fn penalize(logits: &mut [f32], params: &SamplingParams, tokens: &[TokenId], prompt_len: usize) {
    let vocab_size = logits.len();
    let slot = |token: &TokenId| usize::try_from(token.0).ok().filter(|&t| t < vocab_size);
    if params.repetition_penalty != 1.0 {
        let mut seen: Vec<usize> = tokens.iter().filter_map(slot).collect();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            let logit = &mut logits[token];
            *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
        }
    }
    if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        let mut seen: Vec<usize> = tokens[prompt_len.min(tokens.len())..].iter().filter_map(slot).collect();
        seen.sort_unstable();
        for run in seen.chunk_by(|a, b| a == b) {
            // Counts are far below 2^24: exact.
            #[expect(clippy::cast_precision_loss, reason = "a sequence has fewer than 2^24 tokens")]
            let count = run.len() as f32;
            let logit = &mut logits[run[0]];
            *logit = (*logit - params.presence_penalty) - count * params.frequency_penalty;
        }
    }
}

/// The id of the largest logit; the lowest id if several are equal.
#[must_use]
pub fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best
}

/// Adds a draw's bias, and applies its penalties and bans, in place. If the bans would leave no token, they are ignored.
/// `logits` is `[vocab_size]`, finite and without padding.
pub fn adjust(logits: &mut [f32], request: &SampleRequest<'_>) {
    for (token, bias) in &request.bias {
        if let Some(logit) = logits.get_mut(token.0 as usize) {
            *logit += bias;
        }
    }
    penalize(logits, &request.params, &request.tokens, request.prompt_len);
    let mut banned = vec![false; logits.len()];
    for token in request.banned.iter().filter_map(|t| usize::try_from(t.0).ok()) {
        banned.get_mut(token).into_iter().for_each(|banned| *banned = true);
    }
    if banned.contains(&false) {
        logits.iter_mut().zip(banned).filter(|(_, banned)| *banned).for_each(|(logit, _)| *logit = f32::NEG_INFINITY);
    }
}

/// Draws a token. `logits` is as for [`adjust`], which changes it.
#[must_use]
pub fn sample(logits: &mut [f32], request: &SampleRequest<'_>) -> TokenId {
    adjust(logits, request);
    let params = &request.params;
    let token = if params.is_greedy() { argmax(logits) } else { draw(logits, params, &request.key) };
    TokenId(u32::try_from(token).unwrap_or(u32::MAX))
}

/// 2^40: the weight of the most likely token.
pub(crate) const ONE: f32 = 1_099_511_627_776.0;

/// The weight of a token whose scaled logit is so far from the largest one.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "weights are within 0 to 2^40")]
pub(crate) fn weight(distance: f32) -> u64 {
    (math::exp(distance) * ONE).round_ties_even() as u64
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "weights are within 0 to 2^40")]
fn draw(logits: &[f32], params: &SamplingParams, key: &RandomKey) -> usize {
    let max = logits[argmax(logits)];
    let mut weights: Vec<u64> = logits.iter().map(|&logit| weight((logit - max) / params.temperature)).collect();
    let top_p = params.top_p > 0.0 && params.top_p < 1.0;
    let top_k = params.top_k > 0 && params.top_k < logits.len();
    if top_k || top_p {
        // Most likely first. Tokens are compared by their logits, since two weights may round to the same integer.
        let mut ranked: Vec<usize> = (0..logits.len()).collect();
        let order = |&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]).then(a.cmp(&b));
        if top_k {
            ranked.select_nth_unstable_by(params.top_k - 1, order);
            for &token in &ranked[params.top_k..] {
                weights[token] = 0;
            }
            ranked.truncate(params.top_k);
        }
        if top_p {
            ranked.sort_unstable_by(order);
            let total: u128 = ranked.iter().map(|&t| u128::from(weights[t])).sum();
            let wanted = u128::from((params.top_p * 16_777_216.0) as u64) * total;
            let mut sum = 0u128;
            for &token in &ranked {
                if sum * 16_777_216 >= wanted {
                    weights[token] = 0;
                }
                sum += u128::from(weights[token]);
            }
        }
    }
    if params.min_p > 0.0 {
        let least = (params.min_p * ONE).round_ties_even() as u64;
        weights.iter_mut().filter(|w| **w < least).for_each(|w| *w = 0);
    }
    let total: u128 = weights.iter().map(|&w| u128::from(w)).sum();
    let target = (u128::from(key.bits()) * total) >> 64;
    let mut sum = 0u128;
    for (token, &weight) in weights.iter().enumerate() {
        sum += u128::from(weight);
        if sum > target {
            return token;
        }
    }
    // This line is never reached: the target is below the total, and the most likely token's weight is never 0.
    argmax(logits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> SamplingParams {
        SamplingParams { top_k: 0, ..SamplingParams::default() }
    }

    fn request(params: SamplingParams, key: RandomKey) -> SampleRequest<'static> {
        SampleRequest { row: 0, params, key, tokens: (&[]).into(), prompt_len: 0, bias: Vec::new(), banned: Vec::new() }
    }

    fn frequencies(logits: &[f32], params: &SamplingParams, draws: u32) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for position in 0..draws {
            let key = RandomKey { seed: 11, prompt: 3, hypothesis: 0, position };
            let token = sample(&mut logits.to_vec(), &request(*params, key));
            counts[token.0 as usize] += 1.0 / f64::from(draws);
        }
        counts
    }

    fn close(found: &[f64], expected: &[f64]) {
        for (f, e) in found.iter().zip(expected) {
            // The limit is five standard deviations of a frequency over 40 000 draws.
            assert!((f - e).abs() < 5.0 * (e * (1.0 - e) / 40_000.0).sqrt() + 1e-9, "{found:?} {expected:?}");
        }
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits: Vec<f32> = [0.5f32, 0.1, 0.3, 0.1].iter().map(|x| x.ln() + 3.0).collect();
        close(&frequencies(&logits, &params(), 40_000), &[0.5, 0.1, 0.3, 0.1]);
        // Temperature 0.5 squares the probabilities.
        let squares = [0.25 / 0.36, 0.01 / 0.36, 0.09 / 0.36, 0.01 / 0.36];
        close(&frequencies(&logits, &SamplingParams { temperature: 0.5, ..params() }, 40_000), &squares);
        // Of the two tokens of 0.1, top-k 3 keeps the lower id.
        let kept = [0.5 / 0.9, 0.1 / 0.9, 0.3 / 0.9, 0.0];
        close(&frequencies(&logits, &SamplingParams { top_k: 3, ..params() }, 40_000), &kept);
        let nucleus = [0.5 / 0.8, 0.0, 0.3 / 0.8, 0.0];
        close(&frequencies(&logits, &SamplingParams { top_p: 0.75, ..params() }, 40_000), &nucleus);
        close(&frequencies(&logits, &SamplingParams { min_p: 0.25, ..params() }, 40_000), &nucleus);
        // As likely as the likeliest is likely enough.
        close(&frequencies(&[2.0, 0.0, 2.0], &SamplingParams { min_p: 1.0, ..params() }, 40_000), &[0.5, 0.0, 0.5]);
    }

    #[test]
    fn a_key_has_the_same_bits_everywhere() {
        let bits = |seed, prompt, hypothesis, position| RandomKey { seed, prompt, hypothesis, position }.bits();
        assert_eq!(bits(0, 0, 0, 0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(bits(1, 2, 3, 4), 0x128b_9720_b85d_0de3);
        assert_eq!(bits(u64::MAX, u32::MAX, 7, 1), 0x74a6_c657_da5b_3dc4);
    }

    /// Of all bits, zero is the nearest to a token that comes first and cannot be drawn.
    #[test]
    fn a_token_without_weight_is_never_drawn() {
        let key = RandomKey { seed: 0xcbd4_ad27_8de9_e0ee, ..RandomKey::default() };
        assert_eq!(key.bits(), 0);
        assert_eq!(sample(&mut [-100.0, 1.0, 1.0], &request(params(), key)), TokenId(1));
    }

    #[test]
    fn one_candidate_or_no_temperature_is_greedy() {
        assert!(SamplingParams::default().is_greedy());
        assert!(SamplingParams { temperature: 0.0, ..params() }.is_greedy());
        assert!(!params().is_greedy());
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let mut logits = [1.0, 2.0, 2.0, -1.0];
        let key = RandomKey::default();
        assert_eq!(sample(&mut logits, &request(SamplingParams::default(), key)), TokenId(1));
        let cold = SamplingParams { temperature: 0.0, ..params() };
        assert_eq!(sample(&mut logits, &request(cold, key)), TokenId(1));
        let banned = SampleRequest { banned: vec![TokenId(1), TokenId(9)], ..request(cold, key) };
        assert_eq!(sample(&mut logits, &banned), TokenId(2));
    }

    #[test]
    fn penalties_follow_their_formulas() {
        let tokens = [0, 1, 1, 2, 2, 2].map(TokenId);
        let all = SamplingParams {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..SamplingParams::default()
        };
        let mut logits = [4.0, -4.0, 6.0, 1.0];
        penalize(&mut logits, &all, &tokens, 2);
        // Token 0 is only in the prompt, token 1 once in the output, token 2 three times, token 3 never.
        assert_eq!(logits, [2.0, -8.0 - 0.5 - 0.25, 3.0 - 0.5 - 0.75, 1.0]);
    }

    #[test]
    fn each_penalty_alone_is_applied() {
        let none = SamplingParams::default();
        let penalized = |params: SamplingParams| {
            let mut logits = [4.0, 0.0, -4.0];
            penalize(&mut logits, &params, &[0, 1, 2, 2, 3, 7].map(TokenId), 1);
            assert_eq!(params.has_penalties(), params != none);
            logits
        };
        assert_eq!(penalized(none), [4.0, 0.0, -4.0]);
        assert_eq!(penalized(SamplingParams { repetition_penalty: 2.0, ..none }), [2.0, 0.0, -8.0]);
        assert_eq!(penalized(SamplingParams { presence_penalty: 0.5, ..none }), [4.0, -0.5, -4.5]);
        assert_eq!(penalized(SamplingParams { frequency_penalty: 0.5, ..none }), [4.0, -0.5, -5.0]);
    }

    #[test]
    fn bans_hold_unless_they_leave_nothing() {
        let drawn = |banned: &[u32]| {
            let banned = banned.iter().copied().map(TokenId).collect();
            sample(
                &mut [1.0, 3.0, 2.0],
                &SampleRequest { banned, ..request(SamplingParams::default(), RandomKey::default()) },
            )
        };
        assert_eq!([drawn(&[]), drawn(&[1]), drawn(&[1, 2])], [1, 2, 0].map(TokenId));
        assert_eq!([drawn(&[0, 1, 2]), drawn(&[1, 1, 3]), drawn(&[3])], [1, 2, 1].map(TokenId));
    }

    #[test]
    fn the_same_key_draws_the_same_token() {
        let logits: Vec<f32> = (0..100u8).map(|i| f32::from(i % 7)).collect();
        let key = RandomKey { seed: 1, prompt: 2, hypothesis: 3, position: 4 };
        let first = sample(&mut logits.clone(), &request(params(), key));
        assert_eq!(first, sample(&mut logits.clone(), &request(params(), key)));
        let others: std::collections::HashSet<_> = (0..50)
            .map(|position| sample(&mut logits.clone(), &request(params(), RandomKey { position, ..key })))
            .collect();
        assert!(others.len() > 10);
    }
}
