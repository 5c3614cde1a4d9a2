//! The messages in which a step travels between ranks: its inputs as one block of bytes, and its outputs as another.
//!
//! Numbers are little-endian, without padding. A list is its length (u32), then its elements. The reader trusts no
//! length: it refuses a list that is longer than the rest of the block before it allocates anything.

use mixtral_model::{BlockId, DType, TokenId};

use crate::{
    BlockMove, BlockPlace, NonFinite, RandomKey, SampleRequest, SamplingParams, Score, ScoreRequest, Scored,
    StepInputs, StepOutputs,
};

/// Bytes that cannot be read as a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message between ranks is damaged: {what} at byte {at} of {len}")]
pub struct WireError {
    /// What could not be read.
    what: &'static str,
    /// Where.
    at: usize,
    /// Bytes of the message.
    len: usize,
}

/// Data types by their number in a message.
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// Appends values to a block.
#[derive(Debug, Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn u32(&mut self, value: usize) {
        // Counts of a step are below 2^31, because the program's limits are.
        let value = u32::try_from(value).unwrap_or(u32::MAX);
        self.0.extend(value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    fn f32(&mut self, value: f32) {
        self.0.extend(value.to_le_bytes());
    }

    fn list<T: Copy, const N: usize>(&mut self, values: &[T], bytes: impl Fn(T) -> [u8; N]) {
        self.u32(values.len());
        self.0.reserve(N * values.len());
        values.iter().for_each(|&value| self.0.extend(bytes(value)));
    }

    fn ints(&mut self, values: &[i32]) {
        self.list(values, i32::to_le_bytes);
    }

    fn tokens(&mut self, values: &[TokenId]) {
        self.list(values, |t| t.0.to_le_bytes());
    }

    /// Tokens, each with a number.
    fn valued(&mut self, values: &[(TokenId, f32)]) {
        self.list(values, |(token, value)| {
            let [[a, b, c, d], [e, f, g, h]] = [token.0.to_le_bytes(), value.to_le_bytes()];
            [a, b, c, d, e, f, g, h]
        });
    }

    fn place(&mut self, place: BlockPlace) {
        let (kind, number) = match place {
            BlockPlace::Cache(block) => (0, block.0),
            BlockPlace::Host(number) => (1, number),
        };
        self.u32(kind);
        self.u32(number as usize);
    }

    fn scored(&mut self, of: Scored) {
        let (kind, at, token) = match of {
            Scored::Token { row, token } => (0, row, token.0),
            Scored::Draw(sample) => (1, sample, 0),
            Scored::Candidates(sample) => (2, sample, 0),
        };
        [kind, at, token as usize].into_iter().for_each(|part| self.u32(part));
    }
}

/// Reads values from a block.
struct Reader<'a> {
    block: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn error(&self, what: &'static str) -> WireError {
        WireError { what, at: self.at, len: self.block.len() }
    }

    fn take<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], WireError> {
        let bytes = self.block.get(self.at..).and_then(|rest| rest.first_chunk());
        let bytes = *bytes.ok_or_else(|| self.error(what))?;
        self.at += N;
        Ok(bytes)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, WireError> {
        self.take(what).map(u32::from_le_bytes)
    }

    fn usize(&mut self, what: &'static str) -> Result<usize, WireError> {
        let value = self.u32(what)?;
        usize::try_from(value).map_err(|_| self.error(what))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, WireError> {
        self.take(what).map(u64::from_le_bytes)
    }

    fn f32(&mut self, what: &'static str) -> Result<f32, WireError> {
        self.take(what).map(f32::from_le_bytes)
    }

    fn list<T, const N: usize>(
        &mut self,
        what: &'static str,
        from: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, WireError> {
        let len = self.usize(what)?;
        let end = len.checked_mul(N).and_then(|bytes| bytes.checked_add(self.at));
        if end.is_none_or(|end| end > self.block.len()) {
            return Err(self.error(what));
        }
        (0..len).map(|_| self.take(what).map(&from)).collect()
    }

    fn ints(&mut self, what: &'static str) -> Result<Vec<i32>, WireError> {
        self.list(what, i32::from_le_bytes)
    }

    fn tokens(&mut self, what: &'static str) -> Result<Vec<TokenId>, WireError> {
        self.list(what, |bytes| TokenId(u32::from_le_bytes(bytes)))
    }

    fn valued(&mut self, what: &'static str) -> Result<Vec<(TokenId, f32)>, WireError> {
        self.list(what, |[a, b, c, d, e, f, g, h]: [u8; 8]| {
            (TokenId(u32::from_le_bytes([a, b, c, d])), f32::from_le_bytes([e, f, g, h]))
        })
    }

    /// As many values as the block says. Each takes at least `bytes` bytes, so a length that cannot be is refused here.
    fn many<T>(
        &mut self,
        what: &'static str,
        bytes: usize,
        read: impl Fn(&mut Self) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let len = self.usize(what)?;
        if len > (self.block.len() - self.at) / bytes {
            return Err(self.error(what));
        }
        (0..len).map(|_| read(self)).collect()
    }

    fn place(&mut self) -> Result<BlockPlace, WireError> {
        let (kind, number) = (self.u32("a place")?, self.u32("a block")?);
        match kind {
            0 => Ok(BlockPlace::Cache(BlockId(number))),
            1 => Ok(BlockPlace::Host(number)),
            _ => Err(self.error("a place")),
        }
    }

    fn scored(&mut self) -> Result<Scored, WireError> {
        let (kind, at) = (self.u32("what is scored")?, self.usize("a row or a draw")?);
        let token = TokenId(self.u32("a token")?);
        match kind {
            0 => Ok(Scored::Token { row: at, token }),
            1 => Ok(Scored::Draw(at)),
            2 => Ok(Scored::Candidates(at)),
            _ => Err(self.error("what is scored")),
        }
    }

    fn end(&self) -> Result<(), WireError> {
        if self.at == self.block.len() { Ok(()) } else { Err(self.error("the end")) }
    }
}

impl StepInputs<'_> {
    /// The inputs as one block. Draws without penalties do not need the tokens so far, so these are left out.
    #[must_use]
    pub fn pack(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u32(self.num_decodes);
        out.u32(usize::from(self.return_logits));
        for list in [
            &self.token_ids,
            &self.positions,
            &self.slot_mapping,
            &self.block_table,
            &self.seq_lens,
            &self.cu_query_lens,
            &self.logits_indices,
        ] {
            out.ints(list);
        }
        out.u32(self.samples.len());
        for sample in &self.samples {
            let SamplingParams {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
            } = sample.params;
            let RandomKey { seed, prompt, hypothesis, position } = sample.key;
            out.u32(sample.row);
            out.u64(top_k as u64);
            [temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty]
                .iter()
                .for_each(|&x| out.f32(x));
            out.u64(seed);
            [prompt, hypothesis, position].iter().for_each(|&x| out.u32(x as usize));
            out.u32(sample.prompt_len);
            out.tokens(if sample.params.has_penalties() { &sample.tokens } else { &[] });
            out.valued(&sample.bias);
            out.tokens(&sample.banned);
        }
        out.u32(self.scores.len());
        for &ScoreRequest { of, best } in &self.scores {
            out.scored(of);
            out.u32(best);
        }
        out.u32(self.moves.len());
        for &BlockMove { from, to } in &self.moves {
            out.place(from);
            out.place(to);
        }
        out.0
    }

    /// Reads a block back. Whether the inputs fit a program is checked by [`StepInputs::check`], not here.
    ///
    /// # Errors
    /// If the block is cut short, too long, or holds an impossible length.
    pub fn unpack(block: &[u8]) -> Result<StepInputs<'static>, WireError> {
        let mut input = Reader { block, at: 0 };
        let (num_decodes, return_logits) = (input.usize("the number of decodes")?, input.u32("a flag")? != 0);
        let mut step = StepInputs {
            num_decodes,
            token_ids: input.ints("token ids")?,
            positions: input.ints("positions")?,
            slot_mapping: input.ints("slots")?,
            block_table: input.ints("the block table")?,
            seq_lens: input.ints("sequence lengths")?,
            cu_query_lens: input.ints("query lengths")?,
            logits_indices: input.ints("logits indices")?,
            return_logits,
            ..StepInputs::default()
        };
        for _ in 0..input.usize("the number of samples")? {
            let row = input.usize("a row")?;
            let top_k = usize::try_from(input.u64("top-k")?).unwrap_or(usize::MAX);
            let mut real = || input.f32("a sampling parameter");
            let (temperature, top_p, min_p) = (real()?, real()?, real()?);
            let (repetition_penalty, presence_penalty, frequency_penalty) = (real()?, real()?, real()?);
            let params = SamplingParams {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
            };
            let seed = input.u64("a seed")?;
            let mut part = || input.u32("a random key");
            let key = RandomKey { seed, prompt: part()?, hypothesis: part()?, position: part()? };
            let prompt_len = input.usize("a prompt's length")?;
            let tokens = input.tokens("tokens")?.into();
            let (bias, banned) = (input.valued("bias")?, input.tokens("bans")?);
            step.samples.push(SampleRequest { row, params, key, tokens, prompt_len, bias, banned });
        }
        step.scores = input.many("the number of scores", 16, |input| {
            Ok(ScoreRequest { of: input.scored()?, best: input.usize("a number of tokens")? })
        })?;
        step.moves = input
            .many("the number of moves", 16, |input| Ok(BlockMove { from: input.place()?, to: input.place()? }))?;
        input.end()?;
        Ok(step)
    }
}

impl StepOutputs {
    /// The outputs as one block.
    #[must_use]
    pub fn pack(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.tokens(&self.tokens);
        out.list(&self.logits, f32::to_le_bytes);
        out.u32(self.scores.len());
        for Score { logprob, best } in &self.scores {
            out.f32(*logprob);
            out.valued(best);
        }
        out.u32(self.non_finite.len());
        for NonFinite { row, token, value, dtype } in &self.non_finite {
            out.u32(*row);
            out.u32(*token);
            out.f32(*value);
            out.u32(DTYPES.iter().position(|d| d == dtype).unwrap_or_default());
        }
        out.0
    }

    /// Reads a block back.
    ///
    /// # Errors
    /// If the block is cut short, too long, or holds an impossible length.
    pub fn unpack(block: &[u8]) -> Result<StepOutputs, WireError> {
        let mut input = Reader { block, at: 0 };
        let (tokens, logits) = (input.tokens("tokens")?, input.list("logits", f32::from_le_bytes)?);
        let scores = input.many("the number of scores", 8, |input| {
            Ok(Score { logprob: input.f32("a log-probability")?, best: input.valued("likely tokens")? })
        })?;
        let non_finite = input.many("the number of rows that are not finite", 16, |input| {
            let (row, token) = (input.usize("a row")?, input.usize("a token")?);
            let (value, dtype) = (input.f32("a logit")?, input.usize("a data type")?);
            let dtype = *DTYPES.get(dtype).ok_or_else(|| input.error("a data type"))?;
            Ok(NonFinite { row, token, value, dtype })
        })?;
        let outputs = StepOutputs { tokens, scores, non_finite, logits };
        input.end()?;
        Ok(outputs)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn step() -> StepInputs<'static> {
        let params = SamplingParams { repetition_penalty: 1.5, ..SamplingParams::default() };
        let key = RandomKey { seed: u64::MAX, prompt: 1, hypothesis: 2, position: 3 };
        let tokens = vec![TokenId(3), TokenId(9)].into();
        StepInputs {
            num_decodes: 1,
            token_ids: vec![5, 6, 7],
            positions: vec![9, 0, 1],
            slot_mapping: vec![100, -1, 3],
            block_table: vec![6, -1, 0, -1],
            seq_lens: vec![10, 2],
            cu_query_lens: vec![0, 1, 3],
            logits_indices: vec![0, 2],
            samples: vec![SampleRequest {
                row: 1,
                params,
                key,
                tokens,
                prompt_len: 1,
                bias: vec![(TokenId(8), -2.5)],
                banned: vec![TokenId(4)],
            }],
            scores: vec![
                ScoreRequest { of: Scored::Token { row: 0, token: TokenId(3) }, best: 0 },
                ScoreRequest { of: Scored::Draw(0), best: 2 },
                ScoreRequest { of: Scored::Candidates(0), best: 7 },
            ],
            moves: vec![
                BlockMove { from: BlockPlace::Cache(BlockId(6)), to: BlockPlace::Host(1) },
                BlockMove { from: BlockPlace::Host(0), to: BlockPlace::Cache(BlockId(2)) },
            ],
            return_logits: true,
        }
    }

    #[test]
    fn blocks_read_back() {
        assert_eq!(StepInputs::unpack(&step().pack()), Ok(step()));
        let outputs = StepOutputs {
            tokens: vec![TokenId(7)],
            scores: vec![Score { logprob: -0.5, best: vec![(TokenId(7), -0.5), (TokenId(1), -2.0)] }],
            non_finite: vec![NonFinite { row: 2, token: 9, value: f32::INFINITY, dtype: DType::Bf16 }],
            logits: vec![1.5, -0.0],
        };
        assert_eq!(StepOutputs::unpack(&outputs.pack()), Ok(outputs));
    }

    #[test]
    fn a_block_ends_where_the_step_does() {
        let longer = |block: Vec<u8>| [block, vec![0]].concat();
        let said = StepInputs::unpack(&longer(step().pack())).unwrap_err();
        let len = step().pack().len();
        assert_eq!(said, WireError { what: "the end", at: len, len: len + 1 });
        assert!(StepOutputs::unpack(&longer(StepOutputs::default().pack())).is_err());
    }

    proptest! {
        #[test]
        fn damaged_blocks_are_refused_or_harmless(cut in 0usize..200, at in 0usize..200, flip in any::<u8>()) {
            let mut block = step().pack();
            let len = block.len();
            prop_assert!(StepInputs::unpack(&block[..cut % len]).is_err());
            block[at % len] ^= flip;
            // Whatever the bytes are, reading does not panic, and allocates no more than the block's size.
            let _ = StepInputs::unpack(&block);
            let _ = StepOutputs::unpack(&block);
        }
    }
}
