//! `combine`.

use std::ops::Range;

use super::workers::{Workers, index};
use crate::memory::take;
use crate::simd::LANES;

/// `out[t] = round(residual[t] + Σ_j expert_weights[t][j] · input[t·k + j])` over the local experts, `out`
/// holding the residual.
pub(crate) fn combine(
    workers: &Workers<'_>,
    input: &[u8],
    expert_ids: &[i32],
    expert_weights: &[f32],
    experts: &Range<usize>,
    cols: usize,
    out: &mut [u8],
) {
    let row_bytes = workers.row_bytes(cols);
    let num_tokens = out.len() / row_bytes;
    let (top_k, width) = (expert_ids.len() / num_tokens.max(1), cols.next_multiple_of(LANES));
    workers.for_chunks(out, row_bytes, num_tokens * (top_k + 1) * cols, |t, out| {
        workers.with_scratch(|mut scratch| {
            let (acc, row) = (take(&mut scratch, width), take(&mut scratch, width));
            let base = take(&mut scratch, cols);
            acc.fill(0.0);
            for a in t * top_k..(t + 1) * top_k {
                if experts.contains(&index(expert_ids[a])) {
                    workers.simd.widen(workers.dtype, &input[a * row_bytes..][..row_bytes], &mut row[..cols]);
                    workers.simd.weighted_rows(&expert_weights[a..=a], 1, 1, 1, row, width, acc);
                }
            }
            workers.simd.widen(workers.dtype, out, base);
            acc.iter_mut().zip(base).for_each(|(acc, base)| *acc += *base);
            workers.simd.narrow(workers.dtype, &acc[..cols], out);
        });
    });
}
