//! Carries out the shard plan. Each tensor of each rank is streamed piece by piece through buffers of fixed size, and
//! checked, converted, hashed and written on the way. Several tensors are streamed at a time.

use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use mixtral_checkpoint::scan::{count_from, infinity_bits, max_magnitude};
use mixtral_checkpoint::{Progress, RankWriter, TensorSpec, TensorWriter};
use mixtral_model::{DType, ElemType, Piece, Recipe};

use crate::error::ConvertError;
use crate::number::{convert_elements, first_refused};
use crate::plan::{TensorRecipe, parts};
use crate::source::{Located, Source};

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
    let row = source.tensors.values().map(|l| l.stored_cols as u64 * l.stored_size() as u64).max().unwrap_or(0);
    // Input, output (up to twice as wide), and scratch.
    4 * chunk.max(row)
}

/// Writes all weights of all ranks: those of `recipes[r]` with `writers[r]`.
///
/// # Errors
/// The first failure, in the order of the work.
pub fn execute(
    source: &Source,
    recipes: &[Vec<Recipe>],
    writers: &[RankWriter],
    workers: usize,
    progress: &dyn Progress,
) -> Result<(), ConvertError> {
    let jobs = jobs(recipes);
    progress.start(recipes.iter().flatten().map(|r| r.num_bytes() as u64).sum());
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let failure: Mutex<Option<(usize, ConvertError)>> = Mutex::new(None);
    let work = || {
        let mut buffers = Buffers::default();
        while !stop.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(&(rank, tensor)) = jobs.get(index) else { return };
            let write = |recipe: TensorRecipe| {
                let writer = writers[rank].tensor(&recipe.spec.name);
                write_tensor(source, &recipe, writer, &mut buffers, progress)
            };
            if let Err(error) = parts(&recipes[rank][tensor]).into_iter().try_for_each(write) {
                stop.store(true, Ordering::Relaxed);
                let mut failure = failure.lock().expect("no worker panics with it");
                if failure.as_ref().is_none_or(|(first, _)| index < *first) {
                    *failure = Some((index, error));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..workers.clamp(1, jobs.len().max(1)) {
            scope.spawn(work);
        }
        work();
    });
    match failure.into_inner().expect("no worker panicked") {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// All `(rank, tensor)`. The largest come first, so that no worker has a large one left at the end. The same tensor of
/// all ranks comes together, because its source is then still in the page cache.
fn jobs(recipes: &[Vec<Recipe>]) -> Vec<(usize, usize)> {
    let mut jobs: Vec<(usize, usize)> =
        recipes.iter().enumerate().flat_map(|(rank, r)| (0..r.len()).map(move |tensor| (rank, tensor))).collect();
    jobs.sort_by_key(|&(rank, tensor)| (std::cmp::Reverse(recipes[rank][tensor].num_bytes()), tensor, rank));
    jobs
}

fn write_tensor(
    source: &Source,
    recipe: &TensorRecipe,
    mut writer: TensorWriter<'_>,
    buffers: &mut Buffers,
    progress: &dyn Progress,
) -> Result<(), ConvertError> {
    let TensorSpec { elem, shape, .. } = &recipe.spec;
    let row_bytes = shape.last().copied().unwrap_or(1) * elem.size();
    let rows: usize = shape.iter().rev().skip(1).product();
    let mut row = 0;
    for piece in &recipe.pieces {
        write_zeros(&mut writer, (piece.target_row - row) * row_bytes, progress)?;
        write_piece(source, piece, *elem, &mut writer, buffers, progress)?;
        row = piece.target_row + piece.rows.len();
    }
    write_zeros(&mut writer, (rows - row) * row_bytes, progress)?;
    Ok(writer.finish()?)
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

fn write_piece(
    source: &Source,
    piece: &Piece,
    elem: ElemType,
    writer: &mut TensorWriter<'_>,
    buffers: &mut Buffers,
    progress: &dyn Progress,
) -> Result<(), ConvertError> {
    // Source::open found all tensors of the model, and the plan names no others.
    let located = &source.tensors[&piece.source];
    let row_bytes = piece.cols.len() * located.elem.size();
    let rows_at_once = (located.chunk_bytes() / row_bytes.max(1)).max(1);
    let (path, file) = &source.files[located.file];
    for start in piece.rows.clone().step_by(rows_at_once) {
        let rows = start..piece.rows.end.min(start + rows_at_once);
        buffers.input.resize(rows.len() * row_bytes, 0);
        let Buffers { input, output, scratch } = buffers;
        let read = located.read(file, rows, piece.cols.clone(), input, scratch);
        read.map_err(|source| unreadable(path, source))?;
        let bytes = match (located.elem.float(), elem.float()) {
            (Some(from), Some(to)) => {
                if max_magnitude(from, input) >= first_refused(from, to) {
                    return Err(refusal(source, located, piece, from, to));
                }
                if from == to {
                    input
                } else {
                    output.resize(input.len() / from.size() * to.size(), 0);
                    convert_elements(from, input, to, output);
                    output
                }
            }
            _ => input,
        };
        writer.write(bytes)?;
        progress.advance(bytes.len() as u64);
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
