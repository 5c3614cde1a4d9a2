//! A model directory, whichever way it is laid out, seen as transformers 4's tensors.

pub mod config;
pub mod consolidated;
pub mod files;
pub mod fused;
pub mod per_expert;
pub mod view;

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use mixtral_checkpoint::{Header, TensorEntry};
use mixtral_model::{DType, ModelConfig};

use crate::error::ConvertError;
use crate::names::HfTensor;
use config::SourceConfig;
use files::Dialect;
use view::View;

/// Where a layout keeps a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Name of the stored tensor.
    pub name: String,
    /// Shape that it must have.
    pub shape: Vec<usize>,
    /// Which part of it, in which arrangement.
    pub view: View,
}

/// A way of storing a model: one row of a table, from transformers 4's tensors to stored ones.
pub trait Layout: Sync {
    /// What it is called in messages.
    fn name(&self) -> &'static str;

    /// Where `tensor` of `model` is.
    fn stored(&self, model: &ModelConfig, tensor: HfTensor) -> Stored;
}

/// A tensor of the model, found in a file.
#[derive(Clone, Debug)]
pub struct Located {
    /// Index into [`Source::files`].
    pub file: usize,
    /// Element type in the file.
    pub dtype: DType,
    /// First byte of the stored tensor in the file.
    pub start: u64,
    /// Elements of a row of the stored tensor, seen as a matrix.
    pub stored_cols: usize,
    /// Which part of the stored tensor it is.
    pub view: View,
}

/// An open model directory whose tensors are all there and of the right shapes.
#[derive(Debug)]
pub struct Source {
    /// The directory.
    pub dir: PathBuf,
    /// What the configuration says.
    pub config: SourceConfig,
    /// How the weights are laid out.
    pub layout: &'static str,
    /// The weight files.
    pub files: Vec<(PathBuf, File)>,
    /// The model's tensors by transformers 4's names.
    pub tensors: HashMap<String, Located>,
    /// Bytes of the weights.
    pub num_bytes: u64,
    /// Bytes of the largest tensor as it is stored.
    pub largest_tensor: u64,
}

impl Source {
    /// Opens `dir` and finds every tensor of the model in it; no weights are read.
    ///
    /// # Errors
    /// What is wrong with the directory. Tensors that are missing, misshapen or without a place are listed at once.
    pub fn open(dir: &Path) -> Result<Self, ConvertError> {
        let (dialect, config) = open_config(dir)?;
        let weights = files::find(dir, dialect)?;
        let mut files = Vec::new();
        let mut stored: HashMap<String, (usize, TensorEntry)> = HashMap::new();
        for path in weights.paths {
            let io = |source| ConvertError::Io { path: path.clone(), source };
            let file = File::open(&path).map_err(io)?;
            for entry in Header::read(&file, &path)?.tensors {
                if let Some((other, _)) = stored.insert(entry.name.clone(), (files.len(), entry.clone())) {
                    let (first, _): &(PathBuf, File) = &files[other];
                    return Err(ConvertError::Duplicate { tensor: entry.name, first: first.clone(), second: path });
                }
            }
            files.push((path, file));
        }
        if let Some((index, weight_map)) = weights.index {
            files::check_index(index, &weight_map, |tensor| {
                stored.get(tensor).and_then(|(file, _)| files[*file].0.file_name()?.to_str())
            })?;
        }
        let layout = choose_layout(dialect, &stored);
        let tensors = locate(dir, dialect, layout, &config, &stored)?;
        let sizes = || stored.values().map(|(_, entry)| entry.num_bytes());
        let (num_bytes, largest_tensor) = (sizes().sum(), sizes().max().unwrap_or(0));
        Ok(Source { dir: dir.to_owned(), config, layout: layout.name(), files, tensors, num_bytes, largest_tensor })
    }

    /// The type that the model is in: its configuration's, or else that of its embedding.
    #[must_use]
    pub fn dtype(&self) -> DType {
        let embedding = self.tensors.get(&HfTensor::EmbedTokens.to_string());
        self.config.dtype.or(embedding.map(|located| located.dtype)).unwrap_or(DType::F32)
    }
}

/// Reads the configuration of the model in `dir` and nothing else.
///
/// # Errors
/// If there is none, or it describes a model that we do not know.
pub fn open_config(dir: &Path) -> Result<(Dialect, SourceConfig), ConvertError> {
    if !dir.is_dir() {
        return Err(ConvertError::NoDirectory { dir: dir.to_owned() });
    }
    let dialect = files::dialect(dir)?;
    Ok((dialect, SourceConfig::read(dir, dialect)?))
}

fn choose_layout(dialect: Dialect, stored: &HashMap<String, (usize, TensorEntry)>) -> &'static dyn Layout {
    let any = |suffix: &str| stored.keys().any(|name| name.ends_with(suffix));
    match dialect {
        Dialect::HuggingFace if any(".mlp.experts.gate_up_proj") => &fused::Fused,
        Dialect::HuggingFace => &per_expert::PerExpert,
        Dialect::Consolidated if any(".block_sparse_moe.w1") => &consolidated::Stacked,
        Dialect::Consolidated => &consolidated::Consolidated,
    }
}

/// Tensors that published models carry and that nothing is computed from.
fn is_harmless(name: &str, tied: bool) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (tied && matches!(name, "lm_head.weight" | "output.weight"))
}

fn locate(
    dir: &Path,
    dialect: Dialect,
    layout: &'static dyn Layout,
    config: &SourceConfig,
    stored: &HashMap<String, (usize, TensorEntry)>,
) -> Result<HashMap<String, Located>, ConvertError> {
    let mut tensors = HashMap::new();
    let mut problems = Vec::new();
    let mut seen = BTreeSet::new();
    for tensor in HfTensor::all(&config.model, config.tied) {
        let Stored { name, shape, view } = layout.stored(&config.model, tensor);
        let problem = match stored.get(&name) {
            None => format!("missing, expected shape {shape:?}"),
            Some((_, entry)) if entry.shape != shape => format!("expected shape {shape:?}, found {:?}", entry.shape),
            Some((file, entry)) => match entry.float() {
                None => format!("expected type F32, F16 or BF16, found {}", entry.dtype),
                Some(dtype) => {
                    let stored_cols = shape.last().copied().unwrap_or(1);
                    let located = Located { file: *file, dtype, start: entry.start, stored_cols, view };
                    tensors.insert(tensor.to_string(), located);
                    seen.insert(name);
                    continue;
                }
            },
        };
        // Many experts may live in one stored tensor, which is at fault once.
        if seen.insert(name.clone()) {
            problems.push(format!("  `{name}`: {problem}"));
        }
    }
    let mut extra: Vec<&String> =
        stored.keys().filter(|name| !seen.contains(*name) && !is_harmless(name, config.tied)).collect();
    extra.sort();
    problems.extend(extra.into_iter().map(|name| format!("  `{name}`: the model has no place for it")));
    if problems.is_empty() {
        return Ok(tensors);
    }
    let config = dialect.config_file();
    Err(ConvertError::Tensors { dir: dir.to_owned(), config, layout: layout.name(), problems })
}
