//! Compares launches with the signatures in the kernels' sources: names, order and kinds of parameters, and what each
//! points at. Compares the structures of the step block with `base/step.cuh` in the same way. Needs no compiler and no
//! GPU.

use std::collections::BTreeSet;

use mixtral_engine::op::FusedNorm;
use mixtral_engine::{Epilogue, KvScale, Op, Program, Rows};
use mixtral_kernels::lower::observe::{Lists, Observation};
use mixtral_kernels::step_block::{Array, DECODE_SPLIT, MAX_BEST, PREFILL_TILE, STRUCTURES};
use mixtral_kernels::{
    Arg, ExchangeArg, Family, Kernel, Launch, PackArg, PieceArg, ProbeArg, Schedule, Sources, Target, Work,
};
use mixtral_model::{DType, ElemType, MoeNormalization};
use mixtral_testkit::assembly::Assembly;
use mixtral_testkit::decoder::{self, Geometry};
use serde_json::Value;

/// What a signature says about a parameter.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    TensorMap,
    /// A pointer to a type, named as in the source. `written` tells that it is not `const`.
    Pointer {
        to: String,
        written: bool,
    },
    Number {
        bytes: usize,
    },
}

/// Splits `text`, which begins behind an opening parenthesis, at the parenthesis that closes it.
fn closed(text: &str) -> (&str, &str) {
    let mut open = 1;
    let end = text.find(|c| {
        open += match c {
            '(' => 1,
            ')' => -1,
            _ => 0,
        };
        open == 0
    });
    let end = end.expect("a closing parenthesis");
    (&text[..end], &text[end + 1..])
}

/// The parameters of the kernel `name` in a header's text.
fn parameters(text: &str, name: &str) -> Vec<(String, Kind)> {
    let signatures = text.split("__global__").skip(1).filter_map(|rest| {
        let rest = rest.trim_start().strip_prefix("void")?.trim_start();
        let rest = match rest.strip_prefix("__launch_bounds__(") {
            Some(bounds) => closed(bounds).1,
            None => rest,
        };
        let (found, list) = rest.split_once('(')?;
        (found.trim() == name).then(|| closed(list).0)
    });
    let found: Vec<&str> = signatures.collect();
    assert_eq!(found.len(), 1, "definitions of kernel `{name}`");
    found[0].split(',').map(parameter).collect()
}

fn parameter(text: &str) -> (String, Kind) {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (kind, name) = text.rsplit_once(' ').expect("a type and a name");
    let kind = match kind.trim_start_matches("const ") {
        "__grid_constant__ TensorMap" => Kind::TensorMap,
        // The pointer type of a weight format: `weight::Plain::Stored`.
        "typename C::Stored" => Kind::Pointer { to: "Stored".to_owned(), written: false },
        "i32" | "u32" | "int" | "float" => Kind::Number { bytes: 4 },
        "u64" | "i64" => Kind::Number { bytes: 8 },
        pointer => {
            let to = pointer.strip_suffix('*').unwrap_or_else(|| panic!("parameter `{text}`"));
            Kind::Pointer { to: to.trim_start_matches("typename ").to_owned(), written: !kind.starts_with("const ") }
        }
    };
    (name.to_owned(), kind)
}

/// The function of a kernel's name expression: `rms::norm<…>` is `norm`.
fn function(kernel: &Kernel) -> &str {
    let path = kernel.symbol.split('<').next().unwrap_or_default();
    path.rsplit("::").next().unwrap_or_default()
}

/// Programs that have every operation, on every kind of kernel.
fn programs() -> Vec<Program> {
    let other = Geometry { num_heads: 6, window: Some(70), ..Geometry::round(DType::F16) };
    let geometries = [Geometry::small(DType::F32), Geometry::small(DType::F16), Geometry::round(DType::Bf16), other];
    let mut programs: Vec<Program> =
        geometries.iter().flat_map(|geometry| [true, false].map(|fused| decoder::program(geometry, fused))).collect();
    for (word, dtype) in [
        ("int4:g32:f16:zeros", DType::Bf16),
        ("int8:row:bf16", DType::F16),
        ("int4:g64:f32", DType::F32),
        ("fp8", DType::Bf16),
        ("fp8", DType::F32),
        ("fp8:row:static", DType::F16),
        ("fp8:row:token", DType::Bf16),
        ("fp8:row:token", DType::F32),
    ] {
        let mut program = decoder::program(&Geometry::round(dtype), true);
        decoder::quantize(&mut program, word.parse().expect("a format"));
        programs.push(program);
    }
    for (geometry, fused) in [(Geometry::round(DType::Bf16), true), (Geometry::small(DType::F16), false)] {
        let mut program = decoder::program(&geometry, fused);
        decoder::cache_in_fp8(&mut program, KvScale { key: 0.02, value: 0.01 });
        programs.push(program.clone());
        program.attend_in_fp8();
        programs.push(program);
    }
    programs.push(middle_stage());
    // Long steps list and gather their assignments with separate kernels.
    for program in &mut programs {
        (program.limits.max_num_tokens, program.limits.max_num_logits) = (8192, 8192);
        program.plan_arena();
    }
    programs
}

/// What a rank between two pipeline stages says to others.
fn middle_stage() -> Program {
    let mut a = Assembly::new(DType::Bf16);
    (a.program.rank, a.program.world_size, a.program.tp_size) = (2, 6, 2);
    let weight = a.declare("scale", DType::Bf16, &[64]);
    for (name, cols) in [("x", 64), ("part", 64), ("sum", 64), ("normed", 64), ("columns", 32)] {
        a.activation(name, Rows::Tokens, cols);
    }
    let name = str::to_owned;
    a.op(Op::Recv { out: name("x"), from: 0 });
    for (residual, norm) in [(false, false), (true, false), (false, true), (true, true)] {
        a.op(Op::AllReduce {
            input: name("part"),
            residual: residual.then(|| name("x")),
            out: name("sum"),
            norm: norm.then(|| FusedNorm { weight: weight.clone(), eps: 1e-5, out: name("normed") }),
        });
    }
    // A combine that is part of the all-reduce, once with a router behind it.
    (a.program.num_experts, a.program.top_k) = (4, 2);
    let router = a.declare("router", DType::F32, &[4, 64]);
    a.activation("expert_output", Rows::Assignments, 64);
    for (buffer, dtype, rows, cols) in [
        ("expert_ids", ElemType::I32, Rows::Tokens, 2),
        ("expert_weights", ElemType::F32, Rows::Tokens, 2),
        ("logits", ElemType::F32, Rows::Tokens, 4),
        ("offsets", ElemType::I32, Rows::One, 3),
        ("order", ElemType::I32, Rows::Assignments, 1),
    ] {
        a.buffer(buffer, dtype, rows, cols);
    }
    for share in ["share", "other_share"] {
        a.activation(share, Rows::Tokens, 64);
        a.op(Op::Combine {
            input: name("expert_output"),
            expert_ids: name("expert_ids"),
            expert_weights: name("expert_weights"),
            experts: [2, 4],
            residual: None,
            out: name(share),
            norm: None,
        });
        a.op(Op::AllReduce {
            input: name(share),
            residual: Some(name("x")),
            out: name("sum"),
            norm: Some(FusedNorm { weight: weight.clone(), eps: 1e-5, out: name("normed") }),
        });
        if share == "share" {
            a.op(Op::Linear {
                input: name("normed"),
                weight: router.clone(),
                rows: None,
                epilogue: Epilogue::F32,
                residual: None,
                out: name("logits"),
                ladder: vec![],
            });
            a.op(Op::Route {
                logits: name("logits"),
                normalization: MoeNormalization::Renorm,
                layer: 0,
                experts: [2, 4],
                expert_ids: name("expert_ids"),
                expert_weights: name("expert_weights"),
                offsets: name("offsets"),
                order: name("order"),
            });
        }
    }
    a.op(Op::AllGather { input: name("columns"), out: name("x") });
    a.op(Op::Send { input: name("x"), to: 4 });
    a.program
}

/// What of the memory between ranks a parameter of that name and type points at.
fn exchanged(name: &str, to: &str) -> &'static [ExchangeArg] {
    use ExchangeArg::{Done, Inboxes, NextInbox, Report, StageInbox, Steps, Stop, Taken, TakenBefore};
    match (name, to) {
        ("inboxes", "u64") => &[Inboxes],
        ("done", "u32") => &[Done],
        ("steps", "u32") => &[Steps],
        ("inbox", "u8") => &[StageInbox, NextInbox],
        ("taken", "u32") => &[Taken, TakenBefore],
        ("stop", "u32") => &[Stop],
        ("report", "u32") => &[Report],
        _ => &[],
    }
}

/// Adds what calibration adds: launches that look at the inputs of linears.
fn observe(schedule: &mut Schedule, program: &Program) {
    for (op, operation) in program.ops.iter().enumerate() {
        let lists = |offsets, order, in_order| Some(Lists { offsets, order, in_order });
        let (input, lists) = match operation {
            Op::Linear { input, .. } => (input, None),
            Op::ExpertGateUp { input, offsets, order, .. } => (input, lists(offsets, order, false)),
            Op::ExpertDown { input, offsets, order, .. } => (input, lists(offsets, order, true)),
            _ => continue,
        };
        let observation = Observation { op, input, lists, products: program.dtype == DType::F16 };
        schedule.observe(program, &observation).unwrap_or_else(|e| panic!("{e}"));
    }
    schedule.check(program).unwrap_or_else(|e| panic!("{e}"));
}

/// The launches of steps, of fills and of the probe, one for each kernel, each with the operations that it computes.
fn launches(program: &Program, family: Family) -> Vec<(Launch, Vec<Op>)> {
    let mut schedule = Schedule::new(program, Target { family }).unwrap_or_else(|e| panic!("{e}"));
    if family == Family::Portable && program.ops.iter().any(|op| matches!(op, Op::SiluMul { .. })) {
        observe(&mut schedule, program);
    }
    let fills = schedule.fills.into_iter().map(|(_, fill)| fill);
    let packs = schedule.packs.into_iter().map(|pack| pack.launch);
    let mut found: Vec<(Launch, Vec<Op>)> = fills.chain(packs).chain([schedule.probe]).map(|l| (l, vec![])).collect();
    for (_, works) in schedule.regimes {
        for (at, work) in works.iter().enumerate() {
            let Work::Launch(launch) = work else { continue };
            // A launch computes all operations up to the next launch's.
            let next = works[at..].iter().map(Work::op).find(|&op| op > launch.op).unwrap_or(program.ops.len());
            found.push((launch.clone(), program.ops[launch.op..next].to_vec()));
        }
    }
    found
}

/// The array of the step block that a parameter of this name and type points at.
fn array(name: &str, to: &str) -> Option<Array> {
    Some(match (name, to) {
        ("header", "step::Header") => Array::Header,
        ("token_ids", "i32") => Array::TokenIds,
        ("positions", "i32") => Array::Positions,
        ("slots", "i32") => Array::SlotMapping,
        ("cu_query_lens", "i32") => Array::CuQueryLens,
        ("seq_lens", "i32") => Array::SeqLens,
        ("indices", "i32") => Array::LogitsIndices,
        ("items", "int4") => Array::DecodeItems,
        ("items", "int2") => Array::PrefillItems,
        ("samples", "step::Sample") => Array::Samples,
        ("drawn", "step::Drawn") => Array::Drawn,
        ("block_table", "i32") => Array::BlockTable,
        ("adjustments", "step::Adjustment") => Array::Adjustments,
        ("asked", "step::Asked") => Array::Scores,
        ("scored", "step::Scored") => Array::Scored,
        ("best", "step::Best") => Array::Best,
        _ => return None,
    })
}

/// Whether one of `ops` has the buffer `buffer` in the field that the parameter `name` is named after.
fn is_operand(ops: &[Op], name: &str, buffer: &str) -> bool {
    let routes = ops.iter().any(|op| op.name() == "route");
    let field_of = |op: &Op| {
        let value = serde_json::to_value(op).expect("an operation is JSON");
        let fields = &value[op.name()];
        let field = match name {
            "tokens" => &fields["input"],
            // A norm that does not round passes its output for the rounded rows, which the kernel does not write.
            "normalized" | "rounded" => fields.get("norm").map_or(&fields["out"], |norm| &norm["out"]),
            // The kernel that chooses experts reads probabilities for `top_k` and logits for `route`.
            "input" => {
                ["input", "probs", "logits"].iter().map(|f| &fields[f]).find(|f| f.is_string()).unwrap_or(&Value::Null)
            }
            // Without a residual, the launch passes the output, which the kernel does not read.
            "residual" => fields.get("residual").filter(|r| r.is_string()).unwrap_or(&fields["out"]),
            name => &fields[name],
        };
        // A combine without a norm passes its own output in place of the norm's.
        // A router may do the norm of the all-reduce before it, which then reads what the all-reduce wrote.
        let hands_over = routes && op.name() == "all_reduce" && fields["out"] == buffer;
        let is_handed_over = hands_over && matches!(name, "input" | "normalized" | "rounded");
        let is_normalized = matches!(name, "normalized" | "rounded");
        is_handed_over || field == buffer || is_normalized && fields["norm"].is_null() && fields["out"] == buffer
    };
    ops.iter().any(field_of)
}

/// What is wrong with the argument for a parameter, if anything is.
fn problem(program: &Program, ops: &[Op], name: &str, kind: &Kind, arg: &Arg) -> Option<String> {
    let wrong = |what: &str| Some(format!("{what}: {arg:?}"));
    let base = if let Arg::TensorMap(map) = arg { &*map.base } else { arg };
    // An fp8 linear's input is rounded into scratch, and its tokens may be put into expert order there.
    let is_fp8 = |name: &str| program.weight(name).is_some_and(|weight| weight.format.is_fp8());
    let rounds = ops.iter().any(|op| op.weights().into_iter().any(is_fp8));
    match (kind, arg) {
        (Kind::TensorMap, Arg::TensorMap(_)) => {}
        (Kind::TensorMap, _) | (_, Arg::TensorMap(_)) => return wrong("only one of both is a tensor map"),
        (Kind::Number { bytes: 4 }, Arg::Ordinal(_)) => {
            return if name == "ordinal" { None } else { wrong("a number of collectives") };
        }
        (Kind::Number { bytes: 4 }, Arg::KeyScale { .. }) => {
            return if matches!(name, "scale" | "key_scale") { None } else { wrong("a scale of keys") };
        }
        (Kind::Number { bytes: 4 }, Arg::ValueScale(_)) => {
            return if name == "value_scale" { None } else { wrong("a scale of values") };
        }
        (Kind::Number { bytes }, Arg::I32(_) | Arg::F32(_)) if *bytes == 4 => return None,
        (Kind::Number { bytes }, Arg::U64(_)) if *bytes == 8 => return None,
        (Kind::Number { bytes }, Arg::Piece(what)) => {
            // A piece's value has the name of its parameter.
            let called = serde_json::to_value(what).expect("a name") == name && arg.size() == *bytes;
            return if called { None } else { wrong("another value of a piece") };
        }
        (Kind::Number { bytes: 8 }, Arg::Probe(ProbeArg::Words)) => return None,
        (Kind::Number { bytes: 4 }, Arg::Pack(PackArg::Expert)) => {
            return if name == "expert" { None } else { wrong("the number of a matrix") };
        }
        (Kind::Number { .. }, _) => return wrong("no number"),
        (
            Kind::Pointer { .. },
            Arg::I32(_) | Arg::U64(_) | Arg::F32(_) | Arg::KeyScale { .. } | Arg::ValueScale(_) | Arg::Ordinal(_),
        ) => {
            return wrong("no pointer");
        }
        (Kind::Pointer { .. }, _) => {}
    }
    let (to, written) = match kind {
        Kind::Pointer { to, written } => (to.as_str(), *written),
        _ => ("", false),
    };
    match base {
        Arg::Step(found) => (array(name, to) != Some(*found)).then(|| format!("{found:?} for {to}* {name}")),
        Arg::Exchange(found) => (!exchanged(name, to).contains(found)).then(|| format!("{found:?} for {to}* {name}")),
        Arg::Keys(_) => (!name.starts_with("key")).then(|| format!("keys for {name}")),
        Arg::Values(_) => (!name.starts_with("value")).then(|| format!("values for {name}")),
        Arg::ExpertCounts(_) => (name != "counts").then(|| format!("counts for {name}")),
        Arg::Weight { index, .. } => {
            let weight = &program.weights[*index];
            let of =
                |kind: &str| ops.iter().any(|op| op.name() == kind && op.weights().contains(&weight.name.as_str()));
            let fits = match name {
                "table" => weight.shape.len() == 2,
                "router_weight" => weight.dtype == DType::F32 && of("linear"),
                "weight" if is_router(ops) => of("norm"),
                "scale" => is_fp8(&weight.name),
                // A norm that does not round passes its own weight, which the kernel does not read.
                "divisor" => is_fp8(&weight.name) || !of("linear"),
                // A linear whose tokens have no scales of their own passes its weight, which the kernel does not read.
                "weight" | "stored" | "token_scales" => true,
                _ => false,
            };
            if fits { None } else { wrong("a weight") }
        }
        Arg::Buffer(index) => {
            let buffer = &program.buffers[*index];
            let type_fits = match to {
                "float" => buffer.dtype == ElemType::F32,
                "i32" | "int" => buffer.dtype == ElemType::I32,
                _ => buffer.dtype != ElemType::I32,
            };
            let writes = ops.iter().any(|op| op.writes().contains(&buffer.name.as_str()));
            // A combine without a norm has no weight. It passes its output, which the kernel does not read.
            let unused = matches!(name, "weight" | "divisor") && writes;
            let role_fits = unused || is_operand(ops, name, &buffer.name);
            let may_write = !written || writes;
            (!(type_fits || unused) || !role_fits || !may_write)
                .then(|| format!("buffer `{}` ({}) for {to}* {name}, written: {written}", buffer.name, buffer.dtype))
        }
        Arg::Scratch(_) => {
            let of_kernels = [
                "table",
                "partials",
                "tickets",
                "ticket",
                "counter",
                "sizes",
                "copies",
                "tokens",
                "rounded",
                "token_scales",
                "count",
                "amax",
                "sums",
            ];
            // The kernel that puts tokens into expert order writes to scratch; the next launch reads that.
            let gathered = name == "out" && ops.iter().any(|op| op.name() == "expert_gate_up");
            let product = name == "a" && ops.iter().any(|op| op.name() == "linear");
            let to_bytes = rounds && matches!(name, "input" | "out" | "scales");
            // Where keys are rounded to nearest, the angles stand in place of directions, which are not read.
            let unread = name == "directions" && ops.iter().all(|op| op.weights().is_empty());
            let known = of_kernels.contains(&name) || gathered || product || to_bytes || unread;
            (!known).then(|| format!("scratch for {name}"))
        }
        Arg::Piece(PieceArg::Out) | Arg::Probe(ProbeArg::Out) => (name != "out").then(|| format!("out for {name}")),
        // A pointer to a part of a matrix has the name of its parameter.
        Arg::Pack(what) => {
            let called = serde_json::to_value(what).expect("a name") == name && *what != PackArg::Expert;
            (!called).then(|| format!("{what:?} for {name}"))
        }
        Arg::Probe(ProbeArg::Data) => (name != "data").then(|| format!("data for {name}")),
        other => wrong(&format!("{other:?} for {name}")),
    }
}

/// Whether one launch computes a norm and the router behind it. The router has a weight of its own.
fn is_router(ops: &[Op]) -> bool {
    ops.len() >= 3 && ops[0].name() == "norm" && ops[1].name() == "linear"
}

/// Everything that is wrong with a launch.
fn problems(program: &Program, ops: &[Op], launch: &Launch, signature: &[(String, Kind)]) -> Vec<String> {
    let names: Vec<&str> = launch.args.iter().map(|named| &*named.name).collect();
    let wanted: Vec<&str> = signature.iter().map(|(name, _)| name.as_str()).collect();
    if names != wanted {
        return vec![format!("{names:?}, but the signature has {wanted:?}")];
    }
    let pairs = launch.args.iter().zip(signature);
    pairs.filter_map(|(named, (name, kind))| problem(program, ops, name, kind, &named.arg)).collect()
}

fn signature(sources: &Sources, kernel: &Kernel) -> Vec<(String, Kind)> {
    let headers = sources.reached(&kernel.header).unwrap_or_else(|e| panic!("{e}"));
    let (_, text) = headers.iter().find(|(name, _)| **name == *kernel.header).expect("the header reaches itself");
    parameters(text, function(kernel))
}

#[test]
fn launches_have_the_names_of_their_kernels_parameters() {
    let sources = Sources::embedded();
    let (mut wrong, mut seen) = (BTreeSet::new(), BTreeSet::new());
    for program in programs() {
        for family in [Family::Portable, Family::Hopper] {
            for (launch, ops) in launches(&program, family) {
                seen.insert((launch.kernel.header.clone().into_owned(), function(&launch.kernel).to_owned()));
                let found = problems(&program, &ops, &launch, &signature(&sources, &launch.kernel));
                wrong.extend(found.into_iter().map(|problem| format!("{}: {problem}", launch.kernel.symbol)));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.into_iter().collect::<Vec<_>>().join("\n"));
    // Every kernel in the sources was compared.
    let defined: usize = sources
        .names()
        .map(|name| {
            let texts = sources.reached(name).unwrap_or_else(|e| panic!("{e}"));
            texts
                .iter()
                .filter(|(header, _)| *header == name)
                .map(|(_, text)| text.matches("__global__").count())
                .sum::<usize>()
        })
        .sum();
    assert_eq!(seen.len(), defined, "{seen:?}");
}

/// If two parameters of a launch change places, the names show it. If two parameters only point at each other's
/// arguments, the checks of arguments show it.
#[test]
fn parameters_that_change_places_are_noticed() {
    let sources = Sources::embedded();
    let mut swapped = 0;
    for program in programs() {
        for family in [Family::Portable, Family::Hopper] {
            for (launch, ops) in launches(&program, family) {
                let signature = signature(&sources, &launch.kernel);
                for i in 0..launch.args.len() {
                    for j in i + 1..launch.args.len() {
                        let mut other = launch.clone();
                        other.args.swap(i, j);
                        assert!(!problems(&program, &ops, &other, &signature).is_empty(), "{i} and {j} of {launch:?}");
                        swapped += 1;
                    }
                }
            }
        }
    }
    assert!(swapped > 1000, "{swapped} swaps");
    // Swaps arguments under the right names.
    let program = &programs()[0];
    let mut unnoticed = BTreeSet::new();
    for (launch, ops) in launches(program, Family::Portable) {
        let signature = signature(&sources, &launch.kernel);
        for i in 0..launch.args.len() {
            for j in i + 1..launch.args.len() {
                let (a, b) = (&launch.args[i], &launch.args[j]);
                let pointers = [a, b].iter().all(|named| named.arg.size() == 8 && !matches!(named.arg, Arg::U64(_)));
                if !pointers || a.arg == b.arg {
                    continue;
                }
                let mut other = launch.clone();
                (other.args[i].arg, other.args[j].arg) = (b.arg.clone(), a.arg.clone());
                if problems(program, &ops, &other, &signature).is_empty() {
                    unnoticed.insert(format!("{} and {} of {}", a.name, b.name, function(&launch.kernel)));
                }
            }
        }
    }
    assert!(unnoticed.is_empty(), "{unnoticed:?}");
}

#[test]
fn structures_of_the_step_block_are_those_of_the_kernels() {
    let sources = Sources::embedded();
    let texts = sources.reached("base/step.cuh").unwrap_or_else(|e| panic!("{e}"));
    let (_, text) = texts.iter().find(|(name, _)| *name == "base/step.cuh").expect("it reaches itself");
    for structure in STRUCTURES {
        let body = text.split(&format!("struct {} {{", structure.name)).nth(1).expect("a structure of the name");
        let body = body.split('}').next().expect("its end");
        let fields: Vec<(String, String)> = body
            .split(';')
            .map(str::trim)
            .filter(|f| !f.is_empty())
            .map(|field| {
                let (kind, name) = field.split_once(' ').expect("a type and a name");
                let kind = if kind == "float" { "f32" } else { kind };
                match name.split_once('[') {
                    Some((name, count)) => (name.to_owned(), format!("[{kind}; {}]", count.trim_end_matches(']'))),
                    None => (name.to_owned(), kind.to_owned()),
                }
            })
            .collect();
        let expected: Vec<(String, String)> =
            structure.fields.iter().map(|f| (f.name.to_owned(), f.kind.to_owned())).collect();
        assert_eq!(fields, expected, "{}", structure.name);
    }
    for (name, value) in [("DECODE_SPLIT", DECODE_SPLIT), ("PREFILL_TILE", PREFILL_TILE), ("MAX_BEST", MAX_BEST)] {
        assert!(text.contains(&format!("inline constexpr int {name} = {value};")), "{name}");
    }
}
