//! How a weight is stored, apart from the type in which arithmetic sees it.
//!
//! A weight stands for a matrix of elements of a [`DType`]. A plain weight stores these elements. A quantized one
//! stores small integers with a scale for each row or group, and stands for the floats that they decode to. So a
//! weight is one, two or three tensors, its [`Part`]s.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::DType;

/// Element type of a stored tensor or a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ElemType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of binary32.
    Bf16,
    /// 32-bit signed integer.
    I32,
    /// A byte: an 8-bit unsigned integer, or two of 4 bits.
    U8,
    /// The 8-bit float e4m3 ([`crate::fp8`]).
    F8E4M3,
}

impl ElemType {
    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            ElemType::F32 | ElemType::I32 => 4,
            ElemType::F16 | ElemType::Bf16 => 2,
            ElemType::U8 | ElemType::F8E4M3 => 1,
        }
    }

    /// The float type in which arithmetic is done, if it is one.
    #[must_use]
    pub const fn float(self) -> Option<DType> {
        match self {
            ElemType::F32 => Some(DType::F32),
            ElemType::F16 => Some(DType::F16),
            ElemType::Bf16 => Some(DType::Bf16),
            ElemType::I32 | ElemType::U8 | ElemType::F8E4M3 => None,
        }
    }
}

impl From<DType> for ElemType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => ElemType::F32,
            DType::F16 => ElemType::F16,
            DType::Bf16 => ElemType::Bf16,
        }
    }
}

impl fmt::Display for ElemType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ElemType::F32 => "f32",
            ElemType::F16 => "f16",
            ElemType::Bf16 => "bf16",
            ElemType::I32 => "i32",
            ElemType::U8 => "u8",
            ElemType::F8E4M3 => "f8e4m3",
        })
    }
}

/// How a weight is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// Row-major elements of the weight's own type.
    #[default]
    Plain,
    /// Integers and scales.
    Quantized(Quantization),
    /// Floats e4m3 with one scale for each matrix. The input that is multiplied with them is rounded to e4m3 too, by a scale
    /// that is stored with the weight.
    Fp8,
    /// The same with a scale for each row of a matrix.
    Fp8Rows(Fp8Input),
}

/// By what the input of a matrix of [`WeightFormat::Fp8Rows`] is divided before it is rounded to e4m3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fp8Input {
    /// One scale for all inputs, which is stored with the weight.
    Static,
    /// A scale for each token: [`crate::fp8::scale`] of the largest magnitude in its row.
    Token,
}

/// Integers that stand for floats: element k of a row is `(u[k] − z) · s`, where s and z belong to the row's group that
/// contains k.
///
/// Integers are unsigned. Without zeros, z is the middle of their range: 8 or 128.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Quantization {
    /// Size of an integer.
    pub bits: Bits,
    /// Consecutive elements of a row that share a scale; `None` for all of them. The last group of a row may be
    /// shorter.
    pub group: Option<usize>,
    /// Whether each group has a z of its own.
    pub zeros: bool,
    /// Type of the scales.
    pub scale: DType,
}

/// Size of a stored integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Bits {
    /// Two integers a byte; the first is in the lower half.
    Four,
    /// One integer a byte.
    Eight,
}

impl Bits {
    /// Integers of a byte.
    #[must_use]
    pub const fn per_byte(self) -> usize {
        match self {
            Bits::Four => 2,
            Bits::Eight => 1,
        }
    }

    /// The integer that stands for 0 where there are no zeros: the middle of the range.
    #[must_use]
    pub const fn middle(self) -> u8 {
        match self {
            Bits::Four => 8,
            Bits::Eight => 128,
        }
    }

    /// The largest integer.
    #[must_use]
    pub const fn max(self) -> u8 {
        match self {
            Bits::Four => 15,
            Bits::Eight => 255,
        }
    }
}

impl Quantization {
    /// Bytes of the integers of a row of `cols` elements.
    #[must_use]
    pub const fn row_bytes(self, cols: usize) -> usize {
        cols.div_ceil(self.bits.per_byte())
    }

    /// Elements of a whole group in rows of `cols` elements.
    #[must_use]
    pub fn group_len(self, cols: usize) -> usize {
        self.group.unwrap_or(cols).max(1)
    }

    /// Groups of a row of `cols` elements.
    #[must_use]
    pub fn groups(self, cols: usize) -> usize {
        cols.div_ceil(self.group_len(cols))
    }
}

/// What weights are rounded to by weight-only quantization.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Nothing: they stay floats.
    Float,
    /// Integers of 8 bits with an f32 scale for each row.
    Int8,
    /// Integers of 4 bits with a scale for each group, in the model's type.
    Int4,
    /// Floats of 8 bits, and inputs of 8 bits, by calibrated scales.
    Fp8,
    /// Floats of 8 bits with a scale for each row, and inputs of 8 bits with a scale for each token.
    Fp8Rows,
}

impl Precision {
    /// The format of weights of type `dtype`. `group` is the length of int4's groups; `None` for whole rows.
    #[must_use]
    pub const fn format(self, group: Option<usize>, dtype: DType) -> WeightFormat {
        let (bits, group, scale) = match self {
            Precision::Float => return WeightFormat::Plain,
            Precision::Fp8 => return WeightFormat::Fp8,
            Precision::Fp8Rows => return WeightFormat::Fp8Rows(Fp8Input::Token),
            Precision::Int8 => (Bits::Eight, None, DType::F32),
            Precision::Int4 => (Bits::Four, group, dtype),
        };
        WeightFormat::Quantized(Quantization { bits, group, zeros: false, scale })
    }
}

/// What a model's matrices are rounded to by weight-only quantization.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightOnly {
    /// Precision of attention's projections.
    pub attention: Precision,
    /// Precision of the feed-forward.
    pub feed_forward: Precision,
    /// Elements that share an int4 scale; `None` for a whole row.
    pub group: Option<usize>,
}

impl WeightOnly {
    /// The formats, for a model of type `dtype`.
    #[must_use]
    pub const fn formats(self, dtype: DType) -> Formats {
        Formats {
            attention: self.attention.format(self.group, dtype),
            feed_forward: self.feed_forward.format(self.group, dtype),
        }
    }
}

/// What a tensor of a weight holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PartKind {
    /// The elements, or the integers that stand for them.
    Values,
    /// A scale for each group.
    Scales,
    /// The integer of each group that stands for 0.
    Zeros,
    /// The scale of the input.
    InputScale,
}

/// One tensor of a weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What it holds.
    pub kind: PartKind,
    /// Type of its elements.
    pub elem: ElemType,
    /// Its shape: that of the weight, but for the last dimension; for scales of whole matrices one for each of these.
    pub shape: Vec<usize>,
}

impl Part {
    /// Bytes of the part. Saturates instead of overflowing.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.shape.iter().fold(self.elem.size(), |bytes, &n| bytes.saturating_mul(n))
    }

    /// Bytes of a row: of the last dimension.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.shape.last().copied().unwrap_or(1) * self.elem.size()
    }
}

impl WeightFormat {
    /// The tensors of a weight of `shape` whose elements are of type `dtype`. The values come first.
    #[must_use]
    pub fn parts(self, dtype: DType, shape: &[usize]) -> Vec<Part> {
        let part = |kind, elem, cols: Option<usize>| {
            let mut shape = shape.to_vec();
            if let (Some(last), Some(cols)) = (shape.last_mut(), cols) {
                *last = cols;
            }
            Part { kind, elem, shape }
        };
        let quantization = match self {
            WeightFormat::Plain => return vec![part(PartKind::Values, dtype.into(), None)],
            WeightFormat::Fp8 => {
                // One matrix, or one for each expert.
                let scales = if let [experts, _, _] = *shape { vec![experts, 1] } else { vec![1] };
                return vec![
                    part(PartKind::Values, ElemType::F8E4M3, None),
                    Part { kind: PartKind::Scales, elem: ElemType::F32, shape: scales },
                    Part { kind: PartKind::InputScale, elem: ElemType::F32, shape: vec![1] },
                ];
            }
            WeightFormat::Fp8Rows(input) => {
                let mut parts = vec![
                    part(PartKind::Values, ElemType::F8E4M3, None),
                    part(PartKind::Scales, ElemType::F32, Some(1)),
                ];
                if input == Fp8Input::Static {
                    parts.push(Part { kind: PartKind::InputScale, elem: ElemType::F32, shape: vec![1] });
                }
                return parts;
            }
            WeightFormat::Quantized(quantization) => quantization,
        };
        let cols = shape.last().copied().unwrap_or(0);
        let groups = quantization.groups(cols);
        let mut parts = vec![
            part(PartKind::Values, ElemType::U8, Some(quantization.row_bytes(cols))),
            part(PartKind::Scales, quantization.scale.into(), Some(groups)),
        ];
        if quantization.zeros {
            parts.push(part(PartKind::Zeros, ElemType::U8, Some(groups)));
        }
        parts
    }

    /// Bytes of all parts. Saturates instead of overflowing.
    #[must_use]
    pub fn num_bytes(self, dtype: DType, shape: &[usize]) -> usize {
        self.parts(dtype, shape).iter().fold(0, |sum, part| part.num_bytes().saturating_add(sum))
    }

    /// Whether the elements are floats e4m3.
    #[must_use]
    pub const fn is_fp8(self) -> bool {
        matches!(self, WeightFormat::Fp8 | WeightFormat::Fp8Rows(_))
    }

    /// Whether a row may be cut before element `start`: only at the border of a group, and between two bytes.
    #[must_use]
    pub fn can_be_cut_at(self, start: usize) -> bool {
        match self {
            WeightFormat::Plain | WeightFormat::Fp8 | WeightFormat::Fp8Rows(_) => true,
            WeightFormat::Quantized(quantization) => {
                start.is_multiple_of(quantization.group.unwrap_or(1).max(quantization.bits.per_byte()))
            }
        }
    }
}

/// One word: `plain`, `fp8`, `fp8:row:static`, `fp8:row:token`, `int8:row:f32`, `int4:g128:bf16`, `int4:g64:f16:zeros`.
impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Quantization { bits, group, zeros, scale } = match self {
            WeightFormat::Plain => return f.write_str("plain"),
            WeightFormat::Fp8 => return f.write_str("fp8"),
            WeightFormat::Fp8Rows(Fp8Input::Static) => return f.write_str("fp8:row:static"),
            WeightFormat::Fp8Rows(Fp8Input::Token) => return f.write_str("fp8:row:token"),
            WeightFormat::Quantized(quantization) => quantization,
        };
        f.write_str(match bits {
            Bits::Four => "int4",
            Bits::Eight => "int8",
        })?;
        match group {
            None => f.write_str(":row")?,
            Some(group) => write!(f, ":g{group}")?,
        }
        write!(f, ":{scale}{}", if *zeros { ":zeros" } else { "" })
    }
}

/// A text that names no format of weights.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a format of weights; expected a word as plain, fp8, fp8:row:token, int8:row:f32, int4:g128:bf16 or int4:g64:f16:zeros"
)]
pub struct UnknownFormat(pub String);

impl FromStr for WeightFormat {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        let read = || {
            match text {
                "fp8" => return Some(WeightFormat::Fp8),
                "fp8:row:static" => return Some(WeightFormat::Fp8Rows(Fp8Input::Static)),
                "fp8:row:token" => return Some(WeightFormat::Fp8Rows(Fp8Input::Token)),
                _ => {}
            }
            let mut words = text.split(':');
            let bits = match words.next()? {
                "plain" => return words.next().is_none().then_some(WeightFormat::Plain),
                "int4" => Bits::Four,
                "int8" => Bits::Eight,
                _ => return None,
            };
            let group = match words.next()? {
                "row" => None,
                word => Some(word.strip_prefix('g')?.parse().ok().filter(|&group: &usize| group > 0)?),
            };
            let scale = words.next()?.parse().ok()?;
            let zeros = match words.next() {
                None => false,
                Some("zeros") => words.next().is_none().then_some(true)?,
                Some(_) => return None,
            };
            // Two integers share a byte, and a byte belongs to one group.
            let whole = group.is_none_or(|group| group.is_multiple_of(bits.per_byte()));
            whole.then_some(WeightFormat::Quantized(Quantization { bits, group, zeros, scale }))
        };
        read().ok_or_else(|| UnknownFormat(text.to_owned()))
    }
}

impl Serialize for WeightFormat {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for WeightFormat {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheFormat {
    /// In the model's type.
    #[default]
    Plain,
    /// As e4m3, with a scale for the keys of a layer and one for its values.
    Fp8,
}

impl CacheFormat {
    /// Type of the elements, in a model of type `dtype`.
    #[must_use]
    pub const fn elem(self, dtype: DType) -> ElemType {
        match (self, dtype) {
            (CacheFormat::Fp8, _) => ElemType::F8E4M3,
            (CacheFormat::Plain, DType::F32) => ElemType::F32,
            (CacheFormat::Plain, DType::F16) => ElemType::F16,
            (CacheFormat::Plain, DType::Bf16) => ElemType::Bf16,
        }
    }

    /// Whether keys and values are in the model's type.
    #[must_use]
    pub const fn is_plain(&self) -> bool {
        matches!(self, CacheFormat::Plain)
    }
}

/// The formats of a model's matrices. Everything else (the embedding, norms, routers, the output embedding) is plain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Formats {
    /// Query, key, value and output projections of attention.
    pub attention: WeightFormat,
    /// The matrices of the feed-forward, of all experts.
    pub feed_forward: WeightFormat,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_back() {
        for word in [
            "plain",
            "int8:row:f32",
            "int4:g128:bf16",
            "int4:g64:f16:zeros",
            "int8:g32:bf16",
            "int4:row:f16",
            "fp8",
            "fp8:row:static",
            "fp8:row:token",
        ] {
            let format: WeightFormat = word.parse().unwrap();
            assert_eq!(format.to_string(), word);
        }
        for word in [
            "",
            "plain:1",
            "fp8:row",
            "fp8:row:token:",
            "int4",
            "int4:g0:f16",
            "int4:g3:f16",
            "int8:row",
            "int8:row:i8",
            "int4:g32:f16:z",
        ] {
            assert!(word.parse::<WeightFormat>().is_err(), "{word}");
        }
    }

    #[test]
    fn parts_are_values_scales_and_zeros() {
        let parts = |word: &str, shape: &[usize]| {
            let format: WeightFormat = word.parse().unwrap();
            let parts = format.parts(DType::Bf16, shape);
            assert_eq!(format.num_bytes(DType::Bf16, shape), parts.iter().map(Part::num_bytes).sum::<usize>());
            parts.into_iter().map(|part| format!("{:?} {} {:?}", part.kind, part.elem, part.shape)).collect::<Vec<_>>()
        };
        assert_eq!(parts("plain", &[3, 100]), ["Values bf16 [3, 100]"]);
        assert_eq!(parts("fp8", &[3, 100]), ["Values f8e4m3 [3, 100]", "Scales f32 [1]", "InputScale f32 [1]"]);
        assert_eq!(parts("fp8", &[2, 3, 100])[1..], ["Scales f32 [2, 1]", "InputScale f32 [1]"]);
        assert_eq!(parts("fp8:row:token", &[2, 3, 100]), ["Values f8e4m3 [2, 3, 100]", "Scales f32 [2, 3, 1]"]);
        assert_eq!(parts("fp8:row:static", &[3, 100])[1..], ["Scales f32 [3, 1]", "InputScale f32 [1]"]);
        assert_eq!(parts("int8:row:f32", &[3, 100]), ["Values u8 [3, 100]", "Scales f32 [3, 1]"]);
        assert_eq!(
            parts("int4:g64:f16:zeros", &[2, 3, 100]),
            ["Values u8 [2, 3, 50]", "Scales f16 [2, 3, 2]", "Zeros u8 [2, 3, 2]"]
        );
    }

    #[test]
    fn rows_are_cut_between_groups_and_bytes() {
        let cuts = |word: &str| {
            let format: WeightFormat = word.parse().unwrap();
            [1, 2, 32, 64].map(|start| format.can_be_cut_at(start))
        };
        assert_eq!(cuts("plain"), [true; 4]);
        assert_eq!(cuts("int8:row:f32"), [true; 4]);
        assert_eq!(cuts("int4:row:f16"), [false, true, true, true]);
        assert_eq!(cuts("int4:g64:f16"), [false, false, false, true]);
    }
}
