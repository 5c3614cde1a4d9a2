//! Reads the dialects of a model's configuration: of transformers 4 and 5, and Mistral's `params.json`, old and new.

use std::path::{Path, PathBuf};

use mixtral_checkpoint::KeyError;
use mixtral_checkpoint::keys::{Keys, parse_object, read_text};
use mixtral_model::{CacheFormat, DType, Formats, ModelConfig, ModelFamily, MoeConfig, MoeNormalization};

use super::files::Dialect;
use crate::error::ConvertError;

/// A configuration with more experts than this, over all layers, is a mistake.
const MAX_EXPERTS: usize = 1 << 17;

/// What a model's configuration says.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceConfig {
    /// The file it was read from.
    pub path: PathBuf,
    /// The geometry. Its data type is `dtype` if that is known; else it is f32, and the caller has to choose one.
    pub model: ModelConfig,
    /// Data type of the weights, if the file tells.
    pub dtype: Option<DType>,
    /// Whether lm_head is the embedding.
    pub tied: bool,
    /// How the weights are quantized, if the file says so. This may be left over from weights that are no longer
    /// quantized.
    pub quantization: Option<String>,
}

impl SourceConfig {
    /// Reads the configuration file of `dir`.
    ///
    /// # Errors
    /// If it is damaged, or describes a model that is no Mixtral or Mistral, or one that is not supported.
    pub fn read(dir: &Path, dialect: Dialect) -> Result<Self, ConvertError> {
        let path = dir.join(dialect.config_file());
        let map = parse_object(&read_text(&path)?, &path)?;
        let keys = Keys::new(&path, &map);
        if keys.contains("architecture") && !keys.contains("model_type") {
            return Err(ConvertError::AlreadyCheckpoint { path });
        }
        if keys.contains("mixtral_engine_format") {
            return Err(ConvertError::AlreadyEngine { path });
        }
        let quantizer = keys.object("quantization_config", "quantization_config.")?;
        let quantization = match keys.get("quantization_config") {
            Some(_) => Some(quantizer.text("quant_method")?.unwrap_or("a method without a name").to_owned()),
            None => None,
        };
        let (model, dtype, tied) = match dialect {
            Dialect::HuggingFace => read_hugging_face(keys)?,
            Dialect::Consolidated => read_params(keys)?,
        };
        model.validate().map_err(|source| ConvertError::Model { path: path.clone(), source })?;
        let (layers, experts) = (model.num_layers, model.moe.num_experts);
        if layers.saturating_mul(experts) > MAX_EXPERTS {
            return Err(ConvertError::TooManyExperts { path, layers, experts, max: MAX_EXPERTS });
        }
        Ok(SourceConfig { path, model, dtype, tied, quantization })
    }
}

/// Refuses keys whose presence changes the computation.
fn refuse(keys: Keys<'_>, names: &[&str], supported: &'static str) -> Result<(), KeyError> {
    match names.iter().find_map(|name| Some((name, keys.get(name)?))) {
        Some((name, found)) if found != false => Err(keys.unsupported(name, supported, found)),
        _ => Ok(()),
    }
}

/// transformers' `config.json`. Missing keys have transformers' defaults, except that a missing `sliding_window` means
/// that there is none.
fn read_hugging_face(keys: Keys<'_>) -> Result<(ModelConfig, Option<DType>, bool), KeyError> {
    keys.one_of("model_type", &["mixtral", "mistral"], "mixtral, mistral")?;
    let model_type = keys.text("model_type")?.ok_or_else(|| keys.missing("model_type", "mixtral or mistral"))?;
    let moe = model_type == "mixtral";
    keys.one_of("hidden_act", &["silu"], "silu")?;
    refuse(keys, &["attention_bias", "mlp_bias"], "false")?;
    let rope_theta = read_rope(keys)?.unwrap_or(if moe { 1e6 } else { 1e4 });
    let hidden_size = keys.required_size("hidden_size")?;
    let num_heads = keys.required_size("num_attention_heads")?;
    // If the key is absent, transformers' default counts. Null, in files of models without grouping, means as many as
    // query heads.
    let num_kv_heads = match keys.contains("num_key_value_heads") {
        true => keys.size("num_key_value_heads")?.unwrap_or(num_heads),
        false if num_heads.is_multiple_of(8) => 8,
        false => return Err(keys.missing("num_key_value_heads", "a whole number (8 without it, which does not fit)")),
    };
    let dtype = match keys.dtype("dtype")? {
        Some(dtype) => Some(dtype),
        None => keys.dtype("torch_dtype")?,
    };
    let model = ModelConfig {
        family: if moe { ModelFamily::Mixtral } else { ModelFamily::Mistral },
        dtype: dtype.unwrap_or(DType::F32),
        vocab_size: keys.required_size("vocab_size")?,
        hidden_size,
        intermediate_size: keys.required_size("intermediate_size")?,
        num_layers: keys.required_size("num_hidden_layers")?,
        num_heads,
        num_kv_heads,
        head_dim: keys.size("head_dim")?.unwrap_or(hidden_size.checked_div(num_heads).unwrap_or(0)),
        moe: if moe {
            moe_config(keys.size("num_local_experts")?.unwrap_or(8), keys.size("num_experts_per_tok")?.unwrap_or(2))
        } else {
            moe_config(1, 1)
        },
        max_position_embeddings: keys.size("max_position_embeddings")?.unwrap_or(131_072),
        rope_theta,
        norm_eps: keys.number("rms_norm_eps")?.unwrap_or(if moe { 1e-5 } else { 1e-6 }),
        sliding_window: keys.size("sliding_window")?,
        formats: Formats::default(),
        cache: CacheFormat::Plain,
        key_directions: false,
    };
    Ok((model, dtype, keys.flag("tie_word_embeddings")?))
}

fn moe_config(num_experts: usize, top_k: usize) -> MoeConfig {
    MoeConfig { num_experts, top_k, normalization: MoeNormalization::Renorm }
}

/// The base of the rotary frequencies, from `rope_parameters` or `rope_theta`. Any scaling of the frequencies is
/// refused.
fn read_rope(keys: Keys<'_>) -> Result<Option<f64>, KeyError> {
    let mut theta = keys.number("rope_theta")?;
    for (key, prefix) in [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")] {
        let rope = keys.object(key, prefix)?;
        for kind in ["rope_type", "type"] {
            rope.one_of(kind, &["default"], "default")?;
        }
        if let (Some(factor), None, None) = (rope.get("factor"), rope.get("rope_type"), rope.get("type")) {
            return Err(rope.unsupported("factor", "no scaling", factor));
        }
        if let Some(factor) = rope.number("partial_rotary_factor")?
            && factor != 1.0
        {
            return Err(rope.unsupported("partial_rotary_factor", "1", factor));
        }
        theta = rope.number("rope_theta")?.or(theta);
    }
    Ok(theta)
}

/// `params.json`, with mistral-inference's keys or with those that Mixtral 8x7B was first published with. Some values
/// are never in the file. They are those that transformers' converters assume: 32768 positions, and a rotary base of
/// 1e6 with experts, 1e4 without.
fn read_params(keys: Keys<'_>) -> Result<(ModelConfig, Option<DType>, bool), KeyError> {
    let unsupported = ["vision_encoder", "multimodal", "quantization", "lora", "yarn", "llama_4_scaling"];
    refuse(keys, &unsupported, "none; only the language model with plain weights")?;
    keys.one_of("model_type", &["transformer", "mixtral", "mistral"], "transformer")?;
    let either = |new: &str, old: &str| match keys.size(new)? {
        Some(size) => Ok(Some(size)),
        None => keys.size(old),
    };
    let required = |new: &str, old: &str| either(new, old)?.ok_or_else(|| keys.missing(new, "a whole number"));
    let hidden_size = required("dim", "hidden_size")?;
    let num_heads = required("n_heads", "num_attention_heads")?;
    let nested = keys.object("moe", "moe.")?;
    let num_experts = nested.size("num_experts")?.or(keys.size("num_local_experts")?);
    let top_k = nested.size("num_experts_per_tok")?.or(keys.size("num_experts_per_tok")?).unwrap_or(2);
    let norm_eps = keys.number("norm_eps")?.or(keys.number("rms_norm_eps")?);
    let dtype = keys.dtype("dtype")?;
    let model = ModelConfig {
        family: if num_experts.is_some() { ModelFamily::Mixtral } else { ModelFamily::Mistral },
        dtype: dtype.unwrap_or(DType::F32),
        vocab_size: keys.required_size("vocab_size")?,
        hidden_size,
        intermediate_size: required("hidden_dim", "intermediate_size")?,
        num_layers: required("n_layers", "num_hidden_layers")?,
        num_heads,
        num_kv_heads: either("n_kv_heads", "num_key_value_heads")?.unwrap_or(num_heads),
        head_dim: keys.size("head_dim")?.unwrap_or(hidden_size.checked_div(num_heads).unwrap_or(0)),
        moe: num_experts.map_or(moe_config(1, 1), |experts| moe_config(experts, top_k)),
        max_position_embeddings: either("max_position_embeddings", "max_seq_len")?.unwrap_or(32_768),
        rope_theta: keys.number("rope_theta")?.unwrap_or(if num_experts.is_some() { 1e6 } else { 1e4 }),
        norm_eps: norm_eps.unwrap_or(1e-5),
        sliding_window: read_window(keys)?,
        formats: Formats::default(),
        cache: CacheFormat::Plain,
        key_directions: false,
    };
    Ok((model, dtype, keys.flag("tied_embeddings")?))
}

/// `sliding_window`. In the first files it was a string.
fn read_window(keys: Keys<'_>) -> Result<Option<usize>, KeyError> {
    match keys.get("sliding_window").and_then(|value| value.as_str()) {
        Some(text) => text.parse().map(Some).map_err(|_| keys.invalid("sliding_window", "a whole number", text)),
        None => keys.size("sliding_window"),
    }
}
