//! The flags that say how tokens are drawn.

use mixtral_engine::SamplingParams;
use serde::Serialize;

use super::numbers::{finite, non_negative, positive, probability};
use crate::say;

pub(super) const SAMPLING: &str = "Sampling";

/// The flags as they were typed.
#[derive(Clone, Debug, clap::Args, Serialize)]
pub struct SamplingArgs {
    /// Logits are divided by it; 0 is greedy
    #[arg(help_heading = SAMPLING, long, default_value = "1.0", value_parser = non_negative, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Candidates by rank: 1 is greedy, 0 is off
    #[arg(help_heading = SAMPLING, long, default_value_t = 1)]
    pub top_k: usize,
    /// Candidates up to this cumulative probability; 0 is off
    #[arg(help_heading = SAMPLING, long, default_value = "0.0", value_parser = probability, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Candidates at least this likely, relative to the likeliest; 0 is off
    #[arg(help_heading = SAMPLING, long, default_value = "0.0", value_parser = probability, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Penalty on tokens of prompt and output; 1 is off
    #[arg(help_heading = SAMPLING, long, default_value = "1.0", value_parser = positive, allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// Penalty on tokens of the output; 0 is off
    #[arg(help_heading = SAMPLING, long, default_value = "0.0", value_parser = finite, allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// Penalty on tokens of the output, by count; 0 is off
    #[arg(help_heading = SAMPLING, long, default_value = "0.0", value_parser = finite, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// Seed of the draws
    #[arg(help_heading = SAMPLING, long, default_value_t = 0)]
    pub random_seed: u64,
}

impl SamplingArgs {
    /// How tokens are drawn.
    pub fn params(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
        }
    }

    /// Warns of flags that change nothing: with the default of --top-k the likeliest token is always taken, so flags
    /// that say how to draw have no effect.
    pub fn warn_of_greedy(&self) {
        let unused = [
            (self.temperature != 1.0 && self.temperature != 0.0, format!("--temperature {}", self.temperature)),
            (self.top_p > 0.0 && self.top_p < 1.0, format!("--top-p {}", self.top_p)),
            (self.min_p > 0.0, format!("--min-p {}", self.min_p)),
        ];
        let unused: Vec<String> = unused.into_iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).collect();
        if self.top_k == 1 && !unused.is_empty() {
            say::warning(format_args!(
                "{} changes nothing: --top-k 1, the default, always takes the likeliest token; add --top-k 0 to draw from all of them, or --top-k 40 from 40",
                unused.join(" ")
            ));
        }
    }
}
