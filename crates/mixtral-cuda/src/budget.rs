//! How much memory a program takes, and how many blocks of cache fit into the rest. Both are known before anything is
//! allocated.

use mixtral_engine::Program;
use mixtral_kernels::Schedule;

use crate::flight::{self, MOST};
use crate::staging::Queue;
use crate::{CudaError, exchange, weights};

/// How large the cache is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KvBlocks {
    /// This many blocks.
    Exactly(usize),
    /// As many blocks as fit into a part of the memory that everything else leaves free.
    Fraction {
        /// The part, 0 to 1.
        of_free: f32,
        /// Fewer blocks than this are an error.
        at_least: usize,
        /// More blocks than this are not needed.
        at_most: usize,
    },
}

/// Bytes left to the driver, for graphs and for allocations that it rounds up.
const RESERVE: usize = 256 << 20;

/// Bytes that a program takes on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Needs {
    pub(crate) weights: usize,
    /// Activations.
    pub(crate) arena: usize,
    /// Workspaces of kernels, and the memory between ranks.
    pub(crate) scratch: usize,
    /// The step's inputs, and the experts' counters.
    pub(crate) inputs: usize,
    /// One block of cache, all layers.
    pub(crate) kv_block: usize,
    /// What weights take while they are loaded, in the memory that becomes the cache.
    pub(crate) staging: usize,
    /// The most tokens of a step, which arena and scratch are planned for.
    pub(crate) max_num_tokens: usize,
}

impl Needs {
    pub(crate) fn new(program: &Program, schedule: &Schedule) -> Needs {
        let exchange = schedule.exchange.as_ref().map_or(0, |sizes| exchange::bytes(program, sizes));
        Needs {
            weights: weights::layout(program, schedule).1,
            arena: program.arena_bytes,
            scratch: schedule.scratch_bytes.saturating_add(exchange),
            inputs: schedule.block.bytes()
                + MOST * flight::ahead_bytes(&schedule.block)
                + 8 * program.num_layers * program.num_experts,
            kv_block: program.kv.block_bytes(program.limits.block_size),
            staging: Queue::new(program, schedule).bytes(),
            max_num_tokens: program.limits.max_num_tokens,
        }
    }

    /// Blocks of the cache, if everything fits into `free` bytes.
    pub(crate) fn kv_blocks(&self, free: usize, wanted: KvBlocks) -> Result<usize, CudaError> {
        let fixed = self.weights + self.arena + self.scratch + self.inputs + RESERVE;
        let left = free.saturating_sub(fixed);
        let block = self.kv_block.max(1);
        let (least, blocks, fraction) = match wanted {
            KvBlocks::Exactly(blocks) => (blocks, blocks.min(left / block), None),
            KvBlocks::Fraction { of_free, at_least, at_most } => {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    clippy::cast_precision_loss,
                    reason = "a part of memory"
                )]
                let part = (left as f64 * f64::from(of_free)) as usize;
                (at_least, (part / block).min(at_most), Some(of_free))
            }
        };
        if free >= fixed && blocks >= least && left >= self.staging {
            return Ok(blocks);
        }
        let kv = least.saturating_mul(block).max(self.staging);
        let what = format!(
            "the engine needs {} on the GPU: {} for weights, {} for activations, {} for workspaces, {} for inputs, {} for the driver, and {} for {least} blocks of KV cache; {} are free",
            bytes(fixed.saturating_add(kv)),
            bytes(self.weights),
            bytes(self.arena),
            bytes(self.scratch),
            bytes(self.inputs),
            bytes(RESERVE),
            bytes(kv),
            bytes(free),
        );
        Err(CudaError::Memory(format!("{what}; {}", self.advice(free, left, kv, fraction))))
    }

    /// What the user can change to make it fit.
    #[expect(clippy::cast_precision_loss, reason = "a part of memory")]
    fn advice(&self, free: usize, left: usize, kv: usize, fraction: Option<f32>) -> String {
        if let Some(fraction) = fraction
            && kv <= left
            && left > 0
        {
            let enough = (kv as f64 / left as f64 * 100.0).ceil() / 100.0;
            return format!(
                "raise --kv-cache-free-gpu-mem-fraction from {fraction} to {:.2}, or ask for shorter prompts and outputs",
                enough.min(1.0)
            );
        }
        // Activations and workspaces grow with the tokens of a step.
        let by_tokens = self.arena + self.scratch;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of memory")]
        let kv = (kv as f64 / f64::from(fraction.unwrap_or(1.0)).max(0.01)).ceil() as usize;
        let room = free.saturating_sub(self.weights + self.inputs + RESERVE + kv);
        let tokens = room / by_tokens.div_ceil(self.max_num_tokens.max(1)).max(1);
        if tokens >= 64 {
            return format!(
                "build the engine with --max-num-tokens {} (now {}), or ask for shorter prompts and outputs",
                tokens / 64 * 64,
                self.max_num_tokens
            );
        }
        "free the GPU of other programs, use one with more memory, or run with --backend cpu".to_owned()
    }
}

/// A size, for people.
#[expect(clippy::cast_precision_loss, reason = "for reading")]
pub(crate) fn bytes(n: usize) -> String {
    let n = n as f64;
    if n >= 1e9 { format!("{:.2} GB", n / 1e9) } else { format!("{:.1} MB", n / 1e6) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: usize = 1_000_000_000;

    fn needs() -> Needs {
        Needs {
            weights: 90 * GB,
            arena: 2 * GB,
            scratch: GB,
            inputs: GB / 10,
            kv_block: GB / 100,
            staging: 0,
            max_num_tokens: 8192,
        }
    }

    #[test]
    fn the_cache_takes_its_part_of_what_is_left() {
        let free = 90 * GB + 2 * GB + GB + GB / 10 + RESERVE + 10 * GB;
        let blocks =
            |of_free, at_least, at_most| needs().kv_blocks(free, KvBlocks::Fraction { of_free, at_least, at_most });
        assert_eq!(blocks(0.5, 1, 10_000), Ok(500));
        assert_eq!(blocks(1.0, 1, 10_000), Ok(1000));
        assert_eq!(blocks(0.9, 1, 30), Ok(30));
        assert_eq!(needs().kv_blocks(free, KvBlocks::Exactly(1000)), Ok(1000));
        assert!(needs().kv_blocks(free, KvBlocks::Exactly(1001)).is_err());
        assert!(blocks(0.5, 501, 10_000).is_err());
    }

    #[test]
    fn too_little_memory_says_what_would_fit() {
        let message = |free, wanted| needs().kv_blocks(free, wanted).unwrap_err().to_string();
        let part = KvBlocks::Fraction { of_free: 0.5, at_least: 600, at_most: 10_000 };
        insta::assert_snapshot!(message(104 * GB, part), @"the engine needs 99.37 GB on the GPU: 90.00 GB for weights, 2.00 GB for activations, 1.00 GB for workspaces, 100.0 MB for inputs, 268.4 MB for the driver, and 6.00 GB for 600 blocks of KV cache; 104.00 GB are free; raise --kv-cache-free-gpu-mem-fraction from 0.5 to 0.57, or ask for shorter prompts and outputs");
        insta::assert_snapshot!(message(80 * GB, part), @"the engine needs 99.37 GB on the GPU: 90.00 GB for weights, 2.00 GB for activations, 1.00 GB for workspaces, 100.0 MB for inputs, 268.4 MB for the driver, and 6.00 GB for 600 blocks of KV cache; 80.00 GB are free; free the GPU of other programs, use one with more memory, or run with --backend cpu");
        insta::assert_snapshot!(message(98 * GB, KvBlocks::Exactly(600)), @"the engine needs 99.37 GB on the GPU: 90.00 GB for weights, 2.00 GB for activations, 1.00 GB for workspaces, 100.0 MB for inputs, 268.4 MB for the driver, and 6.00 GB for 600 blocks of KV cache; 98.00 GB are free; build the engine with --max-num-tokens 4416 (now 8192), or ask for shorter prompts and outputs");
    }
}
