//! Calibration: which text a model is run over before it is quantized.

use std::path::PathBuf;

use mixtral_calibrate::{CalibrateOptions, Text};

use super::numbers;
use crate::say;

/// What `--calib-data` says in place of a file.
const SELF: &str = "self";

/// The flags as they were typed.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Calibration")]
pub struct CalibrationArgs {
    /// Text to calibrate with: a file with text, JSON lines with a "text" each, or lines of token ids; self has the model write it
    /// [default: none for integers]
    #[arg(long, value_name = "FILE|self")]
    pub calib_data: Option<PathBuf>,
    /// Sequences of it that are taken [default: 512]
    #[arg(long, value_parser = numbers::sequences)]
    pub calib_size: Option<usize>,
    /// The most tokens of one [default: 512]
    #[arg(long, value_parser = numbers::tokens)]
    pub calib_max_seq_length: Option<usize>,
    /// Sequences that are computed at a time; this changes no result [default: 8]
    #[arg(long, value_parser = numbers::sequences)]
    pub batch_size: Option<usize>,
    /// Seed of the choice of sequences, and of text that the model writes [default: 0]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Where statistics are kept. If the file is there, it is used, and nothing is run
    #[arg(long, value_name = "FILE")]
    pub calib_cache: Option<PathBuf>,
}

impl CalibrationArgs {
    /// What the flags ask for. `is_of_use` says whether the format of the weights can be calibrated.
    pub fn options(self, is_of_use: bool) -> Option<CalibrateOptions> {
        let is_asked_for = self.calib_data.is_some() || self.calib_cache.is_some();
        if is_asked_for && !is_of_use {
            say::warning("--calib-data and --calib-cache change nothing, because no weights are quantized to int4");
        }
        (is_asked_for && is_of_use).then(|| CalibrateOptions {
            data: self.calib_data.filter(|path| path.as_os_str() != SELF),
            text: Text {
                size: self.calib_size.unwrap_or(512),
                max_seq_length: self.calib_max_seq_length.unwrap_or(512),
                seed: self.seed.unwrap_or(0),
            },
            batch_size: self.batch_size.unwrap_or(8),
            cache: self.calib_cache,
        })
    }
}
