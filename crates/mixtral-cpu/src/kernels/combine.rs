//! `combine`.

use std::ops::Range;

use super::workers::{Workers, index};
use crate::memory::take;
use crate::simd::LANES;

/// `out[t] = round(residual[t] + Σ_j expert_weights[t][j] · input[t·k + j])` over the local experts. `out` holds the
/// residual.
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

#[cfg(test)]
mod tests {
    use mixtral_model::DType;

    use super::super::workers::with_worker;
    use super::*;

    /// One column of one token: its experts' outputs, each with weight 1, on top of a residual.
    fn combined(outputs: &[f32], experts: Range<usize>, residual: f32) -> f32 {
        let ids: Vec<i32> = (0..outputs.len()).map(|id| i32::try_from(id).expect("a few")).collect();
        let input: Vec<u8> = outputs.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut out = residual.to_le_bytes();
        with_worker(DType::F32, 2 * LANES + 1, |workers| {
            combine(workers, &input, &ids, &vec![1.0; ids.len()], &experts, 1, &mut out);
        });
        f32::from_le_bytes(out)
    }

    #[test]
    fn experts_are_added_in_order_and_the_residual_last() {
        // In any other order one of the small numbers is lost beside a large one.
        assert_eq!(combined(&[3e8, -3e8, 1.0], 0..3, 2.0), 3.0);
        assert_eq!(combined(&[3e8, -3e8], 0..2, 2.0), 2.0, "a residual added first would be lost");
        assert_eq!(combined(&[1.0, 3e8, -3e8], 0..3, 2.0), 2.0, "the first expert's 1 is lost");
    }

    #[test]
    fn experts_of_other_ranks_add_nothing() {
        assert_eq!(combined(&[1.0, 2.0, 4.0, 8.0], 1..3, 16.0), 22.0);
    }
}
