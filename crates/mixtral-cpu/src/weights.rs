//! The program's weights. They are either checked once and then read where they lie, or generated.

use std::sync::Arc;

use mixtral_engine::{BackendError, Program, Weight, WeightSource, WeightView, Weights, dummy};
use mixtral_model::{DType, Piece};
use rayon::prelude::*;

use crate::memory::Memory;
use crate::simd::Simd;

/// A weight seen as the matrix `[product of the leading dimensions, last]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(crate) dtype: DType,
    pub(crate) cols: usize,
    pub(crate) bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    pub(crate) fn num_rows(&self) -> usize {
        self.bytes.len() / (self.cols * self.dtype.size())
    }

    /// Rows `start` to `end`.
    pub(crate) fn rows(&self, start: usize, end: usize) -> Matrix<'a> {
        let size = self.cols * self.dtype.size();
        Matrix { bytes: &self.bytes[start * size..end * size], ..*self }
    }
}

/// Where the weights are.
enum Store {
    Source(Arc<dyn WeightSource>),
    /// Generated weights, and the offset of each.
    Owned(Memory, Vec<usize>),
}

/// The weights of a program, in its order.
pub(crate) struct WeightTable {
    store: Store,
    weights: Vec<Weight>,
}

impl WeightTable {
    pub(crate) fn load(program: &Program, weights: Weights, simd: Simd) -> Result<WeightTable, BackendError> {
        let store = match weights {
            Weights::Source(source) => {
                for weight in &program.weights {
                    checked(weight, source.as_ref())?;
                }
                Store::Source(source)
            }
            Weights::Dummy { seed } => generate(program, seed, simd)?,
        };
        Ok(WeightTable { store, weights: program.weights.clone() })
    }

    /// All weights as matrices. Each is looked up by name in its source, so this is done only once a step, before the
    /// first operation.
    pub(crate) fn matrices(&self) -> Result<Vec<Matrix<'_>>, BackendError> {
        let matrix = |(index, weight): (usize, &Weight)| {
            let bytes = match &self.store {
                Store::Source(source) => checked_bytes(weight, source.as_ref())?,
                Store::Owned(memory, offsets) => &memory.bytes()[offsets[index]..][..weight.num_bytes()],
            };
            Ok(Matrix { dtype: weight.dtype, cols: weight.cols(), bytes })
        };
        self.weights.iter().enumerate().map(matrix).collect()
    }
}

/// Bytes of a weight; `None` if they overflow.
fn num_bytes(weight: &Weight) -> Option<usize> {
    weight.shape.iter().try_fold(weight.dtype.size(), |bytes, &side| bytes.checked_mul(side))
}

fn describe(dtype: DType, shape: &[usize], bytes: Option<usize>) -> String {
    let bytes = bytes.map_or("too many".to_owned(), |b| b.to_string());
    format!("{dtype} {shape:?} of {bytes} bytes")
}

fn wrong(weight: &Weight, found: &WeightView<'_>) -> BackendError {
    BackendError::WrongWeight {
        name: weight.name.clone(),
        found: describe(found.dtype, found.shape, Some(found.bytes.len())),
        expected: describe(weight.dtype, &weight.shape, num_bytes(weight)),
    }
}

/// The weight's bytes. An error unless the source has the tensor that the program expects.
fn checked<'a>(weight: &Weight, source: &'a dyn WeightSource) -> Result<&'a [u8], BackendError> {
    let found = source.weight(&weight.name).ok_or_else(|| BackendError::MissingWeight { name: weight.name.clone() })?;
    if found.dtype != weight.dtype || found.shape != weight.shape || Some(found.bytes.len()) != num_bytes(weight) {
        return Err(wrong(weight, &found));
    }
    Ok(found.bytes)
}

/// As [`checked`], for a source that was checked when it was loaded. It only checks what indexing relies on.
fn checked_bytes<'a>(weight: &Weight, source: &'a dyn WeightSource) -> Result<&'a [u8], BackendError> {
    let found = source.weight(&weight.name).ok_or_else(|| BackendError::MissingWeight { name: weight.name.clone() })?;
    if found.bytes.len() == weight.num_bytes() { Ok(found.bytes) } else { Err(wrong(weight, &found)) }
}

/// Fills anonymous memory with the dummy weights, in parallel over rows. Parts that no piece covers stay zero.
fn generate(program: &Program, seed: u64, simd: Simd) -> Result<Store, BackendError> {
    let mut offsets = Vec::with_capacity(program.weights.len());
    let mut end = Some(0usize);
    for weight in &program.weights {
        offsets.push(end.unwrap_or(0));
        end = end
            .and_then(|end| end.checked_add(num_bytes(weight)?))
            .and_then(|end| end.checked_next_multiple_of(mixtral_engine::memory::ALIGN));
    }
    let hint = "use a smaller model configuration, or more ranks";
    let mut memory = Memory::new("the dummy weights", end, hint)?;
    for (weight, &offset) in program.weights.iter().zip(&offsets) {
        let row_bytes = weight.cols() * weight.dtype.size();
        let bytes = &mut memory.bytes_mut()[offset..][..weight.num_bytes()];
        for piece in &weight.pieces {
            let target = &mut bytes[piece.target_row * row_bytes..][..piece.rows.len() * row_bytes];
            fill(piece, seed, weight, target, row_bytes, simd);
        }
    }
    Ok(Store::Owned(memory, offsets))
}

fn fill(piece: &Piece, seed: u64, weight: &Weight, target: &mut [u8], row_bytes: usize, simd: Simd) {
    let rows = target.par_chunks_exact_mut(row_bytes).enumerate();
    rows.for_each_init(
        || vec![0f32; weight.cols()],
        |values, (row, bytes)| {
            dummy::fill_row(seed, piece, piece.rows.start + row, weight.dtype, values);
            simd.narrow(weight.dtype, values, bytes);
        },
    );
}
