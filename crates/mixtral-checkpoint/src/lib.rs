//! The checkpoint between `convert` and `build`: TensorRT-LLM's unified format, a `config.json` and one
//! `rank{r}.safetensors` a rank. This crate reads, writes and verifies it, and knows no Hugging Face name.
//!
//! What differs from TensorRT-LLM is recorded under the `mixtral` key of `config.json`: every tensor has a BLAKE3
//! hash in its file's metadata, `config.json` has those of the files' headers, of the tokenizer's files beside them and of
//! itself, and rank files carry the run id that it names.
//!
//! Reading order: [`names`], [`keys`], [`config`], [`layout`] say what a checkpoint holds; [`header`], [`map`], [`scan`],
//! [`reader`] read it, [`mod@verify`] all of it; [`staged`], [`writer`] write it so that a directory is either whole or
//! does not load; [`mod@seal`], [`disk`] and [`progress`] serve both.
#![deny(unsafe_code)]

pub mod config;
pub mod disk;
pub mod header;
pub mod keys;
pub mod layout;
pub mod map;
pub mod names;
pub mod progress;
pub mod reader;
pub mod scan;
pub mod seal;
pub mod staged;
pub mod verify;
pub mod writer;

pub use config::{CheckpointConfig, ConfigFileError};
pub use header::{Header, HeaderError, TensorEntry};
pub use keys::{KeyError, Keys};
pub use layout::{TensorSpec, rank_tensors};
pub use names::{TensorId, rank_file_name};
pub use progress::Progress;
pub use reader::{Checkpoint, RankFile, ReadError, TensorView, lines};
pub use staged::{Ownership, StagedDir, StagedError};
pub use verify::{Item, Problem, Verified, verify};
pub use writer::{CheckpointWriter, RankWriter, TensorWriter, WriteError};
