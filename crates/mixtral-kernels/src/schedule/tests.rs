//! A schedule reads back as it was written, stays short, and asks for nothing that the program does not have.

use mixtral_engine::{Limits, Op, Program, Rows};
use mixtral_model::{DType, ElemType};
use mixtral_testkit::assembly::Assembly;
use mixtral_testkit::cases;
use mixtral_testkit::decoder::{self, Geometry};
use mixtral_testkit::large;

use super::fold::fold;
use super::*;
use crate::step_block::Array;
use crate::{ExchangeArg, Grid, NamedArg, PackArg, PieceArg, ProbeArg, Product, Target, TensorMap, Work};

/// Decoders that use each kind of kernel, some with layers that fold and some with layers that do not.
fn programs() -> Vec<Program> {
    let round = Geometry { num_layers: 5, ..Geometry::round(DType::Bf16) };
    let geometries = [Geometry::small(DType::F32), Geometry::small(DType::F16), round];
    geometries.into_iter().flat_map(|g| [true, false].map(|fused| decoder::program(&g, fused))).collect()
}

fn schedules(program: &Program) -> [Schedule; 2] {
    [Family::Portable, Family::Hopper].map(|family| Schedule::new(program, Target { family }).expect("kernels"))
}

#[test]
fn the_text_reads_back() {
    for program in programs() {
        for schedule in schedules(&program) {
            let text = schedule.to_text();
            assert_eq!(Schedule::parse(&text, &program).as_ref(), Ok(&schedule));
            assert_eq!(schedule.to_text(), text);
        }
    }
}

/// The schedules of all cases of the registry, and of operations at the sizes of real models, pass the check.
#[test]
fn whatever_is_lowered_passes_the_check() {
    let cases: Vec<Program> = cases::all().into_iter().map(|case| case.assembly.program).collect();
    let programs = cases.into_iter().chain(large::all().map(|case| case.program));
    let mut checked = 0;
    for program in programs {
        for family in [Family::Portable, Family::Hopper] {
            let Ok(schedule) = Schedule::new(&program, Target { family }) else { continue };
            let text = schedule.to_text();
            assert_eq!(Schedule::parse(&text, &program), Ok(schedule));
            checked += 1;
        }
    }
    assert!(checked > 300, "{checked} schedules");
}

#[test]
fn folded_works_unfold_to_what_they_were() {
    let mut folded = 0;
    for program in programs() {
        for (_, works) in schedules(&program).into_iter().flat_map(|schedule| schedule.regimes) {
            let mut unfolded: Vec<Work> = Vec::new();
            for run in fold(&works) {
                unfolded.extend(run.works.iter().cloned());
                if let Some(repeat) = run.repeat {
                    assert_eq!(repeat.works, run.works.len());
                    folded += repeat.times;
                    for time in 1..=repeat.times {
                        unfolded.extend(run.works.iter().map(|work| repeat.again(work, time).expect("small indices")));
                    }
                }
            }
            assert_eq!(unfolded, works);
        }
    }
    assert!(folded > 0, "no layers were alike");
}

#[test]
fn the_first_layers_are_launched_as_if_lowered_alone() {
    for program in programs() {
        for layers in 1..program.kv.num_layers {
            let short = program.first_layers(layers).expect("layers alike");
            for (whole, alone) in schedules(&program).into_iter().zip(schedules(&short)) {
                assert_eq!(whole.first_layers(&program, &short), Some(alone), "{layers} layers");
            }
        }
    }
}

/// A schedule of the round decoder on Hopper, and its program.
fn example() -> (Schedule, Program) {
    let program = programs().remove(4);
    let [_, schedule] = schedules(&program);
    (schedule, program)
}

#[test]
fn a_text_that_is_damaged_or_of_another_version_says_so() {
    // The layers of this program fold.
    let program = programs().remove(5);
    let [_, schedule] = schedules(&program);
    let text = schedule.to_text();
    let refused = |text: &str| Schedule::parse(text, &program).expect_err("refused").to_string();
    let with = |old: &str, new: &str| {
        assert!(text.contains(old), "no `{old}` in\n{text}");
        refused(&text.replacen(old, new, 1))
    };
    let mut said = vec![
        refused(""),
        refused("mixtral-program 1\n"),
        with("mixtral-schedule 1", "mixtral-schedule 2"),
        with("\nprobe ", "\n# probe "),
        with("\nregime ", "\nregiment "),
        with("kernel=0", "kernel=4096"),
        with("\"num_seqs\":[\"i32\",4]", "\"num_seqs\":[\"i32\",8]"),
        with("\"num_seqs\":[\"i32\",4],", ""),
        with("\"num_seqs\":", "\"num_sequences\":[\"i32\",0],\"num_seqs\":"),
        with("name=Sample bytes=56", "name=Sample bytes=64"),
        with("\"decode_split\":256", "\"decode_split\":128"),
        with("name=positions", "name=places"),
        with("works=", "works=9"),
        with("times=", "times=99999999"),
        with("ops=", "ops=18446744073709551"),
        with(" cluster=1", " cluster=1 clusters=1"),
        with("{\"step\":\"header\"}", "{\"step\":\"footer\"}"),
    ];
    let array = text.lines().find(|line| line.starts_with("array name=block_table")).expect("an array");
    let (before, _) = array.rsplit_once(' ').expect("its bytes");
    said.push(with(array, &format!("{before} bytes=4")));
    said.push(with(array, "# none"));
    insta::assert_snapshot!(said.join("\n"));
}

/// The error for a schedule in which the parameter `name` is changed, in the first launch of a step that has one.
fn with_arg(name: &str, change: impl Fn(&mut Arg)) -> String {
    let (mut schedule, program) = example();
    let works = schedule.regimes.iter_mut().flat_map(|(_, works)| works);
    let args = works.filter_map(|work| if let Work::Launch(launch) = work { Some(&mut launch.args) } else { None });
    let arg = args.flatten().find(|named| named.name == name).expect("a parameter of that name");
    change(&mut arg.arg);
    schedule.check(&program).expect_err("refused").to_string()
}

/// The error for a schedule after `change`.
fn with_change(change: impl Fn(&mut Schedule)) -> String {
    let (mut schedule, program) = example();
    change(&mut schedule);
    schedule.check(&program).expect_err("refused").to_string()
}

fn first(schedule: &mut Schedule) -> &mut Launch {
    match &mut schedule.regimes[0].1[0] {
        Work::Launch(launch) => launch,
        Work::Product(_) => panic!("a decode has no product"),
    }
}

/// Changes a tensor map. A parameter that points at a norm's weight becomes a map of that weight first.
fn change_map(change: fn(&mut TensorMap)) -> impl Fn(&mut Arg) {
    move |arg| {
        if let Arg::Weight { .. } = arg {
            let base = Box::new(arg.clone());
            let mut map = TensorMap {
                base,
                dtype: ElemType::Bf16,
                dims: vec![256],
                strides: vec![],
                tile: vec![64],
                swizzle: 128,
            };
            change(&mut map);
            *arg = Arg::TensorMap(map);
        } else if let Arg::TensorMap(map) = arg {
            change(map);
        }
    }
}

#[test]
fn nothing_is_pointed_at_outside_of_the_program() {
    let in_linear = |change: fn(&mut TensorMap)| with_arg("weight", change_map(change));
    let said = [
        with_arg("out", |arg| *arg = Arg::Buffer(1 << 20)),
        with_arg("weight", |arg| *arg = Arg::Weight { index: 1 << 20, offset: 0 }),
        with_arg("weight", |arg| *arg = Arg::Weight { index: 1, offset: usize::MAX }),
        with_arg("keys", |arg| *arg = Arg::Keys(5)),
        with_arg("values", |arg| *arg = Arg::Values(usize::MAX)),
        with_arg("counts", |arg| *arg = Arg::ExpertCounts(5)),
        with_arg("ticket", |arg| *arg = Arg::Scratch(1 << 40)),
        with_arg("header", |arg| *arg = Arg::Piece(PieceArg::Out)),
        with_arg("header", |arg| *arg = Arg::Probe(ProbeArg::Out)),
        in_linear(|map| map.dims[0] = 257),
        in_linear(|map| map.dims.push(2)),
        in_linear(|map| map.tile[0] = 512),
        in_linear(|map| map.swizzle = 3),
        in_linear(|map| (map.dims, map.strides, map.tile) = (vec![256, 2], vec![u64::MAX], vec![64, 1])),
        in_linear(|map| *map.base = Arg::Step(Array::Header)),
        in_linear(|map| *map.base = Arg::I32(1)),
        with_arg("keys", |arg| {
            let base = Box::new(Arg::Keys(0));
            let (dims, strides, tile) = (vec![64, 1 << 30], vec![64], vec![64, 64]);
            let dtype = ElemType::Bf16;
            *arg = Arg::TensorMap(TensorMap { base, dtype, dims, strides, tile, swizzle: 128 });
        }),
    ];
    insta::assert_snapshot!(said.join("\n"));
}

#[test]
fn no_launch_is_asked_for_that_no_driver_takes() {
    let said = [
        with_change(|s| first(s).kernel.threads = 0),
        with_change(|s| first(s).kernel.threads = 33),
        with_change(|s| first(s).kernel.threads = 2048),
        with_change(|s| first(s).kernel.shared_bytes = 1 << 20),
        with_change(|s| first(s).cluster = 16),
        with_change(|s| first(s).cluster = 3),
        with_change(|s| first(s).grid = Grid::Tokens { per: 0, times: 1 }),
        with_change(|s| first(s).grid = Grid::Fixed(u32::MAX)),
        with_change(|s| (first(s).grid, first(s).cluster) = (Grid::Fixed(3), 2)),
        with_change(|s| first(s).args.clear()),
        with_change(|s| first(s).args = vec![NamedArg { name: "x".into(), arg: Arg::I32(0) }; 33]),
        with_change(|s| first(s).op = 1 << 20),
        with_change(|s| first(s).op = 3),
        with_change(|s| s.regimes[0].0.max_tokens = 0),
        with_change(|s| s.regimes.swap(0, 1)),
        with_change(|s| drop(s.regimes.pop())),
        with_change(|s| s.regimes.iter_mut().for_each(|(regime, _)| regime.max_tokens *= 1000)),
        with_change(|s| s.block.places[2].offset = 0),
        with_change(|s| s.block.places[2].bytes = usize::MAX),
        with_change(|s| s.block.bytes = 128),
        with_change(|s| s.scratch_bytes = usize::MAX),
        with_change(|s| s.scratch_bytes = 0),
        with_change(|s| s.fills.clear()),
        with_change(|s| s.probe.args.truncate(0)),
    ];
    insta::assert_snapshot!(said.join("\n"));
}

/// A norm's kernel and attention's round for the linear behind them. So nothing may begin between them.
#[test]
fn what_is_rounded_for_a_linear_is_handed_over() {
    let mut program = decoder::program(&Geometry::round(DType::Bf16), true);
    let handed_over = |program: &Program| -> Vec<Vec<String>> {
        let [schedule, _] = schedules(program);
        let ranges = schedule.regimes.iter().map(|(_, work)| {
            let named = Schedule::handed_over(work).into_iter().map(|ops| {
                program.ops[ops.start - 1..ops.end].iter().map(|op| op.name()).collect::<Vec<_>>().join(" ")
            });
            named.collect::<Vec<_>>()
        });
        ranges.collect()
    };
    assert!(handed_over(&program).iter().all(Vec::is_empty));
    decoder::quantize(&mut program, "fp8".parse().expect("a format"));
    let (attention, experts) = ("attention linear", "norm linear route expert_gate_up");
    for regime in handed_over(&program) {
        // Decodes and prompts each have a kernel of attention.
        let kinds: Vec<&str> = regime.iter().map(String::as_str).collect();
        let mut once = kinds.clone();
        once.dedup();
        assert_eq!(once, ["norm linear", attention, experts, "combine linear", attention, experts]);
    }
    // Cut short, the last norm still rounds, for nobody.
    let short = program.first_layers(1).expect("layers alike");
    for schedule in schedules(&program) {
        let cut = schedule.first_layers(&program, &short).expect("a schedule of the first layer");
        assert_eq!(cut.check(&short), Ok(()));
    }
}

#[test]
fn every_quantized_weight_is_packed_once() {
    let mut program = decoder::program(&Geometry::round(DType::Bf16), true);
    decoder::quantize(&mut program, "int4:g64:f16:zeros".parse().expect("a format"));
    let [schedule, _] = schedules(&program);
    assert_eq!(schedule.packs.iter().map(|pack| pack.weights.len()).collect::<Vec<_>>(), [2; 4]);
    assert_eq!(schedule.check(&program), Ok(()));
    let with_change = |change: fn(&mut Schedule)| {
        let mut schedule = schedule.clone();
        change(&mut schedule);
        schedule.check(&program).expect_err("a defect").to_string()
    };
    let said = [
        with_change(|s| s.packs.truncate(1)),
        with_change(|s| s.packs[1].weights.push(0)),
        with_change(|s| s.packs[1].weights[0] = 999),
        with_change(|s| s.packs[0].bytes = 0),
        with_change(|s| s.packs[0].bytes = usize::MAX),
        with_change(|s| s.packs[0].launch.args[0].arg = Arg::Staged(0)),
        with_change(|s| s.probe.args[0].arg = Arg::Pack(PackArg::Out)),
    ];
    insta::assert_snapshot!(said.join("\n"));
}

#[test]
fn a_product_stays_inside_of_its_operands() {
    let (mut schedule, program) = example();
    let workspace = (Arg::Scratch(0), 64);
    let product = |rows, depth| Product {
        weight: Arg::Weight { index: 2, offset: 0 },
        tokens: Arg::Buffer(1),
        out: Arg::Buffer(1),
        rows,
        depth,
        dtype: ElemType::Bf16,
        out_type: ElemType::Bf16,
        workspace: workspace.clone(),
        op: 0,
    };
    let last = schedule.regimes.len() - 1;
    let mut said = Vec::new();
    for (regime, product) in [
        (0, product(1, 1)),
        (last, product(1 << 20, 256)),
        (last, product(8, 1 << 16)),
        (last, product(1 << 16, 2)),
        (last, Product { workspace: (Arg::Scratch(0), 1 << 40), ..product(8, 8) }),
        (last, Product { out: Arg::Keys(0), ..product(8, 8) }),
    ] {
        schedule.regimes[regime].1.insert(0, Work::Product(Box::new(product)));
        said.push(schedule.check(&program).expect_err("refused").to_string());
        schedule.regimes[regime].1.remove(0);
    }
    schedule.regimes[last].1.insert(0, Work::Product(Box::new(product(8, 8))));
    schedule.check(&program).expect("it lies inside");
    insta::assert_snapshot!(said.join("\n"));
}

/// The text of a decode: how launches, maps and folded layers are written.
#[test]
fn the_text_of_a_small_decoder() {
    let geometry = Geometry { num_layers: 2, ..Geometry::small(DType::F32) };
    let mut program = decoder::program(&geometry, true);
    program.limits = Limits { max_batch_size: 2, max_num_tokens: 8, max_num_logits: 2, ..program.limits };
    program.plan_arena();
    let schedule = Schedule::new(&program, Target { family: Family::Portable }).expect("kernels");
    // Lines are cut, because the symbol of the table of cosines holds its many constants.
    let text: Vec<String> = schedule.to_text().lines().map(|line| line.chars().take(240).collect()).collect();
    insta::assert_snapshot!(text.join("\n"));
}

/// A rank of four: layers that are alike, each with a sum over the ranks.
fn of_a_rank() -> (Schedule, Program) {
    let mut a = Assembly::new(DType::Bf16);
    (a.program.rank, a.program.world_size, a.program.tp_size) = (1, 4, 2);
    a.activation("x", Rows::Tokens, 64);
    for layer in 0..6 {
        let (part, sum) = (format!("part{layer}"), format!("sum{layer}"));
        a.activation(&part, Rows::Tokens, 64);
        a.activation(&sum, Rows::Tokens, 64);
        a.op(Op::AllReduce { input: part, residual: None, out: sum, norm: None });
    }
    a.op(Op::Send { input: "x".to_owned(), to: 3 });
    a.program.plan_arena();
    (Schedule::new(&a.program, Target { family: Family::Portable }).expect("kernels"), a.program)
}

#[test]
fn collectives_are_numbered_where_layers_fold() {
    let (schedule, program) = of_a_rank();
    let text = schedule.to_text();
    assert!(text.contains("collectives=1"), "{text}");
    assert_eq!(Schedule::parse(&text, &program), Ok(schedule.clone()));
    let (_, works) = schedule.for_step(1, true).expect("a regime");
    let ordinals = works.iter().flat_map(Work::args).filter_map(|arg| match arg {
        Arg::Ordinal(before) => Some(*before),
        _ => None,
    });
    assert_eq!(ordinals.collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    assert_eq!(schedule.first_layers(&program, &program), None);
}

#[test]
fn memory_between_ranks_is_what_the_program_needs() {
    let refused = |change: fn(&mut Schedule)| {
        let (mut schedule, program) = of_a_rank();
        change(&mut schedule);
        schedule.check(&program).expect_err("refused").to_string()
    };
    let (schedule, program) = of_a_rank();
    // 256 tokens of 128 bytes.
    let part_bytes = 256 * 128;
    assert_eq!(schedule.exchange, Some(Exchange { slots: 3, part_bytes, stage_slots: 2, stage_bytes: part_bytes }));
    assert_eq!(
        schedule.exchange.map(|e| (e.inbox_bytes(4), e.stage_inbox_bytes())),
        Some((9 * part_bytes, 2 * part_bytes))
    );
    assert_eq!(schedule.check(&program), Ok(()));
    let mut said = vec![
        refused(|s| s.exchange = None),
        refused(|s| s.exchange.as_mut().expect("ranks").slots = 2),
        refused(|s| s.exchange.as_mut().expect("ranks").stage_bytes -= 1),
        refused(|s| s.exchange.as_mut().expect("ranks").part_bytes = usize::MAX),
    ];
    let (mut alone, program) = example();
    alone.exchange = schedule.exchange;
    said.push(alone.check(&program).expect_err("refused").to_string());
    alone.exchange = None;
    first(&mut alone).args[0].arg = Arg::Exchange(ExchangeArg::Stop);
    said.push(alone.check(&program).expect_err("refused").to_string());
    insta::assert_snapshot!(said.join("\n"));
}
