//! The 8-bit float e4m3: a sign, four bits of exponent, three of mantissa. It has no infinities, and one NaN of either sign.

/// The largest number.
pub const MAX: f32 = 448.0;

/// The scale that makes `amax` the largest number of the format. What is all zero stays so, whatever its scale.
#[must_use]
#[inline(always)]
pub fn scale(amax: f32) -> f32 {
    if amax > 0.0 { (amax / MAX).max(f32::MIN_POSITIVE) } else { 1.0 }
}

/// The magnitude of NaN.
pub const NAN: u8 = 0x7f;

/// The number of a byte. NaN bytes give 480, which is the number that their bits would be.
#[must_use]
#[inline(always)]
pub fn from_bits(byte: u8) -> f32 {
    // Exponent and mantissa at the place of an f32's, whose exponents begin 120 lower. Exact for subnormal numbers too.
    const EXPONENT: f32 = f32::from_bits((127 + 120) << 23);
    let (sign, magnitude) = (u32::from(byte & 0x80) << 24, u32::from(byte & 0x7f) << 20);
    f32::from_bits(magnitude | sign) * EXPONENT
}

/// `x` rounded to the nearest number, ties to even. What is larger than [`MAX`] becomes [`MAX`]. NaN stays NaN.
#[must_use]
#[inline(always)]
pub fn round(x: f32) -> f32 {
    /// Numbers below are multiples of 2^−9.
    const SMALLEST_NORMAL: f32 = 1.0 / 64.0;
    /// Adding it to a small number rounds to a multiple of 2^−9: it is 1.5 · 2^(23 − 9).
    const TO_MULTIPLE: f32 = 24_576.0;
    let x = x.clamp(-MAX, MAX);
    // Cuts 20 bits of the mantissa off, rounding to even. (Only the bits of a NaN can overflow.)
    let bits = x.to_bits();
    let normal = f32::from_bits(bits.wrapping_add(0x7_ffff + (bits >> 20 & 1)) & 0xfff0_0000);
    // The sign of a zero is kept.
    let small = f32::from_bits((x + TO_MULTIPLE - TO_MULTIPLE).to_bits() & 0x7fff_ffff | bits & 0x8000_0000);
    let rounded = if x.abs() < SMALLEST_NORMAL { small } else { normal };
    if x.is_nan() { x } else { rounded }
}

/// The byte of `x`, rounded as [`round`] does.
#[must_use]
#[inline(always)]
pub fn to_bits(x: f32) -> u8 {
    /// 2^−120, which moves the exponent to where f32's begin.
    const EXPONENT: f32 = f32::from_bits(7 << 23);
    let bits = (round(x) * EXPONENT).to_bits();
    let byte = (bits >> 24 & 0x80) | (bits >> 20 & 0x7f);
    if x.is_nan() { NAN } else { byte.to_le_bytes()[0] }
}

/// Whether keys of this many elements can be rounded by directions: their errors are summed in pairs, pairs of pairs and so on.
#[must_use]
pub const fn suits_directions(head_dim: usize) -> bool {
    head_dim.is_power_of_two() && 16 <= head_dim && head_dim <= 512
}

/// The neighbour of `byte` on the other side of `x`, if `byte` is `x` rounded: towards zero if it is farther from zero than `x`, else away
/// from zero. Beyond the largest number there is none, and none for NaN.
#[must_use]
#[inline(always)]
pub fn other_side(byte: u8, x: f32) -> Option<u8> {
    let magnitude = byte & 0x7f;
    if magnitude == NAN {
        None
    } else if from_bits(magnitude) > x.abs() {
        Some(byte - 1)
    } else {
        (magnitude < NAN - 1).then_some(byte + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All finite numbers, by the definition of the format.
    fn numbers() -> Vec<(u8, f64)> {
        let number = |byte: u8| {
            let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
            let magnitude = match exponent {
                0 => mantissa / 8.0 * 2f64.powi(-6),
                _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
            };
            (byte, if byte & 0x80 == 0 { magnitude } else { -magnitude })
        };
        (0..=255u8).filter(|byte| byte & 0x7f != NAN).map(number).collect()
    }

    #[test]
    fn every_byte_is_its_number() {
        for (byte, number) in numbers() {
            assert_eq!(f64::from(from_bits(byte)), number);
            assert_eq!(to_bits(from_bits(byte)), byte, "{number}");
            assert_eq!(round(from_bits(byte)).to_bits(), from_bits(byte).to_bits());
        }
        assert_eq!(from_bits(0x7e), MAX);
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "the halves of neighbours are exact in f32")]
    fn what_lies_between_goes_to_the_nearest_and_ties_to_even() {
        let mut magnitudes: Vec<(u8, f64)> = numbers().into_iter().filter(|(byte, _)| byte & 0x80 == 0).collect();
        magnitudes.sort_by(|a, b| a.1.total_cmp(&b.1));
        for pair in magnitudes.windows(2) {
            let [(low, a), (high, b)] = pair else { panic!("two") };
            let middle = ((a + b) / 2.0) as f32;
            let even = if low & 1 == 0 { *low } else { *high };
            for sign in [0, 0x80] {
                let signed = |x: f32| if sign == 0 { x } else { -x };
                assert_eq!(to_bits(signed(middle)), even | sign, "{middle}");
                assert_eq!(to_bits(signed(middle.next_down())), low | sign);
                assert_eq!(to_bits(signed(middle.next_up())), high | sign);
            }
        }
    }

    #[test]
    fn what_is_too_large_saturates_and_nan_stays() {
        for x in [448.1, 464.0, 1e30, f32::MAX, f32::INFINITY] {
            assert_eq!((round(x), round(-x), to_bits(x), to_bits(-x)), (MAX, -MAX, 0x7e, 0xfe));
        }
        assert!([f32::NAN, f32::from_bits(u32::MAX)].iter().all(|&nan| round(nan).is_nan()));
        assert_eq!(to_bits(f32::NAN) & 0x7f, NAN);
        assert_eq!((to_bits(1e-30), to_bits(-1e-30), to_bits(f32::MIN_POSITIVE / 4.0)), (0, 0x80, 0));
    }
}
