//! A model's weights as floats, read into memory: what calibration runs.

use std::path::Path;

use mixtral_checkpoint::{CheckpointConfig, TensorSpec};
use mixtral_model::{CacheFormat, Mapping, Rank};

use crate::convert::{ConvertOptions, Prepared, prepare};
use crate::error::ConvertError;
use crate::execute::read_weights;
use crate::source::Source;

/// A model as `convert` would write it without quantizing it.
#[derive(Debug)]
pub struct FloatModel {
    source: Source,
    config: CheckpointConfig,
    tied: bool,
}

impl FloatModel {
    /// Opens the model that `options` convert. Returns `None` if they read no weights, or if nothing is left to be calibrated because
    /// the model is quantized and has scales for its cache. Reads no weights itself.
    ///
    /// # Errors
    /// As [`crate::convert()`].
    pub fn open(options: &ConvertOptions) -> Result<Option<Self>, ConvertError> {
        let options = ConvertOptions {
            mapping: Mapping::single(),
            weight_only: None,
            cache: Some(CacheFormat::Plain),
            ..options.clone()
        };
        let Prepared { config, source, tied, .. } = prepare(&options)?;
        let is_known = |source: &Source| source.is_quantized() && source.cache_scales.is_some();
        Ok(source.filter(|source| !is_known(source)).map(|source| FloatModel { source, config, tied }))
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.source.dir
    }

    /// The checkpoint that it would be if it were cut by `mapping`.
    #[must_use]
    pub fn config(&self, mapping: Mapping) -> CheckpointConfig {
        CheckpointConfig { mapping, ..self.config.clone() }
    }

    /// The weights `names` of a rank, as the tensors that a checkpoint of `config` has.
    ///
    /// # Errors
    /// If they cannot be read, or hold numbers that the model's type does not have.
    pub fn weights(
        &self,
        config: &CheckpointConfig,
        rank: Rank,
        names: &[&str],
        workers: usize,
    ) -> Result<Vec<(TensorSpec, Vec<u8>)>, ConvertError> {
        let mut recipes = crate::recipes(config, rank, self.tied);
        recipes.retain(|recipe| names.contains(&recipe.name.as_str()));
        read_weights(&self.source, &recipes, workers)
    }
}
