//! How few tokens are multiplied with packed weights on Hopper: the numbers of `linear::StreamConfig`
//! (`kernels/linear/stream.cuh`), and how they are chosen.

use mixtral_model::Quantization;

use crate::lower::count;
use crate::plan::Stream;
use crate::select::{LinearShape, MULTIPROCESSORS};
use crate::weight::WeightRows;

/// The most bytes of shared memory of a CTA.
const MOST: u32 = 227 << 10;

/// Bytes of shared memory so that a multiprocessor has room for one CTA only: more than half of its memory. Each CTA's
/// slabs are fixed beforehand, so two CTAs that shared a multiprocessor would finish long after all others.
const ALONE: u32 = 114 << 10;

/// The most bytes of a CTA that fits beside one of [`ALONE`] bytes. With a single token, expert_down's CTAs start when
/// each multiprocessor has one of expert_gate_up's, so none gets two. They load their first weights while
/// expert_gate_up still computes.
const BESIDE: u32 = 112 << 10;

/// Tokens of which an expert seldom gets more than eight.
const FEW: usize = 16;

impl Stream {
    /// The numbers for up to `tokens` tokens; `None` if K has no whole blocks.
    pub(crate) fn new(shape: &LinearShape, tokens: usize) -> Option<Stream> {
        if !shape.depth.is_multiple_of(128) || shape.depth == 0 || !shape.weight.is_packed() {
            return None;
        }
        let of_k = count(shape.depth / 128);
        let block = count(shape.weight.block_bytes());
        let cols = match tokens {
            0..=1 => 1,
            2 => 2,
            3..=FEW => 8,
            _ => count(tokens.next_multiple_of(8)).min(32),
        };
        // A tile's rows of tokens lie beside those of the tile behind it.
        let rows = if shape.grouped && cols == 8 { 16 } else { cols };
        // Slabs of a CTA. A token goes to two experts or more. Several tokens share some of theirs.
        let matrices = if shape.grouped { (2 * tokens).clamp(2, 7) } else { 1 };
        let slabs = count((shape.rows.div_ceil(16) * matrices).div_ceil(MULTIPROCESSORS));
        let divisor = |most: u32| (1..=most).rev().find(|n| of_k.is_multiple_of(*n)).unwrap_or(1);
        let alone = tokens > 1 || !shape.grouped;
        let splits = shape.weight.has_groups() && slabs < 12 && cols <= 2;
        let (split, warps) = match (splits, alone) {
            (true, true) => (divisor(14), divisor(14)),
            (true, false) => (divisor(7), divisor(7)),
            (false, _) if slabs <= 8 => (1, slabs.max(4)),
            (false, true) => (1, 15),
            (false, false) => (1, 7),
        };
        let part = of_k / split;
        // Copies of about 4 KB.
        let blocks = [4, 2, 1].into_iter().find(|&n| part.is_multiple_of(n) && n * block <= 4352).unwrap_or(1);
        // All tokens, or stages of a few blocks.
        let some = if rows == 1 { 16 } else { 4.max(blocks) };
        let few = [8, 4, 2, 1].into_iter().map(|n| n * blocks).find(|&n| part.is_multiple_of(n) && n <= some);
        let resident = split > 1 || rows * of_k <= 256 || part == blocks;
        let (token_blocks, token_stages) =
            if resident { (part, 1) } else { (few.unwrap_or(blocks), if cols > 16 { 2 } else { 3 }) };
        let plan = |stages| Stream { cols, rows, warps, split, blocks, stages, token_blocks, token_stages };
        let down = shape.grouped && !shape.silu_mul;
        let most = if alone {
            186 << 10
        } else if down {
            BESIDE
        } else {
            ALONE
        };
        let fits = |most| move |plan: &Stream| plan.bytes(shape) <= most;
        let of = |stages: std::ops::RangeInclusive<u32>| stages.rev().map(plan);
        of(2..=8).find(fits(most)).or_else(|| of(1..=8).find(fits(MOST)))
    }

    /// Bytes of shared memory that a CTA needs: `linear::StreamConfig::SHARED`.
    fn bytes(&self, shape: &LinearShape) -> u32 {
        let Stream { cols, rows, warps, split, blocks, stages, token_blocks, token_stages } = *self;
        let WeightRows::Quantized(_, Quantization { group, scale, .. }) = shape.weight else { return 0 };
        let ring = warps * stages * blocks * count(shape.weight.block_bytes());
        let tokens = token_stages * split * rows * (token_blocks * 256 + 16);
        let teams = warps / split;
        let groups = count(shape.depth / group.unwrap_or(128));
        let column = if cols == 1 { 16 } else { 20 };
        let slots = if split > 1 { 2 * teams * groups * (cols * column * 4 + 16 * count(scale.size())) } else { 0 };
        let barriers = 8 * (warps * stages + 2 * token_stages + if split > 1 { 4 * teams } else { 0 });
        ring + tokens + slots + barriers
    }

    /// Bytes of shared memory that a CTA asks for: all that it needs, and enough to be alone, unless it is to fit beside
    /// expert_gate_up's.
    pub(crate) fn shared_bytes(&self, shape: &LinearShape) -> u32 {
        let beside = self.cols == 1 && shape.grouped && !shape.silu_mul;
        self.bytes(shape).max(if beside { 0 } else { ALONE })
    }
}
