//! Which kernels the operations of a layer of Mixtral 8x7B become.

use std::collections::BTreeSet;

use mixtral_engine::op::FusedNorm;
use mixtral_engine::{Epilogue, KvLayout, KvScale, Limits, Op, Program, Rows, Rung};
use mixtral_model::{DType, ElemType, MoeNormalization};
use mixtral_testkit::assembly::Assembly;
use mixtral_testkit::cases;
use mixtral_testkit::decoder::{self, Geometry};
use mixtral_testkit::quantized;

use crate::plan::RUNGS;
use crate::select::{CUBLASLT_ABOVE, LinearShape};
use crate::{Family, LinearPlan, Schedule, Target, WeightRows, Work, select};

fn name(text: &str) -> String {
    text.to_owned()
}

/// All operations of a layer except its large linears, then a draw. Operations come twice where the test checks that
/// their launch comes once.
fn layer(dtype: DType) -> Program {
    let mut a = Assembly::new(dtype);
    let (hidden, heads, head_dim) = (4096, 32, 128);
    a.program.kv =
        KvLayout { num_layers: 2, num_kv_heads: 8, head_dim, dtype, format: mixtral_model::CacheFormat::Plain };
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
        a.op(Op::RopeWriteKv { qkv: name("qkv"), num_heads: heads, theta: 1e6, layer, directions: None });
        a.op(Op::Attention {
            query: name("qkv"),
            num_heads: heads,
            window: None,
            fp8_context: false,
            layer,
            out: name("attended"),
        });
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

/// One line for each launch (operation, kernel, threads, dynamic shared memory, grid) or product (operands and sizes).
fn lines(work: &[Work]) -> String {
    let line = |work: &Work| match work {
        Work::Launch(l) => {
            // The 64 constants in the symbol of `attention::angles` are left out.
            let symbol = l.kernel.symbol.split_once("angles<").map_or(&*l.kernel.symbol, |_| "attention::angles");
            format!("{} {symbol} {} {} {:?}\n", l.op, l.kernel.threads, l.kernel.shared_bytes, l.grid)
        }
        Work::Product(p) => format!(
            "{} cublaslt {:?} [{}, {}] x {:?} -> {:?}, {} to {}\n",
            p.op, p.weight, p.rows, p.depth, p.tokens, p.out, p.dtype, p.out_type
        ),
    };
    work.iter().map(line).collect()
}

#[test]
fn a_layer_becomes_these_kernels() {
    let schedule = Schedule::new(&layer(DType::Bf16), Target { family: Family::Hopper }).expect("kernels");
    let (_, one) = schedule.for_step(1, true).expect("a regime");
    let (_, many) = schedule.for_step(8192, false).expect("a regime");
    insta::assert_snapshot!(format!("one decode\n{}\nprompts of 8192 tokens\n{}", lines(one), lines(many)));
}

/// The launches of the linears of a model with weights of this format.
fn fp8_linears(word: &str) -> String {
    let mut program = decoder::program(&Geometry::round(DType::Bf16), true);
    decoder::quantize(&mut program, word.parse().expect("a format"));
    (program.limits.max_num_tokens, program.limits.max_num_logits) = (4096, 8);
    program.plan_arena();
    let of = |family| Schedule::new(&program, Target { family }).expect("kernels");
    let (hopper, portable) = (of(Family::Hopper), of(Family::Portable));
    let linears = |schedule: &Schedule, tokens, decodes| {
        let (_, work) = schedule.for_step(tokens, decodes).expect("a regime");
        let ops = |work: &Work| {
            matches!(
                program.ops[work.op()],
                Op::Linear { epilogue: Epilogue::Store | Epilogue::Residual, .. }
                    | Op::ExpertGateUp { .. }
                    | Op::ExpertDown { .. }
            )
        };
        lines(&work.iter().filter(|work| ops(work)).cloned().collect::<Vec<_>>())
    };
    let text = format!(
        "one decode\n{}\nprompts of 4096 tokens\n{}\none decode, anywhere\n{}",
        linears(&hopper, 1, true),
        linears(&hopper, 4096, false),
        linears(&portable, 1, true)
    );
    // Everything that is read from a file, written and read again.
    for schedule in [hopper, portable] {
        assert_eq!(Schedule::parse(&schedule.to_text(), &program).expect("its own text"), schedule);
    }
    text
}

#[test]
fn an_fp8_model_becomes_these_kernels() {
    insta::assert_snapshot!(fp8_linears("fp8"));
}

#[test]
fn fp8_rows_become_these_kernels() {
    insta::assert_snapshot!(fp8_linears("fp8:row:token"));
}

#[test]
fn cases_of_rope_and_decodes_are_computed_by_the_kernel_that_does_both() {
    for case in [DType::F32, DType::F16, DType::Bf16].into_iter().flat_map(cases::decodes_by_tiles) {
        let (program, inputs) = (&case.assembly.program, &case.inputs);
        let schedule = Schedule::new(program, Target { family: Family::Hopper }).expect("kernels");
        let decodes = inputs.num_decodes == inputs.num_seqs() && inputs.num_logits() == inputs.num_seqs();
        let (_, work) = schedule.for_step(inputs.num_tokens(), decodes).expect("a regime");
        let does_both = work.iter().filter_map(Work::kernel).any(|kernel| kernel.symbol.contains("::rope_decode_tma<"));
        // It has registers for groups of up to eight heads.
        let few_heads =
            |op: &Op| matches!(op, Op::Attention { num_heads, .. } if num_heads / program.kv.num_kv_heads <= 8);
        let expected = case.name.contains("rope_write_kv and decodes")
            && program.dtype != DType::F32
            && program.ops.iter().any(few_heads);
        assert_eq!(does_both, expected, "{}", case.name);
    }
}

/// A warp that waits for a stage of the ring which it keeps itself shows only if K has more blocks than the ring has stages. So of three
/// formats each tile that Mixtral's linears run has a case with such a K.
#[test]
fn every_tile_of_packed_weights_has_a_case_that_is_longer_than_its_ring() {
    let mut tiles = BTreeSet::new();
    for (word, case) in
        quantized::LONG.iter().flat_map(|word| quantized::long_cases(word).into_iter().map(move |c| (word, c)))
    {
        let schedule = Schedule::new(&case.assembly.program, Target { family: Family::Hopper }).expect("kernels");
        let (_, work) = schedule.for_step(case.inputs.num_tokens(), false).expect("a regime");
        for kernel in work.iter().filter_map(Work::kernel) {
            let Some((kind, config)) = kernel.symbol.split_once("<linear::Config<weight::Quantized<") else { continue };
            let (_, config) = config.split_once(">, ").expect("a format, then numbers");
            let numbers: Vec<usize> = config.split(", ").map_while(|n| n.parse().ok()).collect();
            let behind: Vec<usize> = config.split(", ").skip(8).map_while(|n| n.parse().ok()).collect();
            let ([rows, cols, _, depth, stages, ..], [_, k, ..]) = (&numbers[..], &behind[..]) else {
                panic!("{config}")
            };
            if k.div_ceil(*depth) > *stages {
                tiles.insert(format!("{} {rows}x{cols} {word}", kind.trim_start_matches("linear::")));
            }
        }
    }
    // What Mixtral 8x7B and 8x22B run, alone and in two ranks: q/k/v and o, gate/up and down.
    let dense = [[6144, 4096], [4096, 4096], [8192, 6144], [6144, 6144], [3072, 4096], [4096, 2048]]
        .map(|shape| (false, shape));
    let grouped =
        [[28672, 4096], [4096, 14336], [32768, 6144], [6144, 16384], [14336, 4096]].map(|shape| (true, shape));
    for (word, (grouped, [rows, depth])) in
        quantized::LONG.iter().flat_map(|word| dense.iter().chain(&grouped).map(move |shape| (word, *shape)))
    {
        let weight = WeightRows::packed(word);
        let shape =
            LinearShape { rows, depth, tokens: ElemType::Bf16, weight, silu_mul: grouped && rows > depth, grouped };
        for tokens in RUNGS.into_iter().chain([8192]) {
            if let LinearPlan::Wgmma { rows, cols, .. } = select::plan(&shape, tokens, Family::Hopper) {
                let tile = format!("{} {rows}x{cols} {word}", if grouped { "grouped" } else { "dense" });
                assert!(tiles.contains(&tile), "{tile} of {shape:?} and {tokens} tokens");
            }
        }
    }
    insta::assert_snapshot!(tiles.into_iter().collect::<Vec<_>>().join("\n"));
}

#[test]
fn every_regime_has_the_kernels_of_its_steps() {
    for (dtype, family) in
        [(DType::F32, Family::Portable), (DType::F16, Family::Portable), (DType::Bf16, Family::Hopper)]
    {
        let program = layer(dtype);
        let schedule = Schedule::new(&program, Target { family }).expect("kernels");
        for (regime, work) in &schedule.regimes {
            let kernels = || work.iter().filter_map(Work::kernel);
            let count = |part: &str| kernels().filter(|kernel| kernel.symbol.contains(part)).count();
            assert_eq!(count("::angles<"), 1, "one table for all layers");
            // Few decodes have one kernel for rotation and attention.
            let together = family == Family::Hopper && regime.decodes && regime.max_tokens <= 8;
            assert_eq!(count("::rope_decode_tma<"), if together { 2 } else { 0 });
            assert_eq!(count("::rope_write_kv<"), if together { 0 } else { 2 });
            // Prefill attention is not launched where every sequence is a decode.
            let tensor_cores = dtype != DType::F32;
            let by_family = |portable, hopper, expected| {
                let expected = if family == Family::Hopper { (0, expected) } else { (expected, 0) };
                assert_eq!((count(portable), count(hopper)), expected);
            };
            by_family("::decode_paged<", "::decode_tma<", if tensor_cores && !together { 2 } else { 0 });
            by_family("::prefill_paged<", "::prefill_wgmma<", if tensor_cores && !regime.decodes { 2 } else { 0 });
            assert_eq!(count("::simt<"), if tensor_cores { 0 } else { 2 });
            // The router lists the assignments itself as long as one CTA can.
            assert_eq!(count("::router<"), 1);
            assert_eq!(count("::place_chunks<"), usize::from(regime.max_tokens > 2048));
        }
    }
}

#[test]
fn an_fp8_cache_has_kernels_of_its_own() {
    let of_cache = |family| {
        let mut program = layer(DType::Bf16);
        decoder::cache_in_fp8(&mut program, KvScale { key: 0.02, value: 0.01 });
        let schedule = Schedule::new(&program, Target { family }).expect("kernels");
        schedule.check(&program).expect("within the program");
        let (_, work) = schedule.for_step(8192, false).expect("a regime");
        let of_cache = |work: &Work| matches!(work.op(), 1 | 2);
        lines(&work.iter().filter(|&work| of_cache(work)).cloned().collect::<Vec<_>>())
    };
    insta::assert_snapshot!(format!("portable\n{}\nHopper\n{}", of_cache(Family::Portable), of_cache(Family::Hopper)));
}

#[test]
fn a_cache_of_another_type_is_refused() {
    let mut program = layer(DType::Bf16);
    program.kv.dtype = DType::F16;
    let error = Schedule::new(&program, Target { family: Family::Portable }).expect_err("no kernels");
    assert!(error.to_string().contains("only equal types have kernels"), "{error}");
}

/// An engine's kernels suffice to run only its first layers.
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

/// The linears of a layer, of the logits and of experts, with cuBLASLt wherever it can compute them. Their order is
/// that of the snapshot below.
fn linears(dtype: DType) -> Program {
    let mut a = Assembly::new(dtype);
    (a.program.num_experts, a.program.top_k) = (8, 2);
    a.program.limits =
        Limits { max_batch_size: 64, max_num_tokens: 2048, max_seq_len: 4096, max_num_logits: 2048, block_size: 64 };
    a.activation("x", Rows::Tokens, 512);
    a.activation("qkv", Rows::Tokens, 768);
    a.activation("part", Rows::Tokens, 512);
    a.activation("odd", Rows::Tokens, 500);
    a.activation("last", Rows::Logits, 512);
    a.activation("gate_up", Rows::Assignments, 128);
    a.buffer("scores", ElemType::F32, Rows::Tokens, 64);
    a.buffer("logits", ElemType::F32, Rows::Logits, 1024);
    a.buffer("offsets", ElemType::I32, Rows::One, 9);
    a.buffer("order", ElemType::I32, Rows::Assignments, 1);
    for (weight, shape) in
        [("qkv", vec![768, 512]), ("dense", vec![1024, 512]), ("odd", vec![500, 512]), ("scores", vec![64, 512])]
    {
        a.declare(weight, dtype, &shape);
    }
    a.declare("lm_head", dtype, &[1024, 512]);
    a.declare("fc", dtype, &[8, 256, 512]);
    let linear = |input: &str, weight: &str, rows, epilogue, out: &str| Op::Linear {
        input: name(input),
        weight: name(weight),
        rows,
        epilogue,
        residual: (epilogue == Epilogue::Residual).then(|| name(out)),
        out: name(out),
        ladder: vec![],
    };
    a.op(linear("x", "qkv", None, Epilogue::Store, "qkv"));
    a.op(linear("x", "dense", Some([512, 1024]), Epilogue::Residual, "part"));
    a.op(linear("x", "scores", None, Epilogue::F32, "scores"));
    a.op(linear("x", "odd", None, Epilogue::Store, "odd"));
    a.op(linear("last", "lm_head", None, Epilogue::F32, "logits"));
    a.op(Op::ExpertGateUp {
        input: name("x"),
        weight: name("fc"),
        offsets: name("offsets"),
        order: name("order"),
        silu_mul: true,
        out: name("gate_up"),
        ladder: vec![],
    });
    a.program
}

/// Gives a program ladders of a family's plans, with cuBLASLt wherever it can compute a linear.
fn with_cublaslt(mut program: Program, family: Family) -> Program {
    let ladders: Vec<_> = program.ops.iter().map(|op| select::ladder(&program, op, family, true)).collect();
    for (op, rungs) in program.ops.iter_mut().zip(ladders) {
        if let Op::Linear { ladder, .. } | Op::ExpertGateUp { ladder, .. } | Op::ExpertDown { ladder, .. } = op {
            *ladder = rungs;
        }
    }
    program
}

#[test]
fn cublaslt_computes_dense_linears_of_long_steps() {
    let program = with_cublaslt(linears(DType::Bf16), Family::Hopper);
    let ladders = program.ops.iter().map(|op| match op {
        Op::Linear { weight, ladder, .. } | Op::ExpertGateUp { weight, ladder, .. } => {
            let rungs: Vec<_> = ladder.iter().map(|rung| format!("{} {}", rung.max_tokens, rung.plan)).collect();
            format!("{weight}: {}\n", rungs.join(", "))
        }
        _ => String::new(),
    });
    let ladders: String = ladders.collect();
    let schedule = Schedule::new(&program, Target { family: Family::Hopper }).expect("kernels");
    let (_, many) = schedule.for_step(2048, false).expect("a regime");
    insta::assert_snapshot!(format!("{ladders}\nprompts of 2048 tokens\n{}", lines(many)));
    // cuBLASLt needs no architecture of its own, so it serves both families. It leaves all other regimes alone; some of
    // these are captured.
    for family in [Family::Hopper, Family::Portable] {
        let schedule = Schedule::new(&program, Target { family }).expect("kernels");
        for (regime, work) in &schedule.regimes {
            let products = work.iter().filter(|work| matches!(work, Work::Product(_))).count();
            assert_eq!(products, if regime.max_tokens > CUBLASLT_ABOVE { 3 } else { 0 }, "{regime:?}");
            assert!(products == 0 || !regime.decodes, "{regime:?}");
        }
    }
}

#[test]
fn cublaslt_has_its_workspace_only_where_it_is_used() {
    let program = linears(DType::Bf16);
    let plain = Schedule::new(&program, Target { family: Family::Hopper }).expect("kernels").scratch_bytes;
    let program = with_cublaslt(program, Family::Hopper);
    let with = Schedule::new(&program, Target { family: Family::Hopper }).expect("kernels").scratch_bytes;
    assert_eq!(with, plain + crate::scratch::PRODUCT_WORKSPACE);
    // A product that a residual is added to lies in the workspace of gathered tokens. Without experts, that workspace
    // exists for the product alone.
    let mut dense = linears(DType::Bf16);
    dense.ops.truncate(2);
    (dense.num_experts, dense.top_k) = (0, 0);
    let [without, with] = [dense.clone(), with_cublaslt(dense, Family::Hopper)]
        .map(|program| Schedule::new(&program, Target { family: Family::Hopper }).expect("kernels").scratch_bytes);
    assert_eq!(with, without + crate::scratch::PRODUCT_WORKSPACE + 2048 * 512 * 2);
}

#[test]
fn a_plan_that_cublaslt_cannot_follow_is_chosen_anew() {
    // An engine's file might hold such ladders.
    let mut program = linears(DType::Bf16);
    let limits = program.limits;
    for op in &mut program.ops {
        if let Op::Linear { ladder, .. } | Op::ExpertGateUp { ladder, .. } = op {
            *ladder = vec![Rung { max_tokens: limits.max_num_tokens, plan: name("cublaslt") }];
        }
    }
    let schedule = Schedule::new(&program, Target { family: Family::Hopper }).expect("kernels");
    for (regime, work) in &schedule.regimes {
        let products: Vec<usize> = work.iter().filter(|work| matches!(work, Work::Product(_))).map(Work::op).collect();
        assert_eq!(products, if regime.max_tokens > CUBLASLT_ABOVE { vec![0, 1, 2] } else { vec![] }, "{regime:?}");
    }
    // cuBLASLt is only asked for 16-bit types, so an f32 program has no products.
    let schedule =
        Schedule::new(&with_cublaslt(linears(DType::F32), Family::Hopper), Target { family: Family::Hopper });
    let work = schedule.expect("kernels").regimes.into_iter().flat_map(|(_, work)| work).collect::<Vec<_>>();
    assert!(work.iter().all(|work| work.kernel().is_some()));
}

/// A combine is part of the all-reduce behind it, unless the all-reduce writes where the combine still reads: an engine of an older
/// version may have planned so.
#[test]
fn a_combine_is_part_of_its_all_reduce_where_memory_allows() {
    let kernels = |overlapping: bool| {
        let mut a = Assembly::new(DType::Bf16);
        (a.program.world_size, a.program.tp_size, a.program.num_experts, a.program.top_k) = (2, 2, 8, 2);
        a.activation("expert_output", Rows::Assignments, 64);
        a.activation("share", Rows::Tokens, 64);
        a.activation("sum", Rows::Tokens, 64);
        a.buffer("ids", ElemType::I32, Rows::Tokens, 2);
        a.buffer("weights", ElemType::F32, Rows::Tokens, 2);
        a.op(Op::Combine {
            input: name("expert_output"),
            expert_ids: name("ids"),
            expert_weights: name("weights"),
            experts: [0, 8],
            residual: None,
            out: name("share"),
            norm: None,
        });
        a.op(Op::AllReduce { input: name("share"), residual: None, out: name("sum"), norm: None });
        a.program.plan_arena();
        if overlapping {
            let input = a.program.buffer("expert_output").expect("declared").offset;
            a.program.buffers[2].offset = input;
        }
        let schedule = Schedule::new(&a.program, Target { family: Family::Portable }).expect("kernels");
        let (_, works) = schedule.for_step(1, true).expect("a regime").clone();
        let functions =
            works.iter().filter_map(Work::kernel).map(|k| k.symbol.split('<').next().unwrap_or("").to_owned());
        functions.collect::<Vec<_>>()
    };
    assert_eq!(kernels(false), ["exchange::begin", "exchange::combine_all_reduce"]);
    assert_eq!(kernels(true), ["exchange::begin", "moe::combine", "exchange::all_reduce"]);
}
