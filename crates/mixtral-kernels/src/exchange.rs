//! The memory through which the ranks of a job pass rows to each other on GPUs: its sizes, and the kernels' arguments
//! for it. `kernels/collective/exchange.cuh` explains how it works.

use mixtral_engine::{Buffer, Op, Program};
use serde::{Deserialize, Serialize};

/// Elements of a packet: a vector of `kernels/base/vector.cuh`.
const PACKET: usize = 8;
/// Slots of an inbox: `exchange::SLOTS`.
const SLOTS: usize = 3;
/// Slots of a pipeline stage's inbox: `exchange::STAGE_SLOTS`.
const STAGE_SLOTS: usize = 2;
/// Each part of an inbox is a multiple of this many bytes.
const ALIGN: usize = 1024;
/// Bytes that a GPU sends in the time from a write until another GPU has seen it: 366 GB/s, 1.3 us
/// (`docs/perf/ranks.md`).
const BYTES_UNDER_WAY: usize = 476_000;

/// Sizes of the memory that a rank's program needs to exchange rows with other ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exchange {
    /// Slots of the inbox of a tensor-parallel group's rank.
    pub slots: usize,
    /// Bytes that a slot has for each other rank of the group: the most that a rank sends in a collective.
    pub part_bytes: usize,
    /// Slots of the inbox for rows of the pipeline stage before.
    pub stage_slots: usize,
    /// Bytes of such a slot: the most that a stage sends in a step. It is the same for all stages.
    pub stage_bytes: usize,
}

/// An argument of a kernel that concerns the exchange. Pointers stay the same as long as a program is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExchangeArg {
    /// Pointer to the addresses, of 64 bits each, of the inboxes of all ranks of the tensor-parallel group.
    Inboxes,
    /// Pointer to the number that the step's first collective has in the group.
    Done,
    /// Pointer to the number of steps, this one included.
    Steps,
    /// Pointer to the inbox for rows of the stage before.
    StageInbox,
    /// Pointer to the next stage's inbox.
    NextInbox,
    /// Pointer to the number of steps whose rows the next stage has read. The next stage writes it.
    Taken,
    /// Pointer to the same number for the stage before: this rank writes there how many steps' rows it has read. Null
    /// on the first stage.
    TakenBefore,
    /// Pointer to a word that is not zero after a rank was lost.
    Stop,
    /// Pointer to a word in the host's memory. A kernel that has waited too long sets it.
    Report,
}

/// Bytes of a row when it is sent: whole packets.
#[must_use]
pub fn row_bytes(buffer: &Buffer) -> usize {
    buffer.cols.div_ceil(PACKET) * PACKET * buffer.dtype.size()
}

impl Exchange {
    /// The exchange that a program needs; `None` if the program sends nothing to other ranks.
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

/// From how many rows on the ranks of a group sum rows like those of `buffer` in shares: each rank sums some of the rows
/// and sends their sums. `None` if they never do. Otherwise each rank sends its rows to all others, and sums all.
///
/// Of n ranks, each sends (n - 1) times its rows if all sum everything, and 2 (n - 1) / n times its rows in shares. But in
/// shares, what one rank reads has gone over the link twice. Both take the same time where the bytes saved are those that
/// are sent meanwhile.
#[must_use]
pub fn shares_from(buffer: &Buffer, ranks: usize) -> Option<usize> {
    let saved = ranks.checked_sub(2)?.saturating_mul(ranks - 1);
    (saved > 0).then(|| (BYTES_UNDER_WAY * ranks).div_ceil(saved * row_bytes(buffer).max(1)))
}

/// How many of the operations are collectives of a tensor-parallel group.
pub(crate) fn num_collectives(ops: &[Op]) -> usize {
    ops.iter().filter(|op| matches!(op, Op::AllReduce { .. } | Op::AllGather { .. })).count()
}

#[cfg(test)]
mod tests {
    use mixtral_engine::Rows;
    use mixtral_model::ElemType;

    use super::*;

    #[test]
    fn more_than_two_ranks_sum_many_rows_in_shares() {
        let (name, dtype, rows) = ("x".to_owned(), ElemType::Bf16, Rows::Tokens);
        let row = Buffer { name, dtype, rows, cols: 4096, offset: 0 };
        let from = |ranks| shares_from(&row, ranks);
        assert_eq!([0, 1, 2, 3, 4, 8].map(from), [None, None, None, Some(88), Some(39), Some(12)]);
    }
}
