//! A program on a GPU: runs steps on it.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use mixtral_engine::score::{self, Found};
use mixtral_engine::{
    Backend, BackendError, DeviceIdle, Inspect, Launched, NonFinite, Op, Program, Score, StepInputs, StepOutputs,
    Weights, sampling,
};
use mixtral_kernels::step_block::{Array, Best, Drawn, MAX_BEST, Scored};
use mixtral_kernels::{Executable, Regime, StepBlock};
use mixtral_model::TokenId;

use crate::driver::{Context, Device, Stream};
use crate::exchange::Exchange;
use crate::execute::{Shape, Timer, WorkList};
use crate::flight::{self, Flight, MOST, Turns};
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
    pub(crate) turns: Turns,
    /// The steps under way.
    pub(crate) flights: VecDeque<Flight>,
    /// How many tokens the last step draws.
    pub(crate) num_drawn: usize,
    /// Those tokens, if the host knows them already. It does if it drew some of them itself.
    pub(crate) known_draws: Vec<TokenId>,
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

    /// How this rank reaches the others, in words, if there are any.
    #[must_use]
    pub fn links(&self) -> Option<&str> {
        self.exchange.as_ref().map(Exchange::links)
    }

    /// Puts a step into the stream: its copies of blocks, its inputs, its launches, and the way back of what it draws.
    fn begin(&mut self, ops: &Range<usize>, inputs: &StepInputs<'_>) -> Result<Flight, BackendError> {
        if let Some(lost) = &self.lost {
            return Err(lost.clone().into());
        }
        inputs.check(&self.program, self.kv_blocks, self.num_drawn)?;
        let draws = self.sampled(ops).is_some();
        let rows = if draws { inputs.samples.iter().map(|sample| sample.row).collect() } else { Vec::new() };
        let turn = usize::try_from(self.steps % MOST as u64).unwrap_or(0);
        let flight = Flight { turn, step: self.steps, is_done: false, rows, what: flight::words(inputs) };
        let bytes = self.turns.of(turn).staging.bytes()?;
        let written = inputs::write(&self.block, &self.program, inputs, &self.known_draws, bytes)?;
        self.steps += 1;
        self.turns.of(turn).begin(&self.stream).map_err(|error| self.failed(&flight, error))?;
        if ops.start == 0 {
            let part_bytes = half_layer(&self.program, self.kv_blocks);
            let shape = CacheShape { parts: 2 * self.program.kv.num_layers, part_bytes, blocks: self.kv_blocks };
            let (cache, host) = (&self.memory.cache, &mut self.host_blocks);
            moves::carry_out(&inputs.moves, shape, cache, host, &self.stream, &self.context)?;
        }
        self.execute(ops, inputs, written, &flight).map_err(|error| self.failed(&flight, error))?;
        (self.num_drawn, self.known_draws) = (flight.rows.len(), Vec::new());
        Ok(flight)
    }

    /// Uploads the step's inputs, and puts its launches and the download of its draws into the stream.
    fn execute(
        &mut self,
        ops: &Range<usize>,
        inputs: &StepInputs<'_>,
        written: inputs::Written,
        flight: &Flight,
    ) -> Result<(), CudaError> {
        let stream = &self.stream;
        self.turns.upload(flight.turn, written.prefix, &self.memory.step, stream, !self.flights.is_empty())?;
        let turn = self.turns.of(flight.turn);
        if written.adjustments > 0 {
            let at = self.block.offset(Array::Adjustments);
            turn.staging.upload(stream, at, written.adjustments, &self.memory.step, at)?;
        }
        if written.scores > 0 {
            let at = self.block.offset(Array::Scores);
            turn.staging.upload(stream, at, written.scores, &self.memory.step, at)?;
        }
        let shape = Shape { tokens: inputs.num_tokens(), logits: inputs.num_logits() };
        let whole = ops.start == 0 && ops.end >= self.program.ops.len();
        let work = regime_of(&mut self.work, inputs)?;
        match &mut self.timer {
            Some(timer) => work.run_timed(stream, shape, ops, timer)?,
            None if whole && work.replay(stream)? => {}
            None => work.run(stream, shape, ops, self.overlap)?,
        }
        let bytes = flight.rows.len() * size_of::<Drawn>();
        turn.landing.download(stream, &self.memory.step, self.block.offset(Array::Drawn), bytes)?;
        turn.end(stream)
    }

    /// Waits for a step, behind all that were launched before it.
    fn wait(&mut self, flight: &mut Flight) -> Result<(), BackendError> {
        let mut earlier = std::mem::take(&mut self.flights);
        let waited = earlier.iter_mut().try_for_each(|flight| self.wait_alone(flight));
        self.flights = earlier;
        waited?;
        self.wait_alone(flight)
    }

    fn wait_alone(&mut self, flight: &mut Flight) -> Result<(), BackendError> {
        let waited = self.turns.wait(flight, self.exchange.as_mut());
        Ok(waited.map_err(|error| self.failed(flight, error))?)
    }

    /// The error of a step. Remembers it if it lost the device.
    fn failed(&mut self, flight: &Flight, error: CudaError) -> CudaError {
        let behind = if self.steps > flight.step + 1 { ", or the step behind it" } else { "" };
        let mut error = error.in_step(flight.step, || format!("{}{behind}", flight.what));
        if let CudaError::Fault { .. } = error {
            if let Some(exchange) = &mut self.exchange {
                error = exchange.cause(error);
            }
            self.lost = Some(error.clone());
        }
        error
    }

    /// What a step that is done has drawn. Rows of logits that are not finite are in the outputs too.
    fn draws(&mut self, flight: &Flight) -> Result<StepOutputs, BackendError> {
        let mut outputs = StepOutputs::default();
        let bytes = flight.rows.len() * size_of::<Drawn>();
        let drawn = inputs::drawn(&self.turns.of(flight.turn).landing.bytes()?[..bytes]);
        for (&row, drawn) in flight.rows.iter().zip(drawn) {
            if let Ok(token) = usize::try_from(drawn.bad_token) {
                let (value, dtype) = (drawn.bad_value, self.program.dtype);
                outputs.non_finite.push(NonFinite { row, token, value, dtype });
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
        sort(&mut outputs.non_finite);
        Ok(outputs)
    }

    /// The logits that the `sample` operation draws from, if it is among `ops`.
    fn sampled(&self, ops: &Range<usize>) -> Option<&str> {
        let ops = self.program.ops.get(ops.start..ops.end.min(self.program.ops.len()))?;
        ops.iter().find_map(|op| if let Op::Sample { logits } = op { Some(logits.as_str()) } else { None })
    }

    /// The outputs of a step that is done, before any other is launched: what it drew, and what the host makes of its
    /// logits. Some draws and scores are not for the kernels; the host computes them as they are defined.
    fn outputs(
        &mut self,
        ops: &Range<usize>,
        inputs: &StepInputs<'_>,
        flight: &Flight,
    ) -> Result<StepOutputs, BackendError> {
        let mut outputs = self.draws(flight)?;
        let Some(logits) = self.sampled(ops).map(str::to_owned) else { return Ok(outputs) };
        if inputs::needs_logits(&self.block, &self.program, inputs) {
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
                && !outputs.non_finite.iter().any(|wrong| wrong.row == request.row)
            {
                outputs.tokens[sample] = sampling::sample(&mut row(request.row).to_vec(), request);
            }
        }
        let scores: Vec<Result<Score, NonFinite>> = match inputs::are_scored_by_host(&self.block, &self.program, inputs)
        {
            true => inputs.scores.iter().map(|request| score::score(request, inputs, row, &outputs.tokens)).collect(),
            false => self.found(inputs)?.into_iter().map(|found| found.map(Score::from)).collect(),
        };
        for score in scores {
            outputs.scores.push(score.unwrap_or_else(|wrong| {
                outputs.non_finite.push(NonFinite { dtype: self.program.dtype, ..wrong });
                Score::default()
            }));
        }
        if !inputs.return_logits {
            outputs.logits.clear();
        }
        sort(&mut outputs.non_finite);
        Ok(outputs)
    }

    /// What the kernels found for the step's scores.
    fn found(&self, inputs: &StepInputs<'_>) -> Result<Vec<Result<Found, NonFinite>>, BackendError> {
        let count = inputs.scores.len();
        let read = |array: Array, size: usize| {
            let mut bytes = vec![0; count * size];
            self.stream.download(&self.memory.step, self.block.offset(array), &mut bytes).map(|()| bytes)
        };
        if count == 0 {
            return Ok(Vec::new());
        }
        let scored = read(Array::Scored, size_of::<Scored>())?;
        let size = MAX_BEST * size_of::<Best>();
        let is_wanted = inputs.scores.iter().any(|request| request.best > 0);
        let best = if is_wanted { read(Array::Best, size)? } else { vec![0; count * size] };
        Ok(inputs::found(inputs, &scored, &best))
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

/// Each row once, ascending.
fn sort(non_finite: &mut Vec<NonFinite>) {
    non_finite.sort_unstable_by_key(|wrong| wrong.row);
    non_finite.dedup_by_key(|wrong| wrong.row);
}

impl Drop for CudaBackend {
    /// Waits for the steps under way. Their kernels may wait for a rank that is gone, until they are told to stop.
    fn drop(&mut self) {
        while let Some(mut flight) = self.flights.pop_front() {
            let _ = self.wait_alone(&mut flight);
        }
    }
}

impl Backend for CudaBackend {
    fn step(&mut self, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        self.run_ops(0..self.program.ops.len(), inputs)
    }

    /// Not if operations are timed one by one.
    fn runs_ahead(&self) -> bool {
        self.timer.is_none()
    }

    /// Waits for a step whose logits the host needs: the next step writes its own in their place.
    fn launch(&mut self, inputs: &StepInputs<'_>) -> Result<Launched, BackendError> {
        if self.flights.len() == MOST {
            return Err(BackendError::Other(format!("{MOST} steps are under way, and there may be no more")));
        }
        if !self.runs_ahead() || inputs::is_more_than_drawn(&self.program, inputs) {
            return self.step(inputs).map(Launched::Done);
        }
        let flight = self.begin(&(0..self.program.ops.len()), inputs)?;
        self.flights.push_back(flight);
        Ok(Launched::UnderWay)
    }

    fn collect(&mut self) -> Result<StepOutputs, BackendError> {
        let none = || BackendError::Other("no step is under way".to_owned());
        let mut flight = self.flights.pop_front().ok_or_else(none)?;
        self.wait_alone(&mut flight)?;
        self.draws(&flight)
    }

    fn device_idle(&self) -> Option<DeviceIdle> {
        Some(self.turns.idle())
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
        let mut flight = self.begin(&ops, inputs)?;
        self.wait(&mut flight)?;
        if let Some(timer) = &mut self.timer {
            timer.collect().map_err(BackendError::from)?;
        }
        let outputs = self.outputs(&ops, inputs, &flight)?;
        self.known_draws.clone_from(&outputs.tokens);
        Ok(outputs)
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
