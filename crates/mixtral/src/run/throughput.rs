//! The figures of many requests, whoever answered them: an engine or a server.

use std::io::Write;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::report::{f, median, quantile, ratio};

/// When a request was answered, from the moment when it was sent.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    /// When its first token came.
    pub first_token: Duration,
    /// When its last token came.
    pub total: Duration,
    /// Tokens of its output.
    pub tokens: usize,
}

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
    per_token_ms_median: f64,
    per_token_ms_p99: f64,
}

/// A time in milliseconds.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Finished {
    /// The mean time between its tokens; an output of one token has none.
    pub fn per_token(&self) -> Option<Duration> {
        let between = u32::try_from(self.tokens.checked_sub(1)?).ok().filter(|&n| n > 0)?;
        Some(self.total.saturating_sub(self.first_token) / between)
    }
}

impl Throughput {
    /// The figures of requests with `prompt_tokens` tokens in all, which took `seconds`.
    pub fn new(sequential: bool, seconds: f64, prompt_tokens: usize, finished: &[Finished]) -> Self {
        let output_tokens: usize = finished.iter().map(|request| request.tokens).sum();
        let first: Vec<f64> = finished.iter().map(|request| ms(request.first_token)).collect();
        let between: Vec<f64> = finished.iter().filter_map(Finished::per_token).map(ms).collect();
        Throughput {
            requests: finished.len(),
            sequential,
            seconds,
            prompt_tokens,
            output_tokens,
            output_tokens_per_s: ratio(f(output_tokens), seconds),
            tokens_per_s: ratio(f(output_tokens + prompt_tokens), seconds),
            first_token_ms_median: median(first.clone()),
            first_token_ms_p99: quantile(first, 0.99),
            per_token_ms_median: median(between.clone()),
            per_token_ms_p99: quantile(between, 0.99),
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
        writeln!(out, "first token  {first:.2} ms median, {first_p99:.2} ms p99")?;
        let [each, each_p99] = [self.per_token_ms_median, self.per_token_ms_p99];
        writeln!(out, "each token   {each:.3} ms median, {each_p99:.3} ms p99")?;
        Ok(())
    }
}
