//! The single numbers of a quantized model: scales of linears in e4m3, of their inputs, and of keys and values in the cache.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use mixtral_checkpoint::names::part_name;
use mixtral_model::{ElemType, Formats, Fp8Input, ModelConfig, PartKind, WeightFormat};

use super::Located;
use super::diagnosis::Diagnosis;
use super::locate::{Entries, Found};
use super::view::View;
use crate::error::ConvertError;
use crate::names::{HfTensor, Matrix, cache_scales};

/// The numbers of a model by the names that a checkpoint would give them.
#[derive(Debug)]
pub(super) struct Scales(HashMap<String, f32>);

impl Scales {
    /// Reads the numbers that were found.
    ///
    /// # Errors
    /// If one cannot be read, or is no scale: negative, not finite, or zero where it divides.
    pub(super) fn read(
        dir: &Path,
        files: &[(PathBuf, File)],
        stored: &Entries,
        found: &Found,
    ) -> Result<Self, ConvertError> {
        let number = |(key, name): (&String, &String)| {
            let (file, entry) = &stored[name];
            let (path, file) = &files[*file];
            let dtype = entry.float().expect("numbers are floats");
            let mut bytes = vec![0; dtype.size()];
            let io = |source| ConvertError::Io { path: path.clone(), source };
            file.read_exact_at(&mut bytes, entry.start).map_err(io)?;
            let scale = dtype.widen(&bytes)[0];
            let may_be_zero = key.ends_with(&part_name("", PartKind::Scales));
            if !scale.is_finite() || scale < 0.0 || scale == 0.0 && !may_be_zero {
                let diagnosis = Box::new(Diagnosis::Scale { tensor: name.clone(), found: scale });
                return Err(ConvertError::Diagnosed { dir: dir.to_owned(), diagnosis });
            }
            Ok((key.clone(), scale))
        };
        found.numbers.iter().map(number).collect::<Result<_, _>>().map(Scales)
    }

    /// The scale of the keys and that of the values of each layer, if the model has them.
    pub(super) fn of_caches(&self, model: &ModelConfig) -> Option<Vec<[f32; 2]>> {
        let number = |spellings: &[String]| self.0.get(&spellings[0]).copied();
        let of_layer = |layer| {
            let [keys, values] = cache_scales(layer);
            Some([number(&keys)?, number(&values)?])
        };
        (0..model.num_layers).map(of_layer).collect()
    }

    /// The formats of a checkpoint that keeps all scales of weights: where linears that are one matrix there have different ones, each
    /// row has its own.
    pub(super) fn formats(&self, model: &ModelConfig, formats: Formats) -> Formats {
        let scale = |tensor: &HfTensor| self.0.get(&part_name(&tensor.to_string(), PartKind::Scales));
        let agree = |matrix: &[HfTensor]| matrix.iter().all(|tensor| scale(tensor) == scale(&matrix[0]));
        let kept = |format, is_kept: bool| match format {
            WeightFormat::Fp8 if !is_kept => WeightFormat::Fp8Rows(Fp8Input::Static),
            format => format,
        };
        let (mut layers, experts) = (0..model.num_layers, model.moe.num_experts);
        let gated = |layer, expert| {
            [Matrix::Up, Matrix::Gate].map(|matrix| HfTensor::feed_forward(model, layer, expert, matrix))
        };
        let mut gates = layers.clone().flat_map(|layer| (0..experts).map(move |expert| gated(layer, expert)));
        Formats {
            attention: kept(formats.attention, layers.all(|layer| agree(&query_key_value(layer)))),
            feed_forward: kept(formats.feed_forward, gates.all(|matrix| agree(&matrix))),
        }
    }

    /// All numbers, as tensors of which each element is the number. An input has one scale for all linears of a layer that read it, and
    /// for all experts: the largest, which cuts nothing off.
    pub(super) fn located(mut self, model: &ModelConfig) -> HashMap<String, Located> {
        for layer in 0..model.num_layers {
            let of_experts = |matrices: &[Matrix]| {
                let tensor = |expert, matrix| HfTensor::feed_forward(model, layer, expert, matrix);
                let experts = 0..model.moe.num_experts;
                experts.flat_map(|expert| matrices.iter().map(move |&matrix| tensor(expert, matrix))).collect()
            };
            let inputs: [Vec<HfTensor>; 4] = [
                query_key_value(layer).to_vec(),
                vec![HfTensor::Output(layer)],
                of_experts(&[Matrix::Up, Matrix::Gate]),
                of_experts(&[Matrix::Down]),
            ];
            for readers in inputs {
                let keys = readers.iter().map(|tensor| part_name(&tensor.to_string(), PartKind::InputScale));
                let keys: Vec<String> = keys.filter(|key| self.0.contains_key(key)).collect();
                let largest = keys.iter().fold(0f32, |largest, key| largest.max(self.0[key]));
                self.0.extend(keys.into_iter().map(|key| (key, largest)));
            }
        }
        let located = |(name, number): (String, f32)| {
            let view = View::Number(number.to_le_bytes());
            (name.clone(), Located { name, file: 0, elem: ElemType::F32, start: 0, stored_cols: 1, view })
        };
        self.0.into_iter().map(located).collect()
    }
}

/// The linears that are `attention.qkv` in a checkpoint.
fn query_key_value(layer: usize) -> [HfTensor; 3] {
    [HfTensor::Query(layer), HfTensor::Key(layer), HfTensor::Value(layer)]
}
