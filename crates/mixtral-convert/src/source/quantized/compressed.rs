//! compressed-tensors, as llm-compressor writes it: weights of 4 or 8 bits, with or without zeros, in groups or whole
//! rows. Words of pack-quantized weights run along the inputs, and hold what the checkpoint holds. Those of zeros run
//! along the outputs. int-quantized weights are signed bytes.

use std::sync::Arc;

use mixtral_checkpoint::KeyError;
use mixtral_checkpoint::keys::Keys;
use mixtral_model::{Bits, DType, PartKind, Quantization, WeightFormat};
use serde_json::Value;

use super::words::{WORD, Words};
use super::{Beside, Description, MustBe, Packing, Scheme, StoredPart, fp8, group_size, groups};
use crate::source::view::View;

/// A word has 8 integers of 4 bits or 4 of 8. `weight_packed` i32 `[outputs, inputs / 8]`, `weight_scale` `[outputs, groups]`, `weight_zero_point`
/// i32 `[outputs / 8, groups]`, `weight_shape` i64 `[2]`.
#[derive(Clone, Copy, Debug)]
struct PackQuantized {
    bits: Bits,
    group: Option<usize>,
    zeros: bool,
}

/// `weight` i8 `[outputs, inputs]`, `weight_scale` `[outputs, groups]`, `weight_zero_point` i8 `[outputs, groups]`.
#[derive(Clone, Copy, Debug)]
struct IntQuantized {
    group: Option<usize>,
    zeros: bool,
}

/// A configuration with more schemes than this is a mistake. Each linear is compared with all of them.
const MAX_GROUPS: usize = 16;

/// What `quantization_config` says: the schemes of all `config_groups`.
pub(super) fn describe(keys: Keys<'_>) -> Result<Description, KeyError> {
    let form = keys.text("format")?.unwrap_or_default();
    let is_given = |found: &&Value| found.as_object().is_none_or(|object| !object.is_empty());
    if let Some(found) = keys.get("transform_config").filter(is_given) {
        return Err(keys.unsupported("transform_config", "none", found));
    }
    let sparsity = keys.object("sparsity_config", "quantization_config.sparsity_config.")?;
    sparsity.one_of("format", &["dense"], "dense")?;
    let groups = keys.get("config_groups").and_then(Value::as_object);
    let groups = groups.ok_or_else(|| keys.missing("config_groups", "an object of schemes"))?;
    if groups.len() > MAX_GROUPS {
        return Err(keys.unsupported("config_groups", "at most 16 groups", format_args!("{} groups", groups.len())));
    }
    let all = keys.object("config_groups", "quantization_config.config_groups.")?;
    let group = |name| scheme(all.object(name, "quantization_config.config_groups.*.")?, form);
    Ok(Description {
        schemes: groups.keys().map(|name| group(name)).collect::<Result<_, _>>()?,
        cache: fp8::cache(keys, "kv_cache_scheme")?,
    })
}

/// The scheme of one of the `config_groups`. `form` is the format of all.
fn scheme(keys: Keys<'_>, form: &str) -> Result<Scheme, KeyError> {
    const INPUTS: &str = "input_activations";
    let form = keys.text("format")?.unwrap_or(form);
    let weights = keys.object("weights", "quantization_config.config_groups.*.weights.")?;
    if let Some(found) = keys.get("output_activations") {
        return Err(keys.unsupported("output_activations", "none", found));
    }
    if form == "float-quantized" {
        if !keys.get(INPUTS).is_some_and(Value::is_object) {
            return Err(keys.missing(INPUTS, "an object: weights in fp8 are multiplied with inputs in fp8"));
        }
        return fp8::float_quantized(
            weights,
            keys.object(INPUTS, "quantization_config.config_groups.*.input_activations.")?,
        );
    }
    if let Some(found) = keys.get(INPUTS) {
        return Err(keys.unsupported(INPUTS, "none beside integers: quantized weights only", found));
    }
    let is_packed = match form {
        "pack-quantized" => true,
        "int-quantized" => false,
        other => return Err(keys.unsupported("format", "pack-quantized, int-quantized, float-quantized", other)),
    };
    weights.one_of("type", &["int"], "int")?;
    let bits = match (weights.required_size("num_bits")?, is_packed) {
        (8, _) => Bits::Eight,
        (4, true) => Bits::Four,
        (other, _) => return Err(weights.unsupported("num_bits", "8, and 4 if they are pack-quantized", other)),
    };
    let group = match weights.text("strategy")? {
        Some("group") => group_size(weights, &["group_size"], None)?,
        Some("channel") => None,
        other => return Err(weights.unsupported("strategy", "group, channel", other.unwrap_or("none"))),
    };
    let symmetric = if weights.contains("symmetric") { weights.flag("symmetric")? } else { true };
    let zeros = !symmetric;
    Ok(if is_packed { Arc::new(PackQuantized { bits, group, zeros }) } else { Arc::new(IntQuantized { group, zeros }) })
}

impl Packing for PackQuantized {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn format(&self, scale: DType) -> WeightFormat {
        let PackQuantized { bits, group, zeros } = *self;
        WeightFormat::Quantized(Quantization { bits, group, zeros, scale })
    }

    fn parts(&self, [outputs, inputs]: [usize; 2]) -> Vec<StoredPart> {
        let (groups, in_word) = (groups(self.group, inputs), WORD * self.bits.per_byte());
        let rows = View::Rows { first: 0 };
        let mut parts = vec![
            StoredPart::new(PartKind::Values, "weight_packed", Some("I32"), [outputs, inputs.div_ceil(in_word)], rows),
            StoredPart::new(PartKind::Scales, "weight_scale", None, [outputs, groups], rows),
        ];
        if self.zeros {
            parts.push(StoredPart::new(
                PartKind::Zeros,
                "weight_zero_point",
                Some("I32"),
                [outputs.div_ceil(in_word), groups],
                View::Packed(Words::Fields(self.bits)),
            ));
        }
        parts
    }

    fn beside(&self, [_, inputs]: [usize; 2]) -> Vec<Beside> {
        let group = self.group.unwrap_or(inputs);
        let in_order = MustBe::InOrder { group };
        vec![
            Beside { suffix: "weight_shape", dtype: "I64", shape: vec![2], must_be: MustBe::Anything },
            Beside { suffix: "weight_g_idx", dtype: "I32", shape: vec![inputs], must_be: in_order },
        ]
    }
}

impl Packing for IntQuantized {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn format(&self, scale: DType) -> WeightFormat {
        let IntQuantized { group, zeros } = *self;
        WeightFormat::Quantized(Quantization { bits: Bits::Eight, group, zeros, scale })
    }

    fn parts(&self, [outputs, inputs]: [usize; 2]) -> Vec<StoredPart> {
        let groups = groups(self.group, inputs);
        let signed = |kind, suffix, cols| StoredPart::new(kind, suffix, Some("I8"), [outputs, cols], View::Signed);
        let mut parts = vec![
            signed(PartKind::Values, "weight", inputs),
            StoredPart::new(PartKind::Scales, "weight_scale", None, [outputs, groups], View::Rows { first: 0 }),
        ];
        if self.zeros {
            parts.push(signed(PartKind::Zeros, "weight_zero_point", groups));
        }
        parts
    }
}
