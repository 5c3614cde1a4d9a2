//! `embed` and `gather_rows`.

use super::workers::{Workers, index};
use crate::weights::Matrix;

/// `out[t] = table[token_ids[t] − vocab_start]`, zeros outside the table.
pub(crate) fn embed(workers: &Workers<'_>, table: Matrix<'_>, vocab_start: usize, token_ids: &[i32], out: &mut [u8]) {
    let rows = table.num_rows();
    workers.for_chunks(out, workers.row_bytes(table.cols), token_ids.len() * table.cols, |t, out| {
        match index(token_ids[t]).checked_sub(vocab_start).filter(|&row| row < rows) {
            None => out.fill(0),
            Some(row) if table.dtype == workers.dtype => out.copy_from_slice(table.rows(row, row + 1).bytes),
            Some(row) => {
                let mut values = vec![0.0; table.cols];
                workers.simd.widen(table.dtype, table.rows(row, row + 1).bytes, &mut values);
                workers.simd.narrow(workers.dtype, &values, out);
            }
        }
    });
}

/// `out[l] = input[indices[l]]`.
pub(crate) fn gather_rows(input: &[u8], indices: &[i32], row_bytes: usize, out: &mut [u8]) {
    for (&row, out) in indices.iter().zip(out.chunks_exact_mut(row_bytes)) {
        out.copy_from_slice(&input[index(row) * row_bytes..][..row_bytes]);
    }
}
