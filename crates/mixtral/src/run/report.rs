//! `--stats` and `--expert-stats`: what a run took and where its tokens went.

use std::fmt;
use std::time::Duration;

use mixtral_build::cost::{StepShape, cost};
use mixtral_engine::Program;
use mixtral_runtime::session::StepStats;
use serde::Serialize;

use super::outputs::Output;

/// A run in figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stats {
    /// Prompts' tokens computed.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub generated_tokens: usize,
    /// Wall time of all steps, in seconds.
    pub seconds: f64,
    /// Generated tokens a second, prefill included.
    pub tokens_per_s: f64,
    /// Median time to the first token, in ms.
    pub first_token_ms: f64,
    /// Steps that only decoded.
    pub decode_steps: usize,
    /// Their median, in ms.
    pub decode_step_ms: f64,
    /// Tokens a second in them.
    pub decode_tokens_per_s: f64,
    /// Prompt tokens a second in the other steps.
    pub prefill_tokens_per_s: f64,
    /// Weight bytes that the median decode step reads, experts counted as hit evenly, in GB a second.
    pub decode_gb_per_s: f64,
    /// Read bandwidth of the machine, measured after the run, in GB a second.
    pub read_gb_per_s: f64,
    /// The former as a percentage of the latter.
    pub bandwidth_percent: f64,
    /// BLAKE3 of all logits that tokens were drawn from, in order.
    pub logits_hash: String,
}

/// The middle one; 0 of none.
pub fn median(values: Vec<f64>) -> f64 {
    quantile(values, 0.5)
}

/// The value that a fraction of the others are below; 0 of none.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "an index")]
pub fn quantile(mut values: Vec<f64>, fraction: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let index = (values.len() as f64 * fraction) as usize;
    values.get(index.min(values.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

/// a / b; 0 where there is nothing to divide by.
pub fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

/// Weight bytes that a decode step of `num_tokens` sequences reads, experts counted as hit evenly.
pub fn decode_weight_bytes(program: &Program, num_tokens: usize) -> f64 {
    let shape = StepShape { num_tokens, num_logits: num_tokens, context: 0 };
    program.ops.iter().map(|op| cost(program, op, shape).weight_bytes).sum()
}

/// A count as a real number, for figures.
#[expect(clippy::cast_precision_loss, reason = "figures for people")]
pub fn f(n: usize) -> f64 {
    n as f64
}

impl Stats {
    /// The figures of `steps` that made `outputs`.
    pub fn new(program: &Program, steps: &[StepStats], outputs: &[Output], read_bytes_per_s: f64) -> Stats {
        let seconds =
            |steps: &mut dyn Iterator<Item = &StepStats>| steps.map(|s| s.time).sum::<Duration>().as_secs_f64();
        let is_decode = |s: &&StepStats| s.prefill_tokens == 0;
        let decode: Vec<&StepStats> = steps.iter().filter(is_decode).collect();
        let decode_seconds = seconds(&mut decode.iter().copied());
        let prefill_seconds = seconds(&mut steps.iter().filter(|s| s.prefill_tokens > 0));
        let prompt_tokens = steps.iter().map(|s| s.prefill_tokens).sum();
        let generated_tokens = outputs.iter().map(|o| o.ids.len()).sum();
        // The step whose time is the median one stands for all.
        let mut by_time = decode.clone();
        by_time.sort_by_key(|s| s.time);
        let bandwidth = by_time
            .get(by_time.len() / 2)
            .map_or(0.0, |step| ratio(decode_weight_bytes(program, step.decode_tokens), step.time.as_secs_f64()));
        let mut hash = blake3::Hasher::new();
        for output in outputs {
            hash.update(output.logits_hash.finalize().as_bytes());
        }
        let all_seconds = seconds(&mut steps.iter());
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        Stats {
            prompt_tokens,
            generated_tokens,
            seconds: all_seconds,
            tokens_per_s: ratio(f(generated_tokens), all_seconds),
            first_token_ms: median(outputs.iter().filter_map(|o| o.finished).map(|(_, t)| ms(t.first_token)).collect()),
            decode_steps: decode.len(),
            decode_step_ms: median(decode.iter().map(|s| ms(s.time)).collect()),
            decode_tokens_per_s: ratio(f(decode.iter().map(|s| s.decode_tokens).sum()), decode_seconds),
            prefill_tokens_per_s: ratio(f(prompt_tokens), prefill_seconds),
            decode_gb_per_s: bandwidth / 1e9,
            read_gb_per_s: read_bytes_per_s / 1e9,
            bandwidth_percent: 100.0 * ratio(bandwidth, read_bytes_per_s),
            logits_hash: hash.finalize().to_hex().to_string(),
        }
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "tokens        {} of prompts, {} generated in {:.3} s ({:.1} tok/s)",
            self.prompt_tokens, self.generated_tokens, self.seconds, self.tokens_per_s
        )?;
        writeln!(f, "first token   {:.2} ms (median)", self.first_token_ms)?;
        writeln!(
            f,
            "decode        {:.3} ms a step (median of {}), {:.1} tok/s",
            self.decode_step_ms, self.decode_steps, self.decode_tokens_per_s
        )?;
        writeln!(f, "prefill       {:.1} tok/s", self.prefill_tokens_per_s)?;
        writeln!(
            f,
            "weights read  {:.2} GB/s in decode, {:.0} % of the machine's {:.2} GB/s",
            self.decode_gb_per_s, self.bandwidth_percent, self.read_gb_per_s
        )?;
        write!(f, "logits        {}", self.logits_hash)
    }
}

/// Tokens each expert was given, as a table.
pub fn expert_table(counts: &[Vec<u64>]) -> String {
    let mut text = String::new();
    for (layer, experts) in counts.iter().enumerate() {
        let total: u64 = experts.iter().sum();
        let shares: Vec<String> = experts
            .iter()
            .map(|&n| {
                #[expect(clippy::cast_precision_loss, reason = "a percentage for people")]
                let share = if total == 0 { 0.0 } else { 100.0 * n as f64 / total as f64 };
                format!("{n} ({share:.1} %)")
            })
            .collect();
        text += &format!("layer {layer}: {}\n", shares.join(", "));
    }
    text
}
