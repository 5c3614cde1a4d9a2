//! How few tokens are multiplied by the portable kernels: the numbers of `linear::StripConfig` (`kernels/linear/strip.cuh`), and how
//! they are chosen.

use crate::lower::count;
use crate::plan::Strip;
use crate::select::{LinearShape, MULTIPROCESSORS, token_bytes};

/// Bytes of the rings of a CTA. The GPUs with the least shared memory give a CTA 99 KB.
const RINGS: u32 = 96 << 10;

impl Strip {
    /// The numbers for up to `tokens` tokens; `None` for more than it is made for, and where rows are not whole pieces of 16 bytes.
    pub(crate) fn new(shape: &LinearShape, tokens: usize) -> Option<Strip> {
        let sizes = [shape.weight.element(), shape.weight.tokens(shape.tokens)].map(|element| element.size());
        let [of_weight, of_token] = sizes.map(|size| (shape.depth * size).is_multiple_of(16));
        if !of_token || !(of_weight || shape.weight.is_packed()) || tokens > if shape.grouped { 16 } else { 8 } {
            return None;
        }
        // Of 8 tokens an expert seldom gets more than 4, and of 16 more than 8. If it does, its weights are read twice.
        let cols = match tokens {
            8 | 16 if shape.grouped => count(tokens / 2),
            _ => count(tokens.clamp(1, 8).next_power_of_two()),
        };
        let matrices = if shape.grouped { (2 * tokens).clamp(2, 8) } else { 1 };
        let of_multiprocessor = count((shape.rows.div_ceil(16) * matrices).div_ceil(MULTIPROCESSORS));
        let stage = Strip { warps: 1, cols, stages: 1 }.shared_bytes(shape);
        // Rings of fewer than four stages do not hide the memory's latency.
        let warps = warps(of_multiprocessor).min(RINGS / (4 * stage)).max(1);
        let stages = (RINGS / (warps * stage)).min(12);
        (stages >= 3).then_some(Strip { warps, cols, stages })
    }

    /// Bytes of shared memory of a CTA: `linear::StripConfig::SHARED`.
    pub(crate) fn shared_bytes(self, shape: &LinearShape) -> u32 {
        let format = shape.weight;
        // A stage has two blocks where a block is one group: their sums are computed side by side.
        let blocks = if format.group() == Some(128) { 2 } else { 1 };
        let block = count(format.stage_bytes(16)) + token_bytes(format, self.cols, count(format.stage_depth()));
        self.warps * self.stages * blocks * block
    }
}

/// How many warps share a multiprocessor's strips. More than eight gain nothing. Of five to eight it is the most with which hardly any
/// warp is idle while others compute their last strip.
fn warps(strips: u32) -> u32 {
    let turns = |warps: u32| strips.div_ceil(warps) * warps;
    let least = (5..=8).map(turns).min().unwrap_or(strips);
    let balanced = (5..=8).rev().find(|&warps| 20 * turns(warps) <= 21 * least);
    if strips <= 8 { strips.max(2) } else { balanced.unwrap_or(8) }
}

#[cfg(test)]
mod tests {
    use mixtral_model::{DType, ElemType};

    use super::*;
    use crate::WeightRows;

    fn shape(rows: usize, depth: usize, grouped: bool) -> LinearShape {
        let weight = WeightRows::Plain(DType::Bf16);
        LinearShape { rows, depth, tokens: ElemType::Bf16, weight, silu_mul: false, grouped }
    }

    #[test]
    fn a_multiprocessor_has_as_many_warps_as_its_strips_take() {
        let numbers = |rows, grouped, tokens| {
            Strip::new(&shape(rows, 4096, grouped), tokens).map(|strip| (strip.warps, strip.cols, strip.stages))
        };
        assert_eq!(numbers(4096, false, 1), Some((2, 1, 12)));
        assert_eq!(numbers(6144, false, 1), Some((3, 1, 12)));
        assert_eq!(numbers(4096, true, 1), Some((4, 1, 11)));
        // 28 strips are four rounds of seven.
        assert_eq!(numbers(28672, true, 1), Some((7, 1, 6)));
        assert_eq!(numbers(28672, true, 8), Some((8, 4, 4)));
        assert_eq!(numbers(28672, true, 16), Some((8, 8, 4)));
        assert_eq!(numbers(28672, true, 32), None);
        assert_eq!(numbers(6144, false, 8), Some((3, 8, 10)));
        assert_eq!(numbers(6144, false, 16), None);
    }

    #[test]
    fn rows_have_to_be_whole_pieces() {
        assert_eq!(Strip::new(&shape(64, 100, false), 1), None);
        assert!(Strip::new(&shape(64, 104, false), 1).is_some());
    }
}
