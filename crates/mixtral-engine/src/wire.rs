//! The messages in which a step travels between ranks: its inputs as one block of bytes, and its outputs as another.
//!
//! Numbers are little-endian, without padding. A list is its length (u32), then its elements. The reader trusts no
//! length: it refuses a list that is longer than the rest of the block before it allocates anything.

use mixtral_model::TokenId;

use crate::{RandomKey, SampleRequest, SamplingParams, StepInputs, StepOutputs};

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
            out.tokens(&sample.banned);
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
            samples: Vec::new(),
            return_logits,
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
            step.samples.push(SampleRequest { row, params, key, tokens, prompt_len, banned: input.tokens("bans")? });
        }
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
        out.0
    }

    /// Reads a block back.
    ///
    /// # Errors
    /// If the block is cut short, too long, or holds an impossible length.
    pub fn unpack(block: &[u8]) -> Result<StepOutputs, WireError> {
        let mut input = Reader { block, at: 0 };
        let outputs =
            StepOutputs { tokens: input.tokens("tokens")?, logits: input.list("logits", f32::from_le_bytes)? };
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
            samples: vec![SampleRequest { row: 1, params, key, tokens, prompt_len: 1, banned: vec![TokenId(4)] }],
            return_logits: true,
        }
    }

    #[test]
    fn blocks_read_back() {
        assert_eq!(StepInputs::unpack(&step().pack()), Ok(step()));
        let outputs = StepOutputs { tokens: vec![TokenId(7)], logits: vec![1.5, -0.0] };
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
