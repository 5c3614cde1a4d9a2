//! The passes, in the order in which they run. Each is one file, takes the whole program, and never changes an
//! edge's data type or rounding: the program computes the same bits before and after it.

pub mod fuse_combine_norm;
pub mod fuse_qkv;
pub mod fuse_residual;
pub mod fuse_route;
pub mod fuse_silu_mul;

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
    Pass { name: "fuse_qkv", run: fuse_qkv::run },
    Pass { name: "fuse_residual", run: fuse_residual::run },
    Pass { name: "fuse_route", run: fuse_route::run },
    Pass { name: "fuse_silu_mul", run: fuse_silu_mul::run },
    Pass { name: "fuse_combine_norm", run: fuse_combine_norm::run },
];

/// What a run of operations becomes.
pub(crate) struct Fused {
    /// How many operations are replaced.
    pub(crate) taken: usize,
    /// What replaces them.
    pub(crate) ops: Vec<Op>,
    /// Buffers that the replacement needs anew.
    pub(crate) buffers: Vec<Buffer>,
}

impl Fused {
    /// `taken` operations become one, over buffers that were there before.
    pub(crate) fn one(taken: usize, op: Op) -> Option<Fused> {
        Some(Fused { taken, ops: vec![op], buffers: Vec::new() })
    }
}

/// Replaces every run of operations that `fuse` recognises at its start.
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
    let order: HashMap<&str, usize> =
        program.ops.iter().flat_map(Op::writes).enumerate().map(|(i, name)| (name, i)).rev().collect();
    program.buffers.retain(|b| order.contains_key(b.name.as_str()));
    program.buffers.sort_by_key(|b| order[b.name.as_str()]);
}
