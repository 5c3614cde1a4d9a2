//! A program of one layer, and where in it rows come to linears and to the cache.

use mixtral_build::lower::lower_unfused;
use mixtral_checkpoint::{CheckpointConfig, TensorId};
use mixtral_convert::LinearInput;
use mixtral_engine::{Limits, Op, Program};
use mixtral_model::Rank;

/// A layer between the rows that come to it and the rows that it makes. The first operation is the embedding, which makes the rows of
/// the first layer; the others begin behind it.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) program: Program,
    /// The buffer of the rows that come to it.
    pub(crate) input: String,
    /// The buffer of the rows that it makes.
    pub(crate) output: String,
    pub(crate) places: Vec<Place>,
}

/// Rows that are looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) what: What,
    /// The operation before which the rows are there.
    pub(crate) op: usize,
    /// Their buffer.
    pub(crate) rows: String,
    /// The buffers that say which rows are an expert's: where each expert's list begins and ends, and the lists. `None` if each row is
    /// a token's.
    pub(crate) lists: Option<[String; 2]>,
    /// Whether the rows lie in the order of the lists. Else they are those of the tokens.
    pub(crate) in_order: bool,
}

/// What rows come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Attention,
    Output,
    FeedForward,
    Down,
    Keys,
    Values,
}

impl What {
    /// The linears' input in layer `layer`; `None` if the rows come to the cache.
    pub(crate) fn input(self, layer: usize, expert: usize) -> Option<LinearInput> {
        Some(match self {
            What::Attention => LinearInput::Attention(layer),
            What::Output => LinearInput::Output(layer),
            What::FeedForward => LinearInput::FeedForward { layer, expert },
            What::Down => LinearInput::Down { layer, expert },
            What::Keys | What::Values => return None,
        })
    }
}

impl Layer {
    /// A layer of `config`, the checkpoint of a model of one layer.
    pub(crate) fn new(config: &CheckpointConfig, limits: Limits) -> Layer {
        let mut program = lower_unfused(config, Rank(0), limits);
        let (mut input, mut output) = (String::new(), String::new());
        // Nothing is calibrated behind the last layer, so the output embedding is cut off.
        if let Some((end, rows)) = program.ops.iter().enumerate().find_map(|(index, op)| match op {
            Op::GatherRows { input, .. } => Some((index, input.clone())),
            _ => None,
        }) {
            output = rows;
            program.ops.truncate(end);
            let ops = &program.ops;
            program.weights.retain(|weight| ops.iter().any(|op| op.weights().contains(&weight.name.as_str())));
            program.buffers.retain(|buffer| ops.iter().any(|op| op.writes().contains(&buffer.name.as_str())));
            program.plan_arena();
        }
        if let Some(Op::Embed { out, .. }) = program.ops.first() {
            input.clone_from(out);
        }
        let places = places(&program);
        Layer { program, input, output, places }
    }
}

fn places(program: &Program) -> Vec<Place> {
    let is_dense = program.num_experts == 0;
    let is = |weight: &str, id: TensorId| weight == id.to_string();
    let mut places = Vec::new();
    for (op, operation) in program.ops.iter().enumerate() {
        let mut of_tokens = |what, rows: &str| {
            places.push(Place { what, op, rows: rows.to_owned(), lists: None, in_order: false });
        };
        match operation {
            Op::Linear { input, weight, rows, .. } => {
                // Query, key and value projections have one input.
                if is(weight, TensorId::Qkv(0)) && rows.is_none_or(|[start, _]| start == 0) {
                    of_tokens(What::Attention, input);
                } else if is(weight, TensorId::Dense(0)) {
                    of_tokens(What::Output, input);
                } else if is_dense && is(weight, TensorId::Fc(0)) {
                    of_tokens(What::FeedForward, input);
                } else if is_dense && is(weight, TensorId::Proj(0)) {
                    of_tokens(What::Down, input);
                }
            }
            Op::WriteKv { key, value, .. } => {
                of_tokens(What::Keys, key);
                of_tokens(What::Values, value);
            }
            Op::ExpertGateUp { input, offsets, order, .. } | Op::ExpertDown { input, offsets, order, .. } => {
                let in_order = matches!(operation, Op::ExpertDown { .. });
                let what = if in_order { What::Down } else { What::FeedForward };
                let lists = Some([offsets.clone(), order.clone()]);
                places.push(Place { what, op, rows: input.clone(), lists, in_order });
            }
            _ => {}
        }
    }
    places
}
