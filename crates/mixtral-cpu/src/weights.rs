//! The program's weights. They are either checked once and then read where they lie, or generated.

use std::ops::Range;
use std::sync::Arc;

use mixtral_engine::{BackendError, Program, TensorSpec, Weight, WeightSource, WeightView, Weights, dummy};
use mixtral_model::{DType, ElemType, Fp8Input, Part, PartKind, Piece, Quantization, WeightFormat, fp8};
use rayon::prelude::*;

use crate::memory::{Memory, take};
use crate::simd::Simd;

/// A weight seen as the matrix `[product of the leading dimensions, last]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    /// Type of its elements, or of what they stand for.
    pub(crate) dtype: DType,
    pub(crate) format: WeightFormat,
    pub(crate) cols: usize,
    /// The elements, or the integers or small floats that stand for them.
    pub(crate) bytes: &'a [u8],
    scales: &'a [u8],
    zeros: &'a [u8],
    /// The scale of the input that is multiplied with an fp8 matrix.
    input_scale: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// A matrix of the given parts, as [`WeightFormat::parts`] orders them.
    fn new(weight: &Weight, parts: &[&'a [u8]]) -> Matrix<'a> {
        let part = |index: usize| parts.get(index).copied().unwrap_or_default();
        let Weight { dtype, format, .. } = *weight;
        let (zeros, input_scale) = if format.is_fp8() { (&[][..], part(2)) } else { (part(2), &[][..]) };
        Matrix { dtype, format, cols: weight.cols(), bytes: part(0), scales: part(1), zeros, input_scale }
    }

    fn row_bytes(&self) -> usize {
        match self.format {
            WeightFormat::Plain => self.cols * self.dtype.size(),
            WeightFormat::Fp8 | WeightFormat::Fp8Rows(_) => self.cols,
            WeightFormat::Quantized(quantization) => quantization.row_bytes(self.cols),
        }
    }

    pub(crate) fn num_rows(&self) -> usize {
        self.bytes.len() / self.row_bytes()
    }

    /// Rows `start` to `end`.
    pub(crate) fn rows(&self, start: usize, end: usize) -> Matrix<'a> {
        let num_rows = self.num_rows();
        let cut = |bytes: &'a [u8]| {
            let size = bytes.len() / num_rows.max(1);
            &bytes[start * size..end * size]
        };
        if self.format == WeightFormat::Fp8 {
            // One scale for each expert. The rows belong to one of them.
            let experts = self.scales.len() / size_of::<f32>();
            let expert = if experts > 1 { start / (num_rows / experts) } else { 0 };
            return Matrix {
                bytes: cut(self.bytes),
                scales: &self.scales[expert * size_of::<f32>()..][..size_of::<f32>()],
                ..*self
            };
        }
        Matrix { bytes: cut(self.bytes), scales: cut(self.scales), zeros: cut(self.zeros), ..*self }
    }

    /// The scale that divides an input of an fp8 matrix, of type `dtype`.
    pub(crate) fn input_scale(&self, simd: Simd, dtype: DType, input: &[u8]) -> f32 {
        if self.format != WeightFormat::Fp8Rows(Fp8Input::Token) {
            return first(self.input_scale);
        }
        let mut values = [0.0; 128];
        let amax = input.chunks(values.len() * dtype.size()).fold(0f32, |amax, input| {
            let values = &mut values[..input.len() / dtype.size()];
            simd.widen(dtype, input, values);
            values.iter().fold(amax, |amax, x| amax.max(x.abs()))
        });
        fp8::scale(amax)
    }

    /// Multiplies the sums of an fp8 matrix's rows with their scales and that of the input.
    pub(crate) fn scale_sums(&self, input_scale: f32, sums: &mut [f32]) {
        let scales = self.scales.as_chunks().0.iter().map(|&scale| input_scale * f32::from_le_bytes(scale));
        match self.format {
            WeightFormat::Fp8Rows(_) => sums.iter_mut().zip(scales).for_each(|(sum, scale)| *sum *= scale),
            _ => {
                let scale = input_scale * first(self.scales);
                sums.iter_mut().for_each(|sum| *sum *= scale);
            }
        }
    }

    /// How many f32 of scratch [`Matrix::decode`] needs.
    pub(crate) fn decode_scratch(&self) -> usize {
        match self.format {
            WeightFormat::Plain | WeightFormat::Fp8 | WeightFormat::Fp8Rows(_) => 0,
            WeightFormat::Quantized(quantization) => 2 * quantization.groups(self.cols),
        }
    }

    /// Columns `cols` of a row of a quantized matrix, decoded to f32: this defines what the integers stand for. `cols` starts at a
    /// whole byte.
    pub(crate) fn decode(
        &self,
        simd: Simd,
        quantization: Quantization,
        row: usize,
        cols: Range<usize>,
        mut scratch: &mut [f32],
        out: &mut [f32],
    ) {
        let Quantization { bits, scale, .. } = quantization;
        let (len, groups) = (quantization.group_len(self.cols), quantization.groups(self.cols));
        let (first, end) = (cols.start / len, cols.end.div_ceil(len));
        let (scales, zeros) = (take(&mut scratch, end - first), take(&mut scratch, end - first));
        let of_row = row * groups;
        simd.widen(scale, &self.scales[(of_row + first) * scale.size()..(of_row + end) * scale.size()], scales);
        match self.zeros {
            [] => zeros.fill(f32::from(bits.middle())),
            stored => {
                let stored = &stored[of_row + first..of_row + end];
                zeros.iter_mut().zip(stored).for_each(|(zero, &z)| *zero = f32::from(z));
            }
        }
        let values = &self.bytes[row * self.row_bytes()..][..self.row_bytes()];
        let runs = ((first + 1) * len - cols.start, len);
        simd.decode(bits, &values[cols.start / bits.per_byte()..], runs, scales, zeros, out);
    }
}

/// The first f32 of some bytes.
fn first(bytes: &[u8]) -> f32 {
    bytes.first_chunk().map_or(1.0, |&scale| f32::from_le_bytes(scale))
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
    /// Each weight and the tensors that hold it.
    weights: Vec<(Weight, Vec<TensorSpec>)>,
}

impl WeightTable {
    pub(crate) fn load(program: &Program, weights: Weights, simd: Simd) -> Result<WeightTable, BackendError> {
        let store = match weights {
            Weights::Source(source) => {
                for tensor in program.weights.iter().flat_map(Weight::tensors) {
                    checked(&tensor, source.as_ref())?;
                }
                Store::Source(source)
            }
            Weights::Dummy { seed } => generate(program, seed, simd)?,
        };
        let weights = program.weights.iter().map(|weight| (weight.clone(), weight.tensors())).collect();
        Ok(WeightTable { store, weights })
    }

    /// All weights as matrices. Each tensor is looked up by name in its source, so this is done only once a step, before the
    /// first operation.
    pub(crate) fn matrices(&self) -> Result<Vec<Matrix<'_>>, BackendError> {
        let matrix = |(index, (weight, tensors)): (usize, &(Weight, Vec<TensorSpec>))| {
            let mut parts = Vec::with_capacity(tensors.len());
            match &self.store {
                Store::Source(source) => {
                    for tensor in tensors {
                        parts.push(checked_bytes(tensor, source.as_ref())?);
                    }
                }
                Store::Owned(memory, offsets) => {
                    let mut rest = &memory.bytes()[offsets[index]..];
                    for tensor in tensors {
                        let (part, behind) = rest.split_at(len(tensor));
                        parts.push(part);
                        rest = behind;
                    }
                }
            }
            Ok(Matrix::new(weight, &parts))
        };
        self.weights.iter().enumerate().map(matrix).collect()
    }
}

/// Bytes of a tensor that was checked.
fn len(tensor: &TensorSpec) -> usize {
    usize::try_from(tensor.num_bytes()).unwrap_or(usize::MAX)
}

/// Bytes of a tensor; `None` if they overflow.
fn num_bytes(tensor: &TensorSpec) -> Option<usize> {
    tensor.shape.iter().try_fold(tensor.elem.size(), |bytes, &side| bytes.checked_mul(side))
}

fn describe(elem: ElemType, shape: &[usize], bytes: Option<usize>) -> String {
    let bytes = bytes.map_or("too many".to_owned(), |b| b.to_string());
    format!("{elem} {shape:?} of {bytes} bytes")
}

fn wrong(tensor: &TensorSpec, found: &WeightView<'_>) -> BackendError {
    BackendError::WrongWeight {
        name: tensor.name.clone(),
        found: describe(found.elem, found.shape, Some(found.bytes.len())),
        expected: describe(tensor.elem, &tensor.shape, num_bytes(tensor)),
    }
}

/// The tensor's bytes. An error unless the source has the tensor that the program expects.
fn checked<'a>(tensor: &TensorSpec, source: &'a dyn WeightSource) -> Result<&'a [u8], BackendError> {
    let found = source.weight(&tensor.name).ok_or_else(|| BackendError::MissingWeight { name: tensor.name.clone() })?;
    if found.elem != tensor.elem || found.shape != tensor.shape || Some(found.bytes.len()) != num_bytes(tensor) {
        return Err(wrong(tensor, &found));
    }
    Ok(found.bytes)
}

/// As [`checked`], for a source that was checked when it was loaded. It only checks what indexing relies on.
fn checked_bytes<'a>(tensor: &TensorSpec, source: &'a dyn WeightSource) -> Result<&'a [u8], BackendError> {
    let found = source.weight(&tensor.name).ok_or_else(|| BackendError::MissingWeight { name: tensor.name.clone() })?;
    if found.bytes.len() == len(tensor) { Ok(found.bytes) } else { Err(wrong(tensor, &found)) }
}

/// Fills anonymous memory with the dummy weights, in parallel over rows. Parts that no piece covers stay zero.
fn generate(program: &Program, seed: u64, simd: Simd) -> Result<Store, BackendError> {
    let mut offsets = Vec::with_capacity(program.weights.len());
    let mut end = Some(0usize);
    for weight in &program.weights {
        offsets.push(end.unwrap_or(0));
        end = end
            .and_then(|end| weight.tensors().iter().try_fold(end, |end, tensor| end.checked_add(num_bytes(tensor)?)))
            .and_then(|end| end.checked_next_multiple_of(mixtral_engine::memory::ALIGN));
    }
    let hint = "use a smaller model configuration, or more ranks";
    let mut memory = Memory::new("the dummy weights", end, hint)?;
    for (weight, &offset) in program.weights.iter().zip(&offsets) {
        let mut rest = &mut memory.bytes_mut()[offset..];
        for part in weight.format.parts(weight.dtype, &weight.shape) {
            let (bytes, behind) = rest.split_at_mut(part.num_bytes());
            rest = behind;
            if weight.format.is_fp8() && part.kind != PartKind::Values {
                fill_fp8_scales(weight, part.kind, bytes);
                continue;
            }
            for piece in &weight.pieces {
                let row_bytes = part.row_bytes();
                let target = &mut bytes[piece.target_row * row_bytes..][..piece.rows.len() * row_bytes];
                fill(piece, seed, weight, &part, target, simd);
            }
        }
    }
    Ok(Store::Owned(memory, offsets))
}

/// Fills the scales of an fp8 weight, or of its input.
fn fill_fp8_scales(weight: &Weight, kind: PartKind, bytes: &mut [u8]) {
    let scale = match (kind, weight.pieces.first()) {
        (PartKind::InputScale, _) => dummy::FP8_INPUT_SCALE,
        (_, piece) => dummy::scale_of_fp8(piece.map_or(weight.cols(), |piece| piece.source_cols)),
    };
    bytes.as_chunks_mut().0.iter_mut().for_each(|bytes| *bytes = scale.to_le_bytes());
}

/// Fills the rows of a piece in one part of a weight.
fn fill(piece: &Piece, seed: u64, weight: &Weight, part: &Part, target: &mut [u8], simd: Simd) {
    let rows = target.par_chunks_exact_mut(part.row_bytes()).enumerate();
    rows.for_each_init(
        || vec![0f32; part.shape.last().copied().unwrap_or(1)],
        |values, (row, bytes)| {
            let row = piece.rows.start + row;
            match (weight.format, part.kind) {
                (WeightFormat::Plain, _) => {
                    dummy::fill_row(seed, piece, row, weight.dtype, values);
                    simd.narrow(weight.dtype, values, bytes);
                }
                (WeightFormat::Fp8 | WeightFormat::Fp8Rows(_), PartKind::Values) => {
                    dummy::fill_fp8(seed, piece, row, bytes)
                }
                (WeightFormat::Fp8 | WeightFormat::Fp8Rows(_), _) | (_, PartKind::InputScale) => {}
                (WeightFormat::Quantized(quantization), PartKind::Values) => {
                    dummy::fill_integers(seed, piece, row, quantization, bytes);
                }
                (WeightFormat::Quantized(quantization), PartKind::Scales) => {
                    dummy::fill_scales(seed, piece, row, quantization, values);
                    simd.narrow(quantization.scale, values, bytes);
                }
                (WeightFormat::Quantized(quantization), PartKind::Zeros) => {
                    dummy::fill_zeros(seed, piece, row, quantization, bytes);
                }
            }
        },
    );
}
