//! AutoAWQ's gemm: 4 bits, always with zeros. Words run along the outputs, in an order of their own.

use std::sync::Arc;

use mixtral_checkpoint::KeyError;
use mixtral_checkpoint::keys::Keys;
use mixtral_model::{Bits, DType, PartKind, Quantization, WeightFormat};

use super::words::{AWQ_ORDER, Words};
use super::{Packing, Scheme, StoredPart, group_size, groups};
use crate::source::view::View;

/// `qweight` i32 `[inputs, outputs / 8]`, `scales` `[groups, outputs]`, `qzeros` i32 `[groups, outputs / 8]`.
#[derive(Debug)]
struct Gemm {
    group: Option<usize>,
}

/// What `quantization_config` says, or the `quant_config.json` of older versions.
pub(super) fn scheme(keys: Keys<'_>) -> Result<Scheme, KeyError> {
    let bits = if keys.contains("w_bit") { "w_bit" } else { "bits" };
    if let Some(found) = keys.get(bits).filter(|found| *found != 4) {
        return Err(keys.unsupported(bits, "4 bits", found));
    }
    keys.one_of("version", &["gemm", "GEMM"], "gemm")?;
    if let Some(found) = keys.get("backend").filter(|found| *found == "llm-awq") {
        return Err(keys.unsupported("backend", "AutoAWQ's gemm", found));
    }
    if let Some(found) = keys.get("zero_point").filter(|found| *found != true) {
        return Err(keys.unsupported("zero_point", "true", found));
    }
    let group = group_size(keys, &["group_size", "q_group_size"], Some(128))?;
    Ok(Arc::new(Gemm { group }))
}

impl Packing for Gemm {
    fn name(&self) -> &'static str {
        "AutoAWQ"
    }

    fn format(&self, scale: DType) -> WeightFormat {
        WeightFormat::Quantized(Quantization { bits: Bits::Four, group: self.group, zeros: true, scale })
    }

    fn parts(&self, [outputs, inputs]: [usize; 2]) -> Vec<StoredPart> {
        let groups = groups(self.group, inputs);
        vec![
            // Eight inputs are unpacked at a time. Groups are multiples of 8, and so are inputs.
            StoredPart::new(
                PartKind::Values,
                "qweight",
                Some("I32"),
                [inputs.next_multiple_of(8), outputs.div_ceil(8)],
                View::Packed(Words::TurnedNibbles),
            ),
            StoredPart::new(PartKind::Scales, "scales", None, [groups, outputs], View::Transposed { first: 0 }),
            StoredPart::new(
                PartKind::Zeros,
                "qzeros",
                Some("I32"),
                [groups, outputs.div_ceil(8)],
                View::Packed(Words::Nibbles { order: AWQ_ORDER, less_one: false }),
            ),
        ]
    }
}
