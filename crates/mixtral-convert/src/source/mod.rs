//! A model directory in any layout, seen as the tensors of transformers 4.

pub mod config;
pub mod consolidated;
pub mod diagnosis;
pub mod files;
pub mod fused;
pub mod locate;
pub mod per_expert;
pub mod quantized;
pub mod scales;
pub mod view;

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use mixtral_checkpoint::{Header, TensorEntry};
use mixtral_model::{CacheFormat, DType, ElemType, Formats, ModelConfig};

use crate::error::ConvertError;
use crate::names::HfTensor;
use config::SourceConfig;
use diagnosis::{Diagnosis, is_quantized};
use files::Dialect;
use locate::{Entries, Form};
use quantized::{Description, MustBe};
use scales::Scales;
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
pub trait Layout: fmt::Debug + Sync {
    /// Its name in messages.
    fn name(&self) -> &'static str;

    /// Where `tensor` of `model` is stored.
    fn stored(&self, model: &ModelConfig, tensor: HfTensor) -> Stored;
}

/// A tensor of the model, or a part of a quantized linear, found in a file.
#[derive(Clone, Debug)]
pub struct Located {
    /// Its name in messages.
    pub name: String,
    /// Index into [`Source::files`].
    pub file: usize,
    /// Type of its elements. Those of the stored tensor are as many bytes, unless they are packed.
    pub elem: ElemType,
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
    /// How the weights are laid out and quantized.
    pub layout: String,
    /// The scales of each layer's keys and values, if the model has them for a cache in e4m3.
    pub cache_scales: Option<Vec<[f32; 2]>>,
    /// What the user should know about the source.
    pub warnings: Vec<String>,
    /// The weight files.
    pub files: Vec<(PathBuf, File)>,
    /// The model's tensors by transformers 4's names. Parts of quantized linears have the names that a checkpoint would
    /// give them.
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
        let (dialect, mut config) = open_config(dir)?;
        let mut files = Vec::new();
        let mut stored = Entries::new();
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
        let mut described = Description::default();
        if stored.values().any(|(_, entry)| is_quantized(entry)) && dialect == Dialect::HuggingFace {
            described = quantized::describe(&config.path)?;
        } else if let Some(method) = &config.quantization {
            log::warn!(
                "{} says that the weights are quantized by {method}, but all of them are plain floats; they are converted as they are",
                config.path.display()
            );
        }
        let form = Form::new(dialect, layout, tied, &config.model, described.schemes, &stored);
        let mut found = form.locate(dir, &config, &stored)?;
        for (name, must_be) in std::mem::take(&mut found.to_check) {
            let (file, entry) = &stored[&name];
            check(&files[*file], entry, must_be, dir)?;
        }
        let scales = Scales::read(dir, &files, &stored, &found)?;
        config.model.formats = scales.formats(&config.model, form.formats());
        let layout = form.name(config.model.formats);
        let cache_scales = scales.of_caches(&config.model);
        let mut warnings = Vec::new();
        if described.cache == CacheFormat::Fp8 && cache_scales.is_none() {
            warnings.push(format!(
                "{} says that the cache is fp8, but the weights have no scales for it, so it is not; --kv-cache-dtype fp8 --kv-scale 1 makes it fp8 with scales of 1",
                config.path.display()
            ));
        }
        let mut tensors = found.tensors;
        tensors.extend(scales.located(&config.model));
        let sizes = || stored.values().map(|(_, entry)| entry.num_bytes());
        let (num_bytes, largest_tensor) = (sizes().sum(), sizes().max().unwrap_or(0));
        let dir = dir.to_owned();
        Ok(Source { dir, config, tied, layout, cache_scales, warnings, files, tensors, num_bytes, largest_tensor })
    }

    /// Whether linears are quantized.
    #[must_use]
    pub fn is_quantized(&self) -> bool {
        self.config.model.formats != Formats::default()
    }

    /// The model's data type: that of its configuration, or else that of its embedding.
    #[must_use]
    pub fn dtype(&self) -> DType {
        let embedding = self.tensors.get(&HfTensor::EmbedTokens.to_string());
        self.config.dtype.or(embedding.and_then(|located| located.elem.float())).unwrap_or(DType::F32)
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

fn choose_layout(dialect: Dialect, stored: &Entries) -> &'static dyn Layout {
    let any = |suffix: &str| stored.keys().any(|name| name.ends_with(suffix));
    let unfused = |block: &str| stored.keys().any(|name| name.contains(&format!("{block}.experts.0.gate_proj.")));
    match dialect {
        Dialect::HuggingFace if any(".mlp.experts.gate_up_proj") => &fused::Fused,
        Dialect::HuggingFace if unfused(".block_sparse_moe") => &per_expert::LLM_COMPRESSOR,
        Dialect::HuggingFace if unfused(".mlp") => &per_expert::GPTQMODEL,
        Dialect::HuggingFace => &per_expert::TRANSFORMERS_4,
        Dialect::Consolidated if any(".block_sparse_moe.w1") => &consolidated::Stacked,
        Dialect::Consolidated => &consolidated::Consolidated,
    }
}

/// Whether lm_head is the embedding. As in transformers 5, the configuration's word counts only if one of the two is
/// missing. If both are there, each is used.
fn is_tied(config: &SourceConfig, layout: &dyn Layout, stored: &Entries) -> bool {
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

/// Checks that a stored tensor holds what it must. It is as small as the scales of a linear.
fn check((path, file): &(PathBuf, File), entry: &TensorEntry, must_be: MustBe, dir: &Path) -> Result<(), ConvertError> {
    if must_be == MustBe::Anything {
        return Ok(());
    }
    // The header's check has shown that the file is that long.
    let mut bytes = vec![0; usize::try_from(entry.num_bytes()).unwrap_or(0)];
    file.read_exact_at(&mut bytes, entry.start).map_err(|source| ConvertError::Io { path: path.clone(), source })?;
    let Some((index, word)) = must_be.first_other(&bytes) else { return Ok(()) };
    let tensor = entry.name.clone();
    let diagnosis = match must_be {
        MustBe::InOrder { .. } => Diagnosis::Scattered { tensor, input: index, group: word },
        _ => Diagnosis::Asymmetric { tensor },
    };
    Err(ConvertError::Diagnosed { dir: dir.to_owned(), diagnosis: Box::new(diagnosis) })
}
