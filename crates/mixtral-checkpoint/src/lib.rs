//! The checkpoint between `convert` and `build`: TensorRT-LLM's unified format, a `config.json` and one
//! `rank{r}.safetensors` a rank. This crate reads, writes and verifies it, and knows no Hugging Face name.
//!
//! What differs from TensorRT-LLM is recorded under the `mixtral` key of `config.json`: every tensor has a BLAKE3
//! hash in its file's metadata, rank files carry the run id that `config.json` names, and the tokenizer's files lie
//! beside them.
//!
//! Reading order: [`names`], [`keys`], [`config`], [`layout`] say what a checkpoint holds; [`header`], [`map`], [`scan`],
//! [`reader`] read it; [`staged`], [`writer`] write it so that a directory is either whole or does not load.
#![deny(unsafe_code)]

pub mod config;
pub mod header;
pub mod keys;
pub mod layout;
pub mod map;
pub mod names;
pub mod reader;
pub mod scan;
pub mod staged;
pub mod writer;

pub use config::{CheckpointConfig, ConfigFileError};
pub use header::{Header, HeaderError, TensorEntry};
pub use keys::{KeyError, Keys};
pub use layout::{TensorSpec, rank_tensors};
pub use names::{TensorId, rank_file_name};
pub use reader::{Checkpoint, Problem, RankFile, ReadError, TensorView, Verified, lines};
pub use staged::{Ownership, StagedDir, StagedError};
pub use writer::{CheckpointWriter, RankWriter, TensorWriter, WriteError};
