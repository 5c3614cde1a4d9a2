//! Calibration: which text a model is run over before it is quantized.

use std::path::PathBuf;

use mixtral_calibrate::{CalibrateOptions, Machine, Text};

use super::build::BackendChoice;
use super::numbers;
use crate::say;

/// What `--calib-data` says in place of a file.
const SELF: &str = "self";

/// The flags as they were typed.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Calibration")]
pub struct CalibrationArgs {
    /// Text to calibrate with: a file with text, JSON lines with a "text" each, or lines of token ids; self has the model write it
    /// [default: self if fp8 needs it, none for integers]
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
    /// Where the model runs over the text; auto is a GPU if there is one, else the CPU [default: auto]
    #[arg(long)]
    pub backend: Option<BackendChoice>,
    /// Where statistics are kept. If the file is there, it is used, and nothing is run
    #[arg(long, value_name = "FILE")]
    pub calib_cache: Option<PathBuf>,
}

/// What calibration is to the formats of weights and cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calibration {
    /// They have no scales without it.
    Needed {
        /// Whether there are integers too, which it makes better.
        integers: bool,
    },
    /// It makes them better.
    OfUse,
    /// It changes nothing.
    OfNoUse,
}

impl CalibrationArgs {
    /// What the flags ask for, and the formats need. The machine is chosen later.
    pub fn options(self, calibration: Calibration) -> Option<CalibrateOptions> {
        let is_asked_for = self.calib_data.is_some() || self.calib_cache.is_some();
        if is_asked_for && calibration == Calibration::OfNoUse {
            say::warning("--calib-data and --calib-cache change nothing, because nothing is quantized to int4 or fp8");
        }
        let runs = match calibration {
            Calibration::Needed { .. } => true,
            Calibration::OfUse => is_asked_for,
            Calibration::OfNoUse => false,
        };
        runs.then(|| CalibrateOptions {
            data: self.calib_data.filter(|path| path.as_os_str() != SELF),
            text: Text {
                size: self.calib_size.unwrap_or(512),
                max_seq_length: self.calib_max_seq_length.unwrap_or(512),
                seed: self.seed.unwrap_or(0),
            },
            batch_size: self.batch_size.unwrap_or(8),
            cache: self.calib_cache,
            moments: calibration != (Calibration::Needed { integers: false }),
            machine: Machine::Cpu,
        })
    }
}
