//! The figures of many requests, whoever answered them: an engine or a server.

use std::io::Write;
use std::time::Duration;

use anyhow::Result;
use mixtral_serve::client::Answered;
use serde::Serialize;

use super::report::{f, quantile, quantiles, ratio};

/// The figures of many requests.
#[derive(Debug, Serialize)]
pub struct Throughput {
    requests: usize,
    sequential: bool,
    seconds: f64,
    prompt_tokens: usize,
    output_tokens: usize,
    output_tokens_per_s: f64,
    tokens_per_s: f64,
    first_token_ms_median: f64,
    first_token_ms_p99: f64,
    /// The mean time between the tokens of a request.
    per_token_ms_median: f64,
    per_token_ms_p99: f64,
    between_tokens: BetweenTokens,
}

/// The times between two tokens of a request that came one after the other.
#[derive(Debug, Serialize)]
struct BetweenTokens {
    median_ms: f64,
    p99_ms: f64,
    /// In how many of them, in percent, the prompt of another request, or its last part, was computed.
    with_prompts_percent: f64,
    /// The 99th percentile of the others, if there are any.
    without_prompts_p99_ms: Option<f64>,
}

/// A time in milliseconds.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl BetweenTokens {
    fn new(answers: &[Answered]) -> Self {
        let mut firsts: Vec<Duration> = answers.iter().filter_map(|answer| answer.came.first()).collect();
        firsts.sort_unstable();
        let begun = |by: Duration| firsts.partition_point(|&first| first <= by);
        let (mut all, mut without_prompts) = (Vec::new(), Vec::new());
        for Answered { came, .. } in answers {
            let came: Vec<Duration> = came.iter().collect();
            for (at, two) in came.windows(2).enumerate() {
                let time = two[1] - two[0];
                // A prompt that is computed in a step gets its first token when others get their next, or shortly before or
                // after that. So its step is that of the token that is nearest in time.
                let until_next = came.get(at + 2).map_or(Duration::ZERO, |&next| next - two[1]);
                if begun(two[1] - time / 2) == begun(two[1] + until_next / 2) {
                    without_prompts.push(ms(time));
                }
                all.push(ms(time));
            }
        }
        let with_prompts_percent = 100.0 * ratio(f(all.len() - without_prompts.len()), f(all.len()));
        let [median_ms, p99_ms] = quantiles(all, [0.5, 0.99]);
        BetweenTokens {
            median_ms,
            p99_ms,
            with_prompts_percent,
            without_prompts_p99_ms: (!without_prompts.is_empty()).then(|| quantile(without_prompts, 0.99)),
        }
    }
}

impl Throughput {
    /// The figures of requests with `prompt_tokens` tokens in all, whose answers took `seconds`.
    pub fn new(sequential: bool, seconds: f64, prompt_tokens: usize, answers: &[Answered]) -> Self {
        let output_tokens: usize = answers.iter().map(|answer| answer.tokens).sum();
        let first = answers.iter().map(|answer| ms(answer.first_token())).collect();
        let each = answers.iter().filter_map(Answered::per_token).map(ms).collect();
        let [first_token_ms_median, first_token_ms_p99] = quantiles(first, [0.5, 0.99]);
        let [per_token_ms_median, per_token_ms_p99] = quantiles(each, [0.5, 0.99]);
        Throughput {
            requests: answers.len(),
            sequential,
            seconds,
            prompt_tokens,
            output_tokens,
            output_tokens_per_s: ratio(f(output_tokens), seconds),
            tokens_per_s: ratio(f(output_tokens + prompt_tokens), seconds),
            first_token_ms_median,
            first_token_ms_p99,
            per_token_ms_median,
            per_token_ms_p99,
            between_tokens: BetweenTokens::new(answers),
        }
    }

    /// How long the requests took.
    pub fn seconds(&self) -> f64 {
        self.seconds
    }

    /// Prints them.
    pub fn print(&self, out: &mut dyn Write) -> Result<()> {
        writeln!(
            out,
            "\n{} requests {} in {:.3} s: {:.1} output tok/s, {:.1} tok/s with prompts",
            self.requests,
            if self.sequential { "one after another" } else { "in flight" },
            self.seconds,
            self.output_tokens_per_s,
            self.tokens_per_s
        )?;
        let [first, first_p99] = [self.first_token_ms_median, self.first_token_ms_p99];
        writeln!(out, "first token  {first:.2} ms median, {first_p99:.2} ms p99 (TTFT)")?;
        let [each, each_p99] = [self.per_token_ms_median, self.per_token_ms_p99];
        writeln!(out, "each token   {each:.3} ms median, {each_p99:.3} ms p99 (TPOT, a request's mean)")?;
        let BetweenTokens { median_ms, p99_ms, with_prompts_percent, without_prompts_p99_ms } = self.between_tokens;
        write!(
            out,
            "between two  {median_ms:.3} ms median, {p99_ms:.3} ms p99 (ITL); in {with_prompts_percent:.1} % a prompt was computed"
        )?;
        match without_prompts_p99_ms {
            Some(others) => writeln!(out, ", without those {others:.3} ms p99")?,
            None => writeln!(out)?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_was_computed_before_the_token_that_its_first_token_came_with() {
        let answer = |sent, came: &[u64]| Answered {
            sent: Duration::from_millis(sent),
            came: came.iter().copied().map(Duration::from_millis).collect(),
            tokens: came.len(),
        };
        // Two prompts took 30 ms. The first token of one came a little before the first request's fourth, that of the other a
        // little after, and its second token with it.
        let answers = [answer(0, &[10, 20, 30, 60, 71]), answer(25, &[59, 69]), answer(25, &[62, 62])];
        let figures = Throughput::new(false, 0.071, 9, &answers);
        assert_eq!((figures.requests, figures.output_tokens), (3, 9));
        assert_eq!([figures.first_token_ms_median, figures.first_token_ms_p99].map(f64::round), [34.0, 37.0]);
        let BetweenTokens { median_ms, p99_ms, with_prompts_percent, without_prompts_p99_ms } = figures.between_tokens;
        assert_eq!([median_ms, p99_ms, without_prompts_p99_ms.unwrap_or(0.0)].map(f64::round), [10.0, 30.0, 11.0]);
        assert_eq!(format!("{:.2} {with_prompts_percent:.2}", figures.per_token_ms_median), "10.00 16.67");
    }
}
