//! Serves a session over HTTP, as OpenAI's API does.
//!
//! Reading order: [`options`] (what is served, to whom, and how much anyone may ask for); [`server`] (from listening to the
//! last answer), [`listen`] (connections), [`routes`] (who answers what) and [`shared`] (what all of them use); [`body`] and
//! [`error`] (what clients send, and what they are told is wrong with it), [`keys`]; [`sampling`], [`answer`] and
//! [`logprobs`] (what [`completions`] and [`chat`] have in common), [`prompt`], [`messages`], [`tools`], [`tool_choice`], [`guide`] and [`stream`];
//! [`tokens`] and [`models`]; [`worker`] (the session's thread), [`generation`] (what a handler sees of it), [`metrics`]
//! and [`openapi`] (the description of all of it, for programs). [`client`] measures any such server.
#![forbid(unsafe_code)]

pub mod answer;
pub mod body;
pub mod chat;
pub mod client;
pub mod completions;
pub mod error;
pub mod generation;
pub mod guide;
pub mod keys;
pub mod listen;
pub mod logprobs;
pub mod messages;
pub mod metrics;
pub mod models;
pub mod openapi;
pub mod options;
pub mod prompt;
pub mod routes;
pub mod sampling;
pub mod server;
pub mod shared;
pub mod stream;
pub mod tokens;
pub mod tool_choice;
pub mod tools;
pub mod worker;

pub use error::ApiError;
pub use keys::Keys;
pub use options::{Bounds, Options};
pub use server::{ServeError, Server, Stopper};
