//! How tokens spread over experts, if every token takes `top_k` of them and all choices are equally likely. A real
//! router has favourites, so real steps are less even than this.

use mixtral_model::even_split;

/// `num_experts` experts, of which each token takes `top_k`, divided over `groups` ranks as whole experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    /// All experts of a layer.
    pub num_experts: usize,
    /// Experts that a token takes; at most `num_experts`.
    pub top_k: usize,
    /// Ranks among which the experts are divided; the first ones have one more where they do not divide evenly.
    pub groups: usize,
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn f(n: usize) -> f64 {
    n as f64
}

/// The number of ways to choose `k` of `n`.
fn choose(n: usize, k: usize) -> f64 {
    if k > n { 0.0 } else { (0..k).fold(1.0, |ways, i| ways * f(n - i) / f(i + 1)) }
}

/// Probabilities below this are taken for 0.
const NEGLIGIBLE: f64 = 1e-12;

impl Spread {
    /// The probability that `h` experts are hit by at least one of `tokens` tokens, for every `h` from 0 to
    /// `num_experts`. Exact: token by token, the number of experts that are new is hypergeometric.
    #[must_use]
    pub fn experts_hit(&self, tokens: usize) -> Vec<f64> {
        let Spread { num_experts, top_k, .. } = *self;
        let mut hit = vec![0.0; num_experts + 1];
        hit[0] = 1.0;
        for _ in 0..tokens {
            if hit[num_experts] > 1.0 - NEGLIGIBLE {
                break;
            }
            let mut next = vec![0.0; num_experts + 1];
            for (h, probability) in hit.iter().enumerate() {
                for new in 0..=top_k.min(num_experts - h) {
                    let ways = choose(num_experts - h, new) * choose(h, top_k - new);
                    next[h + new] += probability * ways / choose(num_experts, top_k);
                }
            }
            hit = next;
        }
        hit
    }

    /// How many experts are hit on the rank with the most hit ones, on average. Exact: `h` experts that were hit are any
    /// `h` of all with equal probability, so their numbers on the ranks are multivariate hypergeometric.
    #[must_use]
    pub fn most_experts_hit(&self, tokens: usize) -> f64 {
        let hit = self.experts_hit(tokens);
        // The mean of a maximum is Σ P(maximum > m).
        let above = |m: usize| -> f64 {
            let ways = self.ways_with_at_most(m);
            hit.iter().enumerate().map(|(h, p)| p * (1.0 - ways[h] / choose(self.num_experts, h))).sum()
        };
        (0..self.of_group(0)).map(above).sum()
    }

    /// For every `h`, the number of ways to choose `h` experts with at most `m` on each rank.
    fn ways_with_at_most(&self, m: usize) -> Vec<f64> {
        let mut ways = vec![0.0; self.num_experts + 1];
        ways[0] = 1.0;
        for own in (0..self.groups).map(|group| self.of_group(group)) {
            let with_rank = |h: usize| (0..=m.min(h)).map(|j| ways[h - j] * choose(own, j)).sum();
            ways = (0..=self.num_experts).map(with_rank).collect();
        }
        ways
    }

    /// How many experts a rank has.
    fn of_group(&self, group: usize) -> usize {
        even_split(self.num_experts, self.groups.max(1), group).len()
    }

    /// How many of the step's `tokens · top_k` assignments the rank with the most gets, on average. A rank's number is
    /// taken for normal, with the mean and variance that it has: this is within a tenth for one token, and ever closer
    /// for more. Computing takes longer than reading only from hundreds of tokens on.
    #[must_use]
    pub fn most_assignments(&self, tokens: usize) -> f64 {
        let (experts, k, groups) = (f(self.num_experts), f(self.top_k), f(self.groups.max(1)));
        let mean = f(tokens) * k * f(self.of_group(0)) / experts;
        if self.groups <= 1 || self.num_experts <= 1 {
            return mean;
        }
        let variance = f(tokens) * k / groups * (1.0 - 1.0 / groups) * (experts - k) / (experts - 1.0);
        // The ranks' numbers have a fixed sum. They are independent ones less their mean.
        mean + (variance / (1.0 - 1.0 / groups)).sqrt() * largest_of_normals(self.groups)
    }

    /// How many columns of tiles of `cols` tokens an expert's tokens fill, on average, the last tile counted as a whole
    /// one. Exact: the number of an expert's tokens is binomial.
    #[must_use]
    pub fn tile_columns(&self, tokens: usize, cols: usize) -> f64 {
        let p = f(self.top_k) / f(self.num_experts);
        if p >= 1.0 {
            return f(tokens.next_multiple_of(cols));
        }
        let mut log = f(tokens) * (1.0 - p).ln();
        let mut sum = 0.0;
        for n in 0..=tokens {
            sum += log.exp() * f(n.next_multiple_of(cols));
            log += (f(tokens - n) / f(n + 1) * p / (1.0 - p)).ln();
        }
        sum
    }
}

/// The mean of the largest of `n` independent standard normal numbers: `∫ x d(Φ(x)ⁿ)`, summed in small steps.
fn largest_of_normals(n: usize) -> f64 {
    const STEP: f64 = 1e-3;
    let (mut below, mut at_most, mut x, mut mean) = (0.0f64, 0.0f64, -8.0f64, 0.0f64);
    while x < 8.0 {
        let middle = x + STEP / 2.0;
        below += (-middle * middle / 2.0).exp() / std::f64::consts::TAU.sqrt() * STEP;
        let next = below.powf(f(n));
        mean += middle * (next - at_most);
        (at_most, x) = (next, x + STEP);
    }
    mean
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: f64, expected: f64, within: f64) {
        assert!((found - expected).abs() <= within * expected.abs(), "{found}, expected {expected}");
    }

    /// All ways in which `tokens` tokens can choose, each equally likely; the mean of what `count` says of a way.
    fn enumerated(spread: Spread, tokens: u32, count: impl Fn(&[u32]) -> f64) -> f64 {
        let subsets: Vec<u32> =
            (0u32..1 << spread.num_experts).filter(|s| s.count_ones() as usize == spread.top_k).collect();
        let ways = subsets.len().pow(tokens);
        let way = |mut index: usize| -> Vec<u32> {
            (0..tokens)
                .map(|_| {
                    let subset = subsets[index % subsets.len()];
                    index /= subsets.len();
                    subset
                })
                .collect()
        };
        (0..ways).map(|index| count(&way(index))).sum::<f64>() / f(ways)
    }

    /// The largest over the ranks of what `of` says of a rank's experts, given as a mask.
    fn most(spread: Spread, of: impl Fn(u32) -> u32) -> f64 {
        let rank = |group: usize| {
            let own = even_split(spread.num_experts, spread.groups, group);
            of(own.fold(0, |mask, expert| mask | 1 << expert))
        };
        f64::from((0..spread.groups).map(rank).max().unwrap())
    }

    #[test]
    fn the_fullest_rank_is_that_of_an_enumeration() {
        for (num_experts, top_k, groups) in
            [(4, 2, 2), (6, 2, 3), (8, 2, 2), (8, 2, 4), (6, 3, 2), (5, 2, 2), (5, 2, 4)]
        {
            let spread = Spread { num_experts, top_k, groups };
            for tokens in 1..=3u32 {
                let hit = |way: &[u32]| way.iter().fold(0, |all, subset| all | subset);
                let expected = enumerated(spread, tokens, |way| most(spread, |rank| (hit(way) & rank).count_ones()));
                near(spread.most_experts_hit(tokens as usize), expected, 1e-9);
                let expected = enumerated(spread, tokens, |way| {
                    most(spread, |rank| way.iter().map(|subset| (subset & rank).count_ones()).sum())
                });
                if num_experts % groups == 0 {
                    near(spread.most_assignments(tokens as usize), expected, 0.1);
                }
            }
        }
    }

    #[test]
    fn experts_are_hit_as_often_as_each_of_them() {
        let spread = Spread { num_experts: 8, top_k: 2, groups: 1 };
        for tokens in [0, 1, 2, 7, 64, 1000] {
            let hit = spread.experts_hit(tokens);
            near(hit.iter().sum(), 1.0, 1e-9);
            let mean: f64 = hit.iter().enumerate().map(|(h, p)| f(h) * p).sum();
            let expected = 8.0 * (1.0 - 0.75f64.powf(f(tokens)));
            near(mean, expected, 1e-9);
            // One rank that has all is the fullest.
            near(spread.most_experts_hit(tokens), expected, 1e-9);
            near(spread.most_assignments(tokens), 2.0 * f(tokens), 1e-9);
        }
    }

    /// A token of Mixtral's takes both of its experts from one of two ranks in 3 of 7 cases.
    #[test]
    fn one_token_on_two_ranks() {
        near(Spread { num_experts: 8, top_k: 2, groups: 2 }.most_experts_hit(1), 10.0 / 7.0, 1e-12);
        near(Spread { num_experts: 8, top_k: 2, groups: 8 }.most_experts_hit(1), 1.0, 1e-12);
        near(Spread { num_experts: 8, top_k: 2, groups: 2 }.most_experts_hit(500), 4.0, 1e-12);
    }

    #[test]
    fn tiles_are_whole() {
        let spread = Spread { num_experts: 8, top_k: 2, groups: 1 };
        // In tiles of one token nothing is lost.
        near(spread.tile_columns(100, 1), 25.0, 1e-9);
        // One token is an expert's in one of four cases.
        near(spread.tile_columns(1, 16), 4.0, 1e-12);
        // 512 ± 20 tokens fill three tiles of 192, whatever happens.
        near(spread.tile_columns(2048, 192), 576.0, 1e-3);
        near(Spread { num_experts: 2, top_k: 2, groups: 1 }.tile_columns(10, 8), 16.0, 1e-12);
    }

    #[test]
    fn the_largest_of_normal_numbers() {
        for (n, expected) in [(2, 0.56419), (3, 0.84628), (8, 1.42360)] {
            near(largest_of_normals(n), expected, 1e-4);
        }
    }
}
