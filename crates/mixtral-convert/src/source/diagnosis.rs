//! Finds out what is likely wrong with weights that do not match their configuration.

use std::collections::{BTreeMap, HashSet};

use mixtral_checkpoint::TensorEntry;
use mixtral_model::{ModelConfig, ModelFamily};

use super::files::Dialect;
use super::locate::Entries;
use super::quantized::READ;
use super::{Layout, Stored};
use crate::names::HfTensor;

/// How names of quantized weights and their scales end.
const QUANTIZED: [&str; 18] = [
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_scale",
    ".weight_scale_2",
    ".weight_scale_inv",
    ".weight_packed",
    ".weight_shape",
    ".weight_zero_point",
    ".input_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".kv_scale",
    ".activation_scale",
    ".absmax",
    ".SCB",
];

/// Names of heads that compute a score and not the next token.
const SCORES: [&str; 6] = ["score.", "classifier.", "v_head.", "value_head.", "reward_head.", "qa_outputs."];

/// Tensors that do not match the configuration, by what is wrong with them.
#[derive(Debug, Default)]
pub struct Misfits<'a> {
    /// Names of tensors that are missing.
    pub missing: Vec<String>,
    /// Names of tensors with another shape or type.
    pub wrong: Vec<String>,
    /// Names of tensors that the model has no place for.
    pub extra: Vec<&'a str>,
}

/// One cause that explains all misfits.
#[derive(Clone, Debug, PartialEq)]
pub enum Diagnosis {
    /// Quantized weights.
    Quantized {
        /// The method, if a file names it.
        method: Option<String>,
        /// A tensor that shows it.
        tensor: String,
        /// Its type.
        dtype: String,
    },
    /// Groups of inputs that are not neighbours.
    Scattered {
        /// The tensor with the group of each input.
        tensor: String,
        /// The first input that is in another group.
        input: usize,
        /// That group.
        group: u32,
    },
    /// Zeros of a model that its configuration calls symmetric.
    Asymmetric {
        /// The tensor of zeros.
        tensor: String,
    },
    /// An adapter that was not merged into its base model.
    UnmergedAdapter {
        /// A tensor that shows it.
        tensor: String,
    },
    /// All names have a prefix, which a wrapper around the model left.
    Prefix {
        /// The prefix with its dot.
        prefix: String,
    },
    /// A scale that cannot be one.
    Scale {
        /// The tensor that holds it.
        tensor: String,
        /// What it holds.
        found: f32,
    },
    /// All names lack a prefix, because the model was saved without its language head.
    NoPrefix {
        /// The prefix with its dot.
        prefix: String,
        /// The configuration file.
        config: &'static str,
    },
    /// Tensors without elements.
    Empty {
        /// One of them.
        tensor: String,
    },
    /// A size that the configuration says differently.
    Size {
        /// The configuration file.
        config: &'static str,
        /// The key.
        key: &'static str,
        /// What the weights have.
        found: usize,
        /// What the configuration says.
        expected: usize,
    },
    /// The weights have experts and the configuration has none, or the other way round.
    Family {
        /// The configuration file.
        config: &'static str,
        /// Whether the weights have experts.
        has_experts: bool,
    },
    /// Weights in 64-bit floats.
    Double {
        /// One of them.
        tensor: String,
    },
    /// There is no head, and the configuration does not say that the embedding is the head.
    NoHead {
        /// The configuration file.
        config: &'static str,
    },
    /// The head computes a score.
    Score {
        /// Its tensor.
        tensor: String,
    },
}

impl std::fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Diagnosis::Quantized { method, tensor, dtype } => {
                let by = method.as_ref().map(|m| format!(" by {m}")).unwrap_or_default();
                write!(
                    f,
                    "they are quantized{by} (`{tensor}` is {dtype}) in a way that is not read; read are {READ}, and plain f16, bf16 and f32 weights: download the model in one of these, or dequantize it first"
                )
            }
            Diagnosis::Scattered { tensor, input, group } => write!(
                f,
                "groups of their inputs are not neighbours (`{tensor}` puts input {input} into group {group}), because they were quantized in the order of activations; layers would need their inputs in that order, which is not supported. Download a branch of the model without act-order, or quantize it again without desc_act (actorder), with static_groups, or in whole rows"
            ),
            Diagnosis::Asymmetric { tensor } => write!(
                f,
                "the configuration calls them symmetric (`sym`), but `{tensor}` has zeros other than 8; set `sym` to false if that is right, else download the files again"
            ),
            Diagnosis::Scale { tensor, found } => write!(
                f,
                "`{tensor}` is {found}, which is no scale of 8-bit floats; quantize the model again, and calibrate it with more text if it has experts that saw none"
            ),
            Diagnosis::UnmergedAdapter { tensor } => write!(
                f,
                "they hold an adapter that is not merged (`{tensor}`); merge it with peft (`model.merge_and_unload()`), save that (`save_pretrained`), and convert it"
            ),
            Diagnosis::Prefix { prefix } => write!(
                f,
                "all names begin with `{prefix}`, which a wrapper around the model left; save the model inside of the wrapper, or rename the tensors without `{prefix}`"
            ),
            Diagnosis::NoPrefix { prefix, config } => write!(
                f,
                "names lack `{prefix}`: this is the model without its language head (lm_head); save the whole model that {config} describes (MixtralForCausalLM or MistralForCausalLM)"
            ),
            Diagnosis::Empty { tensor } => write!(
                f,
                "they are empty (`{tensor}` has no elements), as DeepSpeed's ZeRO-3 saves them if it does not gather them; run zero_to_fp32.py in the training's folder, or save again with `stage3_gather_16bit_weights_on_model_save`"
            ),
            Diagnosis::Size { config, key, found, expected } => write!(
                f,
                "{config} says that `{key}` is {expected}, but the weights have {found}; if the weights are right, set `{key}` to {found} in {config}"
            ),
            Diagnosis::Family { config, has_experts: true } => write!(
                f,
                "{config} describes a dense Mistral, but they have experts; set `model_type` to \"mixtral\" (and the keys of its experts), or use the {config} that belongs to them"
            ),
            Diagnosis::Family { config, has_experts: false } => write!(
                f,
                "{config} describes a model of experts, but they are a dense model's; use the {config} that belongs to them"
            ),
            Diagnosis::Double { tensor } => write!(
                f,
                "they are float64 (`{tensor}`); save them as float32, float16 or bfloat16 (with transformers: `model.to(torch.float32).save_pretrained(dir)`)"
            ),
            Diagnosis::NoHead { config } => write!(
                f,
                "the head for tokens (lm_head) is missing; if the model's embedding is its head too, set `tie_word_embeddings` to true in {config}, else save the whole model"
            ),
            Diagnosis::Score { tensor } => write!(
                f,
                "they have no head for tokens, but one that gives scores (`{tensor}`): a classifier or a reward model, which generates no text"
            ),
        }
    }
}

/// That weights are quantized, if they are. `method` tells how, if a file says so.
#[must_use]
pub fn quantized(stored: &Entries, method: impl Fn() -> Option<String>) -> Option<Diagnosis> {
    let entry = first(stored, &is_quantized)?;
    Some(Diagnosis::Quantized { method: method(), tensor: entry.name.clone(), dtype: entry.dtype.clone() })
}

/// The first tensor by name that `fits`, so that the same files always give the same message.
fn first<'a>(stored: &'a Entries, fits: &dyn Fn(&TensorEntry) -> bool) -> Option<&'a TensorEntry> {
    stored.values().map(|(_, entry)| entry).filter(|entry| fits(entry)).min_by(|a, b| a.name.cmp(&b.name))
}

/// The cause of all `misfits`, if a single cause explains them.
#[must_use]
pub fn diagnose(
    dialect: Dialect,
    layout: &dyn Layout,
    model: &ModelConfig,
    stored: &Entries,
    misfits: &Misfits<'_>,
) -> Option<Diagnosis> {
    let first = |fits: &dyn Fn(&TensorEntry) -> bool| first(stored, fits);
    if let Some(e) =
        first(&|e| [".lora_", ".base_layer.", ".modules_to_save."].iter().any(|part| e.name.contains(part)))
    {
        return Some(Diagnosis::UnmergedAdapter { tensor: e.name.clone() });
    }
    if let Some(e) = first(&|e| e.dtype == "F64") {
        return Some(Diagnosis::Double { tensor: e.name.clone() });
    }
    if let Some(e) = first(&|e| e.num_bytes() == 0) {
        return Some(Diagnosis::Empty { tensor: e.name.clone() });
    }
    let expected: Vec<Stored> =
        HfTensor::all(model, false).into_iter().map(|tensor| layout.stored(model, tensor)).collect();
    if let Some(diagnosis) = prefix(dialect, &expected, stored) {
        return Some(diagnosis);
    }
    let has = |part: &str| stored.keys().any(|name| name.contains(part));
    let config = dialect.config_file();
    if dialect == Dialect::HuggingFace {
        let has_experts = has(".block_sparse_moe.") || has(".mlp.experts.");
        if has_experts != (model.family == ModelFamily::Mixtral) && (has_experts || has(".mlp.gate_proj.")) {
            return Some(Diagnosis::Family { config, has_experts });
        }
    }
    if let Some(tensor) = misfits.extra.iter().find(|name| SCORES.iter().any(|head| name.starts_with(head))) {
        return Some(Diagnosis::Score { tensor: (*tensor).to_owned() });
    }
    let head = layout.stored(model, HfTensor::LmHead).name;
    if misfits.missing == [head] && misfits.wrong.is_empty() && misfits.extra.is_empty() {
        return Some(Diagnosis::NoHead { config });
    }
    size(dialect, layout, model, stored, misfits)
}

/// Whether a tensor belongs to a quantized weight.
#[must_use]
pub fn is_quantized(entry: &TensorEntry) -> bool {
    let is_packed = matches!(entry.dtype.as_str(), "I8" | "U8" | "I16" | "U16" | "I32" | "U32")
        || ["F8_", "F6_", "F4"].iter().any(|narrow| entry.dtype.starts_with(narrow));
    is_packed || QUANTIZED.iter().any(|end| entry.name.ends_with(end))
}

/// The prefix that most stored names have in addition, or that the model's names have and the stored names lack.
fn prefix(dialect: Dialect, expected: &[Stored], stored: &Entries) -> Option<Diagnosis> {
    let names: HashSet<&str> = expected.iter().map(|s| s.name.as_str()).collect();
    if names.iter().any(|name| stored.contains_key(*name) && *name != "lm_head.weight") {
        return None;
    }
    let suffixes = |name: &'_ str| -> Vec<usize> { name.match_indices('.').map(|(at, _)| at + 1).collect() };
    let mut too_much: BTreeMap<&str, usize> = BTreeMap::new();
    for name in stored.keys() {
        // The prefix stands before the longest part of the name that is a name of the model.
        if let Some(at) = suffixes(name).into_iter().find(|&at| names.contains(&name[at..])) {
            *too_much.entry(&name[..at]).or_default() += 1;
        }
    }
    let most = too_much.iter().max_by_key(|(_, count)| **count);
    if let Some((prefix, count)) = most
        && count * 2 > names.len()
    {
        return Some(Diagnosis::Prefix { prefix: (*prefix).to_owned() });
    }
    let lacking = |name: &&str| suffixes(name).into_iter().find(|&at| stored.contains_key(&name[at..]));
    let lacks: Vec<&str> = names.iter().filter_map(|name| Some(&name[..lacking(name)?])).collect();
    let prefix = lacks.first().filter(|prefix| lacks.iter().all(|other| other == *prefix))?;
    let config = dialect.config_file();
    (lacks.len() * 2 > names.len()).then(|| Diagnosis::NoPrefix { prefix: (*prefix).to_owned(), config })
}

/// A size that differs between weights and configuration, if that explains every misfit.
fn size(
    dialect: Dialect,
    layout: &dyn Layout,
    model: &ModelConfig,
    stored: &Entries,
    misfits: &Misfits<'_>,
) -> Option<Diagnosis> {
    let config = dialect.config_file();
    let is_hugging_face = dialect == Dialect::HuggingFace;
    let shape = |tensor| {
        let Stored { name, .. } = layout.stored(model, tensor);
        stored.get(&name).map(|(_, entry)| entry.shape.as_slice())
    };
    // The rows of a stored matrix, if its columns are right.
    let rows = |tensor| match shape(tensor) {
        Some(&[rows, cols]) if cols == model.hidden_size => Some(rows),
        _ => None,
    };
    let heads = [HfTensor::EmbedTokens, HfTensor::LmHead].map(|tensor| layout.stored(model, tensor).name);
    let only_vocabulary = misfits.missing.is_empty() && misfits.extra.is_empty();
    if only_vocabulary
        && misfits.wrong.iter().all(|name| heads.contains(name))
        && let Some(found) = rows(HfTensor::EmbedTokens)
        && rows(HfTensor::LmHead).is_none_or(|rows| rows == found)
        && found != model.vocab_size
    {
        return Some(Diagnosis::Size { config, key: "vocab_size", found, expected: model.vocab_size });
    }
    let layer = |name: &str| -> Option<usize> { name.split_once("layers.")?.1.split('.').next()?.parse().ok() };
    let names = || misfits.missing.iter().map(String::as_str).chain(misfits.extra.iter().copied());
    let found = stored.keys().filter_map(|name| layer(name)?.checked_add(1)).max().unwrap_or(0);
    let expected = model.num_layers;
    if found > 0
        && found != expected
        && misfits.wrong.is_empty()
        && names().all(|name| layer(name).is_some_and(|l| l >= found.min(expected)))
    {
        let key = if is_hugging_face { "num_hidden_layers" } else { "n_layers" };
        return Some(Diagnosis::Size { config, key, found, expected });
    }
    let expected = model.moe.num_experts;
    let found = rows(HfTensor::Router(0)).filter(|_| model.family == ModelFamily::Mixtral)?;
    let key = if is_hugging_face { "num_local_experts" } else { "moe.num_experts" };
    let about_experts =
        names().chain(misfits.wrong.iter().map(String::as_str)).all(|n| n.contains("expert") || n.contains("gate"));
    (found != expected && about_experts).then_some(Diagnosis::Size { config, key, found, expected })
}
