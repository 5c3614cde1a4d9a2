//! Chooses the plan of a linear by its shape, type and token count. `mixtral build` makes its ladders from these
//! tables.

use mixtral_engine::{Op, Program, Rows, Rung};
use mixtral_model::{Bits, ElemType, Quantization};

use crate::lower::count;
use crate::plan::{RUNGS, Stream, Strip};
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
        let [weight, tokens] =
            [self.weight.element(), self.weight.tokens(self.tokens)].map(|element| self.depth * element.size());
        weight.is_multiple_of(16)
            && tokens.is_multiple_of(16)
            && self.rows.is_multiple_of(if self.silu_mul { 16 } else { 8 })
    }
}

/// Bytes of a kernel's ring. They are more than [`ALONE`].
const RING: u32 = 184 << 10;

/// Stages that suffice, however small they are, if the ring is larger than [`ALONE`] with them.
const STAGES: u32 = 12;

/// With more bytes of shared memory, more than half of a multiprocessor's, a CTA has a multiprocessor to itself. What each CTA
/// computes is fixed beforehand. So two that shared a multiprocessor would end long after all others.
pub(crate) const ALONE: u32 = 114 << 10;

/// Experts of packed weights stream them in steps of up to this many tokens. Of 16 tokens an expert of 8x7B gets about four,
/// and of 8 about two. With more, tiles are faster: of int8 sooner, since it has twice the bytes for each product.
const fn streamed(weight: WeightRows) -> usize {
    match weight {
        WeightRows::Quantized(_, Quantization { bits: Bits::Eight, .. }) => 8,
        _ => 16,
    }
}

/// The plan for up to `tokens` tokens.
#[must_use]
pub fn plan(shape: &LinearShape, tokens: usize, family: Family) -> LinearPlan {
    if !shape.weight.suits_tensor_cores(shape.tokens) {
        return LinearPlan::Simt;
    }
    let packed = shape.weight.is_packed();
    let few = packed && family == Family::Hopper && tokens <= if shape.grouped { streamed(shape.weight) } else { 8 };
    if few && let Some(stream) = Stream::new(shape, tokens) {
        return LinearPlan::Stream(stream);
    }
    if family == Family::Portable || !shape.is_aligned() {
        if let Some(strip) = Strip::new(shape, tokens) {
            return LinearPlan::Strip(strip);
        }
        // With two sets of sums, wider tiles would not fit into the registers.
        let cols = portable_cols(tokens).min(if shape.weight.has_two_sums() { 64 } else { 128 });
        return LinearPlan::Mma { rows: if cols > 64 { 128 } else { 64 }, cols };
    }
    let ring = |rows: u32, cols: u32, depth: u32, warpgroups: u32| {
        let depth = match shape.weight {
            WeightRows::Plain(_) => depth,
            WeightRows::Quantized(..) => 128,
            // The same bytes of a row.
            WeightRows::Fp8(_) | WeightRows::Fp8Rows(..) => 2 * depth,
        };
        let stage = stage_bytes(shape.weight, rows, cols, depth);
        let stages = (RING / stage).clamp(3, STAGES).max(ALONE / stage + 1);
        LinearPlan::Wgmma { rows, cols, depth, stages, warpgroups, cluster: 1, dynamic: false }
    };
    match (tokens, shape.grouped) {
        // Tiles have 256 rows, so that each warpgroup has two blocks, of which one is converted while the other is multiplied, and
        // tokens are copied once for 256 rows. They are no wider than an expert's share of the tokens usually is, and loaded and
        // multiplied in eights: of fewer than 24 columns a product takes no less time, but a copy does.
        (0..=64, true) if packed => ring(256, 32, 128, 2),
        (0..=16, grouped) => {
            let cols = if tokens <= 8 { 8 } else { 16 };
            ring(if grouped { 64 } else { few_rows(shape.rows) }, cols, 128, 1)
        }
        (65..=256, true) if packed => ring(256, if tokens <= 128 { 64 } else { 96 }, 128, 2),
        (17..=32, true) => ring(64, 32, 128, 1),
        // Of 128 tokens an expert gets about 32, of 256 about 64 and seldom more than 96. Wider tiles would leave less
        // shared memory for stages.
        (33..=128, true) => ring(128, 64, 64, 2),
        (129..=256, true) => ring(128, 96, 64, 2),
        // Sums and chains of fp8 leave registers for 256 × 144 or for 128 × 192, and the taller tile needs a sixth less data for
        // the same products. Of 512 tokens an expert gets 128 ± 10, which fit into one tile of 144 columns, and of 1024
        // tokens 256 ± 14, which fit into two. Between these, of up to 704 tokens it gets 176 ± 12: one tile of 192.
        (257..=512 | 705.., true) if shape.weight.is_fp8() => {
            LinearPlan::Wgmma { rows: 256, cols: 144, depth: 128, stages: 4, warpgroups: 2, cluster: 2, dynamic: true }
        }
        (257..=512, true) if !packed => ring(128, 192, 64, 2),
        (17..=64, false) => {
            let cols = if tokens <= 32 { 32 } else { 64 };
            // Tiles of 64 rows and half of the tokens are as many as tiles of 32 rows. They need less data where weights have
            // fewer bytes than tokens.
            match few_rows(shape.rows) {
                32 if packed => ring(64, cols / 2, 128, 1),
                rows => ring(rows, cols, 128, 1),
            }
        }
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
        // Two sets of sums leave registers for tiles of half the rows.
        _ if shape.weight.is_fp8() => {
            LinearPlan::Wgmma { rows: 128, cols: 192, depth: 128, stages: 5, warpgroups: 2, cluster: 2, dynamic: true }
        }
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
    rows.next_multiple_of(1024) + token_bytes(weight, cols, depth)
}

/// Bytes of `depth` elements of `cols` tokens, as kernels on tensor cores read them.
pub(crate) fn token_bytes(weight: WeightRows, cols: u32, depth: u32) -> u32 {
    cols * depth * count(weight.tokens(weight.dtype().into()).size())
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

/// Multiprocessors of a Hopper GPU.
pub(crate) const MULTIPROCESSORS: usize = 132;

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
        matches!(shape.weight, WeightRows::Plain(_))
            && shape.weight.suits_tensor_cores(shape.tokens)
            && shape.is_aligned()
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
            let weight = WeightRows::packed(word);
            let shape =
                LinearShape { rows: 4096, depth: 14336, tokens: ElemType::Bf16, weight, silu_mul: false, grouped };
            tokens.iter().map(|&n| plan(&shape, n, Family::Hopper).to_string()).collect()
        };
        let experts = plans("int4:g128:bf16", true, &[16, 32, 64, 128, 256, 16384]);
        assert!(experts[0].starts_with("stream:"), "{experts:?}");
        assert_eq!(
            experts[1..],
            [
                "wgmma:256x32:k128:s7:w2:c1",
                "wgmma:256x32:k128:s7:w2:c1",
                "wgmma:256x64:k128:s5:w2:c1",
                "wgmma:256x96:k128:s4:w2:c1",
                "wgmma:128x192:k128:s3:w2:c2:dynamic"
            ]
        );
        let experts = plans("int8:row:f32", true, &[8, 16]);
        assert!(experts[0].starts_with("stream:"), "{experts:?}");
        assert_eq!(experts[1], "wgmma:256x32:k128:s4:w2:c1");
        let dense = plans("int8:row:f32", false, &[8, 9, 128, 512, 2048]);
        assert!(dense[0].starts_with("stream:"), "{dense:?}");
        assert_eq!(
            dense[1..],
            [
                "wgmma:32x16:k128:s15:w1:c1",
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
    fn a_cta_of_tiles_has_a_multiprocessor_to_itself() {
        let words = ["int4:g128:bf16", "int4:g32:f32:zeros", "int4:row:f32", "int8:row:f32"];
        let others = [WeightRows::Plain(DType::Bf16), WeightRows::Fp8(DType::Bf16)];
        // Rows of 2064 elements have no whole blocks, so no kernel streams them and few tokens go to tiles too.
        let sizes = [
            (6144, 4096),
            (4096, 4096),
            (3072, 4096),
            (4096, 2048),
            (4096, 2064),
            (32000, 4096),
            (8192, 6144),
            (4096, 14336),
        ];
        let shapes = words.map(WeightRows::packed).into_iter().chain(others).flat_map(|weight| {
            sizes.into_iter().flat_map(move |(rows, depth)| {
                let shape =
                    LinearShape { rows, depth, tokens: ElemType::Bf16, weight, silu_mul: false, grouped: false };
                [shape, LinearShape { grouped: true, ..shape }]
            })
        });
        for (shape, tokens) in shapes.flat_map(|shape| RUNGS.map(|tokens| (shape, tokens))) {
            let plan = plan(&shape, tokens, Family::Hopper);
            if let LinearPlan::Wgmma { rows, cols, depth, stages, .. } = plan {
                assert!(stages * stage_bytes(shape.weight, rows, cols, depth) > ALONE, "{plan} of {shape:?}");
            }
        }
    }

    #[test]
    fn fp8_is_computed_by_one_kernel_for_all_tokens() {
        let shape = |depth: usize, grouped: bool| LinearShape {
            rows: 4096,
            depth,
            tokens: ElemType::Bf16,
            weight: WeightRows::Fp8(DType::Bf16),
            silu_mul: false,
            grouped,
        };
        let plans = |shape: &LinearShape, family| -> Vec<String> {
            [1, 32, 64, 128, 256, 512, 704, 16384].map(|tokens| plan(shape, tokens, family).to_string()).to_vec()
        };
        insta::assert_debug_snapshot!([false, true].map(|grouped| plans(&shape(14336, grouped), Family::Hopper)));
        // mma.sync's sums, in tiles or strips, have other bits than wgmma's. So the kernel is chosen by the shape alone.
        for (depth, family) in [(14336, Family::Portable), (14344, Family::Hopper)] {
            for grouped in [false, true] {
                let by_mma = |plan: &String| plan.starts_with("mma:") || plan.starts_with("strip:");
                assert!(plans(&shape(depth, grouped), family).iter().all(by_mma));
            }
        }
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
        let is_portable =
            |shape: LinearShape| matches!(plan(&shape, 1, Family::Hopper), LinearPlan::Strip(Strip { cols: 1, .. }));
        let even = LinearShape { depth: 104, ..shape };
        assert!(matches!(plan(&even, 1, Family::Hopper), LinearPlan::Wgmma { .. }));
        assert!(is_portable(LinearShape { rows: 65, ..even }));
        assert!(is_portable(LinearShape { rows: 72, silu_mul: true, ..even }));
        assert_eq!(
            plan(&LinearShape { weight: WeightRows::Plain(DType::F32), ..even }, 1, Family::Hopper),
            LinearPlan::Simt
        );
    }
}
