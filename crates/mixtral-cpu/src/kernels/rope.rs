//! `rope`.

use super::workers::Workers;
use crate::memory::take;

/// Cosines and sines of a step's positions, `[T, d/2]` each.
#[derive(Clone, Debug, Default)]
pub(crate) struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// The table of these positions. Angles are computed in f32, their sines and cosines in f64.
    #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "the contract's roundings to f32")]
    pub(crate) fn new(theta: f64, head_dim: usize, positions: &[i32]) -> RopeTable {
        let half = head_dim / 2;
        // The power is computed in f64 and rounded. That equals a correctly rounded f32 power.
        let inv_freq: Vec<f32> =
            (0..half).map(|i| 1.0 / theta.powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32).collect();
        let mut table = RopeTable { cos: Vec::with_capacity(positions.len() * half), sin: vec![] };
        table.sin.reserve(positions.len() * half);
        for &position in positions {
            for &freq in &inv_freq {
                let (sin, cos) = f64::from(position as f32 * freq).sin_cos();
                table.cos.push(cos as f32);
                table.sin.push(sin as f32);
            }
        }
        table
    }

    /// Cosines and sines of a token.
    pub(crate) fn at(&self, token: usize, head_dim: usize) -> [&[f32]; 2] {
        let half = head_dim / 2;
        [&self.cos, &self.sin].map(|all| &all[token * half..][..half])
    }
}

/// Rotates a head.
pub(crate) fn rotate(head: &mut [f32], [cos, sin]: [&[f32]; 2]) {
    let (a, b) = head.split_at_mut(cos.len());
    for i in 0..cos.len() {
        (a[i], b[i]) = (a[i] * cos[i] - b[i] * sin[i], b[i] * cos[i] + a[i] * sin[i]);
    }
}

/// Rotates the first `num_heads` heads of each row of `cols` elements.
pub(crate) fn rope(
    workers: &Workers<'_>,
    table: &RopeTable,
    num_heads: usize,
    head_dim: usize,
    cols: usize,
    data: &mut [u8],
) {
    let work = data.len() * 2;
    workers.for_chunks(data, workers.row_bytes(cols), work, |t, row| {
        let row = &mut row[..workers.row_bytes(num_heads * head_dim)];
        let angles = table.at(t, head_dim);
        workers.with_scratch(|mut scratch| {
            let x = take(&mut scratch, num_heads * head_dim);
            workers.simd.widen(workers.dtype, row, x);
            x.chunks_exact_mut(head_dim).for_each(|head| rotate(head, angles));
            workers.simd.narrow(workers.dtype, x, row);
        });
    });
}
