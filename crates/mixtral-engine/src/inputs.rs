//! What one step computes: ragged sequences over a paged cache, decodes first.

use std::borrow::Cow;

use mixtral_model::TokenId;

use crate::{BlockMove, BlockPlace, Limits, Op, Program, RandomKey, SamplingParams, ScoreRequest, Scored, score};

/// The inputs of one step. The arrays have the layout in which a GPU reads them.
///
/// A token may be one that the step before draws, whose id the host does not know yet: a [`TokenSource`].
///
/// Only two other arrays may hold negative numbers. In the block table −1 pads a row behind the blocks that the sequence needs. In
/// the slot mapping it stands for a token whose key and value are not kept. Such tokens are all tokens of a dead sequence, which
/// only pads a step, and any token in programs without attention. Any other token needs its key in the cache, because
/// attention reads it from there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepInputs<'a> {
    /// How many of the sequences are decodes (one token each). They come first.
    pub num_decodes: usize,
    /// Token ids `[T]`, or [`TokenSource::Draw`]s as numbers below 0.
    pub token_ids: Vec<i32>,
    /// Position of each token in its sequence `[T]`.
    pub positions: Vec<i32>,
    /// The cache slot that each token's key and value go to, `[T]`. It follows from the block table and the token's
    /// position: `block · block_size + offset`.
    pub slot_mapping: Vec<i32>,
    /// Blocks of each sequence in order, `[S, max_blocks_per_seq]`. First come the blocks of its tokens. Entries behind
    /// them are not read; they may be other blocks or −1.
    pub block_table: Vec<i32>,
    /// Tokens of each sequence, including this step's, `[S]`.
    pub seq_lens: Vec<i32>,
    /// Where each sequence's tokens start in `token_ids`, `[S + 1]`.
    pub cu_query_lens: Vec<i32>,
    /// The tokens whose logits are wanted, ascending, `[L]`.
    pub logits_indices: Vec<i32>,
    /// The draws that are wanted from those logits.
    pub samples: Vec<SampleRequest<'a>>,
    /// The log-probabilities that are wanted from those logits.
    pub scores: Vec<ScoreRequest>,
    /// Copies of blocks, before anything is computed.
    pub moves: Vec<BlockMove>,
    /// Whether the caller wants the logits themselves.
    pub return_logits: bool,
}

/// Where a token of a step comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenSource {
    /// This is its id.
    Id(TokenId),
    /// It is the token of this draw of the step before, the one that the backend computed last. If that draw's row was
    /// not finite, it is token 0.
    Draw(usize),
}

impl TokenSource {
    /// The element of `token_ids` that stands for it: an id is itself, draw n is −1 − n.
    #[must_use]
    pub fn number(self) -> i32 {
        // Ids and draws of a step that passes its check are below 2^31.
        let int = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
        match self {
            TokenSource::Id(token) => int(token.0 as usize),
            TokenSource::Draw(draw) => -1 - int(draw),
        }
    }

    /// What an element of `token_ids` stands for.
    #[must_use]
    pub fn of(number: i32) -> TokenSource {
        match u32::try_from(number) {
            Ok(id) => TokenSource::Id(TokenId(id)),
            Err(_) => TokenSource::Draw(usize::try_from(-1 - number).unwrap_or(usize::MAX)),
        }
    }
}

/// One draw of a next token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampleRequest<'a> {
    /// Row of `logits_indices`.
    pub row: usize,
    /// How to draw.
    pub params: SamplingParams,
    /// The key of the draw's random bits.
    pub key: RandomKey,
    /// The sequence's tokens so far, for the penalties. May be empty if there are no penalties.
    pub tokens: Cow<'a, [TokenId]>,
    /// How many of them are the prompt.
    pub prompt_len: usize,
    /// What is added to the logits of some tokens, before the penalties.
    pub bias: Vec<(TokenId, f32)>,
    /// Tokens that may not be drawn.
    pub banned: Vec<TokenId>,
}

/// Inputs that a program cannot take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InputError {
    /// More than the engine was built for.
    #[error(
        "the step has {found} {what}, but the engine was built for at most {limit}; build it with a larger --{flag}"
    )]
    OverLimit {
        /// What there is too much of.
        what: &'static str,
        /// How much there is.
        found: usize,
        /// How much there may be.
        limit: usize,
        /// The build flag that sets the limit.
        flag: &'static str,
    },
    /// An array of the wrong length.
    #[error("step input `{name}` has {found} elements, expected {expected}")]
    Length {
        /// The array.
        name: &'static str,
        /// Its length.
        found: usize,
        /// The length it should have.
        expected: usize,
    },
    /// A value outside its range.
    #[error("step input `{name}`[{index}] is {value}, expected {expected}")]
    Value {
        /// The array.
        name: &'static str,
        /// Position in it.
        index: usize,
        /// The value.
        value: i64,
        /// What it may be.
        expected: String,
    },
}

impl StepInputs<'_> {
    /// Tokens of the step.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Sequences of the step.
    #[must_use]
    pub fn num_seqs(&self) -> usize {
        self.seq_lens.len()
    }

    /// Rows of logits of the step.
    #[must_use]
    pub fn num_logits(&self) -> usize {
        self.logits_indices.len()
    }

    /// The ids of its tokens, if the step before drew `drawn`.
    #[must_use]
    pub fn known_ids(&self, drawn: &[TokenId]) -> Cow<'_, [i32]> {
        let known = |&number: &i32| match TokenSource::of(number) {
            TokenSource::Draw(draw) => drawn.get(draw).map_or(number, |&token| TokenSource::Id(token).number()),
            TokenSource::Id(_) => number,
        };
        if self.token_ids.iter().all(|&number| number >= 0) {
            return Cow::Borrowed(&self.token_ids);
        }
        self.token_ids.iter().map(known).collect()
    }

    /// Checks the inputs against a program, a cache of `kv_blocks` blocks, and a step before that drew `drawn` tokens. A
    /// backend can then index by them.
    ///
    /// # Errors
    /// The first rule that they break.
    pub fn check(&self, program: &Program, kv_blocks: usize, drawn: usize) -> Result<(), InputError> {
        let Limits { max_batch_size, max_num_tokens, max_seq_len, max_num_logits, block_size } = program.limits;
        let over = |what, found, limit, flag| {
            if found > limit { Err(InputError::OverLimit { what, found, limit, flag }) } else { Ok(()) }
        };
        let (tokens, seqs) = (self.num_tokens(), self.num_seqs());
        over("tokens", tokens, max_num_tokens, "max-num-tokens")?;
        over("sequences", seqs, max_batch_size, "max-batch-size")?;
        over("rows of logits", self.num_logits(), max_num_logits, "max-num-tokens")?;
        let width = program.limits.max_blocks_per_seq();
        for (name, found, expected) in [
            ("positions", self.positions.len(), tokens),
            ("slot_mapping", self.slot_mapping.len(), tokens),
            ("block_table", self.block_table.len(), seqs * width),
            ("cu_query_lens", self.cu_query_lens.len(), seqs + 1),
        ] {
            if found != expected {
                return Err(InputError::Length { name, found, expected });
            }
        }
        let within = |name, values: &[i32], low: i64, high: i64| {
            // No number is below −2^31 or above 2^31 − 1.
            let least = i32::try_from(low).unwrap_or(i32::MIN);
            let most = i32::try_from(high - 1).unwrap_or(i32::MAX);
            let is_outside = |&v: &i32| v < least || v > most;
            // All are looked at, without an early end: then the processor compares several at a time.
            if !values.iter().fold(false, |any, v| any | is_outside(v)) {
                return Ok(());
            }
            let index = values.iter().position(is_outside).unwrap_or(0);
            let (value, expected) = (i64::from(values[index]), format!("{low} to {}", high - 1));
            Err(InputError::Value { name, index, value, expected })
        };
        let int = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        within("token_ids", &self.token_ids, -int(drawn), int(program.vocab_size))?;
        within("positions", &self.positions, 0, int(max_seq_len))?;
        within("slot_mapping", &self.slot_mapping, -1, int(kv_blocks.saturating_mul(block_size)))?;
        within("block_table", &self.block_table, -1, int(kv_blocks))?;
        within("seq_lens", &self.seq_lens, 1, int(max_seq_len) + 1)?;
        within("cu_query_lens", &self.cu_query_lens, 0, int(tokens) + 1)?;
        within("logits_indices", &self.logits_indices, 0, int(tokens))?;
        if self.num_decodes > seqs {
            let (value, expected) = (int(self.num_decodes), format!("at most the {seqs} sequences"));
            return Err(InputError::Value { name: "num_decodes", index: 0, value, expected });
        }
        if let Some(index) = self.logits_indices.windows(2).position(|pair| pair[0] >= pair[1]) {
            let (value, before) = (self.logits_indices[index + 1], self.logits_indices[index]);
            let (value, expected) = (i64::from(value), format!("more than the {before} before it"));
            return Err(InputError::Value { name: "logits_indices", index: index + 1, value, expected });
        }
        for (index, place) in self.moves.iter().flat_map(|m| [m.from, m.to]).enumerate() {
            if let BlockPlace::Cache(block) = place
                && block.0 as usize >= kv_blocks
            {
                let (value, expected) = (i64::from(block.0), format!("0 to {}", int(kv_blocks) - 1));
                return Err(InputError::Value { name: "moves", index: index / 2, value, expected });
            }
        }
        self.check_scores(program.vocab_size)?;
        let attends = program.ops.iter().any(|op| matches!(op, Op::Attention { .. }));
        self.check_sequences(width, block_size, tokens, attends)
    }

    /// Checks that edges, positions, blocks and slots of the sequences agree. `attends` tells whether the program has
    /// attention.
    fn check_sequences(&self, width: usize, block_size: usize, tokens: usize, attends: bool) -> Result<(), InputError> {
        let wrong = |name, index, value: i32, expected: String| {
            Err(InputError::Value { name, index, value: i64::from(value), expected })
        };
        let edges = &self.cu_query_lens;
        if edges[0] != 0 {
            return wrong("cu_query_lens", 0, edges[0], "0".to_owned());
        }
        let last = edges.len() - 1;
        if usize::try_from(edges[last]) != Ok(tokens) {
            return wrong("cu_query_lens", last, edges[last], tokens.to_string());
        }
        for (seq, edge) in edges.windows(2).enumerate() {
            let (query_len, seq_len) = (edge[1] - edge[0], self.seq_lens[seq]);
            if query_len < 1 || query_len > seq_len || seq < self.num_decodes && query_len != 1 {
                let expected = format!("{} plus this sequence's 1 to {seq_len} tokens (1 for a decode)", edge[0]);
                return wrong("cu_query_lens", seq + 1, edge[1], expected);
            }
            // All of these were checked to be within range above.
            let index = |n: i32| usize::try_from(n).unwrap_or(0);
            let blocks = &self.block_table[seq * width..][..index(seq_len).div_ceil(block_size)];
            if let Some(i) = blocks.iter().position(|&block| block < 0) {
                return wrong("block_table", seq * width + i, blocks[i], "an allocated block".to_owned());
            }
            let tokens = index(edge[0])..index(edge[1]);
            let unkept = !attends || self.slot_mapping[tokens.clone()].iter().all(|&slot| slot < 0);
            for (i, token) in tokens.enumerate() {
                let expected = index(seq_len - query_len) + i;
                let (position, slot) = (self.positions[token], self.slot_mapping[token]);
                if usize::try_from(position) != Ok(expected) {
                    return wrong("positions", token, position, expected.to_string());
                }
                let expected = index(blocks[expected / block_size]) * block_size + expected % block_size;
                if usize::try_from(slot) != Ok(expected) && !(slot < 0 && unkept) {
                    let expected = format!("{expected}, where the block table has position {position}");
                    return wrong("slot_mapping", token, slot, expected);
                }
            }
        }
        for (index, sample) in self.samples.iter().enumerate() {
            if sample.row >= self.num_logits() {
                let expected = format!("a row below {}", self.num_logits());
                let value = i32::try_from(sample.row).unwrap_or(i32::MAX);
                return wrong("samples", index, value, expected);
            }
        }
        Ok(())
    }

    fn check_scores(&self, vocab_size: usize) -> Result<(), InputError> {
        for (index, request) in self.scores.iter().enumerate() {
            let wrong = |value: usize, expected: String| {
                let value = i64::try_from(value).unwrap_or(i64::MAX);
                Err(InputError::Value { name: "scores", index, value, expected })
            };
            match request.of.row(&self.samples) {
                Some(row) if row < self.num_logits() => {}
                Some(row) => return wrong(row, format!("a row below {}", self.num_logits())),
                None => return wrong(self.samples.len(), format!("one of the {} draws", self.samples.len())),
            }
            if let Scored::Token { token, .. } = request.of
                && token.0 as usize >= vocab_size
            {
                return wrong(token.0 as usize, format!("a token below {vocab_size}"));
            }
            if request.best > score::MAX_BEST {
                return wrong(request.best, format!("at most {} tokens", score::MAX_BEST));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
