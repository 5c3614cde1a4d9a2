//! Rounds weights to e4m3, by scales of whole matrices.

use std::collections::BTreeMap;

use mixtral_checkpoint::TensorId;
use mixtral_model::{Rank, Recipe, fp8};

use crate::error::ConvertError;
use crate::quantize::Loss;
use crate::statistics::Statistics;

/// The scale that makes `amax` the largest number of the format.
#[must_use]
pub fn scale(amax: f32) -> f32 {
    // A matrix of zeros stays one, whatever its scale.
    if amax > 0.0 { (amax / fp8::MAX).max(f32::MIN_POSITIVE) } else { 1.0 }
}

/// Appends `values`, rounded, to `bytes`.
pub fn quantize(values: &[f32], scale: f32, bytes: &mut Vec<u8>) -> Loss {
    let mut loss = Loss::default();
    bytes.extend(values.iter().map(|&x| {
        let byte = fp8::to_bits(x / scale);
        let difference = f64::from(x - fp8::from_bits(byte) * scale);
        loss.add(Loss { error: difference * difference, energy: f64::from(x) * f64::from(x) });
        byte
    }));
    loss
}

/// The scales of a rank's keys and values in an fp8 cache: the tensors that hold them, by name.
///
/// # Errors
/// If the model was not calibrated.
pub(crate) fn cache_scales(
    recipes: &[Recipe],
    first_layer: usize,
    rank: Rank,
    statistics: Option<&Statistics>,
) -> Result<BTreeMap<String, Vec<u8>>, ConvertError> {
    let mut tensors = BTreeMap::new();
    for layer in 0.. {
        let name = TensorId::CacheScales(layer).to_string();
        if !recipes.iter().any(|recipe| recipe.name == name) {
            break;
        }
        let amax = statistics.and_then(|statistics| statistics.cache_amax.get(first_layer + layer));
        let amax = amax.ok_or_else(|| ConvertError::NotCalibrated { what: format!("the cache of rank {rank}") })?;
        tensors.insert(name, amax.iter().flat_map(|&amax| scale(amax).to_le_bytes()).collect());
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_element_is_exact_and_others_are_near() {
        let values = [0.3, -2.0, 1e-5, 0.0, 1.999];
        let mut bytes = Vec::new();
        let scale = scale(2.0);
        let loss = quantize(&values, scale, &mut bytes);
        let found: Vec<f32> = bytes.iter().map(|&byte| fp8::from_bits(byte) * scale).collect();
        assert_eq!((found[1], found[3]), (-2.0, 0.0));
        for (x, y) in values.iter().zip(&found) {
            // Half a step: of the mantissa, or of the smallest number.
            assert!((x - y).abs() <= (x.abs() / 16.0).max(scale / 1024.0), "{x} {y}");
        }
        assert!(loss.relative() > 0.0 && loss.relative() < 0.06);
        assert_eq!(quantize(&[0.0; 4], super::scale(0.0), &mut bytes).error, 0.0);
    }
}
