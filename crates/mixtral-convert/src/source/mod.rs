//! A model directory in any layout, seen as the tensors of transformers 4.

pub mod config;
pub mod consolidated;
pub mod diagnosis;
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
use diagnosis::{Misfits, diagnose};
use files::Dialect;
use view::View;

/// Where a layout keeps a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Name of the stored tensor.
    pub name: String,
    /// Shape that it must have.
    pub shape: Vec<usize>,
    /// Which part of the stored tensor it is, and how its elements are arranged there.
    pub view: View,
}

/// A way of storing a model: a map from transformers 4's tensors to stored ones.
pub trait Layout: Sync {
    /// Its name in messages.
    fn name(&self) -> &'static str;

    /// Where `tensor` of `model` is stored.
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

/// An open model directory that has all tensors, with the right shapes.
#[derive(Debug)]
pub struct Source {
    /// The directory.
    pub dir: PathBuf,
    /// What the configuration says.
    pub config: SourceConfig,
    /// Whether lm_head is the embedding, decided by the configuration and the weights.
    pub tied: bool,
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
    /// Opens `dir` and finds every tensor of the model in it. Reads no weights.
    ///
    /// # Errors
    /// What is wrong with the directory. One error lists all tensors that are missing, have the wrong shape, or have no
    /// place in the model.
    pub fn open(dir: &Path) -> Result<Self, ConvertError> {
        let (dialect, config) = open_config(dir)?;
        let mut files = Vec::new();
        let mut stored: HashMap<String, (usize, TensorEntry)> = HashMap::new();
        for path in files::find(dir, dialect)? {
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
        let layout = choose_layout(dialect, &stored);
        let tied = is_tied(&config, layout, &stored);
        let tensors = locate(dir, dialect, layout, &config, tied, &stored)?;
        if let Some(method) = &config.quantization {
            log::warn!(
                "{} says that the weights are quantized by {method}, but all of them are plain floats; they are converted as they are",
                config.path.display()
            );
        }
        let sizes = || stored.values().map(|(_, entry)| entry.num_bytes());
        let (num_bytes, largest_tensor) = (sizes().sum(), sizes().max().unwrap_or(0));
        let (dir, layout) = (dir.to_owned(), layout.name());
        Ok(Source { dir, config, tied, layout, files, tensors, num_bytes, largest_tensor })
    }

    /// The model's data type: that of its configuration, or else that of its embedding.
    #[must_use]
    pub fn dtype(&self) -> DType {
        let embedding = self.tensors.get(&HfTensor::EmbedTokens.to_string());
        self.config.dtype.or(embedding.map(|located| located.dtype)).unwrap_or(DType::F32)
    }
}

/// Reads the configuration of the model in `dir` and nothing else.
///
/// # Errors
/// If there is none, or if it describes a model that is not supported.
pub fn open_config(dir: &Path) -> Result<(Dialect, SourceConfig), ConvertError> {
    match std::fs::metadata(dir) {
        Ok(meta) if !meta.is_dir() => return Err(ConvertError::NotADirectory { path: dir.to_owned() }),
        Ok(_) => {}
        Err(_) => return Err(ConvertError::NoDirectory { dir: dir.to_owned() }),
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

/// Whether a tensor may be left out: published models carry tables of the rotary embedding, which follow from its base.
fn is_harmless(name: &str) -> bool {
    [".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached"].iter().any(|end| name.ends_with(end))
        || name == "rope.freqs"
}

/// Whether lm_head is the embedding. As in transformers 5, the configuration's word counts only if one of the two is
/// missing. If both are there, each is used.
fn is_tied(config: &SourceConfig, layout: &dyn Layout, stored: &HashMap<String, (usize, TensorEntry)>) -> bool {
    let has = |tensor| stored.contains_key(&layout.stored(&config.model, tensor).name);
    let has_both = has(HfTensor::LmHead) && has(HfTensor::EmbedTokens);
    if config.tied && has_both {
        log::warn!(
            "{} says that the embedding is lm_head too, but the weights have both; each is used as it is",
            config.path.display()
        );
    }
    config.tied && !has_both
}

fn locate(
    dir: &Path,
    dialect: Dialect,
    layout: &'static dyn Layout,
    config: &SourceConfig,
    tied: bool,
    stored: &HashMap<String, (usize, TensorEntry)>,
) -> Result<HashMap<String, Located>, ConvertError> {
    let model = &config.model;
    let mut tensors = HashMap::new();
    let (mut problems, mut misfits) = (Vec::new(), Misfits::default());
    let mut seen = BTreeSet::new();
    // The one matrix of a tied model may be stored under either name.
    let head = layout.stored(model, HfTensor::LmHead);
    let embedding_is_head = tied && stored.contains_key(&head.name);
    for tensor in HfTensor::all(model, tied) {
        let Stored { name, shape, view } = match tensor {
            HfTensor::EmbedTokens if embedding_is_head => head.clone(),
            _ => layout.stored(model, tensor),
        };
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
        // One stored tensor may hold many experts; its problem is listed once.
        if seen.insert(name.clone()) {
            problems.push(format!("  `{name}`: {problem}"));
            if stored.contains_key(&name) { &mut misfits.wrong } else { &mut misfits.missing }.push(name);
        }
    }
    misfits.extra = stored.keys().map(String::as_str).filter(|n| !seen.contains(*n) && !is_harmless(n)).collect();
    misfits.extra.sort_unstable();
    problems.extend(misfits.extra.iter().map(|name| format!("  `{name}`: the model has no place for it")));
    if problems.is_empty() {
        return Ok(tensors);
    }
    let method = config.quantization.clone().or_else(|| files::quantizer(dir));
    let dir = dir.to_owned();
    if let Some(diagnosis) = diagnose(dialect, layout, model, method.as_ref(), stored, &misfits) {
        return Err(ConvertError::Diagnosed { dir, diagnosis: Box::new(diagnosis) });
    }
    Err(ConvertError::Tensors { dir, config: dialect.config_file(), layout: layout.name(), problems })
}
