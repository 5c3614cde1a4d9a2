//! Plans where buffers lie, and computes how much memory an engine needs before anything is allocated.

use std::collections::HashMap;

use serde::Serialize;

use crate::{Op, Program};

/// Alignment of buffers in the arena, in bytes: a cache line, which is enough for vector loads and TMA.
pub const ALIGN: usize = 64;

/// Closed-form memory of one rank, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Weights.
    pub weights: usize,
    /// Activations.
    pub arena: usize,
    /// One block of the paged cache, all layers.
    pub kv_block: usize,
    /// Blocks that `max_batch_size` sequences of `max_seq_len` would fill.
    pub kv_blocks_at_limits: usize,
    /// One step's inputs.
    pub inputs: usize,
}

impl MemoryPlan {
    /// Total bytes with `kv_blocks` blocks of cache. Saturates instead of overflowing.
    #[must_use]
    pub const fn total(&self, kv_blocks: usize) -> usize {
        self.weights
            .saturating_add(self.arena)
            .saturating_add(self.inputs)
            .saturating_add(self.kv_block.saturating_mul(kv_blocks))
    }
}

impl Program {
    /// The memory that this rank needs.
    #[must_use]
    pub fn memory_plan(&self) -> MemoryPlan {
        let limits = &self.limits;
        let words = 3 * limits.max_num_tokens
            + limits.max_batch_size * (limits.max_blocks_per_seq() + 2)
            + 1
            + limits.max_num_logits;
        MemoryPlan {
            weights: self.weight_bytes(),
            arena: self.arena_bytes,
            kv_block: self.kv.block_bytes(limits.block_size),
            kv_blocks_at_limits: limits.max_batch_size.saturating_mul(limits.max_blocks_per_seq()),
            inputs: 4 * words,
        }
    }

    /// The operations during which each buffer holds a value that is still needed: first write to last read.
    #[must_use]
    pub fn lifetimes(&self) -> HashMap<&str, (usize, usize)> {
        let mut live: HashMap<&str, (usize, usize)> = HashMap::new();
        for (index, op) in self.ops.iter().enumerate() {
            for name in op.writes().into_iter().chain(op.reads()) {
                live.entry(name).or_insert((index, index)).1 = index;
            }
        }
        live
    }

    /// Gives every buffer an offset such that no two live buffers overlap, and sets the arena's size. It places the
    /// largest buffer first, and each buffer at the lowest offset that is free during its lifetime. The operands of a
    /// combine stay until the all-reduce of its output has ended, so that a backend can do both at once.
    pub fn plan_arena(&mut self) {
        let mut lifetimes: HashMap<String, (usize, usize)> =
            self.lifetimes().into_iter().map(|(name, span)| (name.to_owned(), span)).collect();
        for (index, pair) in self.ops.windows(2).enumerate() {
            if let [combine @ Op::Combine { out, .. }, Op::AllReduce { input, .. }] = pair
                && out == input
            {
                for operand in combine.reads() {
                    lifetimes.entry(operand.to_owned()).and_modify(|(_, last)| *last = (*last).max(index + 1));
                }
            }
        }
        let sizes: Vec<usize> = self.buffers.iter().map(|b| self.max_bytes(b).next_multiple_of(ALIGN)).collect();
        let mut by_size: Vec<usize> = (0..self.buffers.len()).collect();
        by_size.sort_by_key(|&i| std::cmp::Reverse(sizes[i]));

        let mut placed: Vec<usize> = Vec::new();
        let mut arena = 0;
        for index in by_size {
            let Some(&(start, end)) = lifetimes.get(&self.buffers[index].name) else { continue };
            let mut taken: Vec<(usize, usize)> = placed
                .iter()
                .filter(|&&other| {
                    let (other_start, other_end) = lifetimes[&self.buffers[other].name];
                    start <= other_end && other_start <= end
                })
                .map(|&other| (self.buffers[other].offset, self.buffers[other].offset + sizes[other]))
                .collect();
            taken.sort_unstable();
            let mut offset = 0;
            for (taken_start, taken_end) in taken {
                if offset + sizes[index] <= taken_start {
                    break;
                }
                offset = offset.max(taken_end);
            }
            self.buffers[index].offset = offset;
            arena = arena.max(offset + sizes[index]);
            placed.push(index);
        }
        self.arena_bytes = arena;
    }
}
