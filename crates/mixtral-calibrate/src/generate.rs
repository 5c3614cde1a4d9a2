//! Text that the model writes itself: drawn at temperature 1, from the token that texts start with.

use std::sync::Arc;

use mixtral_build::lower;
use mixtral_checkpoint::Progress;
use mixtral_convert::FloatModel;
use mixtral_engine::{BackendError, RandomKey, SampleRequest, SamplingParams};
use mixtral_model::{Mapping, Rank, TokenId};
use mixtral_tokenizer::{Tokenizer, load};

use crate::error::CalibrateError;
use crate::machine::Machine;
use crate::step::{self, int};
use crate::text::Text;
use crate::weights::Tensors;

/// Sequences that are written at a time: on a GPU as many as read the weights for about the price of one, while the cache of
/// Mixtral 8x7B still fits beside its weights (17 GB for 512 tokens each).
const fn at_a_time(machine: &Machine) -> usize {
    match machine {
        Machine::Cpu => 64,
        Machine::Cuda(_) => 256,
    }
}

/// Has the model write sequences of full length. An end token does not end them: what follows it is a new text. All weights
/// are in memory at the same time. Progress is in tokens.
///
/// # Errors
/// If no tokenizer says how a text starts, if weights cannot be read, or there is too little memory.
pub fn generate(
    model: &Arc<FloatModel>,
    text: Text,
    machine: &Machine,
    threads: usize,
    progress: &dyn Progress,
) -> Result<Vec<Vec<TokenId>>, CalibrateError> {
    let dir = model.dir();
    let start = match load::find(dir) {
        Some(_) => Tokenizer::load(dir)?.start_id(),
        None => None,
    };
    let start = start.ok_or_else(|| CalibrateError::NoStart { dir: dir.to_owned() })?;
    let config = model.config(Mapping::single());
    let at_a_time = at_a_time(machine);
    let limits = step::limits(text.size.clamp(1, at_a_time), text.max_seq_length, 1);
    let program = lower(&config, Rank(0), limits);
    let tensors = Tensors::of(&program, model, model.tensors());
    let mut backend = machine.load(program, tensors, threads)?;
    progress.start((text.size * text.max_seq_length.saturating_sub(1)) as u64);
    let params = SamplingParams { top_k: 0, ..SamplingParams::default() };
    let mut sequences = vec![vec![start]; text.size];
    for (batch, sequences) in sequences.chunks_mut(at_a_time).enumerate() {
        for position in 1..text.max_seq_length {
            let so_far: Vec<&[TokenId]> = sequences.iter().map(Vec::as_slice).collect();
            let mut inputs = step::inputs(&so_far, position - 1, &limits);
            inputs.logits_indices = (0..sequences.len()).map(int).collect();
            let request = |row: usize| {
                let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
                let key = RandomKey {
                    seed: text.seed,
                    prompt: number(batch * at_a_time + row),
                    hypothesis: 0,
                    position: number(position),
                };
                SampleRequest { row, params, key, ..SampleRequest::default() }
            };
            inputs.samples = (0..sequences.len()).map(request).collect();
            let outputs = backend.step(&inputs)?;
            if let Some(wrong) = outputs.non_finite.first() {
                return Err(BackendError::Other(format!("the model's own text: {wrong}")).into());
            }
            sequences.iter_mut().zip(outputs.tokens).for_each(|(sequence, token)| sequence.push(token));
            progress.advance(sequences.len() as u64);
        }
    }
    Ok(sequences)
}
