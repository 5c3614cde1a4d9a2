//! The file that keeps statistics: a safetensors file with three tensors for each input, and one for the cache.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use mixtral_checkpoint::{RankFile, TensorSpec};
use mixtral_convert::statistics::num_moments;
use mixtral_convert::{FloatModel, InputStatistics, LinearInput, Statistics};
use mixtral_model::{DType, ElemType, Formats, Mapping, ModelConfig};
use safetensors::tensor::{Dtype, TensorView};

use crate::error::CalibrateError;

/// The largest magnitudes of keys and values, `[layers, 2]`.
const CACHE: &str = "cache.amax";

/// The bytes of a text as a tensor: the model that the statistics are of.
const MODEL: &str = "model";

fn spec(name: String, elem: ElemType, shape: Vec<usize>) -> TensorSpec {
    TensorSpec { name, elem, shape }
}

/// The number of tokens (two words) and the largest magnitude of an input.
fn counts(input: LinearInput) -> TensorSpec {
    spec(format!("{input}.tokens"), ElemType::I32, vec![2])
}

fn largest(input: LinearInput) -> TensorSpec {
    spec(format!("{input}.amax"), ElemType::F32, vec![1])
}

fn moments(input: LinearInput, model: &ModelConfig) -> TensorSpec {
    spec(format!("{input}.moments"), ElemType::F32, vec![num_moments(input.width(model))])
}

/// A model in words, by which its statistics are known. Types of weights and activations make no difference.
///
/// # Errors
/// If its weights cannot be read.
pub fn name(model: &FloatModel) -> Result<String, CalibrateError> {
    let config = model.config(Mapping::single()).model;
    let config = ModelConfig { formats: Formats::default(), dtype: DType::F32, ..config };
    Ok(format!("{config}, weights {}", model.fingerprint()?))
}

/// Checks that there is a folder for the file, so that an error comes before the work and not after it.
///
/// # Errors
/// If there is none.
pub fn check_folder(path: &Path) -> Result<(), CalibrateError> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty() && !dir.is_dir());
    dir.map_or(Ok(()), |dir| Err(CalibrateError::NoFolder { path: path.to_owned(), dir: dir.to_owned() }))
}

/// Writes the statistics of the model with this name.
///
/// # Errors
/// If the file cannot be written.
pub fn write(path: &Path, name: &str, model: &ModelConfig, statistics: &Statistics) -> Result<(), CalibrateError> {
    let io = |source| CalibrateError::Io { path: path.to_owned(), source };
    let mut tensors: Vec<(TensorSpec, Cow<'_, [u8]>)> = Vec::new();
    for (input, InputStatistics { tokens, amax, moments: seen }) in statistics.iter() {
        tensors.push((counts(input), tokens.to_le_bytes().to_vec().into()));
        tensors.push((largest(input), amax.to_le_bytes().to_vec().into()));
        tensors.push((moments(input, model), bytemuck::cast_slice(seen).into()));
    }
    let cache: Vec<f32> = statistics.cache_amax.iter().flatten().copied().collect();
    tensors
        .push((spec(CACHE.to_owned(), ElemType::F32, vec![model.num_layers, 2]), bytemuck::cast_slice(&cache).into()));
    tensors.push((spec(MODEL.to_owned(), ElemType::U8, vec![name.len()]), name.as_bytes().into()));
    let dtype = |elem| match elem {
        ElemType::I32 => Dtype::I32,
        ElemType::U8 => Dtype::U8,
        _ => Dtype::F32,
    };
    let views = tensors.iter().map(|(spec, bytes)| {
        TensorView::new(dtype(spec.elem), spec.shape.clone(), bytes).map(|view| (spec.name.clone(), view))
    });
    let views = views.collect::<Result<Vec<_>, _>>().map_err(|error| io(std::io::Error::other(error)))?;
    let bytes = safetensors::serialize(views, None).map_err(|error| io(std::io::Error::other(error)))?;
    // A file of that name is always whole.
    let unfinished = path.with_extension("unfinished");
    std::fs::write(&unfinished, bytes).and_then(|()| std::fs::rename(&unfinished, path)).map_err(io)
}

/// Reads the statistics of the model with this name.
///
/// # Errors
/// If the file is damaged, or of another model.
pub fn read(path: &Path, name: &str, model: &ModelConfig) -> Result<Statistics, CalibrateError> {
    let file = RankFile::open(path)?;
    let found = String::from_utf8_lossy(file.tensor(MODEL)?.bytes).into_owned();
    if found != name {
        return Err(CalibrateError::OtherModel { path: path.to_owned(), found, this: name.to_owned() });
    }
    let mut specs = vec![spec(CACHE.to_owned(), ElemType::F32, vec![model.num_layers, 2])];
    for input in (0..model.num_layers).flat_map(|layer| LinearInput::of_layer(model, layer)) {
        specs.extend([counts(input), largest(input), moments(input, model)]);
    }
    file.check(&specs, None)?;
    let floats = |spec: TensorSpec| -> Result<Vec<f32>, CalibrateError> {
        let bytes = file.tensor(&spec.name)?.bytes;
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        let damaged = || CalibrateError::Damaged { path: path.to_owned(), tensor: spec.name };
        if values.iter().all(|value| value.is_finite()) { Ok(values) } else { Err(damaged()) }
    };
    let cache = floats(specs[0].clone())?;
    let mut statistics = Statistics::default();
    for (layer, cache) in cache.as_chunks().0.iter().enumerate() {
        let mut inputs = BTreeMap::new();
        for input in LinearInput::of_layer(model, layer) {
            let tokens =
                file.tensor(&counts(input).name)?.bytes.as_chunks().0.first().map_or(0, |&b| u64::from_le_bytes(b));
            let amax = floats(largest(input))?.first().copied().unwrap_or(0.0);
            inputs.insert(input, InputStatistics { tokens, amax, moments: floats(moments(input, model))? });
        }
        statistics.add_kept_layer(model, inputs, *cache);
    }
    Ok(statistics)
}
