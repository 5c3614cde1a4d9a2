//! How the rows of a linear's weight are stored, as its kernels see it. This is the Rust side of `kernels/weight/`;
//! each variant has a header there.

use mixtral_engine::Weight;
use mixtral_model::{DType, ElemType, WeightFormat};

use crate::lower::type_name;

/// A storage format with its element types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightRows {
    /// `weight::Plain`: elements of this type, one after another.
    Plain(DType),
}

impl WeightRows {
    /// The format of `weight`; `None` if it has no kernels.
    #[must_use]
    pub fn of(weight: &Weight) -> Option<Self> {
        match weight.format {
            WeightFormat::Plain => Some(WeightRows::Plain(weight.dtype)),
            WeightFormat::Quantized(_) => None,
        }
    }

    /// Bytes of `elements` elements of a row.
    #[must_use]
    pub fn bytes(self, elements: usize) -> usize {
        match self {
            WeightRows::Plain(dtype) => elements * dtype.size(),
        }
    }

    /// Whether there are kernels that multiply a weight of this format with tokens of type `tokens` on tensor cores.
    #[must_use]
    pub fn suits_tensor_cores(self, tokens: ElemType) -> bool {
        match self {
            WeightRows::Plain(dtype) => matches!(dtype, DType::F16 | DType::Bf16) && tokens == dtype.into(),
        }
    }

    /// How many elements TMA writes into a 128-byte row of swizzled shared memory, and their type in a tensor map.
    #[must_use]
    pub fn atom(self) -> (usize, ElemType) {
        match self {
            WeightRows::Plain(dtype) => (128 / dtype.size(), dtype.into()),
        }
    }

    /// The type in `kernels/weight/` that kernels are instantiated with.
    #[must_use]
    pub fn symbol(self) -> String {
        match self {
            WeightRows::Plain(dtype) => format!("weight::Plain<{}>", type_name(dtype)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_rows_are_their_elements() {
        for (dtype, bytes, name) in
            [(DType::F32, 400, "float"), (DType::F16, 200, "f16_t"), (DType::Bf16, 200, "bf16_t")]
        {
            let rows = WeightRows::Plain(dtype);
            assert_eq!(rows.bytes(100), bytes);
            assert_eq!(rows.bytes(rows.atom().0), 128);
            assert_eq!(rows.symbol(), format!("weight::Plain<{name}>"));
            for tokens in [DType::F32, DType::F16, DType::Bf16] {
                assert_eq!(rows.suits_tensor_cores(tokens.into()), dtype == tokens && dtype != DType::F32);
            }
        }
    }
}
