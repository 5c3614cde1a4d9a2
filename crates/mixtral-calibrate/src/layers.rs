//! Runs a model over sequences, one layer at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use mixtral_checkpoint::Progress;
use mixtral_convert::{FloatModel, Statistics};
use mixtral_engine::StepInputs;
use mixtral_model::{Mapping, TokenId};

use crate::cpu::OnCpu;
use crate::error::CalibrateError;
use crate::gpu::OnGpu;
use crate::layer::{Layer, What};
use crate::machine::Machine;
use crate::observe::Observed;
use crate::step;

/// How a model is run.
#[derive(Clone, Copy, Debug)]
pub struct RunOptions<'a> {
    /// Where.
    pub machine: &'a Machine,
    /// Threads of the host.
    pub threads: usize,
    /// Sequences that are computed at a time.
    pub batch_size: usize,
    /// Whether moments are wanted, beside the largest magnitudes.
    pub moments: bool,
}

/// A machine that runs layers, one at a time.
pub(crate) trait Stage {
    /// Takes the weights of a layer. The machine is borrowed until the layer is dropped, so the next one finds its memory free.
    fn load(&mut self, layer: usize) -> Result<Box<dyn Loaded + '_>, CalibrateError>;
}

/// A layer on a machine.
pub(crate) trait Loaded {
    /// Runs a step. `rows` are those that the layer before made in this step, or none for the first layer; they become the rows that
    /// this layer makes.
    fn step(&mut self, inputs: &StepInputs<'_>, rows: &mut Vec<u8>) -> Result<(), CalibrateError>;

    /// What came to each place of the layer in all steps: of all tokens, or of each expert.
    fn seen(self: Box<Self>) -> Result<Vec<Vec<Observed>>, CalibrateError>;
}

/// Runs `model` over `sequences` and returns what its linears saw. Progress is in tokens, each of which goes through all layers.
///
/// # Errors
/// If weights cannot be read, there is too little memory, or an input is not finite.
pub fn run(
    model: &Arc<FloatModel>,
    sequences: &[Vec<TokenId>],
    options: RunOptions<'_>,
    progress: &dyn Progress,
) -> Result<Statistics, CalibrateError> {
    let RunOptions { machine, threads, batch_size, moments } = options;
    let config = model.config(Mapping::single()).model;
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(1);
    let limits = step::limits(batch_size.min(sequences.len()).max(1), longest, longest);
    let batches: Vec<Vec<&[TokenId]>> =
        sequences.chunks(limits.max_batch_size).map(|batch| batch.iter().map(Vec::as_slice).collect()).collect();
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    progress.start((tokens * config.num_layers) as u64);
    let layer = Layer::new(&model.one_layer(), limits);
    let places: Vec<What> = layer.places.iter().map(|place| place.what).collect();
    let mut stage: Box<dyn Stage> = match machine {
        Machine::Cpu => Box::new(OnCpu::new(model, layer, threads, moments)?),
        Machine::Cuda(gpu) => Box::new(OnGpu::new(model, layer, gpu, moments)?),
    };
    // What a layer makes of each batch waits here for the next one.
    let mut rows: Vec<Vec<u8>> = vec![Vec::new(); batches.len()];
    let mut statistics = Statistics::default();
    for index in 0..config.num_layers {
        let mut loaded = stage.load(index)?;
        for (batch, rows) in batches.iter().zip(&mut rows) {
            let inputs = step::inputs(batch, 0, &limits);
            loaded.step(&inputs, rows)?;
            progress.advance(inputs.num_tokens() as u64);
        }
        let (mut inputs, mut cache) = (BTreeMap::new(), [0.0; 2]);
        for (what, seen) in places.iter().zip(loaded.seen()?) {
            for (expert, seen) in seen.iter().enumerate() {
                let input = what.input(index, expert);
                if !seen.amax().is_finite() {
                    let input = input.map_or_else(|| format!("the cache of layer {index}"), |input| input.to_string());
                    return Err(CalibrateError::NotFinite { input });
                }
                match input {
                    Some(input) => drop(inputs.insert(input, seen.statistics())),
                    None => cache[usize::from(*what == What::Values)] = seen.amax(),
                }
            }
        }
        statistics.add_layer(&config, inputs, cache);
    }
    Ok(statistics)
}
