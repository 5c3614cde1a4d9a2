//! `add` and `silu_mul`.

use super::context::Context;
use crate::memory::take;

/// `out = round(a + out)`: the sum of two buffers, the second being in place already.
pub(crate) fn add(ctx: &Context<'_>, a: &[u8], cols: usize, out: &mut [u8]) {
    let row_bytes = ctx.row_bytes(cols);
    ctx.for_chunks(out, row_bytes, a.len(), |t, out| {
        ctx.with_scratch(|mut scratch| {
            let (x, y) = (take(&mut scratch, cols), take(&mut scratch, cols));
            ctx.simd.widen(ctx.dtype, &a[t * row_bytes..][..row_bytes], x);
            ctx.simd.widen(ctx.dtype, out, y);
            x.iter_mut().zip(y).for_each(|(x, y)| *x += *y);
            ctx.simd.narrow(ctx.dtype, x, out);
        });
    });
}

/// Each row of `input` is up ‖ gate, `2 · cols` elements.
pub(crate) fn silu_mul(ctx: &Context<'_>, input: &[u8], cols: usize, out: &mut [u8]) {
    let row_bytes = ctx.row_bytes(cols);
    ctx.for_chunks(out, row_bytes, input.len() * 4, |t, out| {
        ctx.with_scratch(|scratch| {
            let row = &mut scratch[..2 * cols];
            ctx.simd.widen(ctx.dtype, &input[t * 2 * row_bytes..][..2 * row_bytes], row);
            silu_mul_row(ctx, row, out);
        });
    });
}

/// `out[c] = round(silu(gate[c]) · up[c])` of one row up ‖ gate, which is overwritten.
pub(crate) fn silu_mul_row(ctx: &Context<'_>, row: &mut [f32], out: &mut [u8]) {
    let (up, gate) = row.split_at_mut(row.len() / 2);
    ctx.simd.silu_mul(up, gate);
    ctx.simd.narrow(ctx.dtype, up, out);
}
