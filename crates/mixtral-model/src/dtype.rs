//! Element types of weights and activations.

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// A floating-point element type. Its serialized form is the checkpoint's (`float32`, `float16`, `bfloat16`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum DType {
    /// IEEE binary32.
    #[serde(rename = "float32", alias = "f32", alias = "fp32")]
    F32,
    /// IEEE binary16.
    #[serde(rename = "float16", alias = "f16", alias = "fp16")]
    F16,
    /// The upper half of binary32.
    #[serde(rename = "bfloat16", alias = "bf16")]
    Bf16,
}

impl DType {
    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }

    /// The spelling of `config.json` files: `float32`, `float16`, `bfloat16`.
    #[must_use]
    pub const fn long_name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::Bf16 => "bfloat16",
        }
    }

    /// `value` rounded to this type (nearest, ties to even) and widened back.
    #[must_use]
    pub fn round(self, value: f32) -> f32 {
        match self {
            DType::F32 => value,
            DType::F16 => f16::from_f32(value).to_f32(),
            DType::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// The elements of little-endian bytes, widened to f32. An incomplete element at the end is left out.
    #[must_use]
    pub fn widen(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            DType::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            DType::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            DType::Bf16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        }
    }
}

/// The short spelling: `f32`, `f16`, `bf16`.
impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        })
    }
}

/// A spelling that names no data type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown data type `{0}`: expected f32, f16 or bf16 (or float32, float16, bfloat16)")]
pub struct UnknownDType(pub String);

impl FromStr for DType {
    type Err = UnknownDType;

    fn from_str(s: &str) -> Result<Self, UnknownDType> {
        match s.to_ascii_lowercase().as_str() {
            "f32" | "fp32" | "float32" | "float" => Ok(DType::F32),
            "f16" | "fp16" | "float16" | "half" => Ok(DType::F16),
            "bf16" | "bfloat16" => Ok(DType::Bf16),
            _ => Err(UnknownDType(s.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_agree() {
        for (names, dtype) in [
            (["f32", "fp32", "float32"], DType::F32),
            (["f16", "fp16", "float16"], DType::F16),
            (["bf16", "BF16", "bfloat16"], DType::Bf16),
        ] {
            for name in names {
                assert_eq!(name.parse(), Ok(dtype));
            }
        }
        assert!("int8".parse::<DType>().is_err());
    }
}
