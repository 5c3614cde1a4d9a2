//! Converts values to bytes and back by plain scalar code, and makes seeded values.

use half::{bf16, f16};
use mixtral_engine::dummy;
use mixtral_model::DType;

/// `n` seeded values of mean 0 and standard deviation `scale`.
#[must_use]
pub fn values(name: &str, n: usize, scale: f32) -> Vec<f64> {
    let key = dummy::key(0x7e57, name);
    (0..n as u64).map(|i| f64::from(dummy::element(key, i, dummy::scale(1)) * scale)).collect()
}

/// Floats rounded to a type, as bytes.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "rounding is the purpose")]
pub fn to_bytes(dtype: DType, values: &[f64]) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|x| f16::from_f32(*x as f32).to_le_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x as f32).to_le_bytes()).collect(),
    }
}

/// The floats that bytes of a type hold.
#[must_use]
pub fn from_bytes(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let pair = |b: &[u8]| [b[0], b[1]];
    match dtype {
        DType::F32 => bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect(),
        DType::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes(pair(b)).to_f64()).collect(),
        DType::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes(pair(b)).to_f64()).collect(),
    }
}

/// Integers as bytes.
#[must_use]
pub fn ints_to_bytes(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The integers that bytes hold.
#[must_use]
pub fn ints_from_bytes(bytes: &[u8]) -> Vec<i32> {
    bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}
