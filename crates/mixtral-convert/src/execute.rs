//! Carries out the shard plan. Each tensor of each rank is streamed piece by piece through buffers of fixed size, and
//! checked, converted, hashed and written on the way. Several tensors are streamed at a time.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use mixtral_checkpoint::scan::{count_from, infinity_bits, max_magnitude};
use mixtral_checkpoint::{Progress, RankWriter, TensorSpec};
use mixtral_model::fp8::NAN;
use mixtral_model::{Bits, DType, ElemType, Piece, Quantization, Recipe, WeightFormat};

use crate::error::ConvertError;
use crate::feedback::Feedback;
use crate::fp8;
use crate::number::{convert_elements, first_refused};
use crate::plan::{TensorRecipe, parts};
use crate::quantize::Loss;
use crate::quantized_writer::{QuantizedWriter, Rows};
use crate::source::{Located, Source};
use crate::statistics::{BLOCK, Statistics};

/// What quantizing lost, by the source's tensors.
pub type Losses = BTreeMap<String, Loss>;

/// The buffers of one worker.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    input: Vec<u8>,
    output: Vec<u8>,
    scratch: Vec<u8>,
}

/// The most bytes that the buffers of one worker hold.
#[must_use]
pub fn buffer_bytes(source: &Source) -> u64 {
    let chunk = source.tensors.values().map(Located::chunk_bytes).max().unwrap_or(0) as u64;
    let row = source.tensors.values().map(|l| l.stored_cols as u64 * l.stored_size() as u64).max().unwrap_or(0);
    // Input, output (up to twice as wide), and scratch.
    4 * chunk.max(row)
}

/// Writes all weights of all ranks: those of `recipes[r]` with `writers[r]`. Tensors in `made[r]` come from no source. Weights are quantized by the `statistics`, if there are
/// any. Returns what was lost by quantizing.
///
/// # Errors
/// The first failure, in the order of the work.
pub fn execute(
    source: &Source,
    recipes: &[Vec<Recipe>],
    made: &[BTreeMap<String, Vec<u8>>],
    writers: &[RankWriter],
    statistics: Option<&Statistics>,
    workers: usize,
    progress: &dyn Progress,
) -> Result<Losses, ConvertError> {
    let jobs = jobs(recipes);
    let losses: Mutex<Losses> = Mutex::default();
    let largest = fp8::largest(source, recipes, workers)?;
    in_parallel(jobs.len(), workers, |index, buffers: &mut Buffers| {
        let (rank, weight) = jobs[index];
        let recipe = &recipes[rank][weight];
        if let Some(bytes) = made[rank].get(&recipe.name) {
            let mut writer = writers[rank].tensor(&recipe.name);
            writer.write(bytes)?;
            progress.advance(bytes.len() as u64);
            return Ok(writer.finish()?);
        }
        match recipe.format {
            WeightFormat::Fp8 | WeightFormat::Fp8Rows(_) if !source.is_quantized() => {
                let scales = fp8::Scales { largest: &largest, statistics };
                let found = fp8::write(source, recipe, scales, &writers[rank], buffers, progress)?;
                let mut losses = losses.lock().unwrap_or_else(PoisonError::into_inner);
                found.into_iter().for_each(|(name, loss)| losses.entry(name).or_default().add(loss));
                Ok(())
            }
            WeightFormat::Quantized(quantization) if !source.is_quantized() => {
                let found =
                    write_quantized(source, recipe, quantization, statistics, &writers[rank], buffers, progress)?;
                let mut losses = losses.lock().unwrap_or_else(PoisonError::into_inner);
                found.into_iter().for_each(|(name, loss)| losses.entry(name).or_default().add(loss));
                Ok(())
            }
            _ => {
                let mut write = |tensor| write_tensor(source, tensor, &writers[rank], buffers, progress);
                parts(recipe).iter().try_for_each(&mut write)
            }
        }
    })?;
    Ok(losses.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Does the jobs 0 to `jobs` on `workers` threads (at least one), each with a state of its own. After a failure no job is begun.
///
/// # Errors
/// The failure of the first job that failed, in the order of the jobs.
pub(crate) fn in_parallel<State: Default, E: Send>(
    jobs: usize,
    workers: usize,
    job: impl Fn(usize, &mut State) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let failure: Mutex<Option<(usize, E)>> = Mutex::new(None);
    let work = || {
        let mut state = State::default();
        while !stop.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= jobs {
                return;
            }
            if let Err(error) = job(index, &mut state) {
                stop.store(true, Ordering::Relaxed);
                let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                if failure.as_ref().is_none_or(|(first, _)| index < *first) {
                    *failure = Some((index, error));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..workers.clamp(1, jobs.max(1)) {
            scope.spawn(work);
        }
        work();
    });
    let failure = failure.into_inner().unwrap_or_else(PoisonError::into_inner);
    failure.map_or(Ok(()), |(_, error)| Err(error))
}

/// All `(rank, weight)`. The largest come first, so that no worker has a large one left at the end. The same tensor of
/// all ranks comes together, because its source is then still in the page cache.
fn jobs(recipes: &[Vec<Recipe>]) -> Vec<(usize, usize)> {
    let mut jobs: Vec<(usize, usize)> =
        recipes.iter().enumerate().flat_map(|(rank, r)| (0..r.len()).map(move |weight| (rank, weight))).collect();
    jobs.sort_by_key(|&(rank, weight)| (std::cmp::Reverse(recipes[rank][weight].num_bytes()), weight, rank));
    jobs
}

/// Writes a tensor of a weight that the source stores in the same format.
fn write_tensor(
    source: &Source,
    recipe: &TensorRecipe,
    writer: &RankWriter,
    buffers: &mut Buffers,
    progress: &dyn Progress,
) -> Result<(), ConvertError> {
    let mut writer = writer.tensor(&recipe.spec.name);
    read_tensor(source, recipe, buffers, |bytes| {
        writer.write(bytes)?;
        progress.advance(bytes.len() as u64);
        Ok(())
    })?;
    Ok(writer.finish()?)
}

/// Reads `tensors` of weights that the source stores in the same formats.
///
/// # Errors
/// The first failure, in the order of the tensors.
pub(crate) fn read_tensors(
    source: &Source,
    tensors: Vec<TensorRecipe>,
    workers: usize,
) -> Result<Vec<(TensorSpec, Vec<u8>)>, ConvertError> {
    let read: Vec<Mutex<Vec<u8>>> = tensors.iter().map(|_| Mutex::default()).collect();
    in_parallel(tensors.len(), workers, |index, buffers: &mut Buffers| {
        let mut bytes = Vec::with_capacity(usize::try_from(tensors[index].spec.num_bytes()).unwrap_or(0));
        read_tensor(source, &tensors[index], buffers, |part| {
            bytes.extend_from_slice(part);
            Ok(())
        })?;
        *read[index].lock().unwrap_or_else(PoisonError::into_inner) = bytes;
        Ok::<_, ConvertError>(())
    })?;
    let read = read.into_iter().map(|bytes| bytes.into_inner().unwrap_or_else(PoisonError::into_inner));
    Ok(tensors.into_iter().map(|tensor| tensor.spec).zip(read).collect())
}

/// Reads a tensor of a weight that the source stores in the same format, and gives it to `each` piece by piece.
fn read_tensor(
    source: &Source,
    recipe: &TensorRecipe,
    buffers: &mut Buffers,
    mut each: impl FnMut(&[u8]) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    let TensorSpec { elem, shape, .. } = &recipe.spec;
    let row_bytes = shape.last().copied().unwrap_or(1) * elem.size();
    let rows: usize = shape.iter().rev().skip(1).product();
    let mut row = 0;
    for piece in &recipe.pieces {
        zeros((piece.target_row - row) * row_bytes, &mut each)?;
        read_piece(source, piece, &piece.cols, [*elem; 2], buffers, &mut each)?;
        row = piece.target_row + piece.rows.len();
    }
    zeros((rows - row) * row_bytes, &mut each)
}

/// Reads the bytes of a tensor from its byte `offset` on, as many as `into` has room for.
///
/// # Errors
/// If they cannot be read, or hold numbers that the tensor's type does not have.
pub(crate) fn read_bytes(
    source: &Source,
    recipe: &TensorRecipe,
    offset: usize,
    into: &mut [u8],
) -> Result<(), ConvertError> {
    let TensorSpec { elem, shape, .. } = &recipe.spec;
    let row_bytes = (shape.last().copied().unwrap_or(1) * elem.size()).max(1);
    let end = offset + into.len();
    let mut buffers = Buffers::default();
    into.fill(0);
    for piece in &recipe.pieces {
        let first = piece.target_row.max(offset / row_bytes);
        let last = (piece.target_row + piece.rows.len()).min(end.div_ceil(row_bytes));
        if first >= last {
            continue;
        }
        let start = piece.rows.start + first - piece.target_row;
        let part = Piece { rows: start..start + last - first, target_row: first, ..piece.clone() };
        let mut at = first * row_bytes;
        read_piece(source, &part, &part.cols, [*elem; 2], &mut buffers, |bytes| {
            let (from, to) = (at.max(offset), (at + bytes.len()).min(end));
            if from < to {
                into[from - offset..to - offset].copy_from_slice(&bytes[from - at..to - at]);
            }
            at += bytes.len();
            Ok(())
        })?;
    }
    Ok(())
}

/// Quantizes a weight that its pieces cover. Returns what was lost of each source tensor.
fn write_quantized(
    source: &Source,
    recipe: &Recipe,
    quantization: Quantization,
    statistics: Option<&Statistics>,
    writer: &RankWriter,
    buffers: &mut Buffers,
    progress: &dyn Progress,
) -> Result<Vec<(String, Loss)>, ConvertError> {
    let mut writer = QuantizedWriter::new(writer, &recipe.name, quantization, progress);
    let mut losses = Vec::with_capacity(recipe.pieces.len());
    for piece in &recipe.pieces {
        let mut loss = Loss::default();
        // Only elements of 4 bits make up for each other. For 8 bits, calibration may have kept no moments.
        let statistics = statistics.filter(|_| quantization.bits == Bits::Four);
        let seen = statistics.and_then(|statistics| statistics.of(&piece.source));
        let feedback = seen.map(|seen| Feedback::new(seen, piece.source_cols));
        let cols = match (quantization.group, &feedback) {
            // One scale for a row comes from the whole row, also where this rank has a part of it.
            (None, _) => 0..piece.source_cols,
            (Some(_), None) => piece.cols.clone(),
            // What an element makes up for comes from its whole block.
            (Some(_), Some(_)) => {
                let end = piece.cols.end.next_multiple_of(BLOCK).min(piece.source_cols);
                piece.cols.start / BLOCK * BLOCK..end
            }
        };
        let taken = piece.cols.start - cols.start..piece.cols.end - cols.start;
        let feedback = feedback.as_ref().map(|feedback| feedback.from(cols.start));
        read_piece(source, piece, &cols, [ElemType::F32, quantization.scale.into()], buffers, |bytes| {
            let values = &DType::F32.widen(bytes);
            loss.add(writer.write(Rows { values, cols: cols.len(), taken: taken.clone(), feedback })?);
            Ok(())
        })?;
        losses.push((piece.source.clone(), loss));
    }
    writer.finish()?;
    Ok(losses)
}

/// Gives rows that no piece covers, which are the padding of the vocabulary.
fn zeros(bytes: usize, each: &mut impl FnMut(&[u8]) -> Result<(), ConvertError>) -> Result<(), ConvertError> {
    const ZEROS: [u8; 4096] = [0; 4096];
    (0..bytes).step_by(ZEROS.len()).try_for_each(|start| each(&ZEROS[..ZEROS.len().min(bytes - start)]))
}

/// Reads the columns `cols` of a piece's rows, some rows at a time, and gives them to `each` as elements of type `to`. Floats
/// that are not finite, or too large for the type `limit`, are refused.
pub(crate) fn read_piece(
    source: &Source,
    piece: &Piece,
    cols: &Range<usize>,
    [to, limit]: [ElemType; 2],
    buffers: &mut Buffers,
    mut each: impl FnMut(&[u8]) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    // Source::open found all tensors of the model, and the plan names no others.
    let located = &source.tensors[&piece.source];
    let row_bytes = cols.len() * located.elem.size();
    let rows_at_once = (located.chunk_bytes() / row_bytes.max(1)).max(1);
    let (path, file) = &source.files[located.file];
    for start in piece.rows.clone().step_by(rows_at_once) {
        let rows = start..piece.rows.end.min(start + rows_at_once);
        buffers.input.resize(rows.len() * row_bytes, 0);
        let Buffers { input, output, scratch } = buffers;
        let read = located.read(file, rows, cols.clone(), input, scratch);
        read.map_err(|source| unreadable(path, source))?;
        let (Some(from), Some(to), Some(limit)) = (located.elem.float(), to.float(), limit.float()) else {
            if located.elem == ElemType::F8E4M3 && input.iter().any(|byte| byte & NAN == NAN) {
                return Err(not_numbers(source, located, piece));
            }
            each(input)?;
            continue;
        };
        if max_magnitude(from, input) >= first_refused(from, limit) {
            return Err(refusal(source, located, piece, from, limit));
        }
        if from == to {
            each(input)?;
        } else {
            output.resize(input.len() / from.size() * to.size(), 0);
            convert_elements(from, input, to, output);
            each(output)?;
        }
    }
    Ok(())
}

/// The error for a failed read. A file that became too short after its header was read gets an error of its own.
fn unreadable(path: &Path, source: io::Error) -> ConvertError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::UnexpectedEof => ConvertError::Shrunk { path },
        _ => ConvertError::Io { path, source },
    }
}

/// The error for bytes of e4m3 that are NaN, in the whole tensor of `piece`.
fn not_numbers(source: &Source, located: &Located, piece: &Piece) -> ConvertError {
    let (path, file) = &source.files[located.file];
    let mut bytes = vec![0; piece.source_rows * piece.source_cols];
    if let Err(source) = located.read(file, 0..piece.source_rows, 0..piece.source_cols, &mut bytes, &mut Vec::new()) {
        return unreadable(path, source);
    }
    let mut nan = (0u64..).zip(bytes).filter(|(_, byte)| byte & NAN == NAN).map(|(index, _)| index);
    let first = nan.next().unwrap_or(0);
    ConvertError::NotFinite { path: path.clone(), tensor: located.name.clone(), count: 1 + nan.count() as u64, first }
}

/// The error for refused elements. Reads the whole source tensor of `piece` again, and not only this rank's part, to
/// count its refused elements and find the first.
fn refusal(source: &Source, located: &Located, piece: &Piece, from: DType, to: DType) -> ConvertError {
    let (path, file) = &source.files[located.file];
    let cols = piece.source_cols;
    let rows_at_once = (located.chunk_bytes() / (cols * from.size()).max(1)).max(1);
    let (mut bytes, mut scratch) = (Vec::new(), Vec::new());
    let mut not_finite: Option<(u64, u64)> = None;
    let mut overflow: Option<(u64, u64)> = None;
    for start in (0..piece.source_rows).step_by(rows_at_once) {
        let rows = start..piece.source_rows.min(start + rows_at_once);
        bytes.resize(rows.len() * cols * from.size(), 0);
        if let Err(source) = located.read(file, rows, 0..cols, &mut bytes, &mut scratch) {
            return unreadable(path, source);
        }
        let add = |total: &mut Option<(u64, u64)>, limit| {
            if let Some((count, first)) = count_from(from, &bytes, limit) {
                let (so_far, at) = total.unwrap_or((0, start as u64 * cols as u64 + first));
                *total = Some((so_far + count, at));
            }
        };
        add(&mut not_finite, infinity_bits(from));
        add(&mut overflow, first_refused(from, to));
    }
    let (path, tensor) = (path.clone(), located.name.clone());
    if let Some((count, first)) = not_finite {
        return ConvertError::NotFinite { path, tensor, count, first };
    }
    let (count, first) = overflow.unwrap_or_default();
    let max = match to {
        DType::F16 => "65504",
        DType::Bf16 | DType::F32 => "3.39e38",
    };
    ConvertError::Overflow { path, tensor, count, first, dtype: to, max }
}
