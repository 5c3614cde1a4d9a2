//! Converts the type of little-endian float bytes, and says which magnitudes a type cannot hold.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use mixtral_checkpoint::scan::infinity_bits;
use mixtral_model::DType;

/// How many elements are converted at a time. Their f32 values stay in the first-level cache.
const BLOCK: usize = 1024;

/// The smallest magnitude, as bits of `from`, that is refused when converting to `to`. Infinities and NaNs are always
/// refused, and so are values that are too large for `to`. For f16 these are values above 65504, for bf16 values that
/// round to infinity.
#[must_use]
pub const fn first_refused(from: DType, to: DType) -> u32 {
    /// f16's largest number.
    const F16_MAX: u32 = 65504f32.to_bits();
    match (from, to) {
        (DType::F32, DType::F16) => F16_MAX + 1,
        (DType::Bf16, DType::F16) => (F16_MAX >> 16) + 1,
        // Halfway between bf16's largest number and the next power of two.
        (DType::F32, DType::Bf16) => 0x7f7f_8000,
        _ => infinity_bits(from),
    }
}

/// Converts the elements of `input` to `to`, rounding to nearest, ties to even. All elements are finite.
///
/// # Panics
/// If `output` does not have as many elements as `input`.
pub fn convert_elements(from: DType, input: &[u8], to: DType, output: &mut [u8]) {
    assert_eq!(input.len() / from.size(), output.len() / to.size());
    if from == to {
        return output.copy_from_slice(input);
    }
    let mut values = [0f32; BLOCK];
    let mut halves = [f16::ZERO; BLOCK];
    let blocks = input.chunks(BLOCK * from.size()).zip(output.chunks_mut(BLOCK * to.size()));
    for (input, output) in blocks {
        let n = input.len() / from.size();
        let (values, halves) = (&mut values[..n], &mut halves[..n]);
        match from {
            DType::F32 => {
                values.iter_mut().zip(input.as_chunks().0).for_each(|(v, &b)| *v = f32::from_le_bytes(b));
            }
            DType::Bf16 => {
                for (value, &bytes) in values.iter_mut().zip(input.as_chunks().0) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
                }
            }
            DType::F16 => {
                halves.iter_mut().zip(input.as_chunks().0).for_each(|(h, &b)| *h = f16::from_le_bytes(b));
                halves.convert_to_f32_slice(values);
            }
        }
        match to {
            DType::F32 => {
                output.as_chunks_mut().0.iter_mut().zip(values).for_each(|(b, v)| *b = v.to_le_bytes());
            }
            DType::Bf16 => {
                for (bytes, value) in output.as_chunks_mut().0.iter_mut().zip(values) {
                    *bytes = finite_to_bf16(*value).to_le_bytes();
                }
            }
            DType::F16 => {
                halves.convert_from_f32_slice(values);
                output.as_chunks_mut().0.iter_mut().zip(halves).for_each(|(b, h)| *b = h.to_le_bytes());
            }
        }
    }
}

/// The bytes of finite values, rounded to `to`.
#[must_use]
pub fn narrow(to: DType, values: &[f32]) -> Vec<u8> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut narrowed = vec![0; values.len() * to.size()];
    convert_elements(DType::F32, &bytes, to, &mut narrowed);
    narrowed
}

/// Rounds a finite value. The conversion of `half` looks for NaNs first, and so does not vectorize.
#[inline]
#[allow(clippy::cast_possible_truncation)] // The upper half is what is wanted.
fn finite_to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    bf16::from_bits(((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(dtype: DType, values: &[f32]) -> Vec<u8> {
        mixtral_testkit::Tensor::new("", dtype, &[values.len()], values).data
    }

    proptest! {
        #[test]
        fn every_pair_of_types_rounds_as_half_does(
            values in prop::collection::vec(
                any::<f32>().prop_map(|v| if v.abs() <= 65504.0 { v } else { 1.0 / v }),
                1..3000,
            ),
        ) {
            let types = [DType::F32, DType::F16, DType::Bf16];
            for from in types {
                let input = bytes(from, &values.iter().map(|v| v / 2.0).collect::<Vec<_>>());
                let exact: Vec<f32> = values.iter().map(|v| from.round(v / 2.0)).collect();
                for to in types {
                    let mut output = vec![0; exact.len() * to.size()];
                    convert_elements(from, &input, to, &mut output);
                    prop_assert_eq!(&output, &bytes(to, &exact));
                }
            }
        }
    }

    #[test]
    fn the_limits_are_where_the_next_value_is_lost() {
        let limit = |to| f32::from_bits(first_refused(DType::F32, to));
        assert_eq!(f32::from_bits(first_refused(DType::F32, DType::F16) - 1), 65504.0);
        assert!(bf16::from_f32(limit(DType::Bf16)).is_infinite());
        assert!(bf16::from_f32(f32::from_bits(limit(DType::Bf16).to_bits() - 1)).is_finite());
        let narrow = |bits: u32| bf16::from_bits(u16::try_from(bits).unwrap()).to_f32();
        let first = first_refused(DType::Bf16, DType::F16);
        assert!(narrow(first) > 65504.0 && narrow(first - 1) <= 65504.0);
        assert!(limit(DType::F32).is_infinite());
    }
}
