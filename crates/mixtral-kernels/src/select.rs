//! Chooses the plan of a linear by its shape, type and token count. `mixtral build` makes its ladders from these
//! tables.

use mixtral_engine::{Op, Program, Rows, Rung};
use mixtral_model::{Bits, ElemType, Quantization};

use crate::lower::count;
use crate::plan::{RUNGS, Stream};
use crate::{Family, LinearPlan, WeightRows};

/// A linear as its kernels see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Output features: how many rows of the weight are used. With silu·mul, half as many values are written.
    pub rows: usize,
    /// Input features.
    pub depth: usize,
    /// Type of the tokens.
    pub tokens: ElemType,
    /// How the weight is stored.
    pub weight: WeightRows,
    /// Whether the epilogue applies silu·mul to up and gate rows.
    pub silu_mul: bool,
    /// Whether tokens are sent to experts.
    pub grouped: bool,
}

impl LinearShape {
    /// The shape of a linear of `program`; `None` for other operations and unknown names.
    #[must_use]
    pub fn of(program: &Program, op: &Op) -> Option<LinearShape> {
        let (input, name, silu_mul) = match op {
            Op::Linear { input, weight, .. } | Op::ExpertDown { input, weight, .. } => (input, weight, false),
            Op::ExpertGateUp { input, weight, silu_mul, .. } => (input, weight, *silu_mul),
            _ => return None,
        };
        let (weight, tokens) = (program.weight(name)?, program.buffer(input)?.dtype);
        let stored = WeightRows::of(weight)?;
        let (grouped, rows) = match op {
            Op::Linear { rows, .. } => (false, rows.map_or(weight.rows(), |[start, end]| end - start)),
            _ => (true, weight.rows() / weight.shape.first().copied().unwrap_or(1).max(1)),
        };
        Some(LinearShape { rows, depth: weight.cols(), tokens, weight: stored, silu_mul, grouped })
    }

    /// The most columns of a linear in a step of up to `tokens` tokens. They are the tokens, or for logits as many rows
    /// of logits as a step may have.
    #[must_use]
    pub fn columns(program: &Program, op: &Op, tokens: usize) -> usize {
        let input = if let Op::Linear { input, .. } = op { program.buffer(input) } else { None };
        let of_logits = input.is_some_and(|buffer| buffer.rows == Rows::Logits);
        if of_logits { tokens.min(program.limits.max_num_logits) } else { tokens }
    }

    /// Whether TMA takes it: rows of weights, tokens and outputs begin at multiples of 16 bytes.
    fn is_aligned(&self) -> bool {
        let (weight, tokens) = (self.depth * self.weight.dtype().size(), self.depth * self.tokens.size());
        weight.is_multiple_of(16)
            && tokens.is_multiple_of(16)
            && self.rows.is_multiple_of(if self.silu_mul { 16 } else { 8 })
    }
}

/// Bytes of a kernel's ring. This is more than half of a multiprocessor's shared memory, so that a multiprocessor never
/// runs two CTAs of one kernel. Each CTA's tiles are fixed beforehand, so two CTAs that shared a multiprocessor would
/// finish long after all others.
const RING: u32 = 184 << 10;

/// The plan for up to `tokens` tokens.
#[must_use]
pub fn plan(shape: &LinearShape, tokens: usize, family: Family) -> LinearPlan {
    if !shape.weight.suits_tensor_cores(shape.tokens) {
        return LinearPlan::Simt;
    }
    let packed = shape.weight.is_packed();
    if packed && family == Family::Hopper && tokens <= if shape.grouped { 64 } else { 8 } {
        if let Some(stream) = stream(shape, tokens) {
            return LinearPlan::Stream(stream);
        }
    }
    if family == Family::Portable || !shape.is_aligned() {
        // A stage of a packed weight has twice the elements of a plain one's.
        let cols = portable_cols(tokens).min(if packed { 64 } else { 128 });
        return LinearPlan::Mma { rows: if cols > 64 { 128 } else { 64 }, cols };
    }
    let ring = |rows: u32, cols: u32, depth: u32, warpgroups: u32| {
        let depth = if packed { 128 } else { depth };
        let stages = (RING / stage_bytes(shape.weight, rows, cols, depth)).clamp(3, 12);
        LinearPlan::Wgmma { rows, cols, depth, stages, warpgroups, cluster: 1, dynamic: false }
    };
    match (tokens, shape.grouped) {
        (0..=16, grouped) => {
            let cols = if tokens <= 8 { 8 } else { 16 };
            ring(if grouped { 64 } else { few_rows(shape.rows) }, cols, 128, 1)
        }
        (17..=32, true) => ring(64, 32, 128, 1),
        // A product with an operand from registers takes about 30 cycles more, however few columns it has. Tall tiles
        // keep the tensor cores busy all the same.
        (33..=256, true) if packed => ring(256, if tokens <= 128 { 64 } else { 96 }, 128, 2),
        // Of 128 tokens an expert gets about 32, of 256 about 64 and seldom more than 96. Wider tiles would leave less
        // shared memory for stages.
        (33..=128, true) => ring(128, 64, 64, 2),
        (129..=256, true) => ring(128, 96, 64, 2),
        (257..=512, true) if !packed => ring(128, 192, 64, 2),
        (17..=64, false) => ring(few_rows(shape.rows), if tokens <= 32 { 32 } else { 64 }, 128, 1),
        (65..=256, false) if shape.rows.div_ceil(64) * tokens.div_ceil(128) <= MULTIPROCESSORS => ring(64, 128, 64, 1),
        // Larger tiles are better than a second round of tiles.
        (65..=512, false) if shape.rows.div_ceil(128) * tokens.div_ceil(128) <= MULTIPROCESSORS => {
            ring(128, 128, 64, 2)
        }
        (65..=256, false) => ring(128, 128, 64, 2),
        // Prefill is bound by how fast shared memory is filled. A product of two warpgroups with 128 × 192 each needs a
        // quarter less data than one with 64 × 256 each, and still fits into the registers. A dense linear on a prompt
        // of 2048 tokens has too few such tiles to occupy every multiprocessor. CTAs work in pairs that share their
        // tokens. Tiles are handed out as CTAs become free: the experts' ragged last tiles then leave no CTA idle, and
        // neighbours stay close enough to share data in L2.
        _ if packed => {
            let (rows, cols) = large_packed(shape.weight);
            LinearPlan::Wgmma { rows, cols, depth: 128, stages: 3, warpgroups: 2, cluster: 2, dynamic: true }
        }
        (_, true) => {
            LinearPlan::Wgmma { rows: 256, cols: 192, depth: 64, stages: 3, warpgroups: 2, cluster: 2, dynamic: true }
        }
        (_, false) => {
            LinearPlan::Wgmma { rows: 128, cols: 256, depth: 64, stages: 4, warpgroups: 2, cluster: 2, dynamic: true }
        }
    }
}

/// Rows and columns of the tiles of a packed weight in prefill. Groups need accumulators for a chain and for its sum. So
/// a tile has half the rows of a plain weight's, and stored zeros leave registers for fewer columns.
fn large_packed(weight: WeightRows) -> (u32, u32) {
    match weight {
        WeightRows::Quantized(_, Quantization { zeros: true, group: Some(_), bits: Bits::Four, .. }) => (256, 128),
        WeightRows::Quantized(_, Quantization { zeros: true, group: Some(_), bits: Bits::Eight, .. }) => (128, 128),
        _ => (128, 192),
    }
}

/// Bytes of a stage of `linear::Config`: `depth` elements of `rows` rows of weights and of `cols` tokens.
pub(crate) fn stage_bytes(weight: WeightRows, rows: u32, cols: u32, depth: u32) -> u32 {
    let rows = depth / count(weight.stage_depth()) * count(weight.stage_bytes(rows as usize));
    rows.next_multiple_of(1024) + cols * depth * 2
}

/// Columns of a tile of the portable kernels.
fn portable_cols(tokens: usize) -> u32 {
    match tokens {
        0..=8 => 8,
        9..=16 => 16,
        17..=32 => 32,
        33..=64 => 64,
        _ => 128,
    }
}

/// The most bytes of shared memory of a CTA.
const MAX_SHARED: u32 = 227 << 10;

/// The least bytes of shared memory of a CTA of `linear::stream`: more than half of a multiprocessor's, as [`RING`].
const MIN_SHARED: u32 = 116 << 10;

/// Bytes of weights that the warps of a CTA have under way together, if shared memory has room.
const UNDER_WAY: u32 = 150 << 10;

/// The most warps that multiply. One more copies tokens, and with 16 warps each thread may have 128 registers.
const MAX_WARPS: u32 = 15;

/// How weights are streamed for up to `tokens` tokens; `None` if K has no whole blocks.
fn stream(shape: &LinearShape, tokens: usize) -> Option<Stream> {
    if !shape.depth.is_multiple_of(128) || shape.depth == 0 {
        return None;
    }
    let blocks_of_k = count(shape.depth / 128);
    // Of up to 16 tokens an expert seldom gets more than 8.
    let cols = match (tokens, shape.grouped) {
        (0..=1, _) => 1,
        (2, _) => 2,
        (3..=4, _) => 4,
        (5..=16, true) | (_, false) => 8,
        (17..=32, true) => 16,
        (_, true) => 32,
    };
    // A token goes to two experts or more. Several tokens share some of theirs.
    let slabs = shape.rows.div_ceil(16) * if shape.grouped { (2 * tokens).clamp(2, 6) } else { 1 };
    let per_sm = count(slabs.div_ceil(MULTIPROCESSORS));
    let divisor = |most: u32| (1..=most.max(1)).rev().find(|n| blocks_of_k.is_multiple_of(*n)).unwrap_or(1);
    let (split, warps) = if shape.weight.has_groups() && per_sm < 12 && cols <= 2 {
        let split = divisor(MAX_WARPS - 1);
        (split, (MAX_WARPS - 1) / split * split)
    } else {
        (1, if per_sm > 8 { MAX_WARPS } else { per_sm.max(4) })
    };
    let part = blocks_of_k / split;
    let block = count(shape.weight.block_bytes());
    // Copies of about 4 KB; with few warps, of twice that.
    let most = if warps < 8 { 8 << 10 } else { 4 << 10 };
    let blocks = [4, 2, 1].into_iter().find(|&n| part.is_multiple_of(n) && n * block <= most + 256).unwrap_or(1);
    let chunks = part / blocks;
    // All tokens, if they fit.
    let (token_blocks, token_stages) = if cols * blocks_of_k <= 64 * 4 || part == blocks {
        (part, 1)
    } else {
        let some = [4, 2, 1].into_iter().find(|n| chunks.is_multiple_of(*n) && n * blocks <= 4);
        (some.unwrap_or(1) * blocks, if cols > 16 { 2 } else { 4 })
    };
    let plan = |stages| Stream { cols, warps, split, slabs: 1, blocks, stages, token_blocks, token_stages };
    let wanted = (UNDER_WAY / (warps * blocks * block)).clamp(2, 8);
    (1..=wanted).rev().map(plan).find(|plan| plan.shared_bytes(shape) <= MAX_SHARED)
}

impl Stream {
    /// Bytes of shared memory of a CTA: at least `linear::StreamConfig::SHARED`; the kernel asserts that.
    #[must_use]
    pub fn shared_bytes(&self, shape: &LinearShape) -> u32 {
        let Stream { cols, warps, split, slabs, blocks, stages, token_blocks, token_stages } = *self;
        let format = shape.weight;
        let block = count(format.block_bytes());
        let ring = warps * stages * slabs * blocks * block;
        let tokens = token_stages * split * cols * (token_blocks * 256 + 16);
        let teams = warps / split;
        let WeightRows::Quantized(_, Quantization { group, scale, .. }) = format else { return 0 };
        let groups = count(shape.depth / group.unwrap_or(128));
        let column = if cols == 1 { 16 } else { 20 };
        let slots = if split > 1 { 2 * teams * groups * (cols * column * 4 + 16 * count(scale.size())) } else { 0 };
        let barriers = 8 * (warps * stages + 2 * token_stages + if split > 1 { 4 * teams } else { 0 });
        (ring + tokens + slots + barriers).max(MIN_SHARED)
    }
}

/// Multiprocessors of a Hopper GPU.
const MULTIPROCESSORS: usize = 132;

/// Rows of a tile when there are few tokens. Chosen so that nearly every multiprocessor has one tile and none has two.
fn few_rows(rows: usize) -> u32 {
    let tiles = |r: u32| rows.div_ceil(r as usize);
    let fitting = [64, 48, 32].into_iter().filter(|&r| tiles(r) <= MULTIPROCESSORS);
    fitting.max_by_key(|&r| tiles(r)).unwrap_or(64)
}

/// cuBLASLt, if it may be used, computes steps of more than this many tokens.
pub const CUBLASLT_ABOVE: usize = 256;

/// Whether cuBLASLt can compute an operation of `program` for `tokens` tokens. It can compute dense linears over all
/// tokens, of 16-bit types, with rows that begin at multiples of 16 bytes. It is used in steps so large that the call
/// of a library costs little beside them. It cannot be captured in a graph, so steps of decodes keep their kernels
/// however many sequences they have. It does not compute the vocabulary's linear, which runs over a step's few rows of
/// logits and not over its tokens.
#[must_use]
pub fn takes_cublaslt(program: &Program, op: &Op, tokens: usize) -> bool {
    let Op::Linear { input, .. } = op else { return false };
    let of_tokens = program.buffer(input).is_some_and(|buffer| buffer.rows == Rows::Tokens);
    let fits = LinearShape::of(program, op).is_some_and(|shape| {
        !shape.weight.is_packed() && shape.weight.suits_tensor_cores(shape.tokens) && shape.is_aligned()
    });
    of_tokens && fits && tokens > CUBLASLT_ABOVE
}

/// The ladder of an operation of `program`; empty for operations that are no linears. With `cublaslt`, cuBLASLt
/// computes every linear that it can.
#[must_use]
pub fn ladder(program: &Program, op: &Op, family: Family, cublaslt: bool) -> Vec<Rung> {
    let Some(shape) = LinearShape::of(program, op) else { return Vec::new() };
    let mut ladder: Vec<Rung> = Vec::new();
    let most = program.limits.max_num_tokens;
    for tokens in RUNGS.into_iter().filter(|&r| r < most).chain([most]) {
        let plan = match cublaslt && takes_cublaslt(program, op, tokens) {
            true => LinearPlan::CublasLt,
            false => plan(&shape, LinearShape::columns(program, op, tokens), family),
        };
        let plan = plan.to_string();
        match ladder.last_mut() {
            Some(last) if last.plan == plan => last.max_tokens = tokens,
            _ => ladder.push(Rung { max_tokens: tokens, plan }),
        }
    }
    ladder
}

#[cfg(test)]
mod tests {
    use mixtral_model::DType;

    use super::*;

    #[test]
    fn rows_fill_the_machine() {
        // Mixtral 8x7B: q/k/v, o, vocabulary; 8x22B: q/k/v, o.
        assert_eq!([6144, 4096, 32000, 8192, 6144].map(few_rows), [48, 32, 64, 64, 48]);
    }

    #[test]
    fn packed_weights_go_to_three_kernels() {
        let plans = |word: &str, grouped: bool, tokens: &[usize]| -> Vec<String> {
            let Ok(mixtral_model::WeightFormat::Quantized(quantization)) = word.parse() else { panic!("{word}") };
            let weight = WeightRows::Quantized(DType::Bf16, quantization);
            let shape =
                LinearShape { rows: 4096, depth: 14336, tokens: ElemType::Bf16, weight, silu_mul: false, grouped };
            tokens.iter().map(|&n| plan(&shape, n, Family::Hopper).to_string()).collect()
        };
        let experts = plans("int4:g128:bf16", true, &[64, 128, 256, 16384]);
        assert!(experts[0].starts_with("stream:"), "{experts:?}");
        assert_eq!(
            experts[1..],
            ["wgmma:256x64:k128:s5:w2:c1", "wgmma:256x96:k128:s4:w2:c1", "wgmma:128x192:k128:s3:w2:c2:dynamic"]
        );
        let dense = plans("int8:row:f32", false, &[8, 9, 128, 512, 2048]);
        assert!(dense[0].starts_with("stream:"), "{dense:?}");
        assert_eq!(
            dense[1..],
            [
                "wgmma:32x16:k128:s12:w1:c1",
                "wgmma:64x128:k128:s4:w1:c1",
                "wgmma:128x128:k128:s3:w2:c1",
                "wgmma:128x192:k128:s3:w2:c2:dynamic"
            ]
        );
        // Stored zeros take registers.
        assert_eq!(plans("int4:g64:f16:zeros", true, &[2048]), ["wgmma:256x128:k128:s3:w2:c2:dynamic"]);
        assert_eq!(plans("int8:g64:f16:zeros", true, &[2048]), ["wgmma:128x128:k128:s3:w2:c2:dynamic"]);
    }

    #[test]
    fn odd_shapes_go_to_the_portable_kernels() {
        let shape = LinearShape {
            rows: 64,
            depth: 100,
            tokens: ElemType::Bf16,
            weight: WeightRows::Plain(DType::Bf16),
            silu_mul: false,
            grouped: false,
        };
        assert_eq!(plan(&shape, 1, Family::Hopper), LinearPlan::Mma { rows: 64, cols: 8 });
        let even = LinearShape { depth: 104, ..shape };
        assert!(matches!(plan(&even, 1, Family::Hopper), LinearPlan::Wgmma { .. }));
        assert!(matches!(plan(&LinearShape { rows: 65, ..even }, 1, Family::Hopper), LinearPlan::Mma { .. }));
        assert!(matches!(
            plan(&LinearShape { rows: 72, silu_mul: true, ..even }, 1, Family::Hopper),
            LinearPlan::Mma { .. }
        ));
        assert_eq!(
            plan(&LinearShape { weight: WeightRows::Plain(DType::F32), ..even }, 1, Family::Hopper),
            LinearPlan::Simt
        );
    }
}
