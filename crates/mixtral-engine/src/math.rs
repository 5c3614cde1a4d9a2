//! Elementary functions that every backend computes with the same few operations, so that routing, sampling and SiLU do
//! not depend on a platform's math library. No backend may contract two of them into a fused multiply-add.

/// e^x. Relative error below 2e-7 for −87 ≤ x ≤ 88; 0 below that range, +∞ above it, NaN for NaN.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; e^r by its Taylor polynomial of degree 7 in Horner's form, 2^n through the
/// exponent's bits. ln 2 is split so that n·LN2_HI is exact.
#[must_use]
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "n is within −126 to 127 where the result is used")]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 355.0 / 512.0;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 · 2^23 rounds to the nearest integer, ties to even.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let n = (clamped * LOG2_E + ROUND) - ROUND;
    let r = (clamped - n * LN2_HI) - n * LN2_LO;
    let mut p = 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    let scale = f32::from_bits((((n as i32) + 127) << 23).cast_unsigned());
    let value = p * scale;
    if x < -87.0 {
        0.0
    } else if x > 88.0 {
        f32::INFINITY
    } else {
        value
    }
}

/// x / (1 + e^(−x)).
#[must_use]
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_real_one() {
        let mut worst = 0f64;
        let mut x = -86.9f32;
        while x < 87.9 {
            let reference = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - reference) / reference).abs());
            x += 0.003_7;
        }
        assert!(worst < 2e-7, "worst relative error {worst}");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        // The ends of the range belong to it.
        assert!(exp(-87.0) > 0.0);
        assert!(exp(88.0) < f32::INFINITY);
    }

    #[test]
    fn silu_is_close_to_the_real_one() {
        for x in [-20.0f32, -4.0, -1.0, -0.1, 0.1, 0.5, 1.0, 3.0, 20.0] {
            let reference = f64::from(x) / (1.0 + f64::from(-x).exp());
            let error = ((f64::from(silu(x)) - reference) / reference).abs();
            assert!(error < 4e-7, "silu({x}) is {} instead of {reference}", silu(x));
        }
        assert_eq!(silu(0.0), 0.0);
    }
}
