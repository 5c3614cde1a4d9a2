//! Rounds weights to e4m3, by scales of whole matrices or of rows.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use mixtral_checkpoint::names::part_name;
use mixtral_checkpoint::{Progress, RankWriter, TensorId};
use mixtral_model::{DType, ElemType, Fp8Input, PartKind, Piece, Rank, Recipe, WeightFormat, fp8};

use crate::error::ConvertError;
use crate::execute::{Buffers, in_parallel, read_piece};
use crate::quantize::Loss;
use crate::source::Source;
use crate::statistics::Statistics;

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

/// What scales of fp8 are made of.
#[derive(Clone, Copy)]
pub(crate) struct Scales<'a> {
    /// The largest magnitude in each tensor of the source.
    pub(crate) largest: &'a BTreeMap<String, f32>,
    /// What calibration found.
    pub(crate) statistics: Option<&'a Statistics>,
}

/// The largest magnitude in each of the source's tensors that are rounded to fp8.
pub(crate) fn largest(
    source: &Source,
    recipes: &[Vec<Recipe>],
    workers: usize,
) -> Result<BTreeMap<String, f32>, ConvertError> {
    let rounded = recipes.iter().flatten().filter(|r| r.format == WeightFormat::Fp8 && !source.is_quantized());
    let pieces: BTreeMap<&str, &Piece> =
        rounded.flat_map(|recipe| &recipe.pieces).map(|piece| (piece.source.as_str(), piece)).collect();
    let pieces: Vec<&Piece> = pieces.into_values().collect();
    let found: Mutex<BTreeMap<String, f32>> = Mutex::default();
    in_parallel(pieces.len(), workers, |index, buffers: &mut Buffers| {
        let piece = pieces[index];
        let whole = Piece { rows: 0..piece.source_rows, cols: 0..piece.source_cols, ..piece.clone() };
        let mut amax = 0f32;
        read_piece(source, &whole, &whole.cols, [ElemType::F32; 2], buffers, |bytes| {
            amax = DType::F32.widen(bytes).into_iter().fold(amax, |amax, x| amax.max(x.abs()));
            Ok(())
        })?;
        found.lock().unwrap_or_else(PoisonError::into_inner).insert(piece.source.clone(), amax);
        Ok::<_, ConvertError>(())
    })?;
    Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Rounds a weight to fp8. All pieces of a matrix have one scale, also those of other ranks; or each row has its own, by the whole row.
/// Returns what was lost of each source tensor.
pub(crate) fn write(
    source: &Source,
    recipe: &Recipe,
    scales: Scales<'_>,
    writer: &RankWriter,
    buffers: &mut Buffers,
    progress: &dyn Progress,
) -> Result<Vec<(String, Loss)>, ConvertError> {
    let part = |kind| writer.tensor(&part_name(&recipe.name, kind));
    let (mut values, mut of_weight) = (part(PartKind::Values), part(PartKind::Scales));
    let mut losses = Vec::with_capacity(recipe.pieces.len());
    for matrix in recipe.matrices() {
        let amax =
            matrix.iter().filter_map(|piece| scales.largest.get(&piece.source)).fold(0f32, |amax, x| amax.max(*x));
        let of_matrix = (recipe.format == WeightFormat::Fp8).then(|| fp8::scale(amax));
        let mut written: Vec<u8> = of_matrix.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        for piece in matrix {
            let mut loss = Loss::default();
            let whole = 0..piece.source_cols;
            let (cols, taken) = match of_matrix {
                Some(_) => (&piece.cols, 0..piece.cols.len()),
                None => (&whole, piece.cols.clone()),
            };
            read_piece(source, piece, cols, [ElemType::F32; 2], buffers, |bytes| {
                let mut rounded = Vec::with_capacity(bytes.len() / DType::F32.size());
                for row in DType::F32.widen(bytes).chunks_exact(cols.len()) {
                    let scale = of_matrix.unwrap_or_else(|| {
                        let scale = fp8::scale(row.iter().fold(0f32, |amax, x| amax.max(x.abs())));
                        written.extend(scale.to_le_bytes());
                        scale
                    });
                    loss.add(quantize(&row[taken.clone()], scale, &mut rounded));
                }
                values.write(&rounded)?;
                progress.advance(rounded.len() as u64);
                Ok(())
            })?;
            losses.push((piece.source.clone(), loss));
        }
        of_weight.write(&written)?;
        progress.advance(written.len() as u64);
    }
    values.finish()?;
    of_weight.finish()?;
    if recipe.format != WeightFormat::Fp8Rows(Fp8Input::Token) {
        let first = recipe.pieces.first().map_or("", |piece| &piece.source);
        let amax = scales.statistics.and_then(|statistics| statistics.shared_amax(first));
        let amax = amax.ok_or_else(|| ConvertError::NotCalibrated { what: format!("the input of {}", recipe.name) })?;
        let mut input = part(PartKind::InputScale);
        input.write(&fp8::scale(amax).to_le_bytes())?;
        progress.advance(4);
        input.finish()?;
    }
    Ok(losses)
}

/// The tensors of a rank's scales of keys and values, by name. `scales` are those of all layers.
///
/// # Errors
/// If there are none, and the rank needs some.
pub(crate) fn cache_tensors(
    recipes: &[Recipe],
    first_layer: usize,
    rank: Rank,
    scales: Option<&[[f32; 2]]>,
) -> Result<BTreeMap<String, Vec<u8>>, ConvertError> {
    let mut tensors = BTreeMap::new();
    for layer in 0.. {
        let name = TensorId::CacheScales(layer).to_string();
        if !recipes.iter().any(|recipe| recipe.name == name) {
            break;
        }
        let scales = scales.and_then(|scales| scales.get(first_layer + layer));
        let scales = scales.ok_or_else(|| ConvertError::NotCalibrated { what: format!("the cache of rank {rank}") })?;
        tensors.insert(name, scales.iter().flat_map(|scale| scale.to_le_bytes()).collect());
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
        let scale = fp8::scale(2.0);
        let loss = quantize(&values, scale, &mut bytes);
        let found: Vec<f32> = bytes.iter().map(|&byte| fp8::from_bits(byte) * scale).collect();
        assert_eq!((found[1], found[3]), (-2.0, 0.0));
        for (x, y) in values.iter().zip(&found) {
            // Half a step: of the mantissa, or of the smallest number.
            assert!((x - y).abs() <= (x.abs() / 16.0).max(scale / 1024.0), "{x} {y}");
        }
        assert!(loss.relative() > 0.0 && loss.relative() < 0.06);
        assert_eq!(quantize(&[0.0; 4], fp8::scale(0.0), &mut bytes).error, 0.0);
    }
}
