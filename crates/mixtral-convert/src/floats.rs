//! A model's weights as floats, whole or in parts: what calibration runs.

use std::path::Path;

use mixtral_checkpoint::{CheckpointConfig, TensorId, TensorSpec};
use mixtral_model::{CacheFormat, DType, Mapping, ModelConfig, Rank};

use crate::convert::{ConvertOptions, Prepared, prepare};
use crate::error::ConvertError;
use crate::execute::{read_bytes, read_tensors};
use crate::plan::{TensorRecipe, parts};
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

    /// The checkpoint of a model that has only one of its layers.
    #[must_use]
    pub fn one_layer(&self) -> CheckpointConfig {
        let model = ModelConfig { num_layers: 1, ..self.config.model.clone() };
        CheckpointConfig { model, ..self.config(Mapping::single()) }
    }

    /// The tensors of the whole model, as a checkpoint of one rank has them.
    #[must_use]
    pub fn tensors(&self) -> Vec<TensorRecipe> {
        crate::recipes(&self.config(Mapping::single()), Rank(0), self.tied).iter().flat_map(parts).collect()
    }

    /// The embedding and the tensors of layer `layer`, as the checkpoint [`FloatModel::one_layer`] has them.
    #[must_use]
    pub fn tensors_of_layer(&self, layer: usize) -> Vec<TensorRecipe> {
        let stages = self.config(Mapping { pp_size: self.config.model.num_layers, ..Mapping::single() });
        let embedding = TensorId::Embedding.to_string();
        let mut recipes = crate::recipes(&stages, Rank(layer), self.tied);
        recipes.retain(|recipe| recipe.name != embedding);
        let first = crate::recipes(&stages, Rank(0), self.tied);
        recipes.extend(first.into_iter().filter(|recipe| recipe.name == embedding));
        recipes.iter().flat_map(parts).collect()
    }

    /// A digest of how each of its tensors begins, as f32. It tells models of one shape apart, and does not depend on how they are
    /// stored or to what type they are converted.
    ///
    /// # Errors
    /// As [`FloatModel::read_all`].
    pub fn fingerprint(&self) -> Result<String, ConvertError> {
        const BEGINNING: u64 = 4096;
        let mut config = self.config(Mapping::single());
        config.model.dtype = DType::F32;
        let mut hasher = blake3::Hasher::new();
        for tensor in crate::recipes(&config, Rank(0), self.tied).iter().flat_map(parts) {
            let beginning = usize::try_from(tensor.spec.num_bytes().min(BEGINNING)).unwrap_or(0);
            let mut bytes = vec![0; beginning];
            self.read(&tensor, 0, &mut bytes)?;
            hasher.update(tensor.spec.name.as_bytes()).update(&bytes);
        }
        Ok(hasher.finalize().to_hex()[..16].to_owned())
    }

    /// Reads whole tensors.
    ///
    /// # Errors
    /// If they cannot be read, or hold numbers that the model's type does not have.
    pub fn read_all(
        &self,
        tensors: Vec<TensorRecipe>,
        workers: usize,
    ) -> Result<Vec<(TensorSpec, Vec<u8>)>, ConvertError> {
        read_tensors(&self.source, tensors, workers)
    }

    /// Reads the bytes of a tensor from its byte `offset` on.
    ///
    /// # Errors
    /// As [`FloatModel::read_all`].
    pub fn read(&self, tensor: &TensorRecipe, offset: usize, into: &mut [u8]) -> Result<(), ConvertError> {
        read_bytes(&self.source, tensor, offset, into)
    }
}
