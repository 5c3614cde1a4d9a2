//! `config.json` of a checkpoint, with TensorRT-LLM's keys. They are read in all spellings that they have had, and
//! written in both.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mixtral_model::{
    Bits, CacheFormat, ConfigError, Formats, Fp8Input, Mapping, MappingError, ModelConfig, ModelFamily, MoeConfig,
    MoeNormalization, Quantization, WeightFormat,
};
use serde_json::{Map, Value, json};

use crate::keys::{KeyError, Keys, parse_object, read_text};
use crate::names::CONFIG_FILE;
use crate::seal::{UNSEALED, is_intact, seal};

/// Version of our additions to the format, under the `mixtral` key.
pub const FORMAT_VERSION: u64 = 1;

/// Everything that `config.json` says about a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointConfig {
    /// Geometry of the whole model.
    pub model: ModelConfig,
    /// How it is cut into ranks.
    pub mapping: Mapping,
    /// Whether the token embedding is sharded over tensor-parallel ranks; if not, each rank has a full copy.
    pub use_parallel_embedding: bool,
    /// The dimension along which a sharded embedding is cut: 0 the vocabulary, 1 the hidden size.
    pub embedding_sharding_dim: usize,
    /// Id of the run that wrote the rank files, which have the id too. `None` without weights, or in another tool's
    /// files.
    pub run_id: Option<String>,
    /// Version of our tool that wrote the file; `None` in another tool's files.
    pub tool_version: Option<String>,
    /// BLAKE3 of each rank file's header, in hex. Empty without weights, or in another tool's files.
    pub headers: Vec<String>,
    /// BLAKE3, in hex, of each tokenizer file that was there when the checkpoint was written.
    pub files: BTreeMap<String, String>,
}

/// A `config.json` that is no checkpoint's, or of a checkpoint that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    /// The file or one of its keys.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A Hugging Face config.json in place of a checkpoint's.
    #[error(
        "{path} is a Hugging Face config (it has `model_type`), not a checkpoint's; run `mixtral convert` on its directory first"
    )]
    HuggingFace {
        /// The file.
        path: PathBuf,
    },
    /// An engine's config.json in place of a checkpoint's.
    #[error(
        "{path} is an engine's, not a checkpoint's; run it (`mixtral run --engine-dir`), or name the checkpoint it was built from"
    )]
    Engine {
        /// The file.
        path: PathBuf,
    },
    /// A text that was changed after it was written.
    #[error(
        "{path} was changed after it was written; convert the model again, or, if the change is meant, remove its key `mixtral.seal`"
    )]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Sizes that no model has.
    #[error("{path}: {source}")]
    Model {
        /// The file.
        path: PathBuf,
        /// The rule broken.
        source: ConfigError,
    },
    /// A mapping that the model cannot be cut by.
    #[error("{path}: {source}")]
    Mapping {
        /// The file.
        path: PathBuf,
        /// The rule broken.
        source: MappingError,
    },
}

impl CheckpointConfig {
    /// A checkpoint of `model` cut by `mapping`, with a full embedding on every rank and no weights yet.
    #[must_use]
    pub fn new(model: ModelConfig, mapping: Mapping) -> Self {
        CheckpointConfig {
            model,
            mapping,
            use_parallel_embedding: false,
            embedding_sharding_dim: 0,
            run_id: None,
            tool_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            headers: Vec::new(),
            files: BTreeMap::new(),
        }
    }

    /// The dimension along which the embedding is cut, if it is cut.
    #[must_use]
    pub fn embedding_shards(&self) -> Option<usize> {
        (self.use_parallel_embedding && self.mapping.tp_size > 1).then_some(self.embedding_sharding_dim)
    }

    /// Checks geometry, mapping and the sharding of the embedding against each other.
    ///
    /// # Errors
    /// The first rule broken.
    pub fn validate(&self) -> Result<(), ConfigRuleError> {
        self.model.validate()?;
        self.mapping.validate(&self.model)?;
        if self.embedding_sharding_dim > 1 {
            return Err(ConfigRuleError::EmbeddingDim(self.embedding_sharding_dim));
        }
        let (hidden, tp) = (self.model.hidden_size, self.mapping.tp_size);
        if self.embedding_shards() == Some(1) && !hidden.is_multiple_of(tp) {
            let (what, by) = ("hidden_size", "tp_size");
            return Err(MappingError::Indivisible { what, size: hidden, by, degree: tp }.into());
        }
        Ok(())
    }

    /// Reads and checks `dir/config.json`.
    ///
    /// # Errors
    /// What is wrong with it, by key.
    pub fn read(dir: &Path) -> Result<Self, ConfigFileError> {
        let path = dir.join(CONFIG_FILE);
        Self::parse(&read_text(&path)?, &path)
    }

    /// Reads the text of a config.json; `path` is for messages.
    ///
    /// # Errors
    /// As [`CheckpointConfig::read`].
    pub fn parse(text: &[u8], path: &Path) -> Result<Self, ConfigFileError> {
        let map = parse_object(text, path)?;
        let root = Keys::new(path, &map);
        if root.contains("model_type") && !root.contains("architecture") {
            return Err(ConfigFileError::HuggingFace { path: path.to_owned() });
        }
        if root.contains("mixtral_engine_format") {
            return Err(ConfigFileError::Engine { path: path.to_owned() });
        }
        refuse_unsupported(root)?;
        let config = read_config(root)?;
        config.validate().map_err(|e| match e {
            ConfigRuleError::Model(source) => ConfigFileError::Model { path: path.to_owned(), source },
            ConfigRuleError::Mapping(source) => ConfigFileError::Mapping { path: path.to_owned(), source },
            ConfigRuleError::EmbeddingDim(n) => root.invalid("embedding_sharding_dim", "0 or 1", n).into(),
        })?;
        let ours = root.object("mixtral", "mixtral.")?;
        if !config.headers.is_empty() && config.headers.len() != config.mapping.world_size() {
            return Err(ours.invalid("headers", "a hash a rank", config.headers.len()).into());
        }
        // The seal is checked last, because a message about one wrong key is better than this one.
        match seal_of(&map) {
            Some(seal) if !is_intact(text, seal) => Err(ConfigFileError::Changed { path: path.to_owned() }),
            _ => Ok(config),
        }
    }

    /// The text of `config.json`: every key of TensorRT-LLM 0.10 and 0.11, then our own.
    #[must_use]
    pub fn to_json(&self) -> String {
        let (model, mapping) = (&self.model, &self.mapping);
        let moe = model.has_router();
        let mut root = json!({
            "architecture": if moe { "MixtralForCausalLM" } else { "MistralForCausalLM" },
            "dtype": model.dtype,
            "logits_dtype": "float32",
            "vocab_size": model.vocab_size,
            "max_position_embeddings": model.max_position_embeddings,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
            "head_size": model.head_dim,
            "hidden_act": if moe { "swiglu" } else { "silu" },
            "intermediate_size": model.intermediate_size,
            "norm_epsilon": model.norm_eps,
            "position_embedding_type": "rope_gpt_neox",
            "rotary_base": model.rope_theta,
            "rotary_scaling": null,
            "sliding_window": model.sliding_window,
            "attn_bias": false,
            "mlp_bias": false,
            "residual_mlp": false,
            "qk_layernorm": false,
            "use_parallel_embedding": self.use_parallel_embedding,
            "embedding_sharding_dim": self.embedding_sharding_dim,
            "share_embedding_table": false,
            "disable_weight_only_quant_plugin": false,
            "kv_dtype": if model.cache.is_plain() { json!(model.dtype) } else { json!("fp8") },
        });
        if moe {
            let (experts, top_k) = (model.moe.num_experts, model.moe.top_k);
            let normalization = model.moe.normalization.mode();
            root["moe_num_experts"] = json!(experts);
            root["moe_top_k"] = json!(top_k);
            // The flat key has no value for hybrids. `mapping` below has all degrees.
            if mapping.moe_ep_size == 1 {
                root["moe_tp_mode"] = json!(2);
            } else if mapping.moe_tp_size == 1 {
                root["moe_tp_mode"] = json!(1);
            }
            root["moe_normalization_mode"] = json!(normalization);
            root["moe"] = json!({ "num_experts": experts, "top_k": top_k, "normalization_mode": normalization });
        }
        root["mapping"] = json!({
            "world_size": mapping.world_size(),
            "tp_size": mapping.tp_size,
            "pp_size": mapping.pp_size,
            "moe_tp_size": mapping.moe_tp_size,
            "moe_ep_size": mapping.moe_ep_size,
            "gpus_per_node": 8,
        });
        root["quantization"] = quantization(model);
        root["mixtral"] = json!({
            "format_version": FORMAT_VERSION,
            "tool_version": self.tool_version,
            "run_id": self.run_id,
            "seal": UNSEALED,
            "headers": self.headers,
            "files": self.files,
            "weight_layout": "row-major",
            "formats": model.formats,
            "tensor_hash": "blake3",
            "tokenizer_files": "beside config.json",
        });
        let mut text = serde_json::to_string_pretty(&root).expect("a value with string keys serializes");
        text.push('\n');
        seal(&text)
    }
}

/// A [`CheckpointConfig`] whose fields do not agree.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ConfigRuleError {
    /// The geometry.
    #[error(transparent)]
    Model(#[from] ConfigError),
    /// The mapping.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// The embedding has no such dimension.
    #[error("embedding_sharding_dim is {0}; it must be 0 (vocabulary) or 1 (hidden size)")]
    EmbeddingDim(usize),
}

/// Whether any version of this tool wrote the config.json `text`. This is tested before a directory is replaced.
#[must_use]
pub fn is_ours(text: &[u8]) -> bool {
    serde_json::from_slice::<Value>(text).is_ok_and(|v| v.get("mixtral").is_some_and(Value::is_object))
}

/// Whether this tool wrote the config.json `text`, and the text has lost its seal since.
#[must_use]
pub fn is_unsealed(text: &[u8]) -> bool {
    is_ours(text) && serde_json::from_slice::<Map<String, Value>>(text).is_ok_and(|map| seal_of(&map).is_none())
}

/// The seal. It is found in an object of any name, in case the name `mixtral` itself was damaged.
fn seal_of(map: &Map<String, Value>) -> Option<&str> {
    map.values().find_map(|object| object.as_object()?.get("seal")?.as_str())
}

/// TensorRT-LLM's word for weights, activations or a cache in e4m3.
const FP8: &str = "FP8";

/// Our key beside those of TensorRT-LLM, written only if it is true: whether a cache in e4m3 has directions for the rounding of keys.
const KEY_DIRECTIONS: &str = "kv_cache_key_directions";

/// Modules of the model that are never quantized, by TensorRT-LLM's names.
const NEVER_QUANTIZED: &[&str] = &["lm_head", "router", "vocab_embedding", "input_layernorm", "post_layernorm", "ln_f"];

/// TensorRT-LLM's description of quantized weights. It has no words for all that [`Formats`] says, so that is written too.
fn quantization(model: &ModelConfig) -> Value {
    let ModelConfig { formats, cache, key_directions, .. } = model;
    let algorithm = |format| match format {
        WeightFormat::Plain => None,
        WeightFormat::Fp8 | WeightFormat::Fp8Rows(Fp8Input::Static) => Some(FP8),
        WeightFormat::Fp8Rows(Fp8Input::Token) => Some("FP8_PER_CHANNEL_PER_TOKEN"),
        WeightFormat::Quantized(Quantization { bits: Bits::Eight, group: None, .. }) => Some("W8A16"),
        WeightFormat::Quantized(Quantization { bits: Bits::Eight, .. }) => Some("W8A16_GPTQ"),
        WeightFormat::Quantized(Quantization { bits: Bits::Four, group: None, .. }) => Some("W4A16"),
        WeightFormat::Quantized(Quantization { bits: Bits::Four, .. }) => Some("W4A16_GPTQ"),
    };
    let is_mixed = formats.attention != formats.feed_forward;
    let quantized = |format| if let WeightFormat::Quantized(quantization) = format { Some(quantization) } else { None };
    let of = quantized(formats.feed_forward).or(quantized(formats.attention));
    let mut keys = json!({
        "quant_algo": if is_mixed { Some("MIXED_PRECISION") } else { algorithm(formats.feed_forward) },
        "kv_cache_quant_algo": (!cache.is_plain()).then_some(FP8),
        "group_size": of.and_then(|of| of.group).unwrap_or(128),
        "smoothquant_val": null,
        "has_zero_point": of.is_some_and(|of| of.zeros),
        "pre_quant_scale": false,
        "exclude_modules": (*formats != Formats::default()).then_some(["lm_head", "router", "vocab_embedding"]),
    });
    if !cache.is_plain() && *key_directions {
        keys[KEY_DIRECTIONS] = json!(true);
    }
    keys
}

/// The formats of the weights. A checkpoint that does not name them has plain weights, or TensorRT-LLM's fp8.
fn read_formats(ours: Keys<'_>, quantization: Keys<'_>) -> Result<Formats, KeyError> {
    if !ours.contains("formats") && quantization.text("quant_algo")? == Some(FP8) {
        return Ok(Formats { attention: WeightFormat::Fp8, feed_forward: WeightFormat::Fp8 });
    }
    let keys = ours.object("formats", "mixtral.formats.")?;
    let format = |key| {
        let Some(word) = keys.text(key)? else { return Ok(WeightFormat::Plain) };
        word.parse().map_err(|_| keys.unsupported(key, "plain, fp8, int8:row:f32, int4:g128:bf16 and the like", word))
    };
    Ok(Formats { attention: format("attention")?, feed_forward: format("feed_forward")? })
}

/// Refuses settings that give the weights another meaning than the one that this tool reads them with.
fn refuse_unsupported(root: Keys<'_>) -> Result<(), KeyError> {
    let quantization = root.object("quantization", "quantization.")?;
    quantization.one_of("kv_cache_quant_algo", &[FP8], "null, FP8; convert the original model again")?;
    if quantization.flag(KEY_DIRECTIONS)? && quantization.text("kv_cache_quant_algo")?.is_none() {
        let supported = "false without kv_cache_quant_algo FP8: only keys in e4m3 are rounded by directions";
        return Err(quantization.unsupported(KEY_DIRECTIONS, supported, true));
    }
    let ours = root.object("mixtral", "mixtral.")?;
    // TensorRT-LLM stores integers in the order in which one kind of GPU reads them.
    let is_theirs = |algo: &&Value| !ours.contains("formats") && *algo != FP8;
    if let Some(algo) = quantization.get("quant_algo").filter(is_theirs) {
        let supported = "null, FP8: another tool's quantized weights are arranged for its own kernels; quantize the original model with `mixtral convert`";
        return Err(quantization.unsupported("quant_algo", supported, algo));
    }
    let excluded = quantization.get("exclude_modules").and_then(Value::as_array);
    let is_known =
        |name: &Value| name.as_str().is_some_and(|name| NEVER_QUANTIZED.iter().any(|known| name.ends_with(known)));
    if let Some(other) = excluded.and_then(|names| names.iter().find(|name| !is_known(name))) {
        let supported = "lm_head, router and embedding: all linears of attention and feed-forward are quantized";
        return Err(quantization.unsupported("exclude_modules", supported, other));
    }
    if let Some(scaling) = root.get("rotary_scaling") {
        return Err(root.unsupported("rotary_scaling", "null", scaling));
    }
    for key in ["attn_bias", "mlp_bias", "residual_mlp", "qk_layernorm", "share_embedding_table"] {
        if root.flag(key)? {
            return Err(root.unsupported(key, "false", true));
        }
    }
    root.one_of(
        "architecture",
        &["MixtralForCausalLM", "MistralForCausalLM", "LlamaForCausalLM"],
        "MixtralForCausalLM, MistralForCausalLM, LlamaForCausalLM",
    )?;
    root.one_of("hidden_act", &["swiglu", "silu"], "swiglu, silu")?;
    root.one_of("position_embedding_type", &["rope_gpt_neox"], "rope_gpt_neox")
}

/// The experts, from the nested object of 0.11 or else the flat keys of 0.10. `None` for a dense model.
fn read_moe(root: Keys<'_>) -> Result<Option<MoeConfig>, KeyError> {
    let nested = root.object("moe", "moe.")?;
    let num_experts = nested.size("num_experts")?.or(root.size("moe_num_experts")?).unwrap_or(0);
    if num_experts == 0 {
        return match root.text("architecture")? {
            Some("MixtralForCausalLM") => {
                Err(root.missing("moe_num_experts", "the number of experts of a MixtralForCausalLM"))
            }
            _ => Ok(None),
        };
    }
    let top_k = nested.size("top_k")?.or(root.size("moe_top_k")?).unwrap_or(1);
    let mode = nested.size("normalization_mode")?.or(root.size("moe_normalization_mode")?).unwrap_or(1);
    let normalization = u32::try_from(mode).ok().and_then(MoeNormalization::from_mode);
    let normalization =
        normalization.ok_or_else(|| root.unsupported("moe_normalization_mode", "0 (none), 1 (renorm)", mode))?;
    Ok(Some(MoeConfig { num_experts, top_k, normalization }))
}

/// A degree of parallelism. In TensorRT-LLM, −1 and 0 mean that it is derived from others.
fn degree(keys: Keys<'_>, key: &str) -> Result<Option<usize>, KeyError> {
    match keys.get(key) {
        Some(value) if value.as_i64().is_some_and(|n| n == -1 || n == 0) => Ok(None),
        _ => keys.size(key),
    }
}

fn read_mapping(root: Keys<'_>) -> Result<Mapping, KeyError> {
    let keys = root.object("mapping", "mapping.")?;
    let tp_size = degree(keys, "tp_size")?.unwrap_or(1);
    let pp_size = degree(keys, "pp_size")?.unwrap_or(1);
    if let Some(cp) = degree(keys, "cp_size")?
        && cp != 1
    {
        return Err(keys.unsupported("cp_size", "1", cp));
    }
    if let Some(world) = degree(keys, "world_size")?
        && tp_size.checked_mul(pp_size) != Some(world)
    {
        return Err(keys.invalid("world_size", "tp_size · pp_size", world));
    }
    let derived = |other: usize| tp_size.checked_div(other).unwrap_or(1).max(1);
    let (moe_tp_size, moe_ep_size) = match (degree(keys, "moe_tp_size")?, degree(keys, "moe_ep_size")?) {
        (Some(tp), Some(ep)) => (tp, ep),
        (Some(tp), None) => (tp, derived(tp)),
        (None, Some(ep)) => (derived(ep), ep),
        (None, None) => match root.size("moe_tp_mode")? {
            Some(1) => (1, tp_size),
            Some(2) | None => (tp_size, 1),
            Some(0) if tp_size == 1 => (1, 1),
            Some(mode) => {
                return Err(root.unsupported("moe_tp_mode", "1 (expert parallel), 2 (tensor parallel)", mode));
            }
        },
    };
    Ok(Mapping { tp_size, pp_size, moe_tp_size, moe_ep_size })
}

fn read_config(root: Keys<'_>) -> Result<CheckpointConfig, KeyError> {
    let ours = root.object("mixtral", "mixtral.")?;
    let moe = read_moe(root)?;
    let hidden_size = root.required_size("hidden_size")?;
    let num_heads = root.required_size("num_attention_heads")?;
    let dense = MoeConfig { num_experts: 1, top_k: 1, normalization: MoeNormalization::Renorm };
    let dtype = root.dtype("dtype")?;
    let model = ModelConfig {
        family: if moe.is_some() { ModelFamily::Mixtral } else { ModelFamily::Mistral },
        dtype: dtype.ok_or_else(|| root.missing("dtype", "float32, float16 or bfloat16"))?,
        vocab_size: root.required_size("vocab_size")?,
        hidden_size,
        intermediate_size: root.size("intermediate_size")?.unwrap_or(hidden_size.saturating_mul(4)),
        num_layers: root.required_size("num_hidden_layers")?,
        num_heads,
        num_kv_heads: root.size("num_key_value_heads")?.unwrap_or(num_heads),
        head_dim: root.size("head_size")?.unwrap_or(hidden_size.checked_div(num_heads).unwrap_or(0)),
        moe: moe.unwrap_or(dense),
        max_position_embeddings: root.required_size("max_position_embeddings")?,
        rope_theta: root.number("rotary_base")?.unwrap_or(10_000.0),
        norm_eps: root.number("norm_epsilon")?.unwrap_or(1e-5),
        sliding_window: root.size("sliding_window")?,
        formats: read_formats(ours, root.object("quantization", "quantization.")?)?,
        cache: match root.object("quantization", "quantization.")?.text("kv_cache_quant_algo")? {
            Some(_) => CacheFormat::Fp8,
            None => CacheFormat::Plain,
        },
        key_directions: root.object("quantization", "quantization.")?.flag(KEY_DIRECTIONS)?,
    };
    if let Some(version) = ours.size("format_version")?
        && version as u64 > FORMAT_VERSION
    {
        return Err(ours.unsupported("format_version", "1; use the tool that wrote it, or convert again", version));
    }
    Ok(CheckpointConfig {
        model,
        mapping: read_mapping(root)?,
        use_parallel_embedding: root.flag("use_parallel_embedding")?,
        embedding_sharding_dim: root.size("embedding_sharding_dim")?.unwrap_or(0),
        run_id: ours.text("run_id")?.map(str::to_owned),
        tool_version: ours.text("tool_version")?.map(str::to_owned),
        headers: ours.texts("headers")?,
        files: ours.named_texts("files")?,
    })
}

#[cfg(test)]
mod tests {
    use mixtral_model::DType;

    use super::*;

    fn parse(text: &str) -> Result<CheckpointConfig, String> {
        CheckpointConfig::parse(text.as_bytes(), Path::new("ckpt/config.json")).map_err(|e| e.to_string())
    }

    /// The smallest config that another tool could write, with `extra` keys.
    fn minimal(extra: &str) -> String {
        format!(
            r#"{{"architecture": "MixtralForCausalLM", "dtype": "float16", "vocab_size": 96, "hidden_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128{extra}}}"#
        )
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut model = ModelConfig::mixtral_8x7b(DType::Bf16);
        model.sliding_window = Some(4096);
        model.moe.normalization = MoeNormalization::None;
        for (tp, moe_tp, moe_ep) in [(1, 1, 1), (4, 4, 1), (4, 1, 4), (4, 2, 2)] {
            let mapping = Mapping { tp_size: tp, pp_size: 2, moe_tp_size: moe_tp, moe_ep_size: moe_ep };
            let mut config = CheckpointConfig::new(model.clone(), mapping);
            config.use_parallel_embedding = true;
            config.embedding_sharding_dim = 1;
            config.run_id = Some("00ff".into());
            assert_eq!(parse(&config.to_json()).unwrap(), config);
        }
        let mut dense = CheckpointConfig::new(model, Mapping::tensor_parallel(2, 1));
        (dense.model.formats.attention, dense.model.formats.feed_forward) = (WeightFormat::Fp8, WeightFormat::Fp8);
        dense.model.cache = CacheFormat::Fp8;
        dense.model.family = ModelFamily::Mistral;
        dense.model.moe = MoeConfig { num_experts: 1, top_k: 1, normalization: MoeNormalization::Renorm };
        assert!(!dense.to_json().contains("moe_num_experts"));
        assert!(!dense.to_json().contains("kv_cache_key_directions"), "as TensorRT-LLM's");
        assert_eq!(parse(&dense.to_json()).unwrap(), dense);
        dense.model.key_directions = true;
        assert!(dense.to_json().contains(r#""kv_cache_key_directions": true"#));
        assert_eq!(parse(&dense.to_json()).unwrap(), dense);
    }

    #[test]
    fn both_spellings_of_the_experts_are_read_and_defaults_filled() {
        let flat = parse(&minimal(
            r#", "moe_num_experts": 8, "moe_top_k": 2, "moe_tp_mode": 1, "mapping": {"tp_size": 2}, "quantization": {}"#,
        ))
        .unwrap();
        assert_eq!(flat.mapping, Mapping::expert_parallel(2, 1));
        assert_eq!(flat.model.moe.num_experts, 8);
        assert_eq!((flat.model.head_dim, flat.model.num_kv_heads, flat.model.intermediate_size), (16, 4, 256));
        assert_eq!(flat.run_id, None);
        let nested = parse(&minimal(
            r#", "moe": {"num_experts": 8, "top_k": 2, "normalization_mode": 0},
                "mapping": {"tp_size": 2, "moe_tp_size": 2, "moe_ep_size": -1}, "a_key_of_the_future": [1]"#,
        ))
        .unwrap();
        assert_eq!(nested.mapping, Mapping::tensor_parallel(2, 1));
        assert_eq!(nested.model.moe.normalization, MoeNormalization::None);
    }

    /// As ModelOpt exports it for TensorRT-LLM.
    #[test]
    fn another_tools_fp8_is_read() {
        let quantization = r#"{"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["*router", "*vocab_embedding", "*ln_f", "lm_head"]}"#;
        let config = parse(&minimal(&format!(r#", "moe_num_experts": 8, "quantization": {quantization}"#))).unwrap();
        assert_eq!(config.model.formats, Formats { attention: WeightFormat::Fp8, feed_forward: WeightFormat::Fp8 });
        assert_eq!(config.model.cache, CacheFormat::Fp8);
        assert!(!config.model.key_directions);
    }

    #[test]
    fn each_refusal_says_what_and_where() {
        let refusals: Vec<String> = [
            "{".to_owned(),
            "[]".to_owned(),
            r#"{"model_type": "mixtral"}"#.to_owned(),
            r#"{"architecture": "GPTForCausalLM"}"#.to_owned(),
            minimal(""),
            minimal(r#", "moe_num_experts": 8, "quantization": {"quant_algo": "W4A8_AWQ"}"#),
            minimal(r#", "moe_num_experts": 8, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}"#),
            minimal(
                r#", "moe_num_experts": 8, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "transformer.layers.0.mlp"]}"#,
            ),
            minimal(r#", "moe_num_experts": 8, "quantization": {"kv_cache_key_directions": true}"#),
            minimal(
                r#", "moe_num_experts": 8, "quantization": {"kv_cache_quant_algo": "FP8", "kv_cache_key_directions": "all"}"#,
            ),
            minimal(r#", "moe_num_experts": 8, "rotary_scaling": {"type": "linear"}"#),
            minimal(r#", "moe_num_experts": 8, "attn_bias": true"#),
            minimal(r#", "moe_num_experts": 8, "moe_normalization_mode": 2"#),
            minimal(r#", "moe_num_experts": 8, "head_size": "wide""#),
            minimal(r#", "moe_num_experts": 8, "mapping": {"tp_size": 2, "world_size": 3}"#),
            minimal(r#", "moe_num_experts": 8, "mapping": {"tp_size": 3}"#),
            minimal(r#", "moe_num_experts": 8, "num_key_value_heads": 3"#),
            minimal(r#", "moe_num_experts": 8, "moe_tp_mode": 0, "mapping": {"tp_size": 2}"#),
            minimal(r#", "moe_num_experts": 8, "mixtral": {"format_version": 2}"#),
            minimal(r#", "moe_num_experts": 8, "embedding_sharding_dim": 2"#),
        ]
        .iter()
        .map(|text| parse(text).unwrap_err())
        .collect();
        insta::assert_snapshot!(refusals.join("\n"));
    }
}
