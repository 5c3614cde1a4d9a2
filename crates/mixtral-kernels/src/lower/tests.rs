//! Which kernels the operations of a layer of Mixtral 8x7B become.

use mixtral_engine::op::FusedNorm;
use mixtral_engine::{ElemType, Epilogue, KvLayout, Limits, Op, Program, Rows};
use mixtral_model::{DType, MoeNormalization};
use mixtral_testkit::assembly::Assembly;
use mixtral_testkit::decoder::{self, Geometry};

use crate::{Family, Launch, Schedule, Target};

fn name(text: &str) -> String {
    text.to_owned()
}

/// Everything of a layer but its large linears, twice where it matters that something comes once; then a draw.
fn layer(dtype: DType) -> Program {
    let mut a = Assembly::new(dtype);
    let (hidden, heads, head_dim) = (4096, 32, 128);
    a.program.kv = KvLayout { num_layers: 2, num_kv_heads: 8, head_dim, dtype };
    (a.program.num_experts, a.program.top_k, a.program.vocab_size) = (8, 2, 32_000);
    a.program.limits =
        Limits { max_batch_size: 64, max_num_tokens: 8192, max_seq_len: 4096, max_num_logits: 64, block_size: 64 };
    let scale = a.declare("scale", dtype, &[hidden]);
    let router = a.declare("router", DType::F32, &[8, hidden]);
    let table = a.declare("table", dtype, &[32_000, hidden]);
    for (buffer, rows, cols) in [
        ("x", Rows::Tokens, hidden),
        ("normed", Rows::Tokens, hidden),
        ("qkv", Rows::Tokens, (heads + 16) * head_dim),
        ("attended", Rows::Tokens, hidden),
        ("expert_output", Rows::Assignments, hidden),
        ("last", Rows::Logits, hidden),
    ] {
        a.activation(buffer, rows, cols);
    }
    a.buffer("router_logits", ElemType::F32, Rows::Tokens, 8);
    a.buffer("ids", ElemType::I32, Rows::Tokens, 2);
    a.buffer("weights", ElemType::F32, Rows::Tokens, 2);
    a.buffer("offsets", ElemType::I32, Rows::One, 9);
    a.buffer("order", ElemType::I32, Rows::Assignments, 1);
    a.buffer("logits", ElemType::F32, Rows::Logits, 32_000);
    a.op(Op::Embed { table, vocab_start: 0, out: name("x") });
    for layer in 0..2 {
        a.op(Op::RopeWriteKv { qkv: name("qkv"), num_heads: heads, theta: 1e6, layer });
        a.op(Op::Attention { query: name("qkv"), num_heads: heads, window: None, layer, out: name("attended") });
    }
    a.op(Op::Norm { input: name("x"), weight: scale.clone(), eps: 1e-5, out: name("normed") });
    a.op(Op::Linear {
        input: name("normed"),
        weight: router,
        rows: None,
        epilogue: Epilogue::F32,
        residual: None,
        out: name("router_logits"),
        ladder: vec![],
    });
    a.op(Op::Route {
        logits: name("router_logits"),
        normalization: MoeNormalization::Renorm,
        layer: 0,
        experts: [0, 8],
        expert_ids: name("ids"),
        expert_weights: name("weights"),
        offsets: name("offsets"),
        order: name("order"),
    });
    a.op(Op::Combine {
        input: name("expert_output"),
        expert_ids: name("ids"),
        expert_weights: name("weights"),
        experts: [0, 8],
        residual: Some(name("x")),
        out: name("x"),
        norm: Some(FusedNorm { weight: scale, eps: 1e-5, out: name("normed") }),
    });
    a.op(Op::GatherRows { input: name("x"), out: name("last") });
    a.op(Op::Sample { logits: name("logits") });
    a.program
}

/// A line a launch: operation, kernel, threads, dynamic shared memory, grid.
fn lines(launches: &[Launch]) -> String {
    let line = |l: &Launch| {
        // The table's 64 constants are not told.
        let symbol = l.kernel.symbol.split_once("angles<").map_or(&*l.kernel.symbol, |_| "attention::angles");
        format!("{} {symbol} {} {} {:?}\n", l.op, l.kernel.threads, l.kernel.shared_bytes, l.grid)
    };
    launches.iter().map(line).collect()
}

#[test]
fn a_layer_becomes_these_kernels() {
    let schedule = Schedule::new(&layer(DType::Bf16), Target { family: Family::Hopper }).expect("kernels");
    let (_, one) = schedule.for_step(1, true).expect("a regime");
    let (_, many) = schedule.for_step(8192, false).expect("a regime");
    insta::assert_snapshot!(format!("one decode\n{}\nprompts of 8192 tokens\n{}", lines(one), lines(many)));
}

#[test]
fn every_regime_has_the_kernels_of_its_steps() {
    for (dtype, family) in
        [(DType::F32, Family::Portable), (DType::F16, Family::Portable), (DType::Bf16, Family::Hopper)]
    {
        let program = layer(dtype);
        let schedule = Schedule::new(&program, Target { family }).expect("kernels");
        for (regime, launches) in &schedule.regimes {
            let count = |part: &str| launches.iter().filter(|l| l.kernel.symbol.contains(part)).count();
            assert_eq!(count("::angles<"), 1, "one table for all layers");
            assert_eq!(count("::rope_write_kv<"), 2);
            // Prefill attention has no work where every sequence is a decode.
            let tensor_cores = dtype != DType::F32;
            let by_family = |portable, hopper, expected| {
                let expected = if family == Family::Hopper { (0, expected) } else { (expected, 0) };
                assert_eq!((count(portable), count(hopper)), expected);
            };
            by_family("::decode_paged<", "::decode_tma<", if tensor_cores { 2 } else { 0 });
            by_family("::prefill_paged<", "::prefill_wgmma<", if tensor_cores && !regime.decodes { 2 } else { 0 });
            assert_eq!(count("::simt<"), if tensor_cores { 0 } else { 2 });
            // The router lists the assignments itself as long as one CTA can.
            assert_eq!(count("::router<"), 1);
            assert_eq!(count("::place_chunks<"), usize::from(regime.max_tokens > 2048));
        }
    }
}

#[test]
fn a_cache_of_another_type_is_refused() {
    let mut program = layer(DType::Bf16);
    program.kv.dtype = DType::F16;
    let error = Schedule::new(&program, Target { family: Family::Portable }).expect_err("no kernels");
    assert!(error.to_string().contains("only equal types have kernels"), "{error}");
}

/// An engine's kernels are enough for its first layers alone.
#[test]
fn a_program_cut_short_needs_no_other_kernels() {
    let geometry = Geometry { num_layers: 3, hidden_size: 256, head_dim: 128, ..Geometry::small(DType::Bf16) };
    for fused in [true, false] {
        let whole = decoder::program(&geometry, fused);
        for family in [Family::Portable, Family::Hopper] {
            let schedule = Schedule::new(&whole, Target { family }).expect("supported");
            for layers in 1..3 {
                let short = whole.first_layers(layers).expect("layers alike");
                let short = Schedule::new(&short, Target { family }).expect("supported");
                assert!(short.kernels().is_subset(&schedule.kernels()), "{layers} layers, {family:?}");
            }
        }
    }
}
