//! `all_reduce` and `all_gather`: what is done with the parts once they are here.

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
