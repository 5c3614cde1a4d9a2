//! `add` and `silu_mul`.

use super::workers::Workers;
use crate::memory::take;

/// `out = round(a + out)`: the sum of two buffers, the second of which is already in `out`.
pub(crate) fn add(workers: &Workers<'_>, a: &[u8], cols: usize, out: &mut [u8]) {
    let row_bytes = workers.row_bytes(cols);
    workers.for_chunks(out, row_bytes, a.len(), |t, out| {
        workers.with_scratch(|mut scratch| {
            let (x, y) = (take(&mut scratch, cols), take(&mut scratch, cols));
            workers.simd.widen(workers.dtype, &a[t * row_bytes..][..row_bytes], x);
            workers.simd.widen(workers.dtype, out, y);
            x.iter_mut().zip(y).for_each(|(x, y)| *x += *y);
            workers.simd.narrow(workers.dtype, x, out);
        });
    });
}

/// Each row of `input` is up ‖ gate, `2 · cols` elements.
pub(crate) fn silu_mul(workers: &Workers<'_>, input: &[u8], cols: usize, out: &mut [u8]) {
    let row_bytes = workers.row_bytes(cols);
    workers.for_chunks(out, row_bytes, input.len() * 4, |t, out| {
        workers.with_scratch(|scratch| {
            let row = &mut scratch[..2 * cols];
            workers.simd.widen(workers.dtype, &input[t * 2 * row_bytes..][..2 * row_bytes], row);
            silu_mul_row(workers, row, out);
        });
    });
}

/// `out[c] = round(silu(gate[c]) · up[c])` of one row up ‖ gate. The row is overwritten.
pub(crate) fn silu_mul_row(workers: &Workers<'_>, row: &mut [f32], out: &mut [u8]) {
    let (up, gate) = row.split_at_mut(row.len() / 2);
    workers.simd.silu_mul(up, gate);
    workers.simd.narrow(workers.dtype, up, out);
}
