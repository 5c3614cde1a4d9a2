//! What the tests of several crates share. A dev-dependency only: it panics where a test should fail.
#![forbid(unsafe_code)]

pub mod tiny_model;

pub use tiny_model::{Layout, Tensor, TinyModel, write_safetensors};
