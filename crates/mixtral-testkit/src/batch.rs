//! The inputs of a step: sequences of different lengths, whose blocks are scattered over the cache.

use mixtral_engine::{Limits, RandomKey, SampleRequest, SamplingParams, StepInputs, dummy};

/// A sequence and its blocks of the cache.
#[derive(Clone, Debug)]
pub struct PagedTokens {
    /// Blocks in order, enough for all its tokens.
    pub blocks: Vec<i32>,
    /// All its tokens.
    pub tokens: Vec<i32>,
}

/// Some consecutive tokens of a sequence, computed in one step.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// The sequence.
    pub sequence: &'a PagedTokens,
    /// Tokens computed before.
    pub past: usize,
    /// Tokens computed now.
    pub new: usize,
}

/// `0..n` in an order that the seed determines.
#[must_use]
pub fn shuffled(seed: u32, n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_key(|&i| dummy::mix(seed ^ u32::try_from(i).unwrap_or(0).wrapping_mul(0x9e37_79b9)));
    order
}

/// Sequences of the given lengths. The seed determines their tokens, and which blocks of a cache of `kv_blocks` they
/// have. The cache must have enough blocks.
#[must_use]
pub fn sequences(
    seed: u32,
    lengths: &[usize],
    limits: &Limits,
    vocab_size: usize,
    kv_blocks: usize,
) -> Vec<PagedTokens> {
    let mut free = shuffled(seed, kv_blocks).into_iter();
    let int = |n: usize| i32::try_from(n).unwrap_or(0);
    let sequence = |(s, &len): (usize, &usize)| PagedTokens {
        blocks: free.by_ref().take(limits.blocks_for(len)).map(int).collect(),
        tokens: (0..len)
            .map(|i| int(dummy::mix(seed ^ u32::try_from(s * 1000 + i).unwrap_or(0)) as usize % vocab_size))
            .collect(),
    };
    lengths.iter().enumerate().map(sequence).collect()
}

/// The inputs of a step that computes these parts and the logits of every token. Parts of one token at the beginning
/// are decodes.
#[must_use]
pub fn step(limits: &Limits, parts: &[Part<'_>]) -> StepInputs<'static> {
    let int = |n: usize| i32::try_from(n).unwrap_or(0);
    let mut inputs = StepInputs {
        num_decodes: parts.iter().take_while(|p| p.new == 1).count(),
        cu_query_lens: vec![0],
        return_logits: true,
        ..StepInputs::default()
    };
    for part in parts {
        for position in part.past..part.past + part.new {
            inputs.logits_indices.push(int(inputs.token_ids.len()));
            inputs.token_ids.push(part.sequence.tokens[position]);
            inputs.positions.push(int(position));
            let block = part.sequence.blocks[position / limits.block_size];
            inputs.slot_mapping.push(block * int(limits.block_size) + int(position % limits.block_size));
        }
        inputs.seq_lens.push(int(part.past + part.new));
        inputs.cu_query_lens.push(int(inputs.token_ids.len()));
        let width = limits.max_blocks_per_seq();
        let blocks = part.sequence.blocks.iter().copied().chain(std::iter::repeat(-1)).take(width);
        inputs.block_table.extend(blocks);
    }
    inputs
}

/// A step of one new sequence of `n` tokens, with as many logits as the limits allow.
#[must_use]
pub fn prompt(limits: &Limits, vocab_size: usize, kv_blocks: usize, n: usize) -> StepInputs<'static> {
    let sequence = sequences(1, &[n], limits, vocab_size, kv_blocks).remove(0);
    let mut inputs = step(limits, &[Part { sequence: &sequence, past: 0, new: n }]);
    inputs.logits_indices.truncate(limits.max_num_logits);
    inputs
}

/// Asks for a greedy draw from a row of logits.
#[must_use]
pub fn greedy(row: usize) -> SampleRequest<'static> {
    SampleRequest {
        row,
        params: SamplingParams::default(),
        key: RandomKey::default(),
        tokens: (&[]).into(),
        prompt_len: 0,
        bias: vec![],
        banned: Vec::new(),
    }
}
