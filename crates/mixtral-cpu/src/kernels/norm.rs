//! `norm`.

use super::workers::Workers;
use crate::memory::take;
use crate::simd::LANES;
use crate::weights::Matrix;

/// RMSNorm of each row of `cols` elements.
pub(crate) fn norm(workers: &Workers<'_>, input: &[u8], weight: Matrix<'_>, eps: f64, out: &mut [u8]) {
    let cols = weight.bytes.len() / weight.dtype.size();
    let row_bytes = workers.row_bytes(cols);
    workers.for_chunks(out, row_bytes, input.len(), |t, out| {
        workers
            .with_scratch(|scratch| norm_row(workers, &input[t * row_bytes..][..row_bytes], weight, eps, out, scratch));
    });
}

/// `inv = 1 / sqrt(dot(x, x) / H + eps)`, `out = round(round(x · inv) · weight)`.
#[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "the contract's f32 constants")]
pub(crate) fn norm_row(
    workers: &Workers<'_>,
    input: &[u8],
    weight: Matrix<'_>,
    eps: f64,
    out: &mut [u8],
    mut scratch: &mut [f32],
) {
    let cols = weight.bytes.len() / weight.dtype.size();
    let padded = cols.next_multiple_of(LANES);
    let (x, scale) = (take(&mut scratch, padded), take(&mut scratch, padded));
    workers.simd.widen(workers.dtype, input, &mut x[..cols]);
    x[cols..].fill(-0.0);
    let mut square = [0.0];
    let bytes: &[u8] = bytemuck::cast_slice(&x[..cols]);
    workers.simd.stream(mixtral_model::DType::F32, bytes, cols, x, padded, 1, &mut square, 1);
    let inv = 1.0 / (square[0] / cols as f32 + eps as f32).sqrt();
    let (x, scale) = (&mut x[..cols], &mut scale[..cols]);
    x.iter_mut().for_each(|x| *x *= inv);
    workers.simd.round(workers.dtype, x);
    workers.simd.widen(weight.dtype, weight.bytes, scale);
    x.iter_mut().zip(scale).for_each(|(x, scale)| *x *= *scale);
    workers.simd.narrow(workers.dtype, x, out);
}
