//! How few tokens are multiplied with packed weights on Hopper: the numbers of `linear::StreamConfig`
//! (`kernels/linear/stream.cuh`), and how they are chosen.

use mixtral_model::Quantization;

use crate::lower::count;
use crate::plan::Stream;
use crate::select::{ALONE, LinearShape, MULTIPROCESSORS};
use crate::weight::WeightRows;

/// The most bytes of shared memory of a CTA.
const MOST: u32 = 227 << 10;

/// Bytes of weights that the warps of a CTA have under way together. More gain nothing.
const UNDER_WAY: u32 = 128 << 10;

/// Whether 16 warps that multiply, which leave a thread 96 registers, suffice without spills.
fn has_registers_for_16(weight: WeightRows) -> bool {
    match weight {
        WeightRows::Quantized(_, Quantization { group: None, .. }) => true,
        WeightRows::Quantized(_, Quantization { group: Some(128), zeros: false, scale, .. }) => scale.size() == 2,
        _ => false,
    }
}

impl Stream {
    /// The numbers for up to `tokens` tokens; `None` if K has no whole blocks.
    pub(crate) fn new(shape: &LinearShape, tokens: usize) -> Option<Stream> {
        let of_whole_rows = || Stream::of(shape, tokens, false);
        Stream::of(shape, tokens, shape.weight.has_groups()).or_else(of_whole_rows)
    }

    /// The numbers where warps may share slabs, or may not. Shared slabs need memory for the sums of their groups.
    fn of(shape: &LinearShape, tokens: usize, may_share: bool) -> Option<Stream> {
        if !shape.depth.is_multiple_of(128) || shape.depth == 0 || !shape.weight.is_packed() {
            return None;
        }
        let of_k = count(shape.depth / 128);
        let block = count(shape.weight.block_bytes());
        let cols = match tokens {
            0..=1 => 1,
            2 if !shape.grouped => 2,
            _ => 8,
        };
        // Slabs of a CTA. A token goes to two experts or more. Several tokens share some of theirs.
        let matrices = if shape.grouped { (2 * tokens).clamp(2, 8) } else { 1 };
        let slabs = count((shape.rows.div_ceil(16) * matrices).div_ceil(MULTIPROCESSORS));
        let splits = may_share && cols <= 2 && slabs < 8;
        let split = if splits { (1..=14).rev().find(|n| of_k.is_multiple_of(*n)).unwrap_or(1) } else { 1 };
        let warps = match slabs {
            _ if splits => split,
            0..=8 => slabs.max(4),
            // Two rounds of eight slabs, or one of 16. (One more than there are warps would be a round of its own, in which
            // one warp loads alone.)
            16 if tokens > 8 => 8,
            16 if has_registers_for_16(shape.weight) => 16,
            _ => 15,
        };
        let part = of_k / split;
        // Copies of about 4 KB; with few warps, of twice that.
        let copy = if warps <= 8 && !shape.weight.has_groups() { 8 << 10 } else { 4352 };
        let blocks = [4, 2, 1].into_iter().find(|&n| part.is_multiple_of(n) && n * block <= copy).unwrap_or(1);
        // All tokens of a tile, or stages of a few blocks. Then tokens of several tiles may lie beside each other.
        let resident = split > 1 || cols * of_k <= 256 && tokens <= 8;
        let rows = if shape.grouped && cols == 8 && !resident { 16 } else { cols };
        let some = [4, 2, 1].into_iter().find(|&n| part.is_multiple_of(n) && n.is_multiple_of(blocks));
        let (token_blocks, token_stages) = match resident {
            true => (part, 1),
            false => (some.unwrap_or(blocks), 3),
        };
        let plan = |stages| Stream { cols, rows, warps, split, blocks, stages, token_blocks, token_stages };
        let wanted = (UNDER_WAY / (warps * blocks * block)).clamp(2, 8);
        (1..=wanted).rev().map(plan).find(|plan| plan.bytes(shape) <= MOST)
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

    /// Bytes of shared memory that a CTA asks for: what it needs, and enough to be alone.
    pub(crate) fn shared_bytes(&self, shape: &LinearShape) -> u32 {
        self.bytes(shape).max(ALONE)
    }
}

#[cfg(test)]
mod tests {
    use mixtral_model::ElemType;

    use super::*;

    fn shape(word: &str, rows: usize, depth: usize, grouped: bool) -> LinearShape {
        let weight = WeightRows::packed(word);
        LinearShape { rows, depth, tokens: ElemType::Bf16, weight, silu_mul: false, grouped }
    }

    #[test]
    fn streams_fit_into_shared_memory() {
        let formats = ["int4:g128:bf16", "int4:g32:f32:zeros", "int4:row:f32", "int8:row:f32", "int8:g64:f16:zeros"];
        for word in formats {
            for (rows, depth) in [(28672, 4096), (4096, 14336), (6144, 4096), (6144, 16384), (4096, 1792), (64, 128)] {
                for grouped in [false, true] {
                    let shape = shape(word, rows, depth, grouped);
                    for tokens in [1, 2, 4, 8, 16] {
                        let stream = Stream::new(&shape, tokens).unwrap_or_else(|| panic!("{shape:?} {tokens}"));
                        let bytes = stream.shared_bytes(&shape);
                        assert!((ALONE..=MOST).contains(&bytes), "{stream:?} has {bytes}");
                        let part = count(depth / 128) / stream.split;
                        assert!(part.is_multiple_of(stream.token_blocks), "{stream:?} {part}");
                        assert!(stream.token_blocks.is_multiple_of(stream.blocks), "{stream:?}");
                        assert!(stream.split == 1 || stream.token_blocks == part && stream.cols <= 8, "{stream:?}");
                    }
                }
            }
        }
        assert_eq!(Stream::new(&shape("int4:g128:bf16", 64, 200, false), 1), None);
    }

    #[test]
    fn warps_share_slabs_where_there_are_few() {
        let plan = |word, rows, depth, grouped, tokens| {
            let Stream { cols, warps, split, .. } =
                Stream::new(&shape(word, rows, depth, grouped), tokens).expect("a plan");
            (cols, warps, split)
        };
        assert_eq!(plan("int4:g128:bf16", 28672, 4096, true, 1), (1, 15, 1));
        assert_eq!(plan("int4:g128:bf16", 4096, 14336, true, 1), (1, 14, 14));
        assert_eq!(plan("int8:row:f32", 4096, 14336, true, 1), (1, 4, 1));
        assert_eq!(plan("int4:g128:bf16", 4096, 14336, true, 8), (8, 16, 1));
        assert_eq!(plan("int4:g64:bf16", 4096, 14336, true, 8), (8, 15, 1));
        assert_eq!(plan("int8:row:f32", 4096, 14336, true, 8), (8, 16, 1));
        assert_eq!(plan("int4:g128:bf16", 4096, 14336, true, 16), (8, 8, 1));
    }
}
