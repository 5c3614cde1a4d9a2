//! Quantizes a checkpoint of floats, rank by rank. The result is the checkpoint that quantizing the original model gives for the
//! same layout of ranks.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use mixtral_checkpoint::{
    Checkpoint, CheckpointWriter, Progress, RankFile, RankWriter, TensorId, WeightSpec, rank_weights,
};
use mixtral_model::{Mapping, Quantization, Rank, WeightFormat, WeightOnly};

use crate::error::ConvertError;
use crate::execute::{Losses, in_parallel};
use crate::quantize::Loss;
use crate::quantized_writer::{QuantizedWriter, Rows};
use crate::report::QuantizedTensor;

/// Rows that are read at a time.
const ROWS: usize = 64;

/// Bytes that are copied at a time.
const COPIED: usize = 1 << 19;

/// Writes `checkpoint`, quantized, to `output_dir`. Returns what each weight lost over all ranks, the largest part first.
///
/// # Errors
/// A checkpoint that is damaged or quantized already, groups that ranks cut, or a directory that cannot be written.
pub fn requantize(
    checkpoint: &Checkpoint,
    weight_only: WeightOnly,
    output_dir: &Path,
    workers: usize,
    progress: &dyn Progress,
) -> Result<Vec<QuantizedTensor>, ConvertError> {
    let mut config = checkpoint.config().clone();
    config.model.formats = weight_only.formats(config.model.dtype);
    config.validate()?;
    let ranks: Vec<Rank> = config.mapping.ranks().collect();
    let files = ranks.iter().map(|&rank| checkpoint.rank(rank)).collect::<Result<Vec<_>, _>>()?;
    let mut writer = CheckpointWriter::create(output_dir, config.clone(), false)?;
    for name in checkpoint.config().files.keys() {
        writer.copy_in(name, &checkpoint.dir().join(name))?;
    }
    let weights = |&rank: &Rank| rank_weights(&config, rank).into_iter().map(move |weight| (rank, weight));
    let jobs: Vec<(Rank, WeightSpec)> = ranks.iter().flat_map(weights).collect();
    progress.start(jobs.iter().map(|(_, weight)| weight.num_bytes()).sum());
    let losses: Mutex<Losses> = Mutex::default();
    in_parallel(jobs.len(), workers, |index, (): &mut ()| {
        let (rank, weight) = &jobs[index];
        let to = &writer.ranks()[rank.0];
        let quantization = match weight.format {
            WeightFormat::Plain => return copy(&files[rank.0], weight, to, progress),
            WeightFormat::Fp8 | WeightFormat::Fp8Rows(_) => {
                return Err(ConvertError::NotCalibrated { what: format!("the input of {}", weight.name) });
            }
            WeightFormat::Quantized(quantization) => quantization,
        };
        let parts = match quantization.group {
            None => row_parts(&config.mapping, *rank, weight.id),
            Some(_) => vec![*rank],
        };
        let parts: Vec<&RankFile> = parts.into_iter().map(|rank| &files[rank.0]).collect();
        let own = parts.iter().position(|file| std::ptr::eq(*file, &files[rank.0])).unwrap_or(0);
        let loss = quantize(&parts, own, weight, quantization, to, progress)?;
        losses.lock().unwrap_or_else(PoisonError::into_inner).entry(weight.name.clone()).or_default().add(loss);
        Ok::<_, ConvertError>(())
    })?;
    writer.finish()?;
    Ok(QuantizedTensor::list(losses.into_inner().unwrap_or_else(PoisonError::into_inner)))
}

/// The ranks that hold the parts of the weight's rows, in the order of the columns.
fn row_parts(mapping: &Mapping, rank: Rank, id: TensorId) -> Vec<Rank> {
    let own = mapping.coords(rank);
    let in_stage = mapping.ranks().filter(|&other| mapping.coords(other).pp_rank == own.pp_rank);
    match id {
        TensorId::Dense(_) => in_stage.collect(),
        TensorId::Proj(_) => in_stage.filter(|&other| mapping.coords(other).moe_ep_rank == own.moe_ep_rank).collect(),
        _ => vec![rank],
    }
}

/// Copies a weight that stays as it is.
fn copy(from: &RankFile, weight: &WeightSpec, to: &RankWriter, progress: &dyn Progress) -> Result<(), ConvertError> {
    for tensor in weight.tensors() {
        let mut writer = to.tensor(&tensor.name);
        let len = usize::try_from(tensor.num_bytes()).unwrap_or(usize::MAX);
        let mut buffer = vec![0; COPIED.min(len)];
        for start in (0..len).step_by(COPIED) {
            let bytes = &mut buffer[..COPIED.min(len - start)];
            from.read(&tensor.name, start, bytes)?;
            writer.write(bytes)?;
            progress.advance(bytes.len() as u64);
        }
        writer.finish()?;
    }
    Ok(())
}

/// Quantizes a weight. `parts` hold the parts of its rows; the `own`-th is written.
fn quantize(
    parts: &[&RankFile],
    own: usize,
    weight: &WeightSpec,
    quantization: Quantization,
    to: &RankWriter,
    progress: &dyn Progress,
) -> Result<Loss, ConvertError> {
    let name = &weight.name;
    let mut writer = QuantizedWriter::new(to, name, quantization, progress);
    let size = weight.dtype.size();
    let cols = |file: &RankFile| Ok::<_, ConvertError>(file.shape(name)?.1.last().copied().unwrap_or(0));
    let widths = parts.iter().map(|file| cols(file)).collect::<Result<Vec<_>, _>>()?;
    let before: usize = widths[..own].iter().sum();
    let (whole, taken) = (widths.iter().sum(), before..before + widths[own]);
    let num_rows: usize = weight.shape.iter().rev().skip(1).product();
    let mut loss = Loss::default();
    for first in (0..num_rows).step_by(ROWS) {
        let count = ROWS.min(num_rows - first);
        let mut rows = vec![0.0; count * whole];
        let mut start = 0;
        for (file, width) in parts.iter().zip(&widths) {
            let mut bytes = vec![0; count * width * size];
            file.read(name, first * width * size, &mut bytes)?;
            let part = weight.dtype.widen(&bytes);
            for (row, part) in rows.chunks_exact_mut(whole).zip(part.chunks_exact(*width)) {
                row[start..start + width].copy_from_slice(part);
            }
            start += width;
        }
        loss.add(writer.write(Rows { values: &rows, cols: whole, taken: taken.clone(), feedback: None })?);
    }
    writer.finish()?;
    Ok(loss)
}
