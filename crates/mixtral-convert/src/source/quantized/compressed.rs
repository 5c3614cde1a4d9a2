//! compressed-tensors, as llm-compressor writes it: weights of 4 or 8 bits, with or without zeros, in groups or whole
//! rows. Words of pack-quantized weights run along the inputs, and hold what the checkpoint holds. Those of zeros run
//! along the outputs. int-quantized weights are signed bytes.

use mixtral_checkpoint::KeyError;
use mixtral_checkpoint::keys::Keys;
use mixtral_model::{Bits, PartKind};

use super::words::{WORD, Words};
use super::{Beside, MustBe, Packing, Scheme, StoredPart, group_size};
use crate::source::view::View;

/// A word has 8 integers of 4 bits or 4 of 8. `weight_packed` i32 `[outputs, inputs / 8]`, `weight_scale` `[outputs, groups]`, `weight_zero_point`
/// i32 `[outputs / 8, groups]`, `weight_shape` i64 `[2]`.
#[derive(Debug)]
struct PackQuantized;

/// `weight` i8 `[outputs, inputs]`, `weight_scale` `[outputs, groups]`, `weight_zero_point` i8 `[outputs, groups]`.
#[derive(Debug)]
struct IntQuantized;

/// A configuration with more schemes than this is a mistake. Each linear is compared with all of them.
const MAX_GROUPS: usize = 16;

/// The schemes of all `config_groups`.
pub(super) fn schemes(keys: Keys<'_>) -> Result<Vec<Scheme>, KeyError> {
    let form = keys.text("format")?.unwrap_or_default();
    for (key, supported) in [("kv_cache_scheme", "none"), ("transform_config", "none")] {
        if let Some(found) = keys.get(key).filter(|found| found.as_object().is_none_or(|object| !object.is_empty())) {
            return Err(keys.unsupported(key, supported, found));
        }
    }
    let sparsity = keys.object("sparsity_config", "quantization_config.sparsity_config.")?;
    sparsity.one_of("format", &["dense"], "dense")?;
    let groups = keys.get("config_groups").and_then(|groups| groups.as_object());
    let groups = groups.ok_or_else(|| keys.missing("config_groups", "an object of schemes"))?;
    if groups.len() > MAX_GROUPS {
        return Err(keys.unsupported("config_groups", "at most 16 groups", format_args!("{} groups", groups.len())));
    }
    let all = keys.object("config_groups", "quantization_config.config_groups.")?;
    groups.keys().map(|name| scheme(all.object(name, "quantization_config.config_groups.*.")?, form)).collect()
}

/// The scheme of one of the `config_groups`. `form` is the format of all.
fn scheme(keys: Keys<'_>, form: &str) -> Result<Scheme, KeyError> {
    for key in ["input_activations", "output_activations"] {
        if let Some(found) = keys.get(key) {
            return Err(keys.unsupported(key, "none: quantized weights only", found));
        }
    }
    let form = keys.text("format")?.unwrap_or(form);
    let packing: &dyn Packing = match form {
        "pack-quantized" => &PackQuantized,
        "int-quantized" => &IntQuantized,
        other => return Err(keys.unsupported("format", "pack-quantized, int-quantized", other)),
    };
    let weights = keys.object("weights", "quantization_config.config_groups.*.weights.")?;
    weights.one_of("type", &["int"], "int")?;
    let bits = match (weights.required_size("num_bits")?, form) {
        (8, _) => Bits::Eight,
        (4, "pack-quantized") => Bits::Four,
        (other, _) => return Err(weights.unsupported("num_bits", "8, and 4 if they are pack-quantized", other)),
    };
    let group = match weights.text("strategy")? {
        Some("group") => group_size(weights, &["group_size"], None)?,
        Some("channel") => None,
        other => return Err(weights.unsupported("strategy", "group, channel", other.unwrap_or("none"))),
    };
    let symmetric = if weights.contains("symmetric") { weights.flag("symmetric")? } else { true };
    Ok(Scheme { packing, bits, group, zeros: !symmetric })
}

impl Packing for PackQuantized {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn parts(&self, scheme: &Scheme, [outputs, inputs]: [usize; 2]) -> Vec<StoredPart> {
        let (groups, in_word) = (scheme.groups(inputs), WORD * scheme.bits.per_byte());
        let rows = View::Rows { first: 0 };
        let mut parts = vec![
            StoredPart::new(PartKind::Values, "weight_packed", Some("I32"), [outputs, inputs.div_ceil(in_word)], rows),
            StoredPart::new(PartKind::Scales, "weight_scale", None, [outputs, groups], rows),
        ];
        if scheme.zeros {
            parts.push(StoredPart::new(
                PartKind::Zeros,
                "weight_zero_point",
                Some("I32"),
                [outputs.div_ceil(in_word), groups],
                View::Packed(Words::Fields(scheme.bits)),
            ));
        }
        parts
    }

    fn beside(&self, scheme: &Scheme, [_, inputs]: [usize; 2]) -> Vec<Beside> {
        let group = scheme.group.unwrap_or(inputs);
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

    fn parts(&self, scheme: &Scheme, [outputs, inputs]: [usize; 2]) -> Vec<StoredPart> {
        let groups = scheme.groups(inputs);
        let signed = |kind, suffix, cols| StoredPart::new(kind, suffix, Some("I8"), [outputs, cols], View::Signed);
        let mut parts = vec![
            signed(PartKind::Values, "weight", inputs),
            StoredPart::new(PartKind::Scales, "weight_scale", None, [outputs, groups], View::Rows { first: 0 }),
        ];
        if scheme.zeros {
            parts.push(signed(PartKind::Zeros, "weight_zero_point", groups));
        }
        parts
    }
}
