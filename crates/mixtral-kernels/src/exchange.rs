//! The memory through which the ranks of a job hand rows to each other on GPUs: how large it is, and what kernels are told of it.
//! `kernels/collective/exchange.cuh` says how it works.

use mixtral_engine::{Buffer, Op, Program};
use serde::{Deserialize, Serialize};

/// Elements of a packet: a vector of `kernels/base/vector.cuh`.
const PACKET: usize = 8;
/// Slots of an inbox: `exchange::SLOTS`.
const SLOTS: usize = 3;
/// Slots of a pipeline stage's inbox: `exchange::STAGE_SLOTS`.
const STAGE_SLOTS: usize = 2;
/// Bytes that a part of an inbox is a multiple of.
const ALIGN: usize = 1024;

/// What a rank's program needs to reach the other ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exchange {
    /// Slots of the inbox of a tensor-parallel group's rank.
    pub slots: usize,
    /// Bytes of a slot for each other rank of the group: what one sends in a collective at most.
    pub part_bytes: usize,
    /// Slots of the inbox for rows of the pipeline stage before.
    pub stage_slots: usize,
    /// Bytes of such a slot: the rows that one stage sends in a step at most. The same for all stages.
    pub stage_bytes: usize,
}

/// What a kernel is told of the exchange. Pointers stay the same for as long as a program is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExchangeArg {
    /// Pointer to where the inbox of each rank of the tensor-parallel group begins, 64 bits each.
    Inboxes,
    /// Pointer to the number of collectives that the group did before this step.
    Done,
    /// Pointer to the number of steps, this one included.
    Steps,
    /// Pointer to the inbox for rows of the stage before.
    StageInbox,
    /// Pointer to that of the next stage.
    NextInbox,
    /// Pointer to how many steps' rows the next stage has taken: it writes there.
    Taken,
    /// Pointer to where the stage before reads how many steps' rows this one has taken; null on the first stage.
    TakenBefore,
    /// Pointer to a word that is not zero once a rank is gone.
    Stop,
    /// Pointer to a word of the host that is not zero once a kernel has waited for too long.
    Report,
}

/// Bytes of a row on its way: whole packets.
fn row_bytes(buffer: &Buffer) -> usize {
    buffer.cols.div_ceil(PACKET) * PACKET * buffer.dtype.size()
}

impl Exchange {
    /// That of a program; none if it speaks to no other rank.
    #[must_use]
    pub fn new(program: &Program) -> Option<Exchange> {
        let limits = program.limits;
        let bytes = |name: &str| {
            let buffer = program.buffer(name);
            buffer.map_or(0, |b| row_bytes(b) * program.num_rows(b.rows, limits.max_num_tokens, limits.max_num_logits))
        };
        let mut exchange = Exchange { slots: SLOTS, stage_slots: STAGE_SLOTS, ..Exchange::default() };
        let mut is_alone = true;
        for op in &program.ops {
            let (most, name) = match op {
                Op::AllReduce { input, .. } | Op::AllGather { input, .. } => (&mut exchange.part_bytes, input),
                Op::Send { input: name, .. } | Op::Recv { out: name, .. } => (&mut exchange.stage_bytes, name),
                _ => continue,
            };
            *most = (*most).max(bytes(name).next_multiple_of(ALIGN));
            is_alone = false;
        }
        (!is_alone).then_some(exchange)
    }

    /// Bytes of the inbox of one of `ranks` ranks of a group; saturates instead of overflowing.
    #[must_use]
    pub fn inbox_bytes(&self, ranks: usize) -> usize {
        self.slots.saturating_mul(self.part_bytes).saturating_mul(ranks.saturating_sub(1))
    }

    /// Bytes of the inbox for rows of the stage before; saturates instead of overflowing.
    #[must_use]
    pub fn stage_inbox_bytes(&self) -> usize {
        self.stage_slots.saturating_mul(self.stage_bytes)
    }
}

/// Collectives of a tensor-parallel group among some operations.
pub(crate) fn num_collectives(ops: &[Op]) -> usize {
    ops.iter().filter(|op| matches!(op, Op::AllReduce { .. } | Op::AllGather { .. })).count()
}
