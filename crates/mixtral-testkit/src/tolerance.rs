//! How far from the reference a backend's values may be, and the comparison.

use mixtral_engine::{Op, Program};
use mixtral_model::DType;

use crate::elements::{from_bytes, to_bytes};
use crate::fp8;

/// How far from the reference a backend's values may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Largest normalized mean square error, `Σ (x − ref)² / Σ ref²`, of an f32 buffer.
    pub f32_error: f64,
    /// The same of a 16-bit buffer.
    pub half_error: f64,
    /// How far any single element of an f32 buffer may be off, as a part of its own size plus the buffer's root mean square.
    pub f32_element: f64,
    /// The same of a 16-bit buffer, in units of the type's precision: 2^-10 for f16, 2^-7 for bf16.
    pub half_steps: f64,
    /// The part of a 16-bit buffer's elements that may differ from the rounded reference; two elements more are
    /// allowed. If an operation had a rounding too many or too few inside, most elements would differ.
    pub half_unequal: f64,
}

impl Default for Tolerance {
    /// The limits for a backend that rounds where the contract does, and nowhere else.
    fn default() -> Self {
        Tolerance { f32_error: 1e-10, half_error: 1e-5, f32_element: 1e-4, half_steps: 2.0, half_unequal: 0.01 }
    }
}

impl Tolerance {
    /// How far from the reference a backend may be that rounds where the contract does.
    pub(crate) fn of(program: &Program) -> Self {
        if program.attends_in_fp8() {
            return fp8::context(program.dtype);
        }
        // Behind a rotation, one query or key in some thousand is rounded to the neighbour of what the reference rounds it to. Then the 16-bit
        // outputs of a whole head may be the neighbours of its.
        let rotates = program.ops.len() > 1 && program.ops.iter().any(|op| matches!(op, Op::RopeWriteKv { .. }));
        let usual = Tolerance::default();
        Tolerance { half_unequal: if rotates { 0.05 } else { usual.half_unequal }, ..usual }
    }

    /// Compares values with the reference's. They must be NaN exactly where those are NaN. The others must be within the
    /// tolerance, both on average and each on its own, since a few wrong elements of a large buffer hardly change its mean.
    ///
    /// # Errors
    /// What is off, and where.
    pub fn close(&self, found: &[f64], expected: &[f64], dtype: DType) -> Result<(), String> {
        let rounded = from_bytes(dtype, &to_bytes(dtype, expected));
        let (mut error, mut size, mut unequal) = (0.0, 0.0, 0);
        for (i, ((found, expected), rounded)) in found.iter().zip(expected).zip(&rounded).enumerate() {
            if found.is_nan() != expected.is_nan() {
                return Err(format!("element {i} is {found}, expected {expected}"));
            }
            if !expected.is_nan() {
                error += (found - expected) * (found - expected);
                size += expected * expected;
                unequal += usize::from(found != rounded);
            }
        }
        let is_f32 = dtype == DType::F32;
        let limit = if is_f32 { self.f32_error } else { self.half_error };
        if error > limit * size {
            return Err(format!("NMSE {:e}, limit {limit:e}", error / size));
        }
        #[expect(clippy::cast_precision_loss, reason = "counts are small")]
        let typical = (size / found.len().max(1) as f64).sqrt();
        let element = match dtype {
            DType::F32 => self.f32_element,
            DType::F16 => self.half_steps / 1024.0,
            DType::Bf16 => self.half_steps / 128.0,
        };
        let is_off = |(found, expected): (&f64, &f64)| (found - expected).abs() > element * (expected.abs() + typical);
        if let Some(i) = found.iter().zip(expected).position(is_off) {
            return Err(format!("element {i} is {}, expected {}", found[i], expected[i]));
        }
        #[expect(clippy::cast_precision_loss, reason = "counts are small")]
        let (count, most) = (unequal as f64, 2.0 + found.len() as f64 * self.half_unequal);
        if !is_f32 && count > most {
            return Err(format!("{unequal} of {} elements are not the rounded reference", found.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_element_among_many_is_found() {
        let expected = vec![1.0; 1 << 20];
        let mut found = expected.clone();
        for (dtype, off) in [(DType::F32, 1.0005), (DType::F16, 1.01), (DType::Bf16, 1.0625)] {
            assert_eq!(Tolerance::default().close(&found, &expected, dtype), Ok(()));
            found[77] = off;
            let problem = format!("element 77 is {off}, expected 1");
            assert_eq!(Tolerance::default().close(&found, &expected, dtype), Err(problem));
            found[77] = 1.0;
        }
    }
}
