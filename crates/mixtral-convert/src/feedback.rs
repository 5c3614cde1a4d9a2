//! Rounding that makes up for itself: what the rounding of one weight does to the output is taken from the weights that
//! are rounded after it, as far as the inputs of calibration text are alike.
//!
//! With the moments M of a block of inputs, the squared error of the output is d M dᵀ, where d is what rounding changed.
//! If e is taken from the weight of input k, then taking e · f(k, j) from the later weights j leaves the smallest error. With the triangle U for which M⁻¹ = Uᵀ U, f(k, j) is U(k, j) / U(k, k), and the error that is left is
//! e² / U(k, k)². This is what GPTQ does. Here it stays within blocks, so that a rank's part of a row is rounded as in the
//! whole row, and moments take little memory.

use crate::statistics::{BLOCK, InputStatistics};

/// Added to the diagonal of the moments, as a part of its mean, so that inputs that are always alike do no harm.
const DAMPING: f64 = 0.01;

/// What the errors of an input's weights do, block by block.
#[derive(Clone, Debug)]
pub struct Feedback {
    blocks: Vec<Block>,
}

/// One block of inputs.
#[derive(Clone, Debug)]
pub struct Block {
    /// f(k, j), row by row. Elements up to the diagonal are 0.
    factors: Vec<f32>,
    /// 1 / U(k, k)²: the mean square of that part of input k which later inputs do not explain.
    pub(crate) unexplained: Vec<f32>,
}

impl Feedback {
    /// The feedback for weights that multiply an input of `width` elements.
    #[must_use]
    pub fn new(seen: &InputStatistics, width: usize) -> Self {
        let blocks = (0..width.div_ceil(BLOCK)).map(|block| Block::new(seen.block(width, block)));
        Feedback { blocks: blocks.collect() }
    }

    /// The blocks from input `first` on, which is the first of a block.
    #[must_use]
    pub fn from(&self, first: usize) -> &[Block] {
        &self.blocks[first / BLOCK..]
    }
}

impl Block {
    #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "factors are kept as f32")]
    fn new(mut moments: Vec<f64>) -> Self {
        let n = moments.len().isqrt();
        let mean = (0..n).map(|i| moments[i * n + i]).sum::<f64>() / n as f64;
        // Inputs that are always 0 must not matter, and must not divide by 0.
        let damping = if mean > 0.0 { DAMPING * mean } else { 1.0 };
        (0..n).for_each(|i| moments[i * n + i] += damping);
        let u = inverse(&root(moments, n), n);
        let mut factors = vec![0.0; n * n];
        for k in 0..n {
            for j in k + 1..n {
                factors[k * n + j] = (u[k * n + j] / u[k * n + k]) as f32;
            }
        }
        let unexplained = (0..n).map(|k| (1.0 / (u[k * n + k] * u[k * n + k])) as f32).collect();
        Block { factors, unexplained }
    }

    /// Takes the error of the weight of input `k` from the later weights of the block's `row`.
    #[inline(always)]
    pub(crate) fn make_up(&self, k: usize, error: f32, row: &mut [f32]) {
        let n = row.len();
        let factors = &self.factors[k * n + k + 1..(k + 1) * n];
        row[k + 1..].iter_mut().zip(factors).for_each(|(weight, factor)| *weight -= error * factor);
    }
}

/// The upper triangle R for which R Rᵀ is the matrix.
fn root(mut matrix: Vec<f64>, n: usize) -> Vec<f64> {
    for j in (0..n).rev() {
        for i in (0..=j).rev() {
            let known: f64 = (j + 1..n).map(|k| matrix[i * n + k] * matrix[j * n + k]).sum();
            let rest = matrix[i * n + j] - known;
            // Damping keeps the diagonal above 0, but for rounding.
            matrix[i * n + j] = if i == j { rest.max(f64::MIN_POSITIVE).sqrt() } else { rest / matrix[j * n + j] };
        }
        (0..j).for_each(|k| matrix[j * n + k] = 0.0);
    }
    matrix
}

/// The inverse of an upper triangle.
fn inverse(r: &[f64], n: usize) -> Vec<f64> {
    let mut u = vec![0.0; n * n];
    for j in 0..n {
        u[j * n + j] = 1.0 / r[j * n + j];
        for i in (0..j).rev() {
            let sum: f64 = (i + 1..=j).map(|k| r[i * n + k] * u[k * n + j]).sum();
            u[i * n + j] = -sum / r[i * n + i];
        }
    }
    u
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The squared error of the output that is left is what the definition says, and no other change of the later weights
    /// leaves less.
    #[test]
    fn the_error_that_is_left_is_the_smallest() {
        // Moments of three inputs, the second nearly twice the first.
        let m = [1.0, 1.9, 0.1, 1.9, 4.0, 0.3, 0.1, 0.3, 0.5];
        let error = |d: [f64; 3]| -> f64 { (0..9).map(|at| d[at / 3] * m[at] * d[at % 3]).sum() };
        let block = Block::new(m.to_vec());
        let mut row = [0f32; 3];
        block.make_up(0, 1.0, &mut row);
        let best = [-1.0, f64::from(row[1]), f64::from(row[2])];
        assert!((error(best) - f64::from(block.unexplained[0])).abs() < 0.03, "{best:?}");
        assert!(error(best) < 0.2 * error([-1.0, 0.0, 0.0]));
        for (a, b) in [(0.05, 0.0), (-0.05, 0.0), (0.0, 0.1), (0.0, -0.1)] {
            assert!(error([-1.0, best[1] + a, best[2] + b]) > error(best));
        }
    }

    #[test]
    fn inputs_that_are_always_zero_change_nothing() {
        let block = Block::new(vec![0.0; 16]);
        let mut row = [1.0; 4];
        block.make_up(0, 0.5, &mut row);
        assert_eq!((row, &block.unexplained[..]), ([1.0; 4], &[1.0; 4][..]));
    }
}
