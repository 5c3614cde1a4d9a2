//! Workspaces between the kernels of one operation. They lie in one allocation, whose size follows from the program's
//! limits. It is zero when the program is loaded, and is never cleared afterwards: kernels reset the counters in it
//! themselves.

use mixtral_engine::Program;
use mixtral_model::{Fp8Input, WeightFormat};

use crate::LinearPlan;
use crate::lower::CHUNK;
use crate::step_block::DECODE_SPLIT;

/// Bytes of the workspace for cuBLASLt's products: twice what NVIDIA recommends for Hopper.
pub const PRODUCT_WORKSPACE: usize = 64 << 20;

/// Where the workspaces lie, in bytes from the scratch memory's start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scratch {
    /// Partial results of decode attention: f32 `[S, splits, num_heads, head_dim + 4]` (output, maximum, sum, padding).
    pub attention_partials: usize,
    /// How many splits of a sequence and group of heads are done: i32 `[S, num_heads]`.
    pub attention_tickets: usize,
    /// Tokens in expert order: `[T · top_k, hidden]` of the program's type, as wide as the widest input of experts.
    pub permuted: usize,
    /// Inputs of fp8 linears, rounded to 8 bits: e4m3 `[T, widest input]`, or as many rows as there are logits.
    pub rounded: usize,
    /// The same of `expert_down`: e4m3 `[T · top_k, widest input]`.
    pub rounded_by_expert: usize,
    /// The scales of the rows of `rounded` and of `rounded_by_expert`, if they have scales of their own: f32, one a row.
    pub token_scales: usize,
    /// As above.
    pub token_scales_by_expert: usize,
    /// Products of cuBLASLt before a residual is added: `[T, widest such linear]` of the program's type. It shares its
    /// place with `permuted`, since neither is needed after its operation.
    pub product: usize,
    /// The workspace of cuBLASLt itself: [`PRODUCT_WORKSPACE`] bytes if it computes anything.
    pub workspace: usize,
    /// Assignments of each chunk for each local expert: i32 `[chunks, experts]`.
    pub chunk_sizes: usize,
    /// Cosines and sines of the step's positions: f32 pairs `[T, head_dim / 2]`.
    pub angles: usize,
    /// Adjusted logits of draws: f32 `[L, vocab]`.
    pub sampling: usize,
    /// Counters that any kernel may use: i32 `[1024]`.
    pub counters: usize,
    /// How many tiles of a linear are handed out, and how many CTAs are done: i32 `[2]`.
    pub turns: usize,
    /// Bytes in all.
    pub bytes: usize,
}

impl Scratch {
    /// The scratch memory of a program.
    #[must_use]
    pub fn new(program: &Program) -> Self {
        use mixtral_engine::{Epilogue, Op};
        let (l, kv) = (program.limits, program.kv);
        let heads = program
            .ops
            .iter()
            .map(|op| if let Op::Attention { num_heads, .. } = op { *num_heads } else { 0 })
            .max()
            .unwrap_or(0);
        let cols = |name: &str| program.buffer(name).map_or(0, |b| b.cols);
        let hidden = program
            .ops
            .iter()
            .map(|op| if let Op::ExpertGateUp { input, .. } = op { cols(input) } else { 0 })
            .max()
            .unwrap_or(0);
        let drawn = program.ops.iter().map(|op| if let Op::Sample { logits } = op { cols(logits) } else { 0 });
        let drawn = drawn.max().unwrap_or(0);
        let mut bytes = 0usize;
        let mut region = |size: usize| {
            let offset = bytes;
            bytes += size.next_multiple_of(1024);
            offset
        };
        let splits = l.max_seq_len.div_ceil(DECODE_SPLIT);
        let attention_partials = region(4 * l.max_batch_size * splits * heads * (kv.head_dim + 4));
        let attention_tickets = region(4 * l.max_batch_size * heads);
        let by_cublaslt = |op: &&Op| match op {
            Op::Linear { ladder, .. } => ladder.iter().any(|rung| rung.plan == LinearPlan::CublasLt.to_string()),
            _ => false,
        };
        let added_to = |op: &Op| match op {
            Op::Linear { epilogue: Epilogue::Residual, out, .. } => cols(out),
            _ => 0,
        };
        let products = program.ops.iter().filter(by_cublaslt);
        let product = products.clone().map(added_to).max().unwrap_or(0);
        let permuted = region(l.max_num_tokens * (program.top_k * hidden).max(product) * program.dtype.size());
        let workspace = region(if products.count() > 0 { PRODUCT_WORKSPACE } else { 0 });
        // The most that `size` makes of rows and columns of an input that is rounded.
        let rounded = |by_expert: bool, size: &dyn Fn(WeightFormat, usize, usize) -> usize| {
            let bytes = program.ops.iter().map(|op| match op {
                Op::Linear { input, weight, .. }
                | Op::ExpertGateUp { input, weight, .. }
                | Op::ExpertDown { input, weight, .. }
                    if matches!(op, Op::ExpertDown { .. }) == by_expert =>
                {
                    let rows = |rows| program.num_rows(rows, l.max_num_tokens, l.max_num_logits);
                    match (program.weight(weight), program.buffer(input)) {
                        (Some(weight), Some(buffer)) => size(weight.format, rows(buffer.rows), buffer.cols),
                        _ => 0,
                    }
                }
                _ => 0,
            });
            bytes.max().unwrap_or(0)
        };
        let elements = |format: WeightFormat, rows, cols| if format.is_fp8() { rows * cols } else { 0 };
        let scales = |format, rows, _| if format == WeightFormat::Fp8Rows(Fp8Input::Token) { 4 * rows } else { 0 };
        let [of_tokens, by_expert] =
            [false, true].map(|by_expert| [rounded(by_expert, &elements), rounded(by_expert, &scales)]);
        let [rounded, token_scales] = of_tokens.map(&mut region);
        let [rounded_by_expert, token_scales_by_expert] = by_expert.map(&mut region);
        let chunks = (l.max_num_tokens * program.top_k).div_ceil(CHUNK);
        let chunk_sizes = region(4 * chunks * program.num_experts);
        let angles = region(8 * l.max_num_tokens * (kv.head_dim / 2));
        let sampling = region(4 * l.max_num_logits.max(l.max_batch_size) * drawn);
        let counters = region(4096);
        let turns = region(8);
        Scratch {
            attention_partials,
            attention_tickets,
            permuted,
            rounded,
            rounded_by_expert,
            token_scales,
            token_scales_by_expert,
            product: permuted,
            workspace,
            chunk_sizes,
            angles,
            sampling,
            counters,
            turns,
            bytes,
        }
    }
}
