//! The passes, in the order in which they run. Each is one file and takes the whole program. A pass never changes an
//! edge's data type or rounding, so the program computes the same bits before and after it.

pub mod fuse_all_reduce;
pub mod fuse_combine_norm;
pub mod fuse_qkv;
pub mod fuse_residual;
pub mod fuse_route;
pub mod fuse_silu_mul;
pub mod place_collectives;

use std::collections::HashMap;

use mixtral_engine::{Buffer, Op, Program};

/// A named rewriting of a program.
pub struct Pass {
    /// Its file's name.
    pub name: &'static str,
    /// The rewriting.
    pub run: fn(&mut Program),
}

/// All passes, in order.
pub const PASSES: &[Pass] = &[
    Pass { name: "place_collectives", run: place_collectives::run },
    Pass { name: "fuse_qkv", run: fuse_qkv::run },
    Pass { name: "fuse_residual", run: fuse_residual::run },
    Pass { name: "fuse_route", run: fuse_route::run },
    Pass { name: "fuse_silu_mul", run: fuse_silu_mul::run },
    Pass { name: "fuse_combine_norm", run: fuse_combine_norm::run },
    Pass { name: "fuse_all_reduce", run: fuse_all_reduce::run },
];

/// The replacement for some consecutive operations.
pub(crate) struct Fused {
    /// How many operations are replaced.
    pub(crate) taken: usize,
    /// What replaces them.
    pub(crate) ops: Vec<Op>,
    /// New buffers that the replacement needs.
    pub(crate) buffers: Vec<Buffer>,
}

impl Fused {
    /// Replaces `taken` operations by one that needs no new buffers.
    pub(crate) fn one(taken: usize, op: Op) -> Option<Fused> {
        Some(Fused { taken, ops: vec![op], buffers: Vec::new() })
    }
}

/// Walks over the operations, and replaces the next ones wherever `fuse` recognises them.
pub(crate) fn rewrite(program: &mut Program, fuse: impl Fn(&Program, &[Op]) -> Option<Fused>) {
    let (mut ops, mut buffers) = (Vec::with_capacity(program.ops.len()), Vec::new());
    let mut rest = &program.ops[..];
    while let Some(op) = rest.first() {
        if let Some(fused) = fuse(program, rest) {
            ops.extend(fused.ops);
            buffers.extend(fused.buffers);
            rest = &rest[fused.taken..];
        } else {
            ops.push(op.clone());
            rest = &rest[1..];
        }
    }
    program.ops = ops;
    program.buffers.extend(buffers);
    tidy_buffers(program);
}

/// How many operations read `buffer`.
pub(crate) fn num_readers(program: &Program, buffer: &str) -> usize {
    program.ops.iter().filter(|op| op.reads().contains(&buffer)).count()
}

/// Drops the buffers that nothing writes any more and lists the others in the order in which they are written.
fn tidy_buffers(program: &mut Program) {
    let mut order: HashMap<&str, usize> = HashMap::new();
    for (index, name) in program.ops.iter().flat_map(Op::writes).enumerate() {
        order.entry(name).or_insert(index);
    }
    program.buffers.retain(|b| order.contains_key(b.name.as_str()));
    program.buffers.sort_by_key(|b| order[b.name.as_str()]);
}

#[cfg(test)]
mod tests {
    use mixtral_checkpoint::CheckpointConfig;
    use mixtral_engine::text::op_text;
    use mixtral_engine::{Limits, Program};
    use mixtral_model::{DType, Mapping, ModelConfig, ModelFamily, Rank};

    use super::PASSES;
    use crate::graph;
    use crate::lower::lower;

    fn config(family: ModelFamily) -> CheckpointConfig {
        let mut model = ModelConfig::mixtral_8x7b(DType::Bf16);
        (model.family, model.num_layers, model.hidden_size, model.intermediate_size) = (family, 2, 32, 48);
        (model.num_heads, model.num_kv_heads, model.head_dim, model.vocab_size) = (6, 2, 8, 100);
        if family == ModelFamily::Mistral {
            (model.moe.num_experts, model.moe.top_k) = (1, 1);
        }
        CheckpointConfig::new(model, Mapping::single())
    }

    const LIMITS: Limits =
        Limits { max_batch_size: 4, max_num_tokens: 64, max_seq_len: 128, max_num_logits: 4, block_size: 16 };

    fn ops(program: &Program) -> String {
        program.ops.iter().map(|op| op_text(op) + "\n").collect()
    }

    /// Takes a snapshot before the first pass and after each pass, so that a change in one pass shows in one snapshot.
    /// `idle` names the passes that change nothing, which are those for another number of ranks.
    fn every_pass(name: &str, config: &CheckpointConfig, rank: usize, idle: &[&str]) {
        let mut program = graph::naive(config, Rank(rank), LIMITS);
        insta::assert_snapshot!(format!("{name}_0_naive"), ops(&program));
        for (index, pass) in PASSES.iter().enumerate() {
            let before = ops(&program);
            (pass.run)(&mut program);
            assert_eq!(before == ops(&program), idle.contains(&pass.name), "{}", pass.name);
            if !idle.contains(&pass.name) {
                insta::assert_snapshot!(format!("{name}_{}_{}", index + 1, pass.name), ops(&program));
            }
        }
    }

    #[test]
    fn every_pass_before_and_after() {
        every_pass("one_rank", &config(ModelFamily::Mixtral), 0, &["place_collectives", "fuse_all_reduce"]);
    }

    #[test]
    fn every_pass_with_tensor_parallel_ranks() {
        let mut config = config(ModelFamily::Mixtral);
        config.mapping = Mapping { tp_size: 2, pp_size: 1, moe_tp_size: 1, moe_ep_size: 2 };
        config.use_parallel_embedding = true;
        config.validate().unwrap();
        every_pass("expert_parallel", &config, 1, &["fuse_residual", "fuse_combine_norm"]);
    }

    #[test]
    fn pipeline_stages_begin_and_end_with_their_neighbours() {
        let mut config = config(ModelFamily::Mixtral);
        config.model.num_layers = 3;
        config.mapping = Mapping::tensor_parallel(2, 3);
        config.validate().unwrap();
        let ends: Vec<String> = (0..6)
            .map(|rank| {
                let program = lower(&config, Rank(rank), LIMITS);
                program.check().unwrap();
                let (first, last) = (&program.ops[0], &program.ops[program.ops.len() - 1]);
                format!("{} … {}", op_text(first), op_text(last))
            })
            .collect();
        insta::assert_snapshot!(ends.join("\n"));
    }

    #[test]
    fn the_whole_program_of_a_dense_model() {
        let program = lower(&config(ModelFamily::Mistral), Rank(0), LIMITS);
        program.check().unwrap();
        insta::assert_snapshot!(program.to_text());
    }

    #[test]
    fn the_text_reads_back() {
        for family in [ModelFamily::Mixtral, ModelFamily::Mistral] {
            let program = lower(&config(family), Rank(0), LIMITS);
            assert_eq!(Program::parse(&program.to_text()).unwrap(), program);
        }
    }

    /// At every operation, the buffers that are still needed do not overlap.
    #[test]
    fn no_two_live_buffers_overlap() {
        for layers in [1, 3] {
            let mut config = config(ModelFamily::Mixtral);
            config.model.num_layers = layers;
            let program = lower(&config, Rank(0), LIMITS);
            let live = program.lifetimes();
            for (i, a) in program.buffers.iter().enumerate() {
                for b in &program.buffers[i + 1..] {
                    let ((a_from, a_to), (b_from, b_to)) = (live[a.name.as_str()], live[b.name.as_str()]);
                    let together = a_from <= b_to && b_from <= a_to;
                    let apart =
                        a.offset + program.max_bytes(a) <= b.offset || b.offset + program.max_bytes(b) <= a.offset;
                    assert!(!together || apart, "{} and {}", a.name, b.name);
                }
            }
        }
    }
}
