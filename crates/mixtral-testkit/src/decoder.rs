//! The program of a small decoder with dummy weights, written by hand. All fusions are on or off.

use mixtral_engine::op::FusedNorm;
use mixtral_engine::{Epilogue, KvScale, Op, Program, Rows};
use mixtral_model::{CacheFormat, DType, ElemType, MoeNormalization, Piece, WeightFormat};

use crate::assembly::Assembly;

/// Geometry of the decoder.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Type of weights and activations.
    pub dtype: DType,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of an expert.
    pub intermediate_size: usize,
    /// Layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Experts.
    pub num_experts: usize,
    /// Experts a token.
    pub top_k: usize,
    /// Attention window.
    pub window: Option<usize>,
    /// Vocabulary.
    pub vocab_size: usize,
    /// Tokens of a KV block.
    pub block_size: usize,
}

impl Geometry {
    /// A small geometry. Only the head's size is a multiple of a vector's.
    #[must_use]
    pub const fn small(dtype: DType) -> Self {
        Geometry {
            dtype,
            hidden_size: 40,
            intermediate_size: 50,
            num_layers: 2,
            num_heads: 6,
            num_kv_heads: 2,
            head_dim: 16,
            num_experts: 5,
            top_k: 2,
            window: None,
            vocab_size: 61,
            block_size: 16,
        }
    }

    /// A small geometry with sizes that tensor cores take.
    #[must_use]
    pub const fn round(dtype: DType) -> Self {
        Geometry {
            hidden_size: 256,
            intermediate_size: 384,
            num_heads: 8,
            num_kv_heads: 2,
            head_dim: 128,
            num_experts: 8,
            vocab_size: 512,
            block_size: 64,
            ..Geometry::small(dtype)
        }
    }
}

/// The decoder's program: with every fusion if `fused`, else with none.
#[must_use]
pub fn program(g: &Geometry, fused: bool) -> Program {
    let mut a = Assembly::new(g.dtype);
    let p = &mut a.program;
    (p.vocab_size, p.num_layers, p.num_experts, p.top_k) = (g.vocab_size, g.num_layers, g.num_experts, g.top_k);
    (p.kv.num_layers, p.kv.num_kv_heads, p.kv.head_dim) = (g.num_layers, g.num_kv_heads, g.head_dim);
    (p.limits.max_num_logits, p.limits.block_size) = (p.limits.max_num_tokens, g.block_size);
    let (h, q, kv) = (g.hidden_size, g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim);
    let all = [0, g.num_experts];
    let table = weight(&mut a, "embed_tokens", g.dtype, &[g.vocab_size, h]);
    let mut x = a.activation("embedded", Rows::Tokens, h);
    a.op(Op::Embed { table, vocab_start: 0, out: x.clone() });
    let mut y = a.activation("normalized", Rows::Tokens, h);
    let scale = weight(&mut a, "0.input_norm", g.dtype, &[h]);
    a.op(Op::Norm { input: x.clone(), weight: scale, eps: 1e-5, out: y.clone() });
    for layer in 0..g.num_layers {
        let named = |what: &str| format!("{layer}.{what}");
        let qkv = weight(&mut a, &named("qkv"), g.dtype, &[q + 2 * kv, h]);
        let heads = if fused {
            let out = a.activation(&named("qkv"), Rows::Tokens, q + 2 * kv);
            a.op(linear(&y, &qkv, None, Epilogue::Store, None, &out));
            a.op(Op::RopeWriteKv { qkv: out.clone(), num_heads: g.num_heads, theta: 1e4, layer, directions: None });
            out
        } else {
            let (query, key) =
                (a.activation(&named("q"), Rows::Tokens, q), a.activation(&named("k"), Rows::Tokens, kv));
            let value = a.activation(&named("v"), Rows::Tokens, kv);
            for (rows, out) in [([0, q], &query), ([q, q + kv], &key), ([q + kv, q + 2 * kv], &value)] {
                a.op(linear(&y, &qkv, Some(rows), Epilogue::Store, None, out));
            }
            a.op(Op::Rope { data: query.clone(), num_heads: g.num_heads, theta: 1e4 });
            a.op(Op::Rope { data: key.clone(), num_heads: g.num_kv_heads, theta: 1e4 });
            a.op(Op::WriteKv { key, value, layer, directions: None });
            query
        };
        let attended = a.activation(&named("attended"), Rows::Tokens, q);
        let (num_heads, window) = (g.num_heads, g.window);
        a.op(Op::Attention { query: heads, num_heads, window, fp8_context: false, layer, out: attended.clone() });
        let dense = weight(&mut a, &named("dense"), g.dtype, &[h, q]);
        if fused {
            a.op(linear(&attended, &dense, None, Epilogue::Residual, Some(&x), &x));
        } else {
            let projected = a.activation(&named("projected"), Rows::Tokens, h);
            a.op(linear(&attended, &dense, None, Epilogue::Store, None, &projected));
            let sum = a.activation(&named("sum"), Rows::Tokens, h);
            a.op(Op::Add { a: projected, b: x, out: sum.clone() });
            x = sum;
        }
        let scale = weight(&mut a, &named("post_norm"), g.dtype, &[h]);
        y = a.activation(&named("post"), Rows::Tokens, h);
        a.op(Op::Norm { input: x.clone(), weight: scale, eps: 1e-5, out: y.clone() });

        let router = weight(&mut a, &named("router"), DType::F32, &[g.num_experts, h]);
        let logits = a.buffer(&named("logits"), ElemType::F32, Rows::Tokens, g.num_experts);
        a.op(linear(&y, &router, None, Epilogue::F32, None, &logits));
        let expert_ids = a.buffer(&named("ids"), ElemType::I32, Rows::Tokens, g.top_k);
        let expert_weights = a.buffer(&named("weights"), ElemType::F32, Rows::Tokens, g.top_k);
        let offsets = a.buffer(&named("offsets"), ElemType::I32, Rows::One, g.num_experts + 1);
        let order = a.buffer(&named("order"), ElemType::I32, Rows::Assignments, 1);
        let normalization = MoeNormalization::Renorm;
        if fused {
            a.op(Op::Route {
                logits,
                normalization,
                layer,
                experts: all,
                expert_ids: expert_ids.clone(),
                expert_weights: expert_weights.clone(),
                offsets: offsets.clone(),
                order: order.clone(),
            });
        } else {
            let probs = a.buffer(&named("probs"), ElemType::F32, Rows::Tokens, g.num_experts);
            a.op(Op::Softmax { logits, probs: probs.clone() });
            let (ids, weights) = (expert_ids.clone(), expert_weights.clone());
            a.op(Op::TopK { probs, normalization, layer, expert_ids: ids, expert_weights: weights });
            let (offsets, order) = (offsets.clone(), order.clone());
            a.op(Op::ExpertSort { expert_ids: expert_ids.clone(), experts: all, offsets, order });
        }
        let inter = g.intermediate_size;
        let fc = weight(&mut a, &named("fc"), g.dtype, &[g.num_experts, 2 * inter, h]);
        let gated = a.activation(&named("gated"), Rows::Assignments, inter);
        let gate_up = if fused { gated.clone() } else { a.activation(&named("gate_up"), Rows::Assignments, 2 * inter) };
        a.op(Op::ExpertGateUp {
            input: y.clone(),
            weight: fc,
            offsets: offsets.clone(),
            order: order.clone(),
            silu_mul: fused,
            out: gate_up.clone(),
            ladder: vec![],
        });
        if !fused {
            a.op(Op::SiluMul { input: gate_up, out: gated.clone() });
        }
        let proj = weight(&mut a, &named("proj"), g.dtype, &[g.num_experts, h, inter]);
        let down = a.activation(&named("down"), Rows::Assignments, h);
        a.op(Op::ExpertDown { input: gated, weight: proj, offsets, order, out: down.clone(), ladder: vec![] });
        let next =
            if layer + 1 == g.num_layers { "final_norm".to_owned() } else { format!("{}.input_norm", layer + 1) };
        let scale = weight(&mut a, &next, g.dtype, &[h]);
        y = a.activation(&named("next"), Rows::Tokens, h);
        let norm = FusedNorm { weight: scale, eps: 1e-5, out: y.clone() };
        a.op(Op::Combine {
            input: down,
            expert_ids,
            expert_weights,
            experts: all,
            residual: Some(x.clone()),
            out: x.clone(),
            norm: fused.then(|| norm.clone()),
        });
        if !fused {
            a.op(Op::Norm { input: x.clone(), weight: norm.weight, eps: norm.eps, out: norm.out });
        }
    }
    let last = a.activation("last", Rows::Logits, h);
    a.op(Op::GatherRows { input: y, out: last.clone() });
    // Three more rows are padding. Their tokens are never drawn.
    let head = weight(&mut a, "lm_head", g.dtype, &[g.vocab_size + 3, h]);
    let logits = a.buffer("vocabulary", ElemType::F32, Rows::Logits, g.vocab_size + 3);
    a.op(linear(&last, &head, None, Epilogue::F32, None, &logits));
    a.op(Op::Sample { logits });
    a.program.plan_arena();
    a.program
}

/// Gives the linears of attention and of the experts this format, as a quantized model has it.
pub fn quantize(program: &mut Program, format: WeightFormat) {
    let linears: Vec<String> = program
        .ops
        .iter()
        .filter(|op| !matches!(op, Op::Linear { epilogue: Epilogue::F32, .. }))
        .filter_map(|op| match op {
            Op::Linear { weight, .. } | Op::ExpertGateUp { weight, .. } | Op::ExpertDown { weight, .. } => {
                Some(weight.clone())
            }
            _ => None,
        })
        .collect();
    program
        .weights
        .iter_mut()
        .filter(|weight| linears.contains(&weight.name))
        .for_each(|weight| weight.format = format);
}

/// Gives the program an fp8 cache with these scales in every layer.
pub fn cache_in_fp8(program: &mut Program, scale: KvScale) {
    (program.kv.format, program.kv_scales) = (CacheFormat::Fp8, vec![scale; program.kv.num_layers]);
}

/// Adds a weight that is one whole dummy tensor. Weights of norms are 1.
pub(crate) fn weight(a: &mut Assembly, name: &str, dtype: DType, shape: &[usize]) -> String {
    let name = a.declare(&format!("{name}.weight"), dtype, shape);
    if let Some(weight) = a.program.weights.last_mut() {
        let (rows, cols) = (weight.rows(), weight.cols());
        let source = name.clone();
        let piece = Piece { source, source_rows: rows, source_cols: cols, rows: 0..rows, cols: 0..cols, target_row: 0 };
        weight.pieces.push(piece);
    }
    name
}

fn linear(
    input: &str,
    weight: &str,
    rows: Option<[usize; 2]>,
    epilogue: Epilogue,
    residual: Option<&str>,
    out: &str,
) -> Op {
    Op::Linear {
        input: input.to_owned(),
        weight: weight.to_owned(),
        rows,
        epilogue,
        residual: residual.map(str::to_owned),
        out: out.to_owned(),
        ladder: vec![],
    }
}
