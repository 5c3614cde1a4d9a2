//! How well an engine predicts texts.
//!
//! Reading order: [`score`] (log-probabilities of given tokens), [`text`] (the perplexity of a text), [`choices`] (which of
//! several continuations is the likeliest).

pub mod choices;
pub mod score;
pub mod text;
