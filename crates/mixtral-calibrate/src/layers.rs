//! Runs a model over sequences, one layer at a time.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use mixtral_build::lower::lower_unfused;
use mixtral_checkpoint::{CheckpointConfig, Progress, TensorId, TensorSpec};
use mixtral_convert::{FloatModel, LinearInput, Statistics};
use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_engine::{
    BackendError, Collectives, Inspect, Limits, Op, Program, Rows, StepInputs, WeightSource, WeightView, Weights,
};
use mixtral_model::{DType, ElemType, Mapping, Rank, TokenId};

use crate::error::CalibrateError;
use crate::observe::{Observed, amax};
use crate::step;

/// Runs `model` over `sequences`, `batch_size` at a time, and returns what its linears saw. Progress is in tokens, each of which
/// goes through all layers.
///
/// # Errors
/// If weights cannot be read, there is too little memory, or an input is not finite.
pub fn run(
    model: &FloatModel,
    sequences: &[Vec<TokenId>],
    batch_size: usize,
    threads: usize,
    progress: &dyn Progress,
) -> Result<Statistics, CalibrateError> {
    let num_layers = model.config(Mapping::single()).model.num_layers;
    let config = model.config(Mapping { pp_size: num_layers, ..Mapping::single() });
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(1);
    let limits = step::limits(batch_size.min(sequences.len()).max(1), longest, longest);
    let batches: Vec<Vec<&[TokenId]>> =
        sequences.chunks(limits.max_batch_size).map(|batch| batch.iter().map(Vec::as_slice).collect()).collect();
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    progress.start((tokens * num_layers) as u64);
    let relay = Arc::new(Relay::default());
    let mut statistics = Statistics::default();
    for layer in 0..num_layers {
        let rank = Rank(layer);
        let program = one_layer(lower_unfused(&config, rank, limits));
        let mut stage = Stage::load(model, &config, program, layer, threads, relay.clone())?;
        for batch in &batches {
            let inputs = step::inputs(batch, 0, &limits);
            stage.step(&inputs)?;
            progress.advance(inputs.num_tokens() as u64);
        }
        let inputs = stage.observed.into_iter().map(|(input, observed)| (input, observed.statistics()));
        statistics.add_layer(&config.model, inputs.collect(), stage.cache_amax);
    }
    Ok(statistics)
}

/// Cuts the output embedding off: nothing is calibrated behind the last layer.
fn one_layer(mut program: Program) -> Program {
    if let Some(end) = program.ops.iter().position(|op| matches!(op, Op::GatherRows { .. })) {
        program.ops.truncate(end);
        let ops = &program.ops;
        program.weights.retain(|weight| ops.iter().any(|op| op.weights().contains(&weight.name.as_str())));
        program.buffers.retain(|buffer| ops.iter().any(|op| op.writes().contains(&buffer.name.as_str())));
        program.plan_arena();
    }
    program
}

/// Weights in memory.
pub(crate) struct Held(HashMap<String, (TensorSpec, Vec<u8>)>);

impl Held {
    /// The weights that a program reads.
    pub(crate) fn read(
        model: &FloatModel,
        config: &CheckpointConfig,
        program: &Program,
        threads: usize,
    ) -> Result<Weights, CalibrateError> {
        let names: Vec<&str> = program.weights.iter().map(|weight| weight.name.as_str()).collect();
        let read = model.weights(config, Rank(program.rank), &names, threads)?;
        let held = read.into_iter().map(|(spec, bytes)| (spec.name.clone(), (spec, bytes)));
        Ok(Weights::Source(Arc::new(Held(held.collect()))))
    }
}

impl WeightSource for Held {
    fn weight(&self, name: &str) -> Option<WeightView<'_>> {
        let (spec, bytes) = self.0.get(name)?;
        Some(WeightView { elem: spec.elem, shape: &spec.shape, bytes })
    }
}

/// What the stages send each other: the rows of each step, in the order of the steps.
#[derive(Default)]
struct Relay(Mutex<VecDeque<Vec<u8>>>);

impl Collectives for Relay {
    fn all_gather(&self, _: &[u8], _: &mut [u8]) -> Result<(), BackendError> {
        Err(BackendError::Other("a stage of one rank has nothing to gather".to_owned()))
    }

    fn send(&self, _: usize, bytes: &[u8]) -> Result<(), BackendError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push_back(bytes.to_vec());
        Ok(())
    }

    fn recv(&self, from: usize, bytes: &mut [u8]) -> Result<(), BackendError> {
        let rows = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let rows = rows.filter(|rows| rows.len() == bytes.len());
        let rows = rows.ok_or_else(|| BackendError::Other(format!("stage {from} did not send this step")))?;
        bytes.copy_from_slice(&rows);
        Ok(())
    }

    fn check(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

/// One layer, and what it saw.
struct Stage {
    backend: CpuBackend,
    ops: Vec<Op>,
    layer: usize,
    pool: rayon::ThreadPool,
    observed: BTreeMap<LinearInput, Observed>,
    cache_amax: [f32; 2],
}

impl Stage {
    fn load(
        model: &FloatModel,
        config: &CheckpointConfig,
        program: Program,
        layer: usize,
        threads: usize,
        relay: Arc<Relay>,
    ) -> Result<Stage, CalibrateError> {
        let weights = Held::read(model, config, &program, threads)?;
        let (ops, limits): (Vec<Op>, Limits) = (program.ops.clone(), program.limits);
        let options = CpuOptions { kv_blocks: step::blocks(&limits), threads, ..CpuOptions::default() };
        let backend = CpuBackend::load(program, weights, options)?.with_ranks(relay);
        let observed = LinearInput::of_layer(&config.model, layer);
        let observed = observed.into_iter().map(|input| (input, Observed::new(input.width(&config.model)))).collect();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.map_err(|error| BackendError::Other(format!("could not start {threads} threads: {error}")))?;
        Ok(Stage { backend, ops, layer, pool, observed, cache_amax: [0.0; 2] })
    }

    /// Runs a step. Looks at the inputs of each linear before it runs.
    fn step(&mut self, inputs: &StepInputs<'_>) -> Result<(), CalibrateError> {
        for index in 0..self.ops.len() {
            self.look(index, inputs)?;
            self.backend.run_ops(index..index + 1, inputs)?;
        }
        Ok(())
    }

    fn look(&mut self, index: usize, inputs: &StepInputs<'_>) -> Result<(), CalibrateError> {
        let (layer, dense) = (self.layer, self.backend.program().num_experts == 0);
        let is = |weight: &str, id: TensorId| weight == id.to_string();
        match self.ops[index].clone() {
            Op::Linear { input, weight, rows, .. } => {
                // Query, key and value projections have one input.
                let seen = if is(&weight, TensorId::Qkv(0)) && rows.is_none_or(|[start, _]| start == 0) {
                    LinearInput::Attention(layer)
                } else if is(&weight, TensorId::Dense(0)) {
                    LinearInput::Output(layer)
                } else if dense && is(&weight, TensorId::Fc(0)) {
                    LinearInput::FeedForward { layer, expert: 0 }
                } else if dense && is(&weight, TensorId::Proj(0)) {
                    LinearInput::Down { layer, expert: 0 }
                } else {
                    return Ok(());
                };
                let rows = self.rows(&input, inputs)?;
                self.add(
                    seen,
                    sequences(inputs).map(|tokens| rows[tokens].iter().map(Vec::as_slice).collect()).collect(),
                )
            }
            Op::WriteKv { key, value, .. } => {
                for (half, buffer) in [key, value].iter().enumerate() {
                    let rows = self.rows(buffer, inputs)?;
                    let found = rows.iter().map(|row| amax(row)).fold(0f32, f32::max);
                    self.cache_amax[half] = self.cache_amax[half].max(found);
                }
                Ok(())
            }
            Op::ExpertGateUp { input, offsets, order, .. } => {
                let rows = self.rows(&input, inputs)?;
                let (top_k, [offsets, order]) = (self.backend.program().top_k, self.lists(&offsets, &order, inputs)?);
                for (expert, list) in offsets.windows(2).enumerate() {
                    let tokens = order[list[0]..list[1]].iter().map(|assignment| assignment / top_k);
                    let by_sequence = of_sequences(inputs, tokens.map(|token| (token, rows[token].as_slice())));
                    self.add(LinearInput::FeedForward { layer, expert }, by_sequence)?;
                }
                Ok(())
            }
            Op::ExpertDown { input, offsets, order, .. } => {
                let rows = self.rows(&input, inputs)?;
                let (top_k, [offsets, order]) = (self.backend.program().top_k, self.lists(&offsets, &order, inputs)?);
                for (expert, list) in offsets.windows(2).enumerate() {
                    let here = (list[0]..list[1]).map(|row| (order[row] / top_k, rows[row].as_slice()));
                    self.add(LinearInput::Down { layer, expert }, of_sequences(inputs, here))?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Adds what each sequence had at an input.
    fn add(&mut self, input: LinearInput, sequences: Vec<Vec<&[f32]>>) -> Result<(), CalibrateError> {
        let Some(observed) = self.observed.get_mut(&input) else { return Ok(()) };
        let is_finite =
            self.pool.install(|| sequences.iter().filter(|s| !s.is_empty()).all(|tokens| observed.add(tokens)));
        if is_finite { Ok(()) } else { Err(CalibrateError::NotFinite { input: input.to_string() }) }
    }

    /// The rows of a buffer in this step.
    fn rows(&self, name: &str, inputs: &StepInputs<'_>) -> Result<Vec<Vec<f32>>, CalibrateError> {
        let (dtype, cols, bytes) = self.bytes(name, inputs)?;
        let dtype = dtype.float().unwrap_or(DType::F32);
        Ok(bytes.chunks_exact(cols * dtype.size()).map(|row| dtype.widen(row)).collect())
    }

    /// The expert lists of this step.
    fn lists(&self, offsets: &str, order: &str, inputs: &StepInputs<'_>) -> Result<[Vec<usize>; 2], CalibrateError> {
        let ints = |name: &str| -> Result<Vec<usize>, CalibrateError> {
            let bytes = self.bytes(name, inputs)?.2;
            let ints = bytes.as_chunks().0.iter().map(|&b| usize::try_from(i32::from_le_bytes(b)).unwrap_or(0));
            Ok(ints.collect())
        };
        Ok([ints(offsets)?, ints(order)?])
    }

    fn bytes(&self, name: &str, inputs: &StepInputs<'_>) -> Result<(ElemType, usize, Vec<u8>), CalibrateError> {
        let program = self.backend.program();
        let missing = || BackendError::Other(format!("there is no buffer `{name}`"));
        let buffer = program.buffer(name).ok_or_else(missing)?;
        let rows = program.num_rows(buffer.rows, inputs.num_tokens(), 0);
        debug_assert!(buffer.rows != Rows::Logits);
        let bytes = self.backend.read_buffer(name, rows * buffer.cols * buffer.dtype.size())?;
        Ok((buffer.dtype, buffer.cols, bytes))
    }
}

/// The tokens of each sequence of a step.
fn sequences<'a>(inputs: &'a StepInputs<'_>) -> impl Iterator<Item = Range<usize>> + 'a {
    let at = |edge: i32| usize::try_from(edge).unwrap_or(0);
    inputs.cu_query_lens.windows(2).map(move |edge| at(edge[0])..at(edge[1]))
}

/// Deals rows, which ascend by token, to the sequences of their tokens.
fn of_sequences<'a>(inputs: &StepInputs<'_>, rows: impl Iterator<Item = (usize, &'a [f32])>) -> Vec<Vec<&'a [f32]>> {
    let mut rows = rows.peekable();
    sequences(inputs)
        .map(|tokens| {
            let mut own = Vec::new();
            while let Some((_, row)) = rows.next_if(|(token, _)| *token < tokens.end) {
                own.push(row);
            }
            own
        })
        .collect()
}
