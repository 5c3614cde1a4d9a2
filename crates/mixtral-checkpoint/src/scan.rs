//! Looks at raw float bytes without converting them. Magnitudes are compared as integers, because that vectorizes.

use half::{bf16, f16};
use mixtral_model::DType;

/// The bits of `dtype`'s infinity without the sign. A magnitude at or above it is infinite or NaN.
#[must_use]
pub const fn infinity_bits(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => f32::INFINITY.to_bits(),
        DType::F16 => f16::INFINITY.to_bits() as u32,
        DType::Bf16 => bf16::INFINITY.to_bits() as u32,
    }
}

/// The largest magnitude among little-endian elements, as bits without the sign. The order of these bits is the order
/// of magnitudes.
#[must_use]
pub fn max_magnitude(dtype: DType, bytes: &[u8]) -> u32 {
    match dtype {
        DType::F32 => {
            bytes.as_chunks().0.iter().fold(0, |max, &b: &[u8; 4]| max.max(u32::from_le_bytes(b) & 0x7fff_ffff))
        }
        DType::F16 | DType::Bf16 => {
            u32::from(bytes.as_chunks().0.iter().fold(0, |max, &b: &[u8; 2]| max.max(u16::from_le_bytes(b) & 0x7fff)))
        }
    }
}

/// How many elements have a magnitude of at least `limit`, and the index of the first.
#[must_use]
pub fn count_from(dtype: DType, bytes: &[u8], limit: u32) -> Option<(u64, u64)> {
    let mut found = None;
    for (index, element) in bytes.chunks_exact(dtype.size()).enumerate() {
        if max_magnitude(dtype, element) >= limit {
            let (count, first) = found.unwrap_or((0, index as u64));
            found = Some((count + 1, first));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_magnitude_is_found_in_every_type() {
        let values = [0.5f32, -3.0, 2.0, -0.0];
        let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let f16s: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let bf16s: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        assert_eq!(max_magnitude(DType::F32, &f32s), 3f32.to_bits());
        assert_eq!(max_magnitude(DType::F16, &f16s), u32::from(f16::from_f32(3.0).to_bits()));
        assert_eq!(max_magnitude(DType::Bf16, &bf16s), u32::from(bf16::from_f32(3.0).to_bits()));
        assert_eq!(count_from(DType::Bf16, &bf16s, u32::from(bf16::from_f32(2.0).to_bits())), Some((2, 1)));
        assert_eq!(count_from(DType::F16, &f16s, infinity_bits(DType::F16)), None);
    }

    #[test]
    fn infinities_and_nans_of_either_sign_are_at_or_above_the_limit() {
        for value in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN] {
            assert!(max_magnitude(DType::F32, &value.to_le_bytes()) >= infinity_bits(DType::F32));
            assert!(max_magnitude(DType::F16, &f16::from_f32(value).to_le_bytes()) >= infinity_bits(DType::F16));
        }
        assert!(max_magnitude(DType::F16, &f16::MAX.to_le_bytes()) < infinity_bits(DType::F16));
    }
}
