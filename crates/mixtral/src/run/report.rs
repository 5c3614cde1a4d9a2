//! `--stats` and `--expert-stats`: what a run took and where its tokens went.

use std::fmt;
use std::time::Duration;

use mixtral_build::cost::{StepShape, cost};
use mixtral_engine::Program;
use mixtral_runtime::schedule::Counters;
use mixtral_runtime::session::StepStats;
use serde::Serialize;

use super::outputs::Output;

/// A run in figures. A figure that the run had nothing to measure for is absent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stats {
    /// Tokens of prompts that were computed.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub generated_tokens: usize,
    /// Wall time of all steps, in seconds.
    pub seconds: f64,
    /// Generated tokens a second, prefill included.
    pub tokens_per_s: f64,
    /// Median time to the first token, in ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token_ms: Option<f64>,
    /// Prompt tokens a second, in the steps that computed prompt tokens.
    pub prefill_tokens_per_s: f64,
    /// The steps that only decoded, if there were any.
    #[serde(flatten)]
    pub decode: Option<DecodeStats>,
    /// What reuse and swapping did, if they did anything.
    #[serde(flatten)]
    pub cache: Option<CacheStats>,
}

/// Figures of the cache's blocks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CacheStats {
    /// Tokens of prompts that were not computed, because their blocks were there.
    pub cached_tokens: u64,
    /// Part of all tokens of prompts that they are, in percent.
    pub cached_percent: f64,
    /// Blocks that went to the host's memory for others' sake.
    pub swapped_blocks: u64,
}

/// Figures of the steps that only decoded.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DecodeStats {
    /// How many steps.
    pub decode_steps: usize,
    /// Median time of a step, in ms.
    pub decode_step_ms: f64,
    /// Tokens a second.
    pub decode_tokens_per_s: f64,
    /// Rate at which the median step reads weights, in GB a second, if tokens hit experts evenly.
    pub decode_gb_per_s: f64,
}

/// `--run-profiling`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Profile {
    /// Sequences generated together.
    pub batch_size: usize,
    /// Iterations measured.
    pub iterations: u32,
    /// Mean time of one iteration, in seconds.
    pub mean_latency_s: f64,
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Profile { batch_size, iterations, mean_latency_s } = self;
        write!(f, "batch_size: {batch_size}, avg latency of {iterations} iterations: {mean_latency_s:.6} sec")
    }
}

/// BLAKE3 of all logits that tokens were drawn from, in order.
pub fn logits_hash(outputs: &[Output]) -> String {
    let mut hash = blake3::Hasher::new();
    for output in outputs {
        hash.update(output.logits_hash.finalize().as_bytes());
    }
    hash.finalize().to_hex().to_string()
}

/// The median; 0 if there are no values.
pub fn median(values: Vec<f64>) -> f64 {
    quantile(values, 0.5)
}

/// The value that this fraction of the values lies below; 0 if there are no values.
pub fn quantile(values: Vec<f64>, fraction: f64) -> f64 {
    let [value] = quantiles(values, [fraction]);
    value
}

/// The values that these fractions of the values lie below; 0 if there are no values.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "an index")]
pub fn quantiles<const N: usize>(mut values: Vec<f64>, fractions: [f64; N]) -> [f64; N] {
    values.sort_unstable_by(f64::total_cmp);
    fractions.map(|fraction| {
        let index = (values.len() as f64 * fraction) as usize;
        values.get(index.min(values.len().saturating_sub(1))).copied().unwrap_or(0.0)
    })
}

/// a / b; 0 where there is nothing to divide by.
pub fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

/// Weight bytes that a decode step of `num_tokens` sequences reads, if tokens hit experts evenly.
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
    /// The figures of a run whose `steps` generated `outputs`, and whose schedule counted `counters`.
    pub fn new(program: &Program, steps: &[StepStats], outputs: &[Output], counters: Counters) -> Stats {
        let prompt_tokens = steps.iter().map(|s| s.prefill_tokens).sum();
        let generated_tokens = outputs.iter().map(|o| o.ids.len()).sum();
        let all_seconds = seconds(steps.iter());
        let first: Vec<f64> = outputs.iter().filter_map(|o| o.finished).map(|(_, t)| ms(t.first_token)).collect();
        let is_decode = |s: &&StepStats| s.prefill_tokens == 0;
        Stats {
            prompt_tokens,
            generated_tokens,
            seconds: all_seconds,
            tokens_per_s: ratio(f(generated_tokens), all_seconds),
            first_token_ms: (!first.is_empty()).then(|| median(first)),
            prefill_tokens_per_s: ratio(f(prompt_tokens), seconds(steps.iter().filter(|s| !is_decode(s)))),
            decode: DecodeStats::new(program, steps.iter().filter(is_decode).collect()),
            cache: CacheStats::new(counters),
        }
    }
}

impl CacheStats {
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    fn new(Counters { prompt_tokens, cached_tokens, swapped_out, .. }: Counters) -> Option<CacheStats> {
        let cached_percent = 100.0 * ratio(cached_tokens as f64, prompt_tokens as f64);
        let stats = CacheStats { cached_tokens, cached_percent, swapped_blocks: swapped_out };
        (cached_tokens > 0 || swapped_out > 0).then_some(stats)
    }
}

impl DecodeStats {
    fn new(program: &Program, mut steps: Vec<&StepStats>) -> Option<DecodeStats> {
        steps.sort_by_key(|s| s.time);
        // The step with the median time stands for all of them.
        let median = steps.get(steps.len() / 2)?;
        let tokens: usize = steps.iter().map(|s| s.decode_tokens).sum();
        Some(DecodeStats {
            decode_steps: steps.len(),
            decode_step_ms: ms(median.time),
            decode_tokens_per_s: ratio(f(tokens), seconds(steps.iter().copied())),
            decode_gb_per_s: ratio(decode_weight_bytes(program, median.decode_tokens), median.time.as_secs_f64()) / 1e9,
        })
    }
}

fn seconds<'a>(steps: impl Iterator<Item = &'a StepStats>) -> f64 {
    steps.map(|s| s.time).sum::<Duration>().as_secs_f64()
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "tokens        {} of prompts, {} generated in {:.3} s ({:.1} tok/s)",
            self.prompt_tokens, self.generated_tokens, self.seconds, self.tokens_per_s
        )?;
        if let Some(first) = self.first_token_ms {
            write!(f, "\nfirst token   {first:.2} ms (median)")?;
        }
        write!(f, "\nprefill       {:.1} tok/s", self.prefill_tokens_per_s)?;
        if let Some(CacheStats { cached_tokens, cached_percent, swapped_blocks }) = self.cache {
            write!(
                f,
                "\ncache         {cached_tokens} tokens of prompts found ({cached_percent:.0} %), {swapped_blocks} blocks swapped out"
            )?;
        }
        let Some(DecodeStats { decode_steps, decode_step_ms, decode_tokens_per_s, decode_gb_per_s }) = self.decode
        else {
            return Ok(());
        };
        write!(
            f,
            "\ndecode        {decode_step_ms:.3} ms a step (median of {decode_steps}), {decode_tokens_per_s:.1} tok/s"
        )?;
        write!(f, "\nweights read  {decode_gb_per_s:.2} GB/s in decode")
    }
}

/// How many tokens each expert got, as a table.
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
