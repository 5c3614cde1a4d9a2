//! Why a model cannot be converted.

use std::path::{Path, PathBuf};

use mixtral_checkpoint::config::ConfigRuleError;
use mixtral_checkpoint::{HeaderError, KeyError, ReadError, WriteError, lines};
use mixtral_model::{ConfigError, DType};
use mixtral_tokenizer::TokenizerError;

use crate::source::diagnosis::Diagnosis;

/// A conversion that cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The model directory is not there.
    #[error("there is no model directory {dir}; --model-dir names one with config.json and *.safetensors{}", download(.dir))]
    NoDirectory {
        /// The directory.
        dir: PathBuf,
    },
    /// A file in place of a directory.
    #[error("{path} is a file; --model-dir names the directory with config.json and all of the model's *.safetensors")]
    NotADirectory {
        /// The file.
        path: PathBuf,
    },
    /// A folder of the hub's cache, and not the model inside it.
    #[error("{dir} is a folder of the Hugging Face cache; {}", match .snapshot {
        Some(snapshot) => format!("the model is in {}: name that directory instead", snapshot.display()),
        None => "no snapshot in it has a config.json: the download is incomplete, do it again".to_owned(),
    })]
    HubCache {
        /// The folder.
        dir: PathBuf,
        /// The model in it.
        snapshot: Option<PathBuf>,
    },
    /// A folder above the model.
    #[error("{dir} has neither config.json nor params.json, but {model} has: name that directory instead")]
    Above {
        /// The folder.
        dir: PathBuf,
        /// The first folder in it that may be a model.
        model: PathBuf,
    },
    /// An adapter in place of a model.
    #[error(
        "{dir} holds a LoRA adapter, not a model; merge it into its base model{} first (with peft: `PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(merged)`), and convert what that saved",
        .base.as_ref().map(|base| format!(", {base},")).unwrap_or_default()
    )]
    Adapter {
        /// The directory.
        dir: PathBuf,
        /// The base model of the adapter, if the adapter names it.
        base: Option<String>,
    },
    /// A directory with neither of the files that describe a model.
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
    /// An engine in place of a model.
    #[error(
        "{path} is an engine's: pass this directory to `mixtral run` (--engine-dir), or name the model it was made of"
    )]
    AlreadyEngine {
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
    /// More experts in total than any model has. They are refused before memory is allocated for their names.
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
    /// `--dtype auto`, but nothing tells the data type.
    #[error("{path} names no dtype, and no weights are read; pass --dtype f16, bf16 or f32")]
    NoDType {
        /// The configuration file.
        path: PathBuf,
    },
    /// Weights in a format that can run code when it is read.
    #[error(
        "{path} is a PyTorch pickle, which can run code when it is read; download the model as safetensors, or export it (with transformers: `AutoModelForCausalLM.from_pretrained(dir, dtype=\"auto\").save_pretrained(new_dir)`)"
    )]
    Pickle {
        /// A weight file.
        path: PathBuf,
    },
    /// Weights in another tool's format.
    #[error("{path} is {what}, which is not read; download the model as safetensors (f16, bf16 or f32)")]
    Foreign {
        /// A weight file.
        path: PathBuf,
        /// The format.
        what: &'static str,
    },
    /// What PyTorch's FSDP saves.
    #[error(
        "{dir} holds the shards of PyTorch's distributed checkpoint (FSDP); merge them into safetensors first (`accelerate merge-weights`)"
    )]
    Fsdp {
        /// The directory.
        dir: PathBuf,
    },
    /// What DeepSpeed saves.
    #[error(
        "{dir} holds DeepSpeed's shards; make weights of them first (in it: `python zero_to_fp32.py . merged --safe_serialization`, then copy config.json and the tokenizer's files along)"
    )]
    DeepSpeed {
        /// The directory.
        dir: PathBuf,
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
    /// All shards that the index names but that are missing.
    #[error("{index} names files that are missing; download them too:\n{}", lines(.missing))]
    ShardsMissing {
        /// The index.
        index: PathBuf,
        /// One line each.
        missing: Vec<String>,
    },
    /// A single file of weights with an unusual name.
    #[error(
        "{path} is not called model.safetensors; rename it so if it is the whole model, else download the model again"
    )]
    OtherName {
        /// The file.
        path: PathBuf,
    },
    /// A file that cannot be read as an index.
    #[error("{index}: {problem}; download it again")]
    Index {
        /// The index.
        index: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that became shorter while it was read.
    #[error("{path} has become shorter since the conversion began; wait until it is whole, and convert again")]
    Shrunk {
        /// The file.
        path: PathBuf,
    },
    /// A damaged weight file.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The same tensor is in two files.
    #[error("tensor `{tensor}` is in both {first} and {second}; remove the one that is not part of the model")]
    Duplicate {
        /// The tensor.
        tensor: String,
        /// A file.
        first: PathBuf,
        /// Another.
        second: PathBuf,
    },
    /// Quantized weights that are to be quantized.
    #[error(
        "the weights in {dir} are quantized already ({layout}); convert them as they are, or quantize the original model"
    )]
    Quantized {
        /// The directory.
        dir: PathBuf,
        /// How they are quantized.
        layout: String,
    },
    /// A format that needs scales of activations, and no statistics of them.
    #[error("{what} has no scale: fp8 needs statistics of calibration (`mixtral convert --calib-data`)")]
    NotCalibrated {
        /// What the scale is of.
        what: String,
    },
    /// All tensors that are missing, that have the wrong shape or type, or that the model has no place for.
    #[error("the weights in {dir} are not those that {config} describes (read as {layout}); download both again from one place:\n{}", lines(.problems))]
    Tensors {
        /// The directory.
        dir: PathBuf,
        /// Name of the configuration file.
        config: &'static str,
        /// How the weights were read.
        layout: String,
        /// One line each.
        problems: Vec<String>,
    },
    /// Weights that do not fit their configuration, for a known reason.
    #[error("the weights in {dir} cannot be used: {diagnosis}")]
    Diagnosed {
        /// The directory.
        dir: PathBuf,
        /// The reason.
        diagnosis: Box<Diagnosis>,
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
    /// A checkpoint that is quantized cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] ReadError),
    /// The checkpoint cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// How to download the model, if `dir` looks like a name on the hub: `owner/model`.
fn download(dir: &Path) -> String {
    let name = dir.to_string_lossy();
    match name.split('/').collect::<Vec<_>>()[..] {
        [owner, model] if !owner.is_empty() && !owner.starts_with('.') && !model.is_empty() => {
            format!("; to download {name}: `hf download {name} --local-dir {model}`")
        }
        _ => String::new(),
    }
}
