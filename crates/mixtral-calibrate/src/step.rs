//! Makes the inputs of steps: sequences in blocks of a cache that holds nothing else.

use mixtral_engine::{Limits, StepInputs};
use mixtral_model::TokenId;

/// Tokens of a block of the cache.
const BLOCK_SIZE: usize = 64;

/// The limits of steps of up to `sequences` sequences of up to `tokens` tokens, of which `computed` at a time.
pub(crate) fn limits(sequences: usize, tokens: usize, computed: usize) -> Limits {
    Limits {
        max_batch_size: sequences,
        max_num_tokens: sequences * computed,
        max_seq_len: tokens,
        max_num_logits: sequences,
        block_size: BLOCK_SIZE,
    }
}

/// Blocks of a cache that has room for such steps.
pub(crate) fn blocks(limits: &Limits) -> usize {
    limits.max_batch_size * limits.max_blocks_per_seq()
}

/// A step that computes the tokens of each sequence from position `from` on. Sequence i always has the same blocks.
pub(crate) fn inputs(sequences: &[&[TokenId]], from: usize, limits: &Limits) -> StepInputs<'static> {
    let width = limits.max_blocks_per_seq();
    let mut step = StepInputs { cu_query_lens: vec![0], ..StepInputs::default() };
    for (index, sequence) in sequences.iter().enumerate() {
        let first = index * width;
        for (position, token) in sequence.iter().enumerate().skip(from) {
            step.token_ids.push(int(token.0 as usize));
            step.positions.push(int(position));
            step.slot_mapping.push(int(first * limits.block_size + position));
        }
        step.num_decodes += usize::from(from > 0);
        step.block_table.extend((first..first + width).map(int));
        step.seq_lens.push(int(sequence.len()));
        step.cu_query_lens.push(int(step.token_ids.len()));
    }
    step
}

/// A number of tokens or blocks, which are far below 2^31.
pub(crate) fn int(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}
