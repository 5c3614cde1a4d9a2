//! The flags of a beam search.

use mixtral_runtime::{Beams, EarlyStopping};

use super::numbers;
use super::{Usage, usage};
use crate::say;

const BEAMS: &str = "Beam search";

/// The flags as they were typed.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct BeamArgs {
    /// Search with this many beams instead of drawing, and print as many outputs; 1 is off
    #[arg(help_heading = BEAMS, long, default_value = "1", value_parser = numbers::sequences)]
    pub num_beams: usize,
    /// A score is the sum of log-probabilities over the length to this power
    #[arg(help_heading = BEAMS, long, default_value = "1.0", value_parser = numbers::finite, allow_negative_numbers = true)]
    pub length_penalty: f32,
    /// End when there are as many outputs as beams (1), when the best beam is worse than all (0), or cannot become better (2)
    #[arg(help_heading = BEAMS, long, default_value = "1", allow_negative_numbers = true)]
    pub early_stopping: i64,
    /// Added to a continuation's score, times its rank among its beam's
    #[arg(help_heading = BEAMS, long, default_value = "0.0", value_parser = numbers::finite, allow_negative_numbers = true)]
    pub beam_search_diversity_rate: f32,
}

impl BeamArgs {
    /// The search, if there is one.
    ///
    /// # Errors
    /// If other flags ask for what a search does not have.
    pub fn beams(&self, draws: usize, is_streaming: bool) -> Result<Option<Beams>, Usage> {
        let BeamArgs { num_beams, length_penalty, early_stopping, beam_search_diversity_rate } = *self;
        if num_beams == 1 {
            let changed = [
                (length_penalty != 1.0, "--length-penalty"),
                (early_stopping != 1, "--early-stopping"),
                (beam_search_diversity_rate != 0.0, "--beam-search-diversity-rate"),
            ];
            let changed: Vec<&str> = changed.into_iter().filter(|(is, _)| *is).map(|(_, flag)| flag).collect();
            if !changed.is_empty() {
                say::warning(format_args!("{} changes nothing without --num-beams", changed.join(" ")));
            }
            return Ok(None);
        }
        if draws > 1 {
            usage!(
                "--num-beams {num_beams} gives {num_beams} outputs to each prompt, and draws none; leave out --num-return-sequences"
            );
        }
        if is_streaming {
            usage!("--num-beams knows its outputs at the end, so there is nothing to stream; leave out --streaming");
        }
        let early_stopping = match early_stopping {
            0 => EarlyStopping::No,
            1 => EarlyStopping::Yes,
            _ => EarlyStopping::Never,
        };
        Ok(Some(Beams { width: num_beams, length_penalty, early_stopping, diversity_rate: beam_search_diversity_rate }))
    }
}
