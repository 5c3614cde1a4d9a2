//! Why a model cannot be converted.

use std::path::PathBuf;

use mixtral_checkpoint::config::ConfigRuleError;
use mixtral_checkpoint::{HeaderError, KeyError, WriteError, lines};
use mixtral_model::{ConfigError, DType};
use mixtral_tokenizer::TokenizerError;

/// A conversion that cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The model directory is not there.
    #[error("there is no model directory {dir}; --model-dir names one with config.json and *.safetensors")]
    NoDirectory {
        /// The directory.
        dir: PathBuf,
    },
    /// Neither of the files that describe a model.
    #[error("{dir} has neither config.json nor params.json, so it is no model directory; download the whole model")]
    NoConfig {
        /// The directory.
        dir: PathBuf,
    },
    /// A checkpoint in place of a model.
    #[error("{path} is a checkpoint's: this directory was converted before; pass it to `mixtral build`")]
    AlreadyCheckpoint {
        /// Its config.json.
        path: PathBuf,
    },
    /// A configuration file or one of its keys.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Sizes that no model has.
    #[error("{path}: {source}")]
    Model {
        /// The configuration file.
        path: PathBuf,
        /// The rule broken.
        source: ConfigError,
    },
    /// More experts in all than any model has; refused before names are made for them.
    #[error("{path}: {layers} layers of {experts} experts are more than the supported {max} experts in all")]
    TooManyExperts {
        /// The configuration file.
        path: PathBuf,
        /// Layers.
        layers: usize,
        /// Experts a layer.
        experts: usize,
        /// The cap.
        max: usize,
    },
    /// A mapping or sharding that the model cannot be cut by.
    #[error(transparent)]
    Rule(#[from] ConfigRuleError),
    /// `--dtype auto` without anything that says the type.
    #[error("{path} names no dtype, and no weights are read; pass --dtype f16, bf16 or f32")]
    NoDType {
        /// The configuration file.
        path: PathBuf,
    },
    /// Weights in a format that runs code when it is read.
    #[error(
        "{path} is a PyTorch pickle, which can run code when it is read; download or export the model as safetensors"
    )]
    Pickle {
        /// A weight file.
        path: PathBuf,
    },
    /// No weights at all.
    #[error("{dir} has no weights; download {expected}")]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// What belongs there.
        expected: &'static str,
    },
    /// Shards without the index that names them.
    #[error("{dir} has {shard} but no model.safetensors.index.json; download the index too")]
    NoIndex {
        /// The directory.
        dir: PathBuf,
        /// A shard.
        shard: String,
    },
    /// Shards that the index names and that are missing, all of them.
    #[error("{index} names files that are missing; download them too:\n{}", lines(.missing))]
    ShardsMissing {
        /// The index.
        index: PathBuf,
        /// One line each.
        missing: Vec<String>,
    },
    /// A tensor that is not where the index says, all of them.
    #[error("{index} does not fit its files; download the model again:\n{}", lines(.problems))]
    Index {
        /// The index.
        index: PathBuf,
        /// One line each.
        problems: Vec<String>,
    },
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that lost its end while it was read.
    #[error("{path} has become shorter since the conversion began; wait until it is whole, and convert again")]
    Shrunk {
        /// The file.
        path: PathBuf,
    },
    /// A damaged weight file.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The same tensor in two files: each holds a part of it, or one is a copy.
    #[error("tensor `{tensor}` is in both {first} and {second}; remove the one that is not part of the model")]
    Duplicate {
        /// The tensor.
        tensor: String,
        /// A file.
        first: PathBuf,
        /// Another.
        second: PathBuf,
    },
    /// Tensors that are missing, of the wrong shape or type, or that the model has no place for: all of them.
    #[error("the weights in {dir} are not those that {config} describes (read as {layout}); download both again from one place:\n{}", lines(.problems))]
    Tensors {
        /// The directory.
        dir: PathBuf,
        /// Name of the configuration file.
        config: &'static str,
        /// How the weights were read.
        layout: &'static str,
        /// One line each.
        problems: Vec<String>,
    },
    /// Weights that are infinite or not a number.
    #[error(
        "{path}: tensor `{tensor}` has {count} elements that are not finite, the first at index {first}; download the file again, or repair the model"
    )]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// How many.
        count: u64,
        /// Index of the first, in row-major order.
        first: u64,
    },
    /// Weights that the checkpoint's type cannot hold.
    #[error(
        "{path}: tensor `{tensor}` has {count} elements past ±{max}, the largest {dtype}, the first at index {first}; choose a --dtype that holds them (bf16 or f32)"
    )]
    Overflow {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// How many.
        count: u64,
        /// Index of the first, in row-major order.
        first: u64,
        /// The type.
        dtype: DType,
        /// Its largest finite number.
        max: &'static str,
    },
    /// The tokenizer's files cannot be read.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Another model's tokenizer.
    #[error(
        "{path} has {tokens} tokens, but the model has rows for {vocab_size}; it is another model's tokenizer, or the model's embeddings were not resized: download both from one place"
    )]
    TokenizerTooLarge {
        /// The tokenizer's file.
        path: PathBuf,
        /// Its tokens.
        tokens: usize,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// The checkpoint cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}
