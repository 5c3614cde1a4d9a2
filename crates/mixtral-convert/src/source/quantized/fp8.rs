//! Linears in e4m3 with scales of whole matrices or of rows, as compressed-tensors (float-quantized), AutoFP8 and ModelOpt store them
//! alike; and what these say of caches in e4m3.
//!
//! A library has a scale for each linear, and the checkpoint one for linears that are one matrix there: query, key and value; up
//! and gate. Where their scales differ, rows of the checkpoint have scales of their own (`fp8:row:static`), so that no weight is
//! rounded again. Scales of inputs are those of the layer's largest ([`crate::source::scales`]).

use std::sync::Arc;

use mixtral_checkpoint::KeyError;
use mixtral_checkpoint::keys::Keys;
use mixtral_model::{CacheFormat, DType, Fp8Input, PartKind, WeightFormat};

use super::{Description, Packing, Scheme, StoredPart};
use crate::source::view::View;

/// `weight` e4m3 `[outputs, inputs]`, `weight_scale` one number or `[outputs, 1]`, `input_scale` one number.
#[derive(Debug)]
struct Fp8 {
    library: &'static str,
    /// Whether rows have scales of their own.
    rows: bool,
    input: Fp8Input,
}

/// What is read of caches, for messages.
const CACHES: &str = "none, and e4m3 with a scale for the keys of a layer and one for its values";

/// The scheme of one of compressed-tensors' groups, whose format is float-quantized.
pub(super) fn float_quantized(weights: Keys<'_>, inputs: Keys<'_>) -> Result<Scheme, KeyError> {
    weights.one_of("type", &["float"], "float")?;
    for keys in [weights, inputs] {
        match keys.size("num_bits")? {
            Some(8) => {}
            found => return Err(keys.unsupported("num_bits", "8", found.map_or("missing".into(), |n| n.to_string()))),
        }
    }
    let rows = match weights.text("strategy")? {
        Some("tensor") => false,
        Some("channel") => true,
        other => return Err(weights.unsupported("strategy", "tensor, channel", other.unwrap_or("none"))),
    };
    inputs.one_of("type", &["float"], "float")?;
    let input = match (inputs.flag("dynamic")?, inputs.text("strategy")?) {
        (false, Some("tensor")) => Fp8Input::Static,
        (true, Some("token")) => Fp8Input::Token,
        (_, other) => {
            let supported = "tensor if scales are static, token if they are dynamic";
            return Err(inputs.unsupported("strategy", supported, other.unwrap_or("none")));
        }
    };
    Ok(Arc::new(Fp8 { library: "compressed-tensors", rows, input }))
}

/// AutoFP8's `quantization_config`.
pub(super) fn auto_fp8(keys: Keys<'_>) -> Result<Description, KeyError> {
    if let Some(found) = keys.get("weight_block_size") {
        return Err(keys.unsupported("weight_block_size", "none: a scale a tensor", found));
    }
    let input = match keys.text("activation_scheme")? {
        Some("static") => Fp8Input::Static,
        Some("dynamic") => Fp8Input::Token,
        other => return Err(keys.unsupported("activation_scheme", "static, dynamic", other.unwrap_or("none"))),
    };
    let scheme: Scheme = Arc::new(Fp8 { library: "AutoFP8", rows: false, input });
    Ok(Description { schemes: vec![scheme], cache: cache(keys, "kv_cache_scheme")? })
}

/// ModelOpt's `quantization_config`.
pub(super) fn model_opt(keys: Keys<'_>) -> Result<Description, KeyError> {
    Ok(Description { schemes: vec![by_algorithm(keys)?], cache: cache(keys, "kv_cache_scheme")? })
}

/// ModelOpt's `hf_quant_config.json`.
pub(super) fn hf_quant_config(keys: Keys<'_>) -> Result<Description, KeyError> {
    let keys = keys.object("quantization", "quantization.")?;
    Ok(Description { schemes: vec![by_algorithm(keys)?], cache: cache(keys, "kv_cache_quant_algo")? })
}

/// The scheme that ModelOpt calls `quant_algo`.
fn by_algorithm(keys: Keys<'_>) -> Result<Scheme, KeyError> {
    let (rows, input) = match keys.text("quant_algo")? {
        Some("FP8") => (false, Fp8Input::Static),
        Some("FP8_PER_CHANNEL_PER_TOKEN") => (true, Fp8Input::Token),
        other => {
            return Err(keys.unsupported("quant_algo", "FP8, FP8_PER_CHANNEL_PER_TOKEN", other.unwrap_or("none")));
        }
    };
    Ok(Arc::new(Fp8 { library: "ModelOpt", rows, input }))
}

/// The format of the cache that the libraries describe under `key`: by a word, or by a scheme of compressed-tensors.
pub(super) fn cache(keys: Keys<'_>, key: &str) -> Result<CacheFormat, KeyError> {
    let Some(found) = keys.get(key) else { return Ok(CacheFormat::Plain) };
    let is_fp8 = match found.as_str() {
        Some(word) => ["FP8", "fp8", "static"].contains(&word),
        None => {
            let scheme = keys.object(key, "quantization_config.kv_cache_scheme.")?;
            if found.as_object().is_some_and(serde_json::Map::is_empty) {
                return Ok(CacheFormat::Plain);
            }
            scheme.text("type")? == Some("float")
                && scheme.size("num_bits")? == Some(8)
                && !scheme.flag("dynamic")?
                && matches!(scheme.text("strategy")?, None | Some("tensor"))
        }
    };
    if is_fp8 { Ok(CacheFormat::Fp8) } else { Err(keys.unsupported(key, CACHES, found)) }
}

impl Packing for Fp8 {
    fn name(&self) -> &'static str {
        self.library
    }

    fn format(&self, _: DType) -> WeightFormat {
        match (self.rows, self.input) {
            (false, Fp8Input::Static) => WeightFormat::Fp8,
            (_, input) => WeightFormat::Fp8Rows(input),
        }
    }

    fn parts(&self, [outputs, inputs]: [usize; 2]) -> Vec<StoredPart> {
        let rows = View::Rows { first: 0 };
        let scales = match self.rows {
            true => StoredPart::new(PartKind::Scales, "weight_scale", None, [outputs, 1], rows),
            false => StoredPart::number(PartKind::Scales, "weight_scale"),
        };
        let mut parts =
            vec![StoredPart::new(PartKind::Values, "weight", Some("F8_E4M3"), [outputs, inputs], rows), scales];
        if self.input == Fp8Input::Static {
            parts.push(StoredPart::number(PartKind::InputScale, "input_scale"));
        }
        parts
    }
}
