//! `all_reduce` and `all_gather`: combines the ranks' parts when they have arrived.

use super::workers::Workers;
use crate::memory::take;

/// `parts` are the ranks' buffers one after another. `sum = round(Σ parts)` in ascending rank; then `out = sum`, or
/// `out = round(sum + out)` unless `alone`.
pub(crate) fn add_sum(workers: &Workers<'_>, parts: &[u8], cols: usize, alone: bool, out: &mut [u8]) {
    let (row_bytes, len) = (workers.row_bytes(cols), out.len());
    if len == 0 {
        return;
    }
    workers.for_chunks(out, row_bytes, parts.len(), |t, out| {
        workers.with_scratch(|mut scratch| {
            let (sum, row) = (take(&mut scratch, cols), take(&mut scratch, cols));
            for (rank, part) in parts.chunks_exact(len).enumerate() {
                let part = &part[t * row_bytes..][..row_bytes];
                if rank == 0 {
                    workers.simd.widen(workers.dtype, part, sum);
                } else {
                    workers.simd.widen(workers.dtype, part, row);
                    sum.iter_mut().zip(&*row).for_each(|(sum, x)| *sum += *x);
                }
            }
            workers.simd.round(workers.dtype, sum);
            if !alone {
                workers.simd.widen(workers.dtype, out, row);
                sum.iter_mut().zip(&*row).for_each(|(sum, x)| *sum += *x);
            }
            workers.simd.narrow(workers.dtype, sum, out);
        });
    });
}

/// Row i of `out` is row i of every rank's part, in order of rank. A part's rows have `row_bytes` bytes.
pub(crate) fn join_columns(parts: &[u8], ranks: usize, row_bytes: usize, out: &mut [u8]) {
    for (rank, part) in parts.chunks_exact((parts.len() / ranks).max(1)).enumerate() {
        for (row, out) in part.chunks_exact(row_bytes).zip(out.chunks_exact_mut(ranks * row_bytes)) {
            out[rank * row_bytes..][..row_bytes].copy_from_slice(row);
        }
    }
}

#[cfg(test)]
mod tests {
    use mixtral_model::DType;

    use super::super::workers::with_worker;
    use super::*;

    /// The sum of `parts`, one element for each rank, then plus `before` if there is one.
    fn sum(dtype: DType, parts: &[f32], before: Option<f32>) -> f32 {
        with_worker(dtype, 2, |workers| {
            let bytes = |values: &[f32]| {
                let mut bytes = vec![0; values.len() * dtype.size()];
                workers.simd.narrow(dtype, values, &mut bytes);
                bytes
            };
            let mut out = bytes(&[before.unwrap_or(0.0)]);
            add_sum(workers, &bytes(parts), 1, before.is_none(), &mut out);
            let mut value = [0.0];
            workers.simd.widen(dtype, &out, &mut value);
            value[0]
        })
    }

    #[test]
    fn parts_are_added_in_ascending_rank() {
        // In any other order one of the small parts is lost beside a large one.
        assert_eq!(sum(DType::F32, &[3e8, -3e8, 1.0], None), 1.0);
        assert_eq!(sum(DType::F32, &[1.0, 3e8, -3e8], None), 0.0);
        assert_eq!(sum(DType::F32, &[3e8, 1.0, -3e8, 2.0], None), 2.0);
    }

    #[test]
    fn the_sum_is_rounded_before_the_residual_is_added() {
        // 256 + 1 is halfway between two bf16 numbers, and rounds to the even one below: 256. With the residual's 1 in the same
        // sum it would be 258.
        assert_eq!(sum(DType::Bf16, &[256.0, 1.0], Some(1.0)), 256.0);
        assert_eq!(sum(DType::F32, &[3e8, -3e8], Some(5.0)), 5.0);
        assert_eq!(sum(DType::F32, &[1.0, 2.0], Some(5.0)), 8.0);
    }
}
