//! Serves a session over HTTP, as OpenAI's API does.
//!
//! Reading order: [`options`] (what is served, to whom, and how much anyone may ask for), [`server`] (from listening to the
//! last answer) with [`listen`] (connections) and [`routes`] (who answers what); [`body`] and [`error`] (what clients send,
//! and what they are told is wrong with it), [`keys`]; [`sampling`], [`prompt`] and [`completions`] (requests and answers), [`tokens`]
//! and [`models`]; [`worker`] (the session's thread) and [`generation`] (what a handler sees of it).
#![forbid(unsafe_code)]

pub mod body;
pub mod completions;
pub mod error;
pub mod generation;
pub mod keys;
pub mod listen;
pub mod models;
pub mod options;
pub mod prompt;
pub mod routes;
pub mod sampling;
pub mod server;
pub mod shared;
pub mod stream;
pub mod tokens;
pub mod worker;

pub use error::ApiError;
pub use keys::Keys;
pub use options::{Bounds, Options};
pub use server::{ServeError, Server};
