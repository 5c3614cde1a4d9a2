//! A layer on the CPU. Between two operations, its buffers are read.

use std::ops::Range;
use std::sync::Arc;

use mixtral_convert::FloatModel;
use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_engine::{BackendError, Inspect, StepInputs};
use mixtral_model::{DType, ElemType};

use crate::error::CalibrateError;
use crate::layer::{Layer, Place};
use crate::layers::{self, Stage};
use crate::observe::Observed;
use crate::step;
use crate::weights::Tensors;

pub(crate) struct OnCpu {
    model: Arc<FloatModel>,
    layer: Layer,
    threads: usize,
    moments: bool,
    pool: rayon::ThreadPool,
}

struct Loaded<'a> {
    layer: &'a Layer,
    pool: &'a rayon::ThreadPool,
    backend: CpuBackend,
    seen: Vec<Vec<Observed>>,
}

impl OnCpu {
    pub(crate) fn new(
        model: &Arc<FloatModel>,
        layer: Layer,
        threads: usize,
        moments: bool,
    ) -> Result<OnCpu, CalibrateError> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.map_err(|error| BackendError::Other(format!("could not start {threads} threads: {error}")))?;
        Ok(OnCpu { model: Arc::clone(model), layer, threads, moments, pool })
    }
}

impl Loaded<'_> {
    /// Looks at the rows of a place.
    fn look(&mut self, place: usize, inputs: &StepInputs<'_>) -> Result<(), CalibrateError> {
        let backend = &self.backend;
        let Place { rows, lists, in_order, .. } = &self.layer.places[place];
        let rows = floats(backend, rows, inputs)?;
        let lists: Vec<Vec<Vec<&[f32]>>> = match lists {
            None => vec![sequences(inputs).map(|tokens| rows[tokens].iter().map(Vec::as_slice).collect()).collect()],
            Some([offsets, order]) => {
                let (offsets, order) = (ints(backend, offsets, inputs)?, ints(backend, order, inputs)?);
                let top_k = self.layer.program.top_k;
                let of_expert = |list: &[usize]| {
                    let assignments = (list[0]..list[1]).map(|at| (at, order[at] / top_k));
                    of_sequences(
                        inputs,
                        assignments.map(|(at, token)| (token, rows[if *in_order { at } else { token }].as_slice())),
                    )
                };
                offsets.windows(2).map(of_expert).collect()
            }
        };
        for (seen, sequences) in self.seen[place].iter_mut().zip(lists) {
            self.pool.install(|| sequences.iter().filter(|s| !s.is_empty()).for_each(|tokens| seen.add(tokens)));
        }
        Ok(())
    }
}

impl Stage for OnCpu {
    fn load(&mut self, layer: usize) -> Result<Box<dyn layers::Loaded + '_>, CalibrateError> {
        let Layer { program, places, .. } = &self.layer;
        let tensors = Tensors::of(program, &self.model, self.model.tensors_of_layer(layer));
        let kv_blocks = step::blocks(&program.limits);
        let options = CpuOptions { kv_blocks, threads: self.threads, ..CpuOptions::default() };
        let backend = CpuBackend::load(program.clone(), tensors.in_memory(self.threads)?, options)?;
        let seen = |place: &Place| {
            let lists = if place.lists.is_some() { program.num_experts } else { 1 };
            let width = program.buffer(&place.rows).map_or(0, |buffer| buffer.cols);
            vec![Observed::new(width, self.moments && place.what.input(layer, 0).is_some()); lists]
        };
        let seen = places.iter().map(seen).collect();
        Ok(Box::new(Loaded { layer: &self.layer, pool: &self.pool, backend, seen }))
    }
}

impl layers::Loaded for Loaded<'_> {
    fn step(&mut self, inputs: &StepInputs<'_>, rows: &mut Vec<u8>) -> Result<(), CalibrateError> {
        let first = usize::from(!rows.is_empty());
        if first == 1 {
            self.backend.write_buffer(&self.layer.input, rows)?;
        }
        for op in first..self.layer.program.ops.len() {
            for place in 0..self.layer.places.len() {
                if self.layer.places[place].op == op {
                    self.look(place, inputs)?;
                }
            }
            self.backend.run_ops(op..op + 1, inputs)?;
        }
        *rows = bytes(&self.backend, &self.layer.output, inputs)?.1;
        Ok(())
    }

    fn seen(self: Box<Self>) -> Result<Vec<Vec<Observed>>, CalibrateError> {
        Ok(self.seen)
    }
}

/// The type of a buffer's elements, and its bytes in this step.
pub(crate) fn bytes(
    backend: &impl Inspect,
    name: &str,
    inputs: &StepInputs<'_>,
) -> Result<(ElemType, Vec<u8>), CalibrateError> {
    let program = backend.program();
    let missing = || BackendError::Other(format!("there is no buffer `{name}`"));
    let buffer = program.buffer(name).ok_or_else(missing)?;
    let rows = program.num_rows(buffer.rows, inputs.num_tokens(), 0);
    Ok((buffer.dtype, backend.read_buffer(name, rows * buffer.cols * buffer.dtype.size())?))
}

/// The rows of a buffer in this step.
fn floats(backend: &impl Inspect, name: &str, inputs: &StepInputs<'_>) -> Result<Vec<Vec<f32>>, CalibrateError> {
    let cols = backend.program().buffer(name).map_or(1, |buffer| buffer.cols);
    let (dtype, bytes) = bytes(backend, name, inputs)?;
    let dtype = dtype.float().unwrap_or(DType::F32);
    Ok(bytes.chunks_exact(cols * dtype.size()).map(|row| dtype.widen(row)).collect())
}

/// The integers of a buffer in this step.
fn ints(backend: &impl Inspect, name: &str, inputs: &StepInputs<'_>) -> Result<Vec<usize>, CalibrateError> {
    let (_, bytes) = bytes(backend, name, inputs)?;
    Ok(bytes.as_chunks().0.iter().map(|&b| usize::try_from(i32::from_le_bytes(b)).unwrap_or(0)).collect())
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
