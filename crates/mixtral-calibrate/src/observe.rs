//! What is kept of the inputs of linears.
//!
//! Sums are taken token by token within a sequence, then sequence by sequence. So they do not depend on the number of threads,
//! nor on how many sequences a step has.

use mixtral_convert::InputStatistics;
use mixtral_convert::statistics::BLOCK;
use rayon::prelude::*;

/// Sums over the tokens that were seen at one input.
#[derive(Clone, Debug)]
pub struct Observed {
    width: usize,
    tokens: u64,
    amax: f32,
    /// For each element i its products with the elements of its block: `[width, BLOCK]`. Only those from i on are used. Empty if moments
    /// are not wanted.
    products: Vec<f64>,
}

impl Observed {
    /// Nothing was seen yet at an input of `width` elements.
    #[must_use]
    pub fn new(width: usize, moments: bool) -> Self {
        Observed { width, tokens: 0, amax: 0.0, products: if moments { vec![0.0; width * BLOCK] } else { Vec::new() } }
    }

    /// What another machine summed up.
    #[must_use]
    pub fn from_sums(width: usize, tokens: u64, amax: f32, products: Vec<f64>) -> Self {
        Observed { width, tokens, amax, products }
    }

    /// Adds the tokens of one sequence.
    pub fn add(&mut self, tokens: &[&[f32]]) {
        self.tokens += tokens.len() as u64;
        self.amax = tokens.iter().map(|token| amax(token)).fold(self.amax, larger);
        self.products.par_chunks_exact_mut(BLOCK).enumerate().for_each(|(i, sums)| {
            let (start, end) = (i / BLOCK * BLOCK, (i / BLOCK * BLOCK + BLOCK).min(self.width));
            let mut of_sequence = [0f32; BLOCK];
            for token in tokens {
                let x = token[i];
                of_sequence.iter_mut().zip(&token[start..end]).for_each(|(sum, y)| *sum += x * y);
            }
            sums.iter_mut().zip(of_sequence).for_each(|(sum, of_sequence)| *sum += f64::from(of_sequence));
        });
    }

    /// The largest magnitude; NaN if an element was NaN.
    #[must_use]
    pub fn amax(&self) -> f32 {
        self.amax
    }

    /// The statistics.
    #[must_use]
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "means, kept as f32")]
    pub fn statistics(&self) -> InputStatistics {
        let tokens = self.tokens.max(1) as f64;
        let row = |(i, sums): (usize, &[f64])| {
            let end = BLOCK.min(self.width - i / BLOCK * BLOCK);
            sums[i % BLOCK..end].iter().map(|sum| (sum / tokens) as f32).collect::<Vec<_>>()
        };
        let moments = self.products.chunks_exact(BLOCK).enumerate().flat_map(row).collect();
        InputStatistics { tokens: self.tokens, amax: self.amax, moments }
    }
}

/// The larger of two magnitudes; NaN if one is NaN.
fn larger(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

/// The largest magnitude; NaN if an element is NaN.
fn amax(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |most, x| larger(most, x.abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_means_of_products() {
        let tokens: Vec<Vec<f32>> =
            (0..3u8).map(|t| (0..130u8).map(|i| f32::from(i) - 100.0 * f32::from(t)).collect()).collect();
        let mut observed = Observed::new(130, true);
        observed.add(&[&tokens[0], &tokens[1]]);
        observed.add(&[&tokens[2]]);
        let seen = observed.statistics();
        assert_eq!((seen.tokens, seen.amax), (3, 200.0));
        let mean = |i: usize, j: usize| tokens.iter().map(|t| f64::from(t[i] * t[j])).sum::<f64>() / 3.0;
        let near = |found: f64, wanted: f64| assert!((found - wanted).abs() <= 1e-5 * wanted.abs(), "{found} {wanted}");
        for (i, j) in [(0, 0), (0, 127), (5, 77), (127, 127)] {
            near(seen.block(130, 0)[i * BLOCK + j], mean(i, j));
        }
        near(seen.block(130, 1)[1], mean(128, 129));
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for wrong in [f32::NAN, f32::INFINITY] {
            let mut observed = Observed::new(2, false);
            observed.add(&[&[1.0, wrong], &[3.0, 2.0]]);
            observed.add(&[&[4.0, 0.0]]);
            assert!(!observed.amax().is_finite());
            assert!(observed.statistics().moments.is_empty());
        }
    }
}
