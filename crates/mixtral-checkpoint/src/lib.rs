//! The checkpoint between `convert` and `build`. It has TensorRT-LLM's unified format: a `config.json`, and a
//! `rank{r}.safetensors` for each rank. This crate reads, writes and verifies checkpoints, and knows no Hugging Face
//! name.
//!
//! The format has some additions to TensorRT-LLM's. The metadata of a rank file holds a BLAKE3 hash of each tensor, and
//! the run id. The `mixtral` key of `config.json` holds the hashes of the rank files' headers, of the tokenizer's files
//! and of `config.json` itself, and the same run id.
//!
//! A checkpoint with an fp8 cache may also say by which directions keys are rounded. Then `quantization` in `config.json` has
//! `"kv_cache_key_directions": true`, and each layer has a tensor `attention.kv_cache_key_directions`, f32, with a row for each of
//! the rank's KV heads ([`TensorId::KeyDirections`]). TensorRT-LLM's and ModelOpt's checkpoints have neither, and their keys are rounded to
//! nearest.
//!
//! Reading order: [`names`], [`keys`], [`config`], [`layout`] say what a checkpoint holds; [`header`], [`map`],
//! [`scan`] and [`reader`] read it; [`mod@verify`] reads and checks all of it; [`staged`] and [`writer`] write it so
//! that a directory is either whole or does not load; all use [`mod@seal`], [`disk`] and [`progress`].
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
pub use layout::{TensorSpec, WeightSpec, rank_tensors, rank_weights, tensors};
pub use names::{TensorId, rank_file_name};
pub use progress::Progress;
pub use reader::{Checkpoint, RankFile, ReadError, TensorView, lines};
pub use staged::{Ownership, StagedDir, StagedError};
pub use verify::{Item, Problem, Verified, verify};
pub use writer::{CheckpointWriter, RankWriter, TensorWriter, WriteError};
