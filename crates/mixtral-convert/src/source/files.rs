//! Which files of a directory are the model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use mixtral_checkpoint::keys::{parse_object, read_text};
use serde_json::Value;

use crate::error::ConvertError;

/// Whose conventions a directory follows.
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

/// The files with the weights, and what an index says about them: which file each tensor is in.
#[derive(Debug)]
pub struct Weights {
    /// The files.
    pub paths: Vec<PathBuf>,
    /// The index and its map, if there is one.
    pub index: Option<(PathBuf, BTreeMap<String, String>)>,
}

fn list(dir: &Path) -> Result<BTreeSet<String>, ConvertError> {
    let io = |source| ConvertError::Io { path: dir.to_owned(), source };
    let entries = std::fs::read_dir(dir).map_err(io)?;
    entries.map(|entry| entry.map(|e| e.file_name().to_string_lossy().into_owned()).map_err(io)).collect()
}

fn is_consolidated(name: &str) -> bool {
    name.starts_with("consolidated") && name.ends_with(".safetensors")
}

fn is_hugging_face(name: &str) -> bool {
    name.ends_with(".safetensors") && !is_consolidated(name)
}

/// Whose directory `dir` is. Mistral publishes both dialects side by side; Hugging Face's is read if it is whole.
///
/// # Errors
/// If it is neither's.
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
        (false, false) => Err(ConvertError::NoConfig { dir: dir.to_owned() }),
    }
}

/// Finds the weight files of `dir`.
///
/// # Errors
/// If there are none that we read, or not all that the index names.
pub fn find(dir: &Path, dialect: Dialect) -> Result<Weights, ConvertError> {
    let names = list(dir)?;
    let (single, expected) = match dialect {
        Dialect::HuggingFace => {
            ("model.safetensors", "model.safetensors, or model.safetensors.index.json and its shards")
        }
        Dialect::Consolidated => ("consolidated.safetensors", "consolidated*.safetensors"),
    };
    if names.contains(single) {
        return Ok(Weights { paths: vec![dir.join(single)], index: None });
    }
    let index = format!("{single}.index.json");
    if names.contains(&index) {
        return indexed(dir, &index);
    }
    match dialect {
        Dialect::Consolidated => {
            let paths: Vec<_> = names.iter().filter(|n| is_consolidated(n)).map(|n| dir.join(n)).collect();
            if !paths.is_empty() {
                return Ok(Weights { paths, index: None });
            }
        }
        Dialect::HuggingFace => {
            if let Some(shard) = names.iter().find(|n| is_hugging_face(n)) {
                return Err(ConvertError::NoIndex { dir: dir.to_owned(), shard: shard.clone() });
            }
        }
    }
    let pickle = names.iter().find(|n| [".bin", ".pt", ".pth"].iter().any(|end| n.ends_with(end)));
    Err(match pickle {
        Some(name) => ConvertError::Pickle { path: dir.join(name) },
        None => ConvertError::NoWeights { dir: dir.to_owned(), expected },
    })
}

fn indexed(dir: &Path, name: &str) -> Result<Weights, ConvertError> {
    let index = dir.join(name);
    let root = parse_object(&read_text(&index)?, &index)?;
    let invalid = |problem: String| ConvertError::Index { index: index.clone(), problems: vec![problem] };
    let Some(Value::Object(entries)) = root.get("weight_map") else {
        return Err(invalid("  the key `weight_map` is missing or no object".to_owned()));
    };
    let mut weight_map = BTreeMap::new();
    for (tensor, file) in entries {
        // A name with a directory in it could lead anywhere.
        let file = file.as_str().filter(|f| !f.is_empty() && !f.contains('/') && *f != ".." && *f != ".");
        let file = file.ok_or_else(|| invalid(format!("  `{tensor}`: its file is not the name of a file")))?;
        weight_map.insert(tensor.clone(), file.to_owned());
    }
    let shards: BTreeSet<&String> = weight_map.values().collect();
    let missing: Vec<String> = shards.iter().filter(|f| !dir.join(f).exists()).map(|f| format!("  {f}")).collect();
    if !missing.is_empty() {
        return Err(ConvertError::ShardsMissing { index, missing });
    }
    let paths = shards.into_iter().map(|f| dir.join(f)).collect();
    Ok(Weights { paths, index: Some((index, weight_map)) })
}

/// Checks that each tensor is in the file that the index names; `file_of` says which it is in.
///
/// # Errors
/// All tensors that are not.
pub fn check_index<'a>(
    index: PathBuf,
    weight_map: &BTreeMap<String, String>,
    file_of: impl Fn(&str) -> Option<&'a str>,
) -> Result<(), ConvertError> {
    let problem = |(tensor, named): (&String, &String)| match file_of(tensor) {
        None => Some(format!("  `{tensor}`: {named} does not have it")),
        Some(found) if found != named => Some(format!("  `{tensor}`: expected in {named}, found in {found}")),
        Some(_) => None,
    };
    let problems: Vec<String> = weight_map.iter().filter_map(problem).collect();
    if problems.is_empty() { Ok(()) } else { Err(ConvertError::Index { index, problems }) }
}
