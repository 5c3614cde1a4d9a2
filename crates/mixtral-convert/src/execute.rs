//! Carries out the shard plan. Each tensor of each rank is streamed piece by piece through buffers of fixed size, and
//! checked, converted, hashed and written on the way. Several tensors are streamed at a time.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use mixtral_checkpoint::names::part_name;
use mixtral_checkpoint::scan::{count_from, infinity_bits, max_magnitude};
use mixtral_checkpoint::{Progress, RankWriter, TensorWriter};
use mixtral_model::{DType, PartKind, Piece, Quantization, Recipe, WeightFormat};

use crate::error::ConvertError;
use crate::number::{convert_elements, first_refused, narrow};
use crate::quantize::{Loss, quantize_row};
use crate::source::{Located, Source};

/// What quantizing lost, by the source's tensors.
pub type Losses = BTreeMap<String, Loss>;

/// The buffers of one worker.
#[derive(Debug, Default)]
struct Buffers {
    input: Vec<u8>,
    output: Vec<u8>,
    scratch: Vec<u8>,
}

/// The most bytes that the buffers of one worker hold.
#[must_use]
pub fn buffer_bytes(source: &Source) -> u64 {
    let chunk = source.tensors.values().map(Located::chunk_bytes).max().unwrap_or(0) as u64;
    let row = source.tensors.values().map(|l| l.stored_cols as u64 * l.dtype.size() as u64).max().unwrap_or(0);
    // Input, output (up to twice as wide), and scratch.
    4 * chunk.max(row)
}

/// Writes all weights of all ranks: those of `recipes[r]` with `writers[r]`. Returns what was lost by quantizing.
///
/// # Errors
/// The first failure, in the order of the work.
pub fn execute(
    source: &Source,
    recipes: &[Vec<Recipe>],
    writers: &[RankWriter],
    workers: usize,
    progress: &dyn Progress,
) -> Result<Losses, ConvertError> {
    let jobs = jobs(recipes);
    progress.start(recipes.iter().flatten().map(|r| r.num_bytes() as u64).sum());
    let losses: Mutex<Losses> = Mutex::default();
    in_parallel(jobs.len(), workers, |index, buffers: &mut Buffers| {
        let (rank, weight) = jobs[index];
        let recipe = &recipes[rank][weight];
        match recipe.format {
            WeightFormat::Plain => write_plain(source, recipe, &writers[rank], buffers, progress),
            WeightFormat::Quantized(quantization) => {
                let found = write_quantized(source, recipe, quantization, &writers[rank], buffers, progress)?;
                let mut losses = losses.lock().unwrap_or_else(PoisonError::into_inner);
                found.into_iter().for_each(|(name, loss)| losses.entry(name).or_default().add(loss));
                Ok(())
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

fn write_plain(
    source: &Source,
    recipe: &Recipe,
    writer: &RankWriter,
    buffers: &mut Buffers,
    progress: &dyn Progress,
) -> Result<(), ConvertError> {
    let mut writer = writer.tensor(&recipe.name);
    let row_bytes = recipe.cols() * recipe.dtype.size();
    let mut row = 0;
    for piece in &recipe.pieces {
        write_zeros(&mut writer, (piece.target_row - row) * row_bytes, progress)?;
        read_piece(source, piece, &piece.cols, [recipe.dtype; 2], buffers, |bytes| {
            writer.write(bytes)?;
            progress.advance(bytes.len() as u64);
            Ok(())
        })?;
        row = piece.target_row + piece.rows.len();
    }
    write_zeros(&mut writer, (recipe.rows() - row) * row_bytes, progress)?;
    Ok(writer.finish()?)
}

/// Quantizes a weight that its pieces cover. Returns what was lost of each source tensor.
fn write_quantized(
    source: &Source,
    recipe: &Recipe,
    quantization: Quantization,
    writer: &RankWriter,
    buffers: &mut Buffers,
    progress: &dyn Progress,
) -> Result<Vec<(String, Loss)>, ConvertError> {
    let part = |kind| writer.tensor(&part_name(&recipe.name, kind));
    let (mut values, mut scales) = (part(PartKind::Values), part(PartKind::Scales));
    let (mut floats, mut integers, mut found) = (Vec::new(), Vec::new(), Vec::new());
    let mut losses = Vec::with_capacity(recipe.pieces.len());
    for piece in &recipe.pieces {
        let mut loss = Loss::default();
        // One scale for a row comes from the whole row, also where this rank has a part of it.
        let cols = if quantization.group.is_none() { 0..piece.source_cols } else { piece.cols.clone() };
        let taken = piece.cols.start - cols.start..piece.cols.end - cols.start;
        read_piece(source, piece, &cols, [DType::F32, quantization.scale], buffers, |bytes| {
            integers.clear();
            found.clear();
            for row in bytes.chunks_exact(cols.len() * DType::F32.size()) {
                floats.clear();
                floats.extend(row.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)));
                loss.add(quantize_row(&floats, taken.clone(), quantization, &mut integers, &mut found));
            }
            values.write(&integers)?;
            let found = narrow(quantization.scale, &found);
            scales.write(&found)?;
            progress.advance((integers.len() + found.len()) as u64);
            Ok(())
        })?;
        losses.push((piece.source.clone(), loss));
    }
    values.finish()?;
    scales.finish()?;
    Ok(losses)
}

/// Writes rows that no piece covers, which are the padding of the vocabulary.
fn write_zeros(writer: &mut TensorWriter<'_>, bytes: usize, progress: &dyn Progress) -> Result<(), ConvertError> {
    const ZEROS: [u8; 4096] = [0; 4096];
    for start in (0..bytes).step_by(ZEROS.len()) {
        let n = ZEROS.len().min(bytes - start);
        writer.write(&ZEROS[..n])?;
        progress.advance(n as u64);
    }
    Ok(())
}

/// Reads the columns `cols` of a piece's rows, some rows at a time, and gives them to `each` as elements of type `to`. Elements
/// that are not finite, or too large for the type `limit`, are refused.
fn read_piece(
    source: &Source,
    piece: &Piece,
    cols: &Range<usize>,
    [to, limit]: [DType; 2],
    buffers: &mut Buffers,
    mut each: impl FnMut(&[u8]) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    // Source::open found all tensors of the model, and the plan names no others.
    let located = &source.tensors[&piece.source];
    let first_refused = first_refused(located.dtype, limit);
    let row_bytes = cols.len() * located.dtype.size();
    let rows_at_once = (located.chunk_bytes() / row_bytes.max(1)).max(1);
    let (path, file) = &source.files[located.file];
    for start in piece.rows.clone().step_by(rows_at_once) {
        let rows = start..piece.rows.end.min(start + rows_at_once);
        let elements = rows.len() * cols.len();
        buffers.input.resize(elements * located.dtype.size(), 0);
        let Buffers { input, output, scratch } = buffers;
        let read = located.read(file, rows, cols.clone(), input, scratch);
        read.map_err(|source| unreadable(path, source))?;
        if max_magnitude(located.dtype, input) >= first_refused {
            return Err(refusal(source, located, piece, limit, first_refused));
        }
        if located.dtype == to {
            each(input)?;
        } else {
            output.resize(elements * to.size(), 0);
            convert_elements(located.dtype, input, to, output);
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

/// The error for refused elements. Reads the whole source tensor of `piece` again, and not only this rank's part, to
/// count its refused elements and find the first.
fn refusal(source: &Source, located: &Located, piece: &Piece, dtype: DType, limit: u32) -> ConvertError {
    let (path, file) = &source.files[located.file];
    let cols = piece.source_cols;
    let rows_at_once = (located.chunk_bytes() / (cols * located.dtype.size()).max(1)).max(1);
    let (mut bytes, mut scratch) = (Vec::new(), Vec::new());
    let mut not_finite: Option<(u64, u64)> = None;
    let mut overflow: Option<(u64, u64)> = None;
    for start in (0..piece.source_rows).step_by(rows_at_once) {
        let rows = start..piece.source_rows.min(start + rows_at_once);
        bytes.resize(rows.len() * cols * located.dtype.size(), 0);
        if let Err(source) = located.read(file, rows, 0..cols, &mut bytes, &mut scratch) {
            return unreadable(path, source);
        }
        let add = |total: &mut Option<(u64, u64)>, limit| {
            if let Some((count, first)) = count_from(located.dtype, &bytes, limit) {
                let (so_far, at) = total.unwrap_or((0, start as u64 * cols as u64 + first));
                *total = Some((so_far + count, at));
            }
        };
        add(&mut not_finite, infinity_bits(located.dtype));
        add(&mut overflow, limit);
    }
    let (path, tensor) = (path.clone(), piece.source.clone());
    if let Some((count, first)) = not_finite {
        return ConvertError::NotFinite { path, tensor, count, first };
    }
    let (count, first) = overflow.unwrap_or_default();
    let max = match dtype {
        DType::F16 => "65504",
        DType::Bf16 | DType::F32 => "3.39e38",
    };
    ConvertError::Overflow { path, tensor, count, first, dtype, max }
}
