//! The whole of calibration: text, layers, statistics.

use std::path::PathBuf;
use std::sync::Arc;

use mixtral_checkpoint::Progress;
use mixtral_convert::{ConvertOptions, FloatModel, Statistics};
use mixtral_model::Mapping;

use crate::error::CalibrateError;
use crate::layers::RunOptions;
use crate::machine::Machine;
use crate::text::{self, Text};
use crate::{cache, generate, layers};

/// How to calibrate a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CalibrateOptions {
    /// A file with text. Without it, the model writes its own.
    pub data: Option<PathBuf>,
    /// How much text.
    pub text: Text,
    /// Sequences that are computed at a time. They change no bit.
    pub batch_size: usize,
    /// A file that keeps the statistics. If it is there, they are read from it, and nothing is computed.
    pub cache: Option<PathBuf>,
    /// Whether moments are wanted, beside the largest magnitudes: integers of 4 bits are rounded by them. A file always gets them.
    pub moments: bool,
    /// Where it is computed.
    pub machine: Machine,
}

/// What calibration found, and how.
#[derive(Clone, Debug)]
pub struct Calibration {
    /// The statistics.
    pub statistics: Statistics,
    /// Sequences and tokens that the model was run over; `None` if the statistics were kept in a file.
    pub text: Option<(usize, usize)>,
}

/// Calibrates the model that `convert` converts. Returns `None` if it reads no weights. The two phases (writing text, if there
/// is none, and running it through the layers) each have a progress of their own.
///
/// # Errors
/// What is wrong with the model, the text or the file of statistics.
pub fn calibrate(
    convert: &ConvertOptions,
    options: &CalibrateOptions,
    [writing, running]: [&dyn Progress; 2],
) -> Result<Option<Calibration>, CalibrateError> {
    let Some(model) = FloatModel::open(convert)?.map(Arc::new) else { return Ok(None) };
    let config = model.config(Mapping::single()).model;
    if let Some(path) = options.cache.as_ref().filter(|path| path.exists()) {
        return Ok(Some(Calibration { statistics: cache::read(path, &cache::name(&model)?, &config)?, text: None }));
    }
    options.cache.as_deref().map_or(Ok(()), cache::check_folder)?;
    let max_seq_length = options.text.max_seq_length.min(config.max_position_embeddings);
    let text = Text { max_seq_length, ..options.text };
    let sequences = match &options.data {
        Some(path) => text::read(path, model.dir(), config.vocab_size, text)?,
        None => generate::generate(&model, text, &options.machine, convert.workers, writing)?,
    };
    let run = RunOptions {
        machine: &options.machine,
        threads: convert.workers,
        batch_size: options.batch_size,
        moments: options.moments || options.cache.is_some(),
    };
    let statistics = layers::run(&model, &sequences, run, running)?;
    if let Some(path) = &options.cache {
        cache::write(path, &cache::name(&model)?, &config, &statistics)?;
    }
    let tokens = sequences.iter().map(Vec::len).sum();
    Ok(Some(Calibration { statistics, text: Some((sequences.len(), tokens)) }))
}
