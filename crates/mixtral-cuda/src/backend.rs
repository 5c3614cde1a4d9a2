//! A program on a GPU: runs steps on it.

use std::ops::Range;
use std::time::Duration;

use mixtral_engine::{
    Backend, BackendError, Inspect, NonFinite, Op, Program, Score, StepInputs, StepOutputs, Weights, sampling, score,
};
use mixtral_kernels::step_block::{Array, Drawn};
use mixtral_kernels::{Executable, Regime, StepBlock};
use mixtral_model::TokenId;

use crate::driver::{Context, Device, Pinned, Stream};
use crate::exchange::Exchange;
use crate::execute::{Shape, Timer, WorkList};
use crate::load::{Memory, half_layer};
use crate::moves::{self, CacheShape, HostBlocks};
use crate::{CudaError, CudaOptions, KvBlocks, Loading, inputs};

/// One rank's program on a GPU. Fields are dropped in their order, so what uses the memory comes before the memory.
pub struct CudaBackend {
    /// Dropped first, because it waits for the other ranks. Freeing memory may wait for all kernels on the GPU, also
    /// for those of other ranks.
    pub(crate) exchange: Option<Exchange>,
    pub(crate) work: Vec<(Regime, WorkList)>,
    pub(crate) timer: Option<Timer>,
    pub(crate) stream: Stream,
    pub(crate) staging: Pinned,
    pub(crate) landing: Pinned,
    pub(crate) memory: Memory,
    pub(crate) host_blocks: HostBlocks,
    pub(crate) program: Program,
    pub(crate) block: StepBlock,
    pub(crate) kv_blocks: usize,
    pub(crate) overlap: bool,
    /// Steps that have run so far.
    pub(crate) steps: u64,
    /// The failure that lost the device, if there was one. The device answers nothing after it.
    pub(crate) lost: Option<CudaError>,
    pub(crate) context: Context,
}

impl CudaBackend {
    /// Loads a program of one rank that has the GPU to itself. The ranks of a job use [`Loading`].
    ///
    /// # Errors
    /// Those of [`Loading::new`], [`Loading::kv_blocks`] and [`Loading::finish`].
    pub fn load(
        program: Program,
        source: &Weights,
        executable: &Executable,
        kv_blocks: KvBlocks,
        options: CudaOptions,
    ) -> Result<CudaBackend, BackendError> {
        let loading = Loading::new(program, source, executable, options)?;
        let kv_blocks = loading.kv_blocks(kv_blocks)?;
        loading.finish(kv_blocks, None)
    }

    /// The GPU.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.context.device()
    }

    /// Uploads the step's inputs, runs its launches, and waits for them.
    fn execute(
        &mut self,
        ops: Range<usize>,
        inputs: &StepInputs<'_>,
        written: inputs::Written,
    ) -> Result<(), CudaError> {
        let stream = &self.stream;
        self.staging.upload(stream, 0, written.prefix, &self.memory.step, 0)?;
        if written.adjustments > 0 {
            let at = self.block.offset(Array::Adjustments);
            self.staging.upload(stream, at, written.adjustments, &self.memory.step, at)?;
        }
        let shape = Shape { tokens: inputs.num_tokens(), logits: inputs.num_logits() };
        let whole = ops.start == 0 && ops.end >= self.program.ops.len();
        let work = regime_of(&mut self.work, inputs)?;
        let replayed = whole && self.timer.is_none() && work.replay(stream)?;
        if !replayed {
            match &mut self.timer {
                Some(timer) => work.run_timed(stream, shape, &ops, timer)?,
                None => work.run(stream, shape, &ops, self.overlap)?,
            }
        }
        if !inputs.samples.is_empty() && self.sampled(&ops).is_some() {
            let bytes = inputs.samples.len() * size_of::<Drawn>();
            self.landing.download(stream, &self.memory.step, self.block.offset(Array::Drawn), bytes)?;
        }
        match &mut self.exchange {
            Some(exchange) => exchange.wait(stream)?,
            None => stream.synchronize()?,
        }
        if !replayed && let Some(timer) = &mut self.timer {
            timer.collect()?;
        }
        Ok(())
    }

    /// The logits that the `sample` operation draws from, if it is among `ops`.
    fn sampled(&self, ops: &Range<usize>) -> Option<&str> {
        let ops = self.program.ops.get(ops.start..ops.end.min(self.program.ops.len()))?;
        ops.iter().find_map(|op| if let Op::Sample { logits } = op { Some(logits.as_str()) } else { None })
    }

    /// The tokens that the step has drawn, and its logits if they are wanted.
    fn outputs(&mut self, ops: &Range<usize>, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        let mut outputs = StepOutputs::default();
        let Some(logits) = self.sampled(ops).map(str::to_owned) else { return Ok(outputs) };
        let bytes = inputs.samples.len() * size_of::<Drawn>();
        let mut non_finite = Vec::new();
        for (request, drawn) in inputs.samples.iter().zip(inputs::drawn(&self.landing.bytes()?[..bytes])) {
            if let Ok(token) = usize::try_from(drawn.bad_token) {
                let (row, value, dtype) = (request.row, drawn.bad_value, self.program.dtype);
                non_finite.push(NonFinite { row, token, value, dtype });
                outputs.tokens.push(TokenId(0));
                continue;
            }
            let token = u32::try_from(drawn.token).ok().filter(|&t| (t as usize) < self.program.vocab_size);
            let wrong = || {
                let token = drawn.token;
                BackendError::Other(format!(
                    "the GPU drew token {token}, which there is not; this is a bug, please report it"
                ))
            };
            outputs.tokens.push(TokenId(token.ok_or_else(wrong)?));
        }
        // Some draws are not for the kernels, and none scores. Such a step's logits come to the host, which computes both as
        // they are defined.
        let host_draws = inputs.samples.iter().any(|sample| inputs::is_drawn_by_host(&self.program, sample));
        if inputs.return_logits || host_draws || !inputs.scores.is_empty() {
            let cols = self.program.buffer(&logits).map_or(0, |buffer| buffer.cols);
            let bytes = self.read_buffer(&logits, 4 * cols * inputs.num_logits())?;
            let rows = bytes.chunks_exact((4 * cols).max(1));
            let value = |word: &[u8]| f32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            outputs.logits =
                rows.flat_map(|row| row[..4 * self.program.vocab_size.min(cols)].chunks_exact(4).map(value)).collect();
        }
        let row = |row: usize| &outputs.logits[row * self.program.vocab_size..][..self.program.vocab_size];
        for (sample, request) in inputs.samples.iter().enumerate() {
            if inputs::is_drawn_by_host(&self.program, request)
                && !non_finite.iter().any(|wrong| wrong.row == request.row)
            {
                outputs.tokens[sample] = sampling::sample(&mut row(request.row).to_vec(), request);
            }
        }
        for request in &inputs.scores {
            outputs.scores.push(score::score(request, inputs, row, &outputs.tokens).unwrap_or_else(|wrong| {
                non_finite.push(NonFinite { dtype: self.program.dtype, ..wrong });
                Score::default()
            }));
        }
        if !inputs.return_logits {
            outputs.logits.clear();
        }
        non_finite.sort_unstable_by_key(|wrong| wrong.row);
        non_finite.dedup_by_key(|wrong| wrong.row);
        outputs.non_finite = non_finite;
        Ok(outputs)
    }

    /// Offset of a buffer in the arena, if it has at least `len` bytes.
    fn buffer(&self, name: &str, len: usize) -> Result<usize, BackendError> {
        let missing = || BackendError::Other(format!("there is no buffer `{name}`"));
        let buffer = self.program.buffer(name).ok_or_else(missing)?;
        let size = self.program.max_bytes(buffer);
        if len > size {
            return Err(BackendError::Other(format!("{len} bytes of the {size} of buffer `{name}`")));
        }
        Ok(buffer.offset)
    }

    /// Fills the arena with `byte`, for tests: no step may depend on what was in the arena before it.
    ///
    /// # Errors
    /// A device failure.
    pub fn poison(&mut self, byte: u8) -> Result<(), BackendError> {
        self.stream.fill(&self.memory.arena, 0, self.memory.arena.len(), byte)?;
        Ok(self.stream.synchronize()?)
    }

    fn cache_spans(&self, layer: usize) -> Result<[Range<usize>; 2], BackendError> {
        if layer >= self.program.kv.num_layers {
            return Err(BackendError::Other(format!("layer {layer} of {}", self.program.kv.num_layers)));
        }
        let half = half_layer(&self.program, self.kv_blocks);
        let start = 2 * layer * half;
        Ok([start..start + half, start + half..start + 2 * half])
    }
}

/// The work list of the regime that the step runs in.
fn regime_of<'a>(work: &'a mut [(Regime, WorkList)], inputs: &StepInputs<'_>) -> Result<&'a mut WorkList, CudaError> {
    let seqs = inputs.num_seqs();
    // Whether every sequence is a decode with one token, one row of logits and one draw, all in the same order. Where
    // another rank draws, there are no draws.
    let decodes = inputs.num_decodes == seqs
        && inputs.num_logits() == seqs
        && (inputs.samples.len() == seqs || inputs.samples.is_empty())
        && inputs.samples.iter().enumerate().all(|(i, sample)| sample.row == i);
    let index = choose(work.iter().map(|(regime, _)| *regime), inputs.num_tokens(), decodes);
    let none = || CudaError::Unsupported(format!("no kernels were chosen for steps of {} tokens", inputs.num_tokens()));
    Ok(&mut work[index.ok_or_else(none)?].1)
}

/// The index of the smallest regime that a step fits into, as [`mixtral_kernels::Schedule::for_step`] chooses it.
fn choose(regimes: impl Iterator<Item = Regime> + Clone, tokens: usize, decodes: bool) -> Option<usize> {
    let smallest = |of: bool| regimes.clone().position(|r| r.decodes == of && r.max_tokens >= tokens);
    decodes.then(|| smallest(true)).flatten().or_else(|| smallest(false))
}

impl Backend for CudaBackend {
    fn step(&mut self, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        self.run_ops(0..self.program.ops.len(), inputs)
    }

    fn kv_blocks(&self) -> usize {
        self.kv_blocks
    }

    fn expert_counts(&self) -> Vec<Vec<u64>> {
        let (layers, experts) = (self.program.num_layers, self.program.num_experts);
        let mut bytes = vec![0; 8 * layers * experts];
        if let Some(counts) = &self.memory.counts
            && self.stream.download(counts, 0, &mut bytes).is_err()
        {
            // The device is lost. The last step has returned that error.
            bytes.fill(0);
        }
        let count = |word: &[u8]| u64::from_le_bytes(word.try_into().unwrap_or_default());
        (0..layers)
            .map(|layer| bytes[8 * layer * experts..8 * (layer + 1) * experts].chunks_exact(8).map(count).collect())
            .collect()
    }

    fn op_times(&self) -> Vec<Duration> {
        self.timer.as_ref().map(|timer| timer.times.clone()).unwrap_or_default()
    }
}

impl Inspect for CudaBackend {
    fn program(&self) -> &Program {
        &self.program
    }

    /// The operations at which a launch begins in every regime, and the program's end.
    fn boundaries(&self) -> Vec<usize> {
        let begins = |op: &usize| self.work.iter().all(|(_, list)| list.begins(*op));
        let ops = self.program.ops.len();
        (0..ops).filter(begins).chain([ops]).collect()
    }

    fn run_ops(&mut self, ops: Range<usize>, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        if let Some(lost) = &self.lost {
            return Err(lost.clone().into());
        }
        inputs.check(&self.program, self.kv_blocks, 0)?;
        if ops.start == 0 {
            let part_bytes = half_layer(&self.program, self.kv_blocks);
            let shape = CacheShape { parts: 2 * self.program.kv.num_layers, part_bytes, blocks: self.kv_blocks };
            let (cache, host) = (&self.memory.cache, &mut self.host_blocks);
            moves::carry_out(&inputs.moves, shape, cache, host, &self.stream, &self.context)?;
        }
        let written = inputs::write(&self.block, &self.program, inputs, self.staging.bytes()?)?;
        let step = self.steps;
        self.steps += 1;
        self.execute(ops.clone(), inputs, written).map_err(|error| {
            let error = error.in_step(step, || {
                format!(
                    "{} tokens of {} sequences, {} decodes",
                    inputs.num_tokens(),
                    inputs.num_seqs(),
                    inputs.num_decodes
                )
            });
            if let CudaError::Fault { .. } = error {
                self.lost = Some(error.clone());
            }
            error
        })?;
        self.outputs(&ops, inputs)
    }

    fn read_buffer(&self, name: &str, len: usize) -> Result<Vec<u8>, BackendError> {
        let offset = self.buffer(name, len)?;
        let mut bytes = vec![0; len];
        self.stream.download(&self.memory.arena, offset, &mut bytes)?;
        Ok(bytes)
    }

    fn write_buffer(&mut self, name: &str, bytes: &[u8]) -> Result<(), BackendError> {
        let offset = self.buffer(name, bytes.len())?;
        Ok(self.stream.upload(bytes, &self.memory.arena, offset)?)
    }

    fn read_cache(&self, layer: usize) -> Result<[Vec<u8>; 2], BackendError> {
        let [keys, values] = self.cache_spans(layer)?;
        let read = |span: Range<usize>| {
            let mut bytes = vec![0; span.len()];
            self.stream.download(&self.memory.cache, span.start, &mut bytes).map(|()| bytes)
        };
        Ok([read(keys)?, read(values)?])
    }

    fn write_cache(&mut self, layer: usize, keys: &[u8], values: &[u8]) -> Result<(), BackendError> {
        for (span, bytes) in self.cache_spans(layer)?.into_iter().zip([keys, values]) {
            if bytes.len() != span.len() {
                return Err(BackendError::Other(format!("{} bytes for the {} of a layer", bytes.len(), span.len())));
            }
            self.stream.upload(bytes, &self.memory.cache, span.start)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_takes_the_smallest_regime_that_fits() {
        let regimes =
            [(1, true), (4, true), (8, false), (64, false)].map(|(max_tokens, decodes)| Regime { max_tokens, decodes });
        let index = |tokens, decodes| choose(regimes.into_iter(), tokens, decodes);
        assert_eq!(index(1, true), Some(0));
        assert_eq!(index(3, true), Some(1));
        // More decodes than any captured regime takes run as any other step does.
        assert_eq!(index(5, true), Some(2));
        assert_eq!(index(1, false), Some(2));
        assert_eq!(index(9, false), Some(3));
        assert_eq!(index(65, false), None);
    }
}
