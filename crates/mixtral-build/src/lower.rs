//! Lowers a rank's graph: runs the passes and plans the arena.

use mixtral_checkpoint::CheckpointConfig;
use mixtral_engine::{Limits, Program};
use mixtral_model::Rank;

use crate::graph;
use crate::passes::{PASSES, place_collectives};

/// The program of `rank`, fused and with its arena planned.
#[must_use]
pub fn lower(config: &CheckpointConfig, rank: Rank, limits: Limits) -> Program {
    let mut program = graph::naive(config, rank, limits);
    for pass in PASSES {
        (pass.run)(&mut program);
    }
    finish(&mut program);
    program
}

/// The program of `rank` with its collectives placed and its arena planned, but with nothing fused. Tests compare the
/// fused program with it.
#[must_use]
pub fn lower_unfused(config: &CheckpointConfig, rank: Rank, limits: Limits) -> Program {
    let mut program = graph::naive(config, rank, limits);
    place_collectives::run(&mut program);
    finish(&mut program);
    program
}

/// Lists weights in the order of their first use, and plans the arena.
fn finish(program: &mut Program) {
    let used: Vec<String> = program.ops.iter().flat_map(|op| op.weights()).map(str::to_owned).collect();
    let position = |name: &str| used.iter().position(|n| n == name).unwrap_or(usize::MAX);
    program.weights.sort_by_cached_key(|w| position(&w.name));
    program.plan_arena();
}
