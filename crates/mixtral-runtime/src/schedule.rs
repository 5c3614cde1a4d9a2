//! Plans which sequences compute how many tokens in the next step.
//!
//! First come, first served. Decodes go first, with one token each. The rest of the step's token budget goes to
//! prompts, in chunks if need be. A sequence joins when there is a place for it and all its blocks can be reserved, so
//! no sequence is ever preempted.

use std::collections::VecDeque;

use mixtral_engine::{Limits, StepInputs};
use mixtral_model::BlockId;

use crate::blocks::BlockPool;
use crate::request::Request;
use crate::sequence::Sequence;

/// A sequence's part in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Index of the sequence among the running ones.
    pub sequence: usize,
    /// How many tokens are computed.
    pub num_tokens: usize,
    /// Whether these are tokens of the prompt.
    pub is_prompt: bool,
    /// First of its rows of logits.
    pub first_logits_row: usize,
    /// How many rows of logits it has.
    pub num_logits: usize,
    /// Which of the step's samples is its next token, if it draws one.
    pub sample: Option<usize>,
}

/// Moves sequences in order from the queue to the running ones, until the next one does not fit.
pub fn admit(queue: &mut VecDeque<Sequence>, running: &mut Vec<Sequence>, pool: &mut BlockPool, limits: &Limits) {
    while running.len() < limits.max_batch_size {
        let Some(next) = queue.front() else { return };
        let Some(blocks) = pool.allocate(limits.blocks_for(next.max_len())) else { return };
        let mut next = queue.pop_front().expect("it was just looked at");
        next.blocks = blocks;
        running.push(next);
    }
}

/// Distributes the step's tokens among the running sequences that have any to compute. In the result decodes come first.
/// With `depth` steps under way at a time, a step takes only its share of the sequences, so that the other steps have
/// some too.
#[must_use]
pub fn plan(running: &[Sequence], limits: &Limits, depth: usize) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::new();
    let (mut tokens, mut logits, mut samples) = (limits.max_num_tokens, 0, 0);
    let share = running.len().div_ceil(depth);
    let wanted = || (0..running.len()).filter(|&i| !running[i].cancelled);
    let decodes = wanted().filter(|&i| running[i].is_decode());
    for sequence in decodes.chain(wanted().filter(|&i| !running[i].is_decode())) {
        if chunks.len() == share {
            break;
        }
        let state = &running[sequence];
        let mut num_tokens = state.num_pending().min(tokens);
        // One row of logits for the last token; or one for each token, if the prompt's logits are wanted.
        let all = state.request.context_logits && !state.is_decode();
        let room = limits.max_num_logits - logits;
        if all {
            num_tokens = num_tokens.min(room);
        }
        let draws = num_tokens == state.num_pending();
        let num_logits = if all { num_tokens } else { usize::from(draws) };
        // No tokens, because its next one is being drawn, or because the step is full.
        if num_tokens == 0 || num_logits > room {
            continue;
        }
        chunks.push(Chunk {
            sequence,
            num_tokens,
            is_prompt: !state.is_decode(),
            first_logits_row: logits,
            num_logits,
            sample: draws.then_some(samples),
        });
        tokens -= num_tokens;
        logits += num_logits;
        samples += usize::from(draws);
    }
    chunks
}

/// The step's inputs.
#[must_use]
pub fn inputs<'a>(running: &'a [Sequence], chunks: &[Chunk], limits: &Limits) -> StepInputs<'a> {
    let width = limits.max_blocks_per_seq();
    let mut step = StepInputs { cu_query_lens: vec![0], ..StepInputs::default() };
    for chunk in chunks {
        let sequence = &running[chunk.sequence];
        let (start, end) = (sequence.num_computed, sequence.num_computed + chunk.num_tokens);
        step.num_decodes += usize::from(sequence.is_decode());
        for position in start..end {
            let block = sequence.blocks[position / limits.block_size];
            step.token_ids.push(int(sequence.tokens[position].0 as usize));
            step.positions.push(int(position));
            step.slot_mapping.push(int(block.0 as usize * limits.block_size + position % limits.block_size));
        }
        let filled = limits.blocks_for(end);
        step.block_table.extend(sequence.blocks[..filled].iter().map(|&BlockId(block)| int(block as usize)));
        step.block_table.extend(std::iter::repeat_n(-1, width - filled));
        step.seq_lens.push(int(end));
        step.cu_query_lens.push(int(step.token_ids.len()));
        let last = step.token_ids.len();
        step.logits_indices.extend((last - chunk.num_logits..last).map(int));
        if chunk.sample.is_some() {
            step.samples.push(sequence.sample_request(chunk.first_logits_row + chunk.num_logits - 1));
        }
        let Request { generation_logits, context_logits, .. } = sequence.request;
        step.return_logits |= generation_logits && chunk.sample.is_some() || context_logits && chunk.is_prompt;
    }
    step
}

/// Token ids, positions and slots are below 2^31: the limits' check and the session's refusals ensure that.
fn int(n: usize) -> i32 {
    i32::try_from(n).expect("checked against the limits")
}
