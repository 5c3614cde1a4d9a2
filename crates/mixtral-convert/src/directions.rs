//! The direction in which the queries of each KV head mostly lie, which weights alone tell. The writer of an e4m3 cache rounds keys
//! so that their errors are small along it.
//!
//! The input of the query projection is a normed row x times the norm's weight g. For an x that is alike in all directions, the
//! second moment of a query is Wq diag(g²) Wqᵀ, where Wq are the rows of its head. S is their sum over the query heads that share the
//! KV head. The direction is its first eigenvector, as long as the queries are longer along it than along others.
//!
//! All sums have one order, so the numbers do not depend on threads, on vectors, on how ranks cut the model or on how a source stores it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use mixtral_checkpoint::names::part_name;
use mixtral_checkpoint::{CheckpointConfig, Progress, TensorId};
use mixtral_model::{DType, ElemType, ModelConfig, PartKind, Piece, Rank, WeightFormat, fp8};

use crate::error::ConvertError;
use crate::execute::{Buffers, in_parallel, read_piece};
use crate::names::HfTensor;
use crate::source::Source;

/// The widest heads that have directions. Mixtral's and Mistral's have 128 elements. The time for an eigenvector grows with the cube, and a
/// small file may describe many wide heads.
const MAX_HEAD_DIM: usize = 256;

/// Inputs whose products are summed at a time: as many as a core's nearest caches hold of a head.
const BLOCK: usize = 64;

/// Rows and columns of S that are summed together.
const TILE: [usize; 2] = [4, 8];

/// How often S is squared at most. Then what is left of another eigenvector is the ratio of the eigenvalues to the power 2²⁴.
const SQUARINGS: usize = 24;

/// If the mean of the other eigenvalues is a smaller part of the first, rounding made it, and the direction has no length.
const LEAST_REST: f64 = 1e-9;

/// Whether `source` has the weights of queries in a form that [`of_model`] reads, and of a size that keys can be rounded with.
pub(crate) fn are_readable(source: &Source) -> bool {
    let format = source.config.model.formats.attention;
    let is_readable = matches!(format, WeightFormat::Plain | WeightFormat::Fp8 | WeightFormat::Fp8Rows(_));
    let head_dim = source.config.model.head_dim;
    is_readable && head_dim <= MAX_HEAD_DIM && fp8::suits_directions(head_dim)
}

/// The most bytes that a worker of [`of_model`] holds beside its buffers.
pub(crate) fn bytes(model: &ModelConfig) -> u64 {
    let (head, width) = (model.head_dim, width(model.head_dim));
    let floats = (head + 1) * model.hidden_size;
    let doubles = model.hidden_size + BLOCK * width + 3 * width * width;
    (floats * size_of::<f32>() + doubles * size_of::<f64>()) as u64
}

/// Bytes of the weights that a KV head's direction is made of, in the model's type.
fn bytes_of_head(model: &ModelConfig) -> u64 {
    (model.group_size() * model.head_dim * model.hidden_size * model.dtype.size()) as u64
}

/// The bytes that [`of_model`] advances its progress by.
pub(crate) fn progress_bytes(model: &ModelConfig) -> u64 {
    (model.num_layers * model.num_kv_heads) as u64 * bytes_of_head(model)
}

/// The directions of each layer: `[num_kv_heads, head_dim]`.
///
/// # Errors
/// If weights cannot be read, or are not finite.
pub(crate) fn of_model(
    source: &Source,
    workers: usize,
    progress: &dyn Progress,
) -> Result<Vec<Vec<f32>>, ConvertError> {
    let model = &source.config.model;
    let (head_dim, kv_heads) = (model.head_dim, model.num_kv_heads);
    let found = vec![vec![0f32; kv_heads * head_dim]; model.num_layers];
    let found = Mutex::new(found);
    in_parallel(model.num_layers * kv_heads, workers, |job, state: &mut State| {
        let (layer, kv_head) = (job / kv_heads, job % kv_heads);
        let moment = moment(source, layer, kv_head, state)?;
        let direction = direction(&moment, head_dim);
        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
        found[layer][kv_head * head_dim..][..head_dim].copy_from_slice(&direction);
        progress.advance(bytes_of_head(model));
        Ok::<_, ConvertError>(())
    })?;
    Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// A rank's tensors of directions, by name. `found` are those of the whole model.
pub(crate) fn tensors(config: &CheckpointConfig, rank: Rank, found: &[Vec<f32>]) -> BTreeMap<String, Vec<u8>> {
    let CheckpointConfig { model, mapping, .. } = config;
    let heads = mapping.kv_heads(model, rank);
    let own = heads.start * model.head_dim..heads.end * model.head_dim;
    let of_layer = |(layer, found): (usize, &Vec<f32>)| {
        let bytes = found[own.clone()].iter().flat_map(|x| x.to_le_bytes()).collect();
        (TensorId::KeyDirections(layer).to_string(), bytes)
    };
    found[mapping.layers(model, rank)].iter().enumerate().map(of_layer).collect()
}

/// What a worker keeps between heads.
#[derive(Default)]
struct State {
    buffers: Buffers,
    /// The rows of a head.
    rows: Vec<f32>,
    /// Columns of `rows`, times the norm's weight, one after another.
    block: Vec<f64>,
}

/// The columns of S as it is stored: whole tiles.
fn width(head_dim: usize) -> usize {
    head_dim.next_multiple_of(TILE[1])
}

/// S of a KV head, `[width, width]`. Rows and columns behind `head_dim` are zero.
fn moment(source: &Source, layer: usize, kv_head: usize, state: &mut State) -> Result<Vec<f64>, ConvertError> {
    let model = &source.config.model;
    let (head_dim, hidden, group) = (model.head_dim, model.hidden_size, model.group_size());
    let width = width(head_dim);
    let State { buffers, rows, block } = state;
    read(source, HfTensor::InputNorm(layer), 0, 1, buffers, rows)?;
    let norm: Vec<f64> = rows.iter().map(|&x| f64::from(x)).collect();
    let mut sums = vec![0.0; width * width];
    for head in kv_head * group..(kv_head + 1) * group {
        read(source, HfTensor::Query(layer), head * head_dim, head_dim, buffers, rows)?;
        for start in (0..hidden).step_by(BLOCK) {
            let norm = &norm[start..hidden.min(start + BLOCK)];
            block.clear();
            block.resize(norm.len() * width, 0.0);
            for (at, row) in rows.chunks_exact(hidden).enumerate() {
                for ((out, &x), &g) in block.chunks_exact_mut(width).zip(&row[start..]).zip(norm) {
                    out[at] = f64::from(x) * g;
                }
            }
            add_products(block, width, &mut sums);
        }
    }
    mirror(&mut sums, width);
    Ok(sums)
}

/// Reads `count` rows of a tensor from `first` on as floats: those in e4m3 times their scales.
fn read(
    source: &Source,
    tensor: HfTensor,
    first: usize,
    count: usize,
    buffers: &mut Buffers,
    into: &mut Vec<f32>,
) -> Result<(), ConvertError> {
    let [source_rows, source_cols] = tensor.matrix_shape(&source.config.model);
    let name = tensor.to_string();
    let is_fp8 = source.tensors[&name].elem == ElemType::F8E4M3;
    let rows = first..first + count;
    let piece = Piece { source: name, source_rows, source_cols, rows, cols: 0..source_cols, target_row: 0 };
    into.clear();
    read_piece(source, &piece, &piece.cols, [ElemType::F32; 2], buffers, |bytes| {
        match is_fp8 {
            true => into.extend(bytes.iter().map(|&byte| fp8::from_bits(byte))),
            false => into.extend(DType::F32.widen(bytes)),
        }
        Ok(())
    })?;
    if is_fp8 {
        let mut scales = Vec::with_capacity(count);
        let of_rows = Piece { source: part_name(&piece.source, PartKind::Scales), source_cols: 1, cols: 0..1, ..piece };
        read_piece(source, &of_rows, &of_rows.cols, [ElemType::F32; 2], buffers, |bytes| {
            scales.extend(DType::F32.widen(bytes));
            Ok(())
        })?;
        for (row, scale) in into.chunks_exact_mut(source_cols).zip(scales) {
            row.iter_mut().for_each(|x| *x *= scale);
        }
    }
    Ok(())
}

/// Adds to `sums` `[width, width]` the products of all pairs of rows of `columns`, which lie one column after another. Only tiles that
/// have an element on or above the diagonal are summed.
fn add_products(columns: &[f64], width: usize, sums: &mut [f64]) {
    // Compiled for the widest vectors of this machine. Each operation rounds as it does without them.
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for i in (0..width).step_by(TILE[0]) {
                for j in (i / TILE[1] * TILE[1]..width).step_by(TILE[1]) {
                    add_tile(columns, width, [i, j], sums);
                }
            }
        },
    );
}

/// Copies what is above the diagonal below it.
fn mirror(sums: &mut [f64], width: usize) {
    for i in 0..width {
        for j in 0..i {
            sums[i * width + j] = sums[j * width + i];
        }
    }
}

/// [`add_products`] for the tile at (`i`, `j`).
#[inline(always)]
fn add_tile(columns: &[f64], width: usize, [i, j]: [usize; 2], sums: &mut [f64]) {
    let mut tile = [[0f64; TILE[1]]; TILE[0]];
    for column in columns.chunks_exact(width) {
        let left: [f64; TILE[0]] = std::array::from_fn(|r| column[i + r]);
        let right: [f64; TILE[1]] = std::array::from_fn(|c| column[j + c]);
        tile = std::array::from_fn(|r| std::array::from_fn(|c| tile[r][c] + left[r] * right[c]));
    }
    for (r, row) in tile.iter().enumerate() {
        for (sum, x) in sums[(i + r) * width + j..].iter_mut().zip(row) {
            *sum += x;
        }
    }
}

/// The first eigenvector v of the symmetric matrix `moment` `[width, width]`, whose first `head_dim` rows and columns count, times
/// √((λ − μ) / μ): λ is its eigenvalue, and μ the mean of the others. The element with the largest magnitude is positive. If μ is zero, so
/// is the vector.
fn direction(moment: &[f64], head_dim: usize) -> Vec<f32> {
    let width = width(head_dim);
    let trace = |matrix: &[f64]| (0..width).map(|i| matrix[i * width + i]).sum::<f64>();
    let scaled = |mut matrix: Vec<f64>| {
        let trace = trace(&matrix);
        matrix.iter_mut().for_each(|x| *x /= trace);
        matrix
    };
    let zeros = vec![0.0; head_dim];
    if !(trace(moment).is_normal() && head_dim > 1) {
        return zeros;
    }
    let moment = scaled(moment.to_vec());
    // Each square has the same eigenvectors, and the first eigenvalue outweighs the others more. In the end v vᵀ is left.
    let mut power = moment.clone();
    for _ in 0..SQUARINGS {
        let mut square = vec![0.0; width * width];
        add_products(&power, width, &mut square);
        mirror(&mut square, width);
        // The sum of the squares of eigenvalues whose sum is one.
        let purity = trace(&square);
        power = scaled(square);
        if purity > 1.0 - 1e-14 {
            break;
        }
    }
    let diagonal = |i: usize| power[i * width + i];
    let longest = (0..head_dim).fold(0, |best, i| if diagonal(i) > diagonal(best) { i } else { best });
    let vector = &power[longest * width..][..head_dim];
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let square = dot(vector, vector);
    let image: Vec<f64> = moment.chunks_exact(width).map(|row| dot(&row[..head_dim], vector)).collect();
    let first = dot(&image[..head_dim], vector) / square;
    let rest = (1.0 - first) / (head_dim - 1) as f64;
    let length = ((first - rest).max(0.0) / rest).sqrt();
    if !(rest > LEAST_REST * first && length.is_finite()) {
        return zeros;
    }
    let largest = vector.iter().fold(0f64, |largest, &x| if x.abs() > largest.abs() { x } else { largest });
    let factor = length / square.sqrt() * largest.signum();
    #[expect(clippy::cast_possible_truncation, reason = "directions are kept as f32")]
    vector.iter().map(|x| (x * factor) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// S as it is stored, of the matrix with these rows.
    fn stored(rows: &[&[f64]]) -> Vec<f64> {
        let width = width(rows.len());
        let mut stored = vec![0.0; width * width];
        for (row, stored) in rows.iter().zip(stored.chunks_exact_mut(width)) {
            stored[..row.len()].copy_from_slice(row);
        }
        stored
    }

    /// Compares to the precision of f32.
    fn assert_near(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (x, y) in found.iter().zip(expected) {
            assert!((f64::from(*x) - y).abs() <= 1e-7 * y.abs().max(1e-3), "{found:?} {expected:?}");
        }
    }

    #[test]
    fn the_first_eigenvector_is_as_long_as_its_eigenvalue_says() {
        // Eigenvalues 9 for (1, −1), and 1 for (1, 1): the length is √8.
        assert_near(&direction(&stored(&[&[5.0, -4.0], &[-4.0, 5.0]]), 2), &[2.0, -2.0]);
        // 6 for (1, 2, 0, 0), 1 for (2, −1, 0, 0), and 2 and 0, of which μ is 1: the length is √5.
        let rows: [&[f64]; 4] =
            [&[2.0, 2.0, 0.0, 0.0], &[2.0, 5.0, 0.0, 0.0], &[0.0, 0.0, 2.0, 0.0], &[0.0, 0.0, 0.0, 0.0]];
        assert_near(&direction(&stored(&rows), 4), &[1.0, 2.0, 0.0, 0.0]);
        // The size of S does not count.
        let tiny = stored(&rows).iter().map(|x| x * 1e-200).collect::<Vec<_>>();
        assert_near(&direction(&tiny, 4), &[1.0, 2.0, 0.0, 0.0]);
    }

    #[test]
    fn the_largest_element_is_positive_and_the_first_of_equals_counts() {
        // (1, −2) and (−2, 1) are one axis turned; the first eigenvalue is 6, the other 1.
        let length = 5f64.sqrt() / 5f64.sqrt();
        assert_near(&direction(&stored(&[&[2.0, -2.0], &[-2.0, 5.0]]), 2), &[-length, 2.0 * length]);
        assert_near(&direction(&stored(&[&[5.0, -2.0], &[-2.0, 2.0]]), 2), &[2.0 * length, -length]);
    }

    /// The largest element of the diagonal belongs to another eigenvector, so a start at its column would never find the first.
    #[test]
    fn the_first_eigenvector_is_found_whereever_it_is() {
        let mut rows = vec![vec![0.0; 6]; 6];
        rows[0][0] = 3.0;
        (1..5).for_each(|i| rows[i][1..5].fill(1.0));
        let rows: Vec<&[f64]> = rows.iter().map(Vec::as_slice).collect();
        // Eigenvalues 4, 3 and zeros: μ is 0.6.
        let each = ((4.0 - 0.6) / 0.6f64).sqrt() / 2.0;
        assert_near(&direction(&stored(&rows), 6), &[0.0, each, each, each, each, 0.0]);
        // Two eigenvalues that differ by a hundred thousandth.
        let near = direction(&stored(&[&[1.0, 0.0, 0.0], &[0.0, 1.000_01, 0.0], &[0.0, 0.0, 1.0]]), 3);
        assert_near(&near, &[0.0, 1e-5f64.sqrt(), 0.0]);
    }

    #[test]
    fn what_has_no_direction_or_nothing_beside_it_is_zero() {
        for rows in [
            [[0.0, 0.0], [0.0, 0.0]],
            [[7.0, 0.0], [0.0, 7.0]],
            // The other eigenvalue is zero, or what rounding leaves of it.
            [[1.0, 2.0], [2.0, 4.0]],
            [[0.1, 0.3], [0.3, 0.9]],
            [[f64::INFINITY, 0.0], [0.0, 1.0]],
            [[f64::NAN, 0.0], [0.0, 1.0]],
        ] {
            let rows = rows.each_ref().map(|row| &row[..]);
            assert_eq!(direction(&stored(&rows), 2), [0.0; 2], "{rows:?}");
        }
    }

    #[test]
    fn products_of_all_pairs_are_summed() {
        for width in [8, 16, 40] {
            let element = |k: usize, i: usize| f64::from(u8::try_from((k * 7 + i * 13) % 31).unwrap()) - 15.0;
            let columns: Vec<f64> = (0..19).flat_map(|k| (0..width).map(move |i| element(k, i))).collect();
            let mut sums = vec![1.0; width * width];
            add_products(&columns, width, &mut sums);
            mirror(&mut sums, width);
            for (at, sum) in sums.iter().enumerate() {
                let (i, j) = (at / width, at % width);
                let expected = 1.0 + (0..19).map(|k| element(k, i) * element(k, j)).sum::<f64>();
                assert_eq!(*sum, expected, "{i} {j} of {width}");
            }
        }
    }
}
