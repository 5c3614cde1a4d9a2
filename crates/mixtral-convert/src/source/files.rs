//! Finds the files of a model in a directory.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use mixtral_checkpoint::keys::{parse_object, read_text};
use serde_json::Value;

use crate::error::ConvertError;

/// The conventions that a directory follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `config.json`, `model*.safetensors`.
    HuggingFace,
    /// `params.json`, `consolidated*.safetensors`.
    Consolidated,
}

impl Dialect {
    /// The file that describes the model.
    #[must_use]
    pub const fn config_file(self) -> &'static str {
        match self {
            Dialect::HuggingFace => "config.json",
            Dialect::Consolidated => "params.json",
        }
    }
}

/// Formats of other tools, by how their file names end.
const FOREIGN: [(&str, &str); 7] = [
    (".gguf", "llama.cpp's GGUF"),
    (".ggml", "llama.cpp's GGML"),
    (".msgpack", "Flax's format"),
    (".h5", "TensorFlow's format"),
    (".onnx", "an ONNX graph"),
    (".npz", "NumPy's or MLX's format"),
    (".nemo", "NeMo's format"),
];

/// Files beside the weights that say how the weights were quantized.
const QUANTIZERS: [(&str, &str); 3] =
    [("hf_quant_config.json", "ModelOpt"), ("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")];

fn list(dir: &Path) -> Result<BTreeSet<String>, ConvertError> {
    let io = |source| ConvertError::Io { path: dir.to_owned(), source };
    let entries = std::fs::read_dir(dir).map_err(io)?;
    entries.map(|entry| entry.map(|e| e.file_name().to_string_lossy().into_owned()).map_err(io)).collect()
}

fn is_consolidated(name: &str) -> bool {
    name.starts_with("consolidated") && name.ends_with(".safetensors")
}

fn is_hugging_face(name: &str) -> bool {
    name.ends_with(".safetensors") && !is_consolidated(name) && !is_adapter(name)
}

/// Whether a file belongs to a LoRA adapter.
fn is_adapter(name: &str) -> bool {
    name.starts_with("adapter_model.") || name.starts_with("adapter_model-") || name == "adapter_config.json"
}

/// The base model of the adapter in `dir`, if the adapter names it.
fn adapter_base(dir: &Path) -> Option<String> {
    let path = dir.join("adapter_config.json");
    let map = parse_object(&read_text(&path).ok()?, &path).ok()?;
    map.get("base_model_name_or_path")?.as_str().map(str::to_owned)
}

/// The method by which the weights in `dir` were quantized, if a file other than the configuration shows it.
#[must_use]
pub fn quantizer(dir: &Path) -> Option<String> {
    QUANTIZERS.iter().find(|(file, _)| dir.join(file).exists()).map(|(_, method)| (*method).to_owned())
}

/// The dialect of `dir`. Mistral publishes both dialects side by side; then Hugging Face's counts if its files are
/// complete.
///
/// # Errors
/// If it follows neither.
pub fn dialect(dir: &Path) -> Result<Dialect, ConvertError> {
    let names = list(dir)?;
    match (names.contains("config.json"), names.contains("params.json")) {
        (true, true) => {
            let only_consolidated =
                names.iter().any(|n| is_consolidated(n)) && !names.iter().any(|n| is_hugging_face(n));
            Ok(if only_consolidated { Dialect::Consolidated } else { Dialect::HuggingFace })
        }
        (true, false) => Ok(Dialect::HuggingFace),
        (false, true) => Ok(Dialect::Consolidated),
        (false, false) => Err(no_config(dir, &names)),
    }
}

/// The error for a directory without a configuration, which says what the directory seems to be.
fn no_config(dir: &Path, names: &BTreeSet<String>) -> ConvertError {
    let own = || dir.to_owned();
    if names.contains("snapshots") {
        return ConvertError::HubCache { dir: own(), snapshot: snapshot(dir) };
    }
    if let Some(model) = names.iter().filter(|n| n.starts_with("models--")).find_map(|n| snapshot(&dir.join(n))) {
        return ConvertError::Above { dir: own(), model };
    }
    if names.iter().any(|name| is_adapter(name)) {
        return ConvertError::Adapter { dir: own(), base: adapter_base(dir) };
    }
    if let Some(error) = foreign(dir, names) {
        return error;
    }
    match names.iter().map(|name| dir.join(name)).find(|path| is_model(path)) {
        Some(model) => ConvertError::Above { dir: own(), model },
        None => ConvertError::NoConfig { dir: own() },
    }
}

/// Whether a directory has a model's configuration, and not a checkpoint's or an engine's.
fn is_model(dir: &Path) -> bool {
    let path = dir.join(Dialect::HuggingFace.config_file());
    let is_hugging_face = || parse_object(&read_text(&path).ok()?, &path).ok()?.get("model_type").cloned();
    dir.join(Dialect::Consolidated.config_file()).is_file() || is_hugging_face().is_some()
}

/// The model in a folder of the hub's cache: that of the main branch, else the one downloaded last.
fn snapshot(dir: &Path) -> Option<PathBuf> {
    let snapshots = dir.join("snapshots");
    let main = std::fs::read_to_string(dir.join("refs/main")).ok().map(|hash| snapshots.join(hash.trim()));
    if let Some(path) = main.filter(|path| is_model(path)) {
        return Some(path);
    }
    let paths = std::fs::read_dir(snapshots).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    paths.filter(|path| is_model(path)).max_by_key(|path| std::fs::metadata(path).and_then(|m| m.modified()).ok())
}

/// The error for weights in a format that is not read, if they are in one.
fn foreign(dir: &Path, names: &BTreeSet<String>) -> Option<ConvertError> {
    let ends = |ends: &[&str]| names.iter().find(|name| ends.iter().any(|end| name.ends_with(end)));
    if names.iter().any(|name| name.ends_with(".distcp") || name.starts_with("pytorch_model_fsdp")) {
        return Some(ConvertError::Fsdp { dir: dir.to_owned() });
    }
    if names.contains("zero_to_fp32.py") {
        return Some(ConvertError::DeepSpeed { dir: dir.to_owned() });
    }
    if let Some(name) = ends(&[".bin", ".pt", ".pth", ".ckpt"]).filter(|name| *name != "training_args.bin") {
        return Some(ConvertError::Pickle { path: dir.join(name) });
    }
    let found = FOREIGN.iter().find_map(|(end, what)| Some((ends(&[end])?, *what)));
    found.map(|(name, what)| ConvertError::Foreign { path: dir.join(name), what })
}

/// Finds the weight files of `dir` in the order of transformers: a single file first, then an index and the files that
/// it names. As in transformers, the files themselves tell which tensors they hold, and the index's entries do not
/// matter.
///
/// # Errors
/// If there are no weights in a format that is read, or if a file that the index names is missing.
pub fn find(dir: &Path, dialect: Dialect) -> Result<Vec<PathBuf>, ConvertError> {
    let names = list(dir)?;
    let (single, expected) = match dialect {
        Dialect::HuggingFace => {
            ("model.safetensors", "model.safetensors, or model.safetensors.index.json and its shards")
        }
        Dialect::Consolidated => ("consolidated.safetensors", "consolidated*.safetensors"),
    };
    let index = format!("{single}.index.json");
    let paths = if names.contains(single) {
        vec![dir.join(single)]
    } else if names.contains(&index) {
        indexed(dir, &index)?
    } else {
        match dialect {
            Dialect::Consolidated => names.iter().filter(|n| is_consolidated(n)).map(|n| dir.join(n)).collect(),
            Dialect::HuggingFace => match names.iter().find(|n| is_hugging_face(n)) {
                Some(shard) => return Err(no_index(dir, shard)),
                None => Vec::new(),
            },
        }
    };
    let adapter = names.iter().find(|name| is_adapter(name));
    if paths.is_empty() {
        return Err(match (adapter, foreign(dir, &names)) {
            (Some(_), _) => ConvertError::Adapter { dir: dir.to_owned(), base: adapter_base(dir) },
            (None, Some(error)) => error,
            (None, None) => ConvertError::NoWeights { dir: dir.to_owned(), expected },
        });
    }
    if let Some(adapter) = adapter {
        log::warn!(
            "{} is an adapter beside the model and is left out; merge it into the model first if it is to count",
            dir.join(adapter).display()
        );
    }
    if names.contains(single) && names.contains(&index) {
        log::warn!(
            "{} has {single} and {index}; {single} is read, and shards that the index names are left out; remove what is not the model",
            dir.display()
        );
    }
    Ok(paths)
}

fn no_index(dir: &Path, shard: &str) -> ConvertError {
    let (dir, file) = (dir.to_owned(), shard.to_owned());
    match shard.contains("-of-") {
        true => ConvertError::NoIndex { dir, shard: file },
        false => ConvertError::OtherName { path: dir.join(file) },
    }
}

fn indexed(dir: &Path, name: &str) -> Result<Vec<PathBuf>, ConvertError> {
    let index = dir.join(name);
    let root = parse_object(&read_text(&index)?, &index)?;
    let invalid = |problem: String| ConvertError::Index { index: index.clone(), problem };
    let Some(Value::Object(entries)) = root.get("weight_map") else {
        return Err(invalid("the key `weight_map` is missing or no object".to_owned()));
    };
    let mut shards = BTreeSet::new();
    for (tensor, file) in entries {
        // A name with a directory in it could name any file of the system.
        let file = file.as_str().filter(|f| !f.is_empty() && !f.contains('/') && *f != ".." && *f != ".");
        shards.insert(file.ok_or_else(|| invalid(format!("`{tensor}`: its file is not the name of a file")))?);
    }
    let missing: Vec<String> = shards.iter().filter(|f| !dir.join(f).exists()).map(|f| format!("  {f}")).collect();
    match missing.is_empty() {
        true => Ok(shards.into_iter().map(|f| dir.join(f)).collect()),
        false => Err(ConvertError::ShardsMissing { index, missing }),
    }
}
