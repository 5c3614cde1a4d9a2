//! The flags that say what a step holds, and when it is launched.

use mixtral_runtime::SessionOptions;

use super::numbers;

const STEPS: &str = "Steps";

/// The flags as they were typed.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct StepArgs {
    /// Tokens of prompts in a step that decodes too, at most, so that decodes wait less for prompts [default: all that fit, and 4096 in a pipeline]
    #[arg(help_heading = STEPS, long, value_name = "N", value_parser = numbers::tokens)]
    pub max_prefill_tokens: Option<usize>,
    /// Launch a step only when the tokens of the step before are known, to measure what overlap gains; a CPU never overlaps
    #[arg(help_heading = STEPS, long)]
    pub no_overlap: bool,
}

impl StepArgs {
    /// The options of a session, with what these flags say.
    #[must_use]
    pub fn of(&self, options: SessionOptions) -> SessionOptions {
        let StepArgs { max_prefill_tokens, no_overlap } = *self;
        SessionOptions { max_prefill_tokens, overlap: !no_overlap, ..options }
    }
}
