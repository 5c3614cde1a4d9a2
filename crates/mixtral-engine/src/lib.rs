//! The engine's program as a value, and the trait of the backends that run it.
//!
//! `mixtral build` lowers a model to a [`Program`]: a list of operations over named buffers. Everything that can be
//! decided ahead is decided in it. An engine holds the program as text. A [`Backend`] interprets the program; no
//! backend knows Mixtral.
//!
//! Reading order: [`op`] (the operations and what each one computes, to the rounding), [`program`] (buffers, weights,
//! limits), [`record`] and [`text`] (its written form), [`check`] (what a well-formed program is), [`memory`] (arena
//! offsets and the closed-form memory plan), [`inputs`] (the ragged, paged inputs of a step), [`math`], [`sampling`]
//! and [`dummy`] (functions that every backend must agree on to the bit), [`backend`], [`inspect`] (a backend looked
//! into), [`first_layers`] (a program cut short), [`wire`] (a step on its way to other ranks), and [`dir`] (the engine
//! directory).
#![forbid(unsafe_code)]

pub mod backend;
pub mod check;
pub mod dir;
pub mod dummy;
pub mod first_layers;
pub mod inputs;
pub mod inspect;
pub mod math;
pub mod memory;
pub mod moves;
pub mod op;
pub mod program;
pub mod record;
pub mod sampling;
pub mod score;
pub mod text;
pub mod wire;

pub use backend::{
    Backend, BackendError, Collectives, DeviceIdle, Launched, NonFinite, StepOutputs, WeightSource, WeightView, Weights,
};
pub use check::ProgramError;
pub use dir::{EngineConfig, EngineDir, EngineError, EngineWriter, MappedWeights, WeightsKind};
pub use first_layers::CutError;
pub use inputs::{InputError, SampleRequest, StepInputs, TokenSource};
pub use inspect::Inspect;
pub use mixtral_checkpoint::TensorSpec;
pub use moves::{BlockMove, BlockPlace};
pub use op::{Epilogue, KeyDirections, Op, Rung};
pub use program::{Buffer, KvLayout, KvScale, Limits, PIPELINE_PROMPT_TOKENS, Program, Rows, Weight};
pub use sampling::{RandomKey, SamplingParams};
pub use score::{Score, ScoreRequest, Scored};
pub use text::TextError;
pub use wire::WireError;
