//! The whole convert stage: takes options and writes a checkpoint directory.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use mixtral_checkpoint::disk::free_bytes;
use mixtral_checkpoint::{CheckpointConfig, CheckpointWriter, Progress};
use mixtral_model::{CacheFormat, DType, Mapping, ModelConfig, MoeNormalization, Recipe, WeightFormat, WeightOnly};

use crate::directions;
use crate::error::ConvertError;
use crate::execute::{Losses, buffer_bytes, execute};
use crate::fp8;
use crate::plan::recipes;
use crate::report::{ConvertPlan, PlannedTensor, QuantizedTensor, RankPlan, Report};
use crate::source::config::SourceConfig;
use crate::source::{Source, open_config};
use crate::statistics::Statistics;
use crate::tokenizer::TokenizerFiles;

/// Memory of the program itself, its threads and its lists, in bytes. The buffers come on top.
const BASE_MEMORY: u64 = 32 << 20;

/// Where the model comes from.
#[derive(Clone, Debug)]
pub enum Input {
    /// A model directory, in Hugging Face's or in Mistral's layout.
    Directory(PathBuf),
    /// A geometry without weights. Only `config.json` is written, and `build` makes random weights for it.
    Geometry(ModelConfig),
}

/// What to convert, and how.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// The model.
    pub input: Input,
    /// The checkpoint directory. It is created; or replaced, if it is empty or holds an older checkpoint that this tool
    /// wrote.
    pub output_dir: PathBuf,
    /// Data type to write. `None` keeps the source's.
    pub dtype: Option<DType>,
    /// What matrices are rounded to. `None` keeps them as floats.
    pub weight_only: Option<WeightOnly>,
    /// How the cache of keys and values is stored. `None` is e4m3 if the source has scales for it, and else the model's type.
    pub cache: Option<CacheFormat>,
    /// The scale of keys and values of all layers in an e4m3 cache, in place of the source's and of those that calibration found.
    pub kv_scale: Option<f32>,
    /// What calibration found out about the model. Without it all inputs of a linear count alike.
    pub statistics: Option<Arc<Statistics>>,
    /// How to cut the model.
    pub mapping: Mapping,
    /// How the weights of a token's experts are scaled.
    pub normalization: MoeNormalization,
    /// Whether the embedding is sharded over tensor-parallel ranks.
    pub use_parallel_embedding: bool,
    /// The dimension along which a sharded embedding is cut: 0 the vocabulary, 1 the hidden size.
    pub embedding_sharding_dim: usize,
    /// Write only `config.json` and the tokenizer's files, without reading any weights.
    pub save_config_only: bool,
    /// Threads; at least one is used.
    pub workers: usize,
}

impl ConvertOptions {
    /// Converts `input` to `output_dir` as one rank, in the source's data type, on all cores.
    #[must_use]
    pub fn new(input: Input, output_dir: PathBuf) -> Self {
        ConvertOptions {
            input,
            output_dir,
            dtype: None,
            weight_only: None,
            cache: None,
            kv_scale: None,
            statistics: None,
            mapping: Mapping::single(),
            normalization: MoeNormalization::Renorm,
            use_parallel_embedding: false,
            embedding_sharding_dim: 0,
            save_config_only: false,
            workers: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

/// Everything that is known before the first weight is read.
pub(crate) struct Prepared {
    pub(crate) config: CheckpointConfig,
    /// `None` if only the config is written.
    pub(crate) source: Option<Source>,
    /// Whether lm_head is the embedding.
    pub(crate) tied: bool,
    /// The recipes of each rank, in the order of its file.
    recipes: Vec<Vec<Recipe>>,
    tokenizer: TokenizerFiles,
}

pub(crate) fn prepare(options: &ConvertOptions) -> Result<Prepared, ConvertError> {
    let mut source = None;
    let mut tokenizer = TokenizerFiles::default();
    let (mut model, tied) = match &options.input {
        Input::Geometry(model) => (ModelConfig { dtype: options.dtype.unwrap_or(model.dtype), ..model.clone() }, false),
        Input::Directory(dir) => {
            let (config, tied) = if options.save_config_only {
                let config = open_config(dir)?.1;
                let tied = config.tied;
                (config, tied)
            } else {
                let source = source.insert(Source::open(dir)?);
                (source.config.clone(), source.tied)
            };
            tokenizer = TokenizerFiles::read(dir, config.model.vocab_size)?;
            if options.cache.is_none() {
                tokenizer.warnings.extend(source.iter().flat_map(|source| source.warnings.clone()));
            }
            if let (None, Some(method), None) = (&source, &config.quantization, options.weight_only) {
                tokenizer.warnings.push(format!(
                    "the model is quantized by {method}, but its weights are not read, so the checkpoint's config describes plain ones"
                ));
            }
            let dtype = options.dtype.or(source.as_ref().map(Source::dtype)).or(config.dtype);
            let SourceConfig { path, model, .. } = config;
            let dtype = dtype.ok_or(ConvertError::NoDType { path })?;
            (ModelConfig { dtype, ..model }, tied)
        }
    };
    model.moe.normalization = options.normalization;
    let has_scales = source.as_ref().is_some_and(|source| source.cache_scales.is_some());
    let own = if has_scales { CacheFormat::Fp8 } else { CacheFormat::Plain };
    model.cache = options.cache.unwrap_or(own);
    if let Some(source) = &source {
        // (Where the scales of the cache come with a model, keys are rounded as its library rounds them: to nearest.)
        let own_scales = has_scales && options.kv_scale.is_none();
        model.key_directions = model.cache == CacheFormat::Fp8 && !own_scales && directions::are_readable(source);
    }
    if let Some(weight_only) = options.weight_only {
        if let Some(source) = source.as_ref().filter(|source| source.is_quantized()) {
            return Err(ConvertError::Quantized { dir: source.dir.clone(), layout: source.layout.clone() });
        }
        model.formats = weight_only.formats(model.dtype);
    }
    let mut config = CheckpointConfig::new(model, options.mapping);
    config.use_parallel_embedding = options.use_parallel_embedding;
    config.embedding_sharding_dim = options.embedding_sharding_dim;
    config.validate()?;
    let mut plans = Vec::new();
    if source.is_some() {
        plans.extend(options.mapping.ranks().map(|rank| recipes(&config, rank, tied)));
    }
    Ok(Prepared { config, source, tied, recipes: plans, tokenizer })
}

/// What [`convert`] would do with `options`. It checks the source as far as that is possible without reading weights.
///
/// # Errors
/// Those of [`convert`] that show without reading weights.
pub fn plan(options: &ConvertOptions) -> Result<ConvertPlan, ConvertError> {
    let Prepared { config, source, recipes, tokenizer, .. } = prepare(options)?;
    let ranks: Vec<RankPlan> = recipes
        .into_iter()
        .enumerate()
        .map(|(rank, recipes)| {
            let tensors: Vec<PlannedTensor> = recipes
                .into_iter()
                .map(|r| {
                    let bytes = r.num_bytes() as u64;
                    PlannedTensor { name: r.name, dtype: r.dtype, format: r.format, shape: r.shape, bytes }
                })
                .collect();
            RankPlan { rank, bytes: tensors.iter().map(|t| t.bytes).sum(), tensors }
        })
        .collect();
    let workers = options.workers.max(1);
    let buffers = source.as_ref().map_or(0, buffer_bytes);
    let of_directions = if config.model.key_directions { directions::bytes(&config.model) } else { 0 };
    Ok(ConvertPlan {
        model_dir: match &options.input {
            Input::Directory(dir) => Some(dir.clone()),
            Input::Geometry(_) => None,
        },
        layout: source.as_ref().map(|s| s.layout.clone()),
        source_dtype: source.as_ref().map(Source::dtype),
        source_bytes: source.as_ref().map_or(0, |s| s.num_bytes),
        output_dir: options.output_dir.clone(),
        model: config.model,
        mapping: config.mapping,
        output_bytes: ranks.iter().map(|r| r.bytes).sum(),
        ranks,
        tokenizer_files: tokenizer.names(),
        warnings: tokenizer.warnings,
        free_bytes: free_bytes(&options.output_dir),
        workers,
        peak_memory_bytes: (buffers + of_directions) * workers as u64 + BASE_MEMORY,
    })
}

/// Converts a model. Afterwards the output directory is whole. After an error nothing of the new output is left in it.
///
/// # Errors
/// What is wrong with the source, the options, a weight or the output directory.
pub fn convert(options: &ConvertOptions, progress: &dyn Progress) -> Result<Report, ConvertError> {
    let start = Instant::now();
    let Prepared { config, source, recipes, tokenizer, .. } = prepare(options)?;
    let statistics = options.statistics.as_deref();
    let cache_scales = cache_scales(options, source.as_ref(), config.model.num_layers);
    let mut made = Vec::new();
    for (rank, recipes) in config.mapping.ranks().zip(&recipes) {
        let first_layer = config.mapping.layers(&config.model, rank).start;
        made.push(fp8::cache_tensors(recipes, first_layer, rank, cache_scales.as_deref())?);
        let uncalibrated = recipes.iter().find(|recipe| recipe.format == WeightFormat::Fp8 && statistics.is_none());
        if let Some(recipe) = uncalibrated.filter(|_| !source.as_ref().is_some_and(Source::is_quantized)) {
            return Err(ConvertError::NotCalibrated { what: format!("the input of {}", recipe.name) });
        }
    }
    let mut writer = CheckpointWriter::create(&options.output_dir, config.clone(), source.is_none())?;
    tokenizer.write(&mut writer)?;
    let mut losses = Losses::new();
    let tensors = recipes.iter().flatten();
    let (count, bytes) = (tensors.clone().count(), tensors.map(|r| r.num_bytes() as u64).sum());
    if let Some(source) = &source {
        let of_directions = if config.model.key_directions { directions::progress_bytes(&config.model) } else { 0 };
        progress.start(bytes + of_directions);
        if config.model.key_directions {
            let found = directions::of_model(source, options.workers, progress)?;
            for (rank, made) in config.mapping.ranks().zip(&mut made) {
                made.extend(directions::tensors(&config, rank, &found));
            }
        }
        losses = execute(source, &recipes, &made, writer.ranks(), statistics, options.workers, progress)?;
    }
    let run_id = writer.finish()?;
    let seconds = start.elapsed().as_secs_f64();
    let quantized = QuantizedTensor::list(losses);
    Ok(Report { run_id, ranks: recipes.len(), tensors: count, bytes, seconds, quantized, warnings: tokenizer.warnings })
}

/// The scales of each layer's keys and values in an e4m3 cache, if any are known.
fn cache_scales(options: &ConvertOptions, source: Option<&Source>, num_layers: usize) -> Option<Vec<[f32; 2]>> {
    if let Some(scale) = options.kv_scale {
        return Some(vec![[scale; 2]; num_layers]);
    }
    let of_source = source.and_then(|source| source.cache_scales.clone());
    let found = || {
        Some(options.statistics.as_ref()?.cache_amax.iter().map(|amax| amax.map(mixtral_model::fp8::scale)).collect())
    };
    of_source.or_else(found)
}
