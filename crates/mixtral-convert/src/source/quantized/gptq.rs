//! GPTQ, as AutoGPTQ, GPTQModel and optimum store it: 4 bits. Words run along the inputs.
//!
//! Symmetric models have zeros too, all of them 8; the checkpoint leaves these out. The first version stores zeros less
//! one. A model that was quantized in the order of activations has an index of groups. If groups of inputs are not
//! neighbours there, its layers would need their inputs in another order, and it is not read.

use std::sync::Arc;

use mixtral_checkpoint::KeyError;
use mixtral_checkpoint::keys::Keys;
use mixtral_model::{Bits, DType, PartKind, Quantization, WeightFormat};

use super::words::{ORDER, Words};
use super::{Beside, MustBe, Packing, Scheme, StoredPart, group_size, groups};
use crate::source::view::View;

/// `qweight` i32 `[inputs / 8, outputs]`, `scales` `[groups, outputs]`, `qzeros` i32 `[groups, outputs / 8]`, `g_idx` i32
/// `[inputs]`.
#[derive(Debug)]
struct Gptq {
    group: Option<usize>,
    zeros: bool,
    /// Whether zeros are stored less one.
    less_one: bool,
}

/// What `quantization_config` says, or the `quantize_config.json` of older versions.
pub(super) fn scheme(keys: Keys<'_>) -> Result<Scheme, KeyError> {
    if let Some(found) = keys.get("bits").filter(|found| *found != 4) {
        return Err(keys.unsupported("bits", "4 bits", found));
    }
    let group = group_size(keys, &["group_size"], Some(128))?;
    let supported = "gptq, gptq_v2";
    for key in ["checkpoint_format", "format"] {
        keys.one_of(key, &["gptq", "gptq_v2"], supported)?;
    }
    if keys.flag("is_marlin_format")? {
        return Err(keys.unsupported("is_marlin_format", "false: GPTQ's own packing", true));
    }
    keys.one_of("pack_dtype", &["int32"], "int32")?;
    let form = keys.text("checkpoint_format")?.or(keys.text("format")?);
    let symmetric = if keys.contains("sym") { keys.flag("sym")? } else { true };
    let less_one = form != Some("gptq_v2");
    if less_one && !symmetric && !is_gptqmodel(keys)? {
        // AutoGPTQ wrote zeros of 0 over their neighbours. GPTQModel refuses such files as well.
        let supported = "true; or files that GPTQModel wrote, or whose checkpoint_format is gptq_v2";
        return Err(keys.unsupported("sym", supported, false));
    }
    Ok(Arc::new(Gptq { group, zeros: !symmetric, less_one }))
}

/// Whether GPTQModel wrote the files.
fn is_gptqmodel(keys: Keys<'_>) -> Result<bool, KeyError> {
    let meta = keys.object("meta", "quantization_config.meta.")?;
    let quantizers = match meta.get("quantizer") {
        Some(one) if one.is_string() => meta.text("quantizer")?.map(str::to_owned).into_iter().collect(),
        _ => meta.texts("quantizer")?,
    };
    Ok(quantizers.iter().any(|quantizer| quantizer.starts_with("gptqmodel")))
}

impl Packing for Gptq {
    fn name(&self) -> &'static str {
        "GPTQ"
    }

    fn format(&self, scale: DType) -> WeightFormat {
        WeightFormat::Quantized(Quantization { bits: Bits::Four, group: self.group, zeros: self.zeros, scale })
    }

    fn parts(&self, [outputs, inputs]: [usize; 2]) -> Vec<StoredPart> {
        let groups = groups(self.group, inputs);
        let mut parts = vec![
            StoredPart::new(
                PartKind::Values,
                "qweight",
                Some("I32"),
                [inputs.div_ceil(8), outputs],
                View::Packed(Words::Turned),
            ),
            StoredPart::new(PartKind::Scales, "scales", None, [groups, outputs], View::Transposed { first: 0 }),
        ];
        if self.zeros {
            parts.push(StoredPart::new(
                PartKind::Zeros,
                "qzeros",
                Some("I32"),
                [groups, outputs.div_ceil(8)],
                View::Packed(Words::Nibbles { order: ORDER, less_one: self.less_one }),
            ));
        }
        parts
    }

    fn beside(&self, [outputs, inputs]: [usize; 2]) -> Vec<Beside> {
        let group = self.group.unwrap_or(inputs);
        let mut beside =
            vec![Beside { suffix: "g_idx", dtype: "I32", shape: vec![inputs], must_be: MustBe::InOrder { group } }];
        if !self.zeros {
            beside.push(Beside {
                suffix: "qzeros",
                dtype: "I32",
                shape: vec![groups(self.group, inputs), outputs.div_ceil(8)],
                must_be: MustBe::All(if self.less_one { 0x7777_7777 } else { 0x8888_8888 }),
            });
        }
        beside
    }
}
