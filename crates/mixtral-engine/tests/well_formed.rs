//! A decoder's program is well-formed. Nothing in it can be changed alone: every size, type and range has to agree with
//! another part of the program, so the check notices the change.

use mixtral_engine::{CutError, Op, Program, Rows};
use mixtral_model::{DType, ElemType};
use mixtral_testkit::decoder::{self, Geometry};

/// Decoders in two data types, each with fused operations and without.
fn programs() -> Vec<Program> {
    let of = |dtype| [true, false].map(|fused| decoder::program(&Geometry::small(dtype), fused));
    [DType::Bf16, DType::F32].into_iter().flat_map(of).collect()
}

/// Fails unless the program is refused after `change`.
#[track_caller]
fn assert_refused(program: &Program, what: &str, change: impl FnOnce(&mut Program)) {
    let mut changed = program.clone();
    change(&mut changed);
    assert!(changed.check().is_err(), "{what} is taken:\n{}", changed.to_text());
}

#[test]
fn buffers_have_the_size_and_type_that_operations_need() {
    for program in programs() {
        program.check().expect("well-formed");
        for (i, buffer) in program.buffers.iter().enumerate() {
            let what = |change: &str| format!("`{}` {change}", buffer.name);
            assert_refused(&program, &what("one column wider"), |p| p.buffers[i].cols += 1);
            assert_refused(&program, &what("one column narrower"), |p| p.buffers[i].cols -= 1);
            for dtype in [ElemType::I32, ElemType::F32, ElemType::F16, ElemType::Bf16] {
                if dtype != buffer.dtype {
                    assert_refused(&program, &what(&format!("of {dtype:?}")), |p| p.buffers[i].dtype = dtype);
                }
            }
            for rows in [Rows::One, Rows::Tokens, Rows::Assignments, Rows::Logits] {
                if rows != buffer.rows {
                    assert_refused(&program, &what(&format!("with {rows:?}")), |p| p.buffers[i].rows = rows);
                }
            }
            assert_refused(&program, &what("past the arena"), |p| p.buffers[i].offset = p.arena_bytes);
        }
    }
}

#[test]
fn weights_have_the_shape_that_operations_need() {
    for program in programs() {
        for (i, weight) in program.weights.iter().enumerate() {
            for side in 0..weight.shape.len() {
                let what = |change: &str| format!("side {side} of `{}` {change}", weight.name);
                // An embedding may have more rows than the vocabulary, and a linear may use only some of a weight's
                // rows.
                let is_whole = program.ops.iter().all(|op| match op {
                    Op::Embed { table, .. } => *table != weight.name,
                    Op::Linear { weight: used, rows, .. } => *used != weight.name || rows.is_none(),
                    _ => true,
                });
                if is_whole || side > 0 {
                    assert_refused(&program, &what("longer"), |p| p.weights[i].shape[side] += 1);
                    assert_refused(&program, &what("shorter"), |p| p.weights[i].shape[side] -= 1);
                }
            }
            assert_refused(&program, &format!("`{}` without a side", weight.name), |p| p.weights[i].shape.clear());
            assert_refused(&program, &format!("`{}` twice", weight.name), |p| p.weights.push(p.weights[i].clone()));
        }
    }
}

#[test]
fn operations_name_layers_heads_and_experts_that_there_are() {
    for program in programs() {
        let (layers, experts) = (program.num_layers, program.num_experts);
        for (i, op) in program.ops.iter().enumerate() {
            let what = |change: &str| format!("operation {i} ({}) {change}", op.name());
            let set = |change: &str, set: &dyn Fn(&mut Op)| {
                assert_refused(&program, &what(change), |p| set(&mut p.ops[i]));
            };
            if let Op::WriteKv { .. }
            | Op::RopeWriteKv { .. }
            | Op::Attention { .. }
            | Op::Route { .. }
            | Op::TopK { .. } = op
            {
                set("of a layer too many", &|op| match op {
                    Op::WriteKv { layer, .. }
                    | Op::RopeWriteKv { layer, .. }
                    | Op::Attention { layer, .. }
                    | Op::Route { layer, .. }
                    | Op::TopK { layer, .. } => *layer = layers,
                    _ => unreachable!("as above"),
                });
            }
            if let Op::RopeWriteKv { .. } | Op::Attention { .. } = op {
                for heads in [0, 1, 600] {
                    set(&format!("of {heads} heads"), &|op| match op {
                        Op::RopeWriteKv { num_heads, .. } | Op::Attention { num_heads, .. } => *num_heads = heads,
                        _ => unreachable!("as above"),
                    });
                }
            }
            if let Op::Route { .. } | Op::ExpertSort { .. } | Op::Combine { .. } = op {
                for range in [[0, 0], [1, 0], [0, experts + 1], [experts, experts + 1]] {
                    set(&format!("over experts {range:?}"), &|op| match op {
                        Op::Route { experts, .. } | Op::ExpertSort { experts, .. } | Op::Combine { experts, .. } => {
                            *experts = range;
                        }
                        _ => unreachable!("as above"),
                    });
                }
            }
            if let Op::Linear { .. } = op {
                for range in [[0, 0], [3, 2], [0, usize::MAX], [0, 7]] {
                    set(&format!("over rows {range:?}"), &|op| {
                        if let Op::Linear { rows, .. } = op {
                            *rows = Some(range);
                        }
                    });
                }
            }
        }
        assert_refused(&program, "a cache of no layers", |p| p.kv.num_layers = 0);
        assert_refused(&program, "more experts a token than there are", |p| p.top_k = experts + 1);
        assert_refused(&program, "a rank outside the world", |p| p.rank = p.world_size);
    }
}

#[test]
fn the_first_layers_are_a_program_of_their_own() {
    let geometry = Geometry { num_layers: 5, ..Geometry::small(DType::Bf16) };
    for fused in [true, false] {
        let whole = decoder::program(&geometry, fused);
        assert_eq!(whole.first_layers(5).as_ref(), Ok(&whole));
        for layers in 1..5 {
            let first = whole.first_layers(layers).expect("layers that are alike");
            first.check().expect("well-formed");
            let short = decoder::program(&Geometry { num_layers: layers, ..geometry }, fused);
            let names = |program: &Program| program.ops.iter().map(Op::name).collect::<Vec<_>>();
            assert_eq!(names(&first), names(&short), "{layers} layers");
            assert_eq!(first.weights.len(), short.weights.len(), "{layers} layers");
            assert_eq!(first.memory_plan().weights, short.memory_plan().weights, "{layers} layers");
        }
        for wanted in [0, 6] {
            assert_eq!(whole.first_layers(wanted), Err(CutError::Layers { wanted, found: 5 }));
        }
    }
}

#[test]
fn layers_that_are_not_alike_are_not_cut() {
    let whole = decoder::program(&Geometry { num_layers: 3, ..Geometry::small(DType::F32) }, false);
    let gather = |ops: &[Op]| ops.iter().position(|op| matches!(op, Op::GatherRows { .. })).expect("rows are gathered");
    let attention = |ops: &[Op], layer: usize| {
        ops.iter().position(|op| matches!(op, Op::Attention { layer: of, .. } if *of == layer)).expect("attention")
    };
    let problem = |change: &dyn Fn(&mut Vec<Op>)| {
        let mut changed = whole.clone();
        change(&mut changed.ops);
        match changed.first_layers(2) {
            Err(CutError::Unlike { layer: 1, problem }) => problem,
            other => panic!("{other:?}"),
        }
    };
    let said = [
        problem(&|ops| drop(ops.remove(attention(ops, 2)))),
        problem(&|ops| drop(ops.remove(attention(ops, 1)))),
        problem(&|ops| drop(ops.remove(gather(ops)))),
        problem(&|ops| {
            let gather = ops.remove(gather(ops));
            ops.insert(0, gather);
        }),
        // The last layer ends with one operation more, or with another one.
        problem(&|ops| ops.insert(gather(ops), ops[0].clone())),
        problem(&|ops| {
            let last = gather(ops) - 1;
            ops[last] = ops[0].clone();
        }),
        problem(&|ops| {
            let at = gather(ops);
            let Op::GatherRows { input, .. } = &mut ops[at] else { unreachable!("as found") };
            "something else".clone_into(input);
        }),
        // Layers of one operation, behind which stand two.
        problem(&|ops| {
            let layers = [0, 1, 2, 2].map(|layer| ops[attention(ops, layer)].clone());
            let gather = ops[gather(ops)].clone();
            *ops = layers.into_iter().chain([gather]).collect();
        }),
    ];
    insta::assert_snapshot!(said.join("\n"));
    // Layers of two operations, one right behind the other.
    let mut short = whole.clone();
    let sum = |out: &str| Op::Add { a: out.to_owned(), b: out.to_owned(), out: out.to_owned() };
    let attend = |layer| whole.ops[attention(&whole.ops, layer)].clone();
    let rows = |input: &str| Op::GatherRows { input: input.to_owned(), out: "rows".to_owned() };
    short.ops = vec![attend(0), sum("x"), attend(1), sum("y"), attend(2), sum("z"), rows("z")];
    assert_eq!(short.first_layers(2).expect("alike").ops, [attend(0), sum("x"), attend(1), sum("y"), rows("y")]);
}

#[test]
fn a_written_program_is_read_back() {
    for program in programs() {
        assert_eq!(Program::parse(&program.to_text()).expect("well-formed"), program);
    }
}

#[test]
fn buffers_and_weights_are_found_by_name() {
    for program in programs() {
        assert!(program.buffers.iter().all(|buffer| program.buffer(&buffer.name) == Some(buffer)));
        assert!(program.weights.iter().all(|weight| program.weight(&weight.name) == Some(weight)));
        assert_eq!((program.buffer("none"), program.weight("none")), (None, None));
    }
}

#[test]
fn the_memory_plan_adds_up() {
    let program = decoder::program(&Geometry::small(DType::F32), true);
    let plan = program.memory_plan();
    let limits = program.limits;
    let ints = [
        // Token ids, positions and slots; blocks and length of each sequence; where each sequence starts, and where the
        // last one ends; rows of logits.
        3 * limits.max_num_tokens,
        limits.max_batch_size * limits.max_blocks_per_seq(),
        limits.max_batch_size,
        limits.max_batch_size + 1,
        limits.max_num_logits,
    ];
    assert_eq!(plan.inputs, 4 * ints.iter().sum::<usize>());
    // Keys and values of 2 layers, 2 heads of 16 elements and 16 tokens, 4 bytes each.
    assert_eq!(plan.kv_block, 2 * 2 * 2 * 16 * 16 * 4);
    assert_eq!(plan.weights, program.weights.iter().map(|w| w.shape.iter().product::<usize>() * 4).sum::<usize>());
    assert_eq!(plan.total(0), plan.weights + plan.arena + plan.inputs);
    assert_eq!(plan.total(3), plan.total(0) + 3 * plan.kv_block);
    assert_eq!(plan.total(usize::MAX), usize::MAX);
}
