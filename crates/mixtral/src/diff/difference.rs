//! How far apart two contents of a buffer are.

use mixtral_model::{ElemType, fp8};
use serde::Serialize;

/// How far contents may be from the reference's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Tolerance {
    /// Largest error of an f32 buffer.
    pub f32: f64,
    /// Largest error of a 16-bit buffer.
    pub half: f64,
}

impl Tolerance {
    /// The limit of a buffer of a type that an operation wrote; integers have to be equal. In 16 bits it is twice as large
    /// for a sum over ranks: every part is rounded, then the sum, then the sum with the residual, and one rank rounds
    /// half as often.
    pub fn of(&self, kind: &str, dtype: ElemType) -> f64 {
        match dtype {
            ElemType::F32 => self.f32,
            ElemType::F16 | ElemType::Bf16 if kind == "all_reduce" => 2.0 * self.half,
            ElemType::F16 | ElemType::Bf16 | ElemType::F8E4M3 => self.half,
            ElemType::I32 | ElemType::U8 => 0.0,
        }
    }
}

/// An element, and the values that two backends computed for it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Element {
    /// Row.
    pub row: usize,
    /// Column.
    pub col: usize,
    /// The reference's value.
    pub reference: f64,
    /// The other backend's value.
    pub other: f64,
}

/// Sums over the elements of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Elements compared.
    pub elements: usize,
    /// Largest absolute difference.
    pub max: f64,
    /// Mean absolute difference.
    pub mean: f64,
    /// Root mean square of the reference, for scale.
    pub rms: f64,
    /// The figure that has a limit. Of floats it is `Σ (x − ref)² / Σ ref²`; of integers, the part of the elements that
    /// differ.
    pub error: f64,
    /// The element with the largest difference.
    pub worst: Option<Element>,
}

impl Difference {
    /// Compares two contents, each in rows of `cols` elements. Elements of equal bits do not differ, even if both are
    /// NaN. An element that is not finite differs infinitely from all others.
    pub fn new(dtype: ElemType, cols: usize, reference: &[u8], other: &[u8]) -> Difference {
        let (a, b) = (values(dtype, reference), values(dtype, other));
        let (mut max, mut sum, mut squares, mut size, mut unequal) = (0.0f64, 0.0f64, 0.0f64, 0.0f64, 0usize);
        let mut worst = None;
        for (index, (&a, &b)) in a.iter().zip(&b).enumerate() {
            size += if a.is_finite() { a * a } else { 0.0 };
            if a.to_bits() == b.to_bits() || a == b {
                continue;
            }
            let apart = if (a - b).is_finite() { (a - b).abs() } else { f64::INFINITY };
            (sum, squares, unequal) = (sum + apart, squares + apart * apart, unequal + 1);
            if apart > max {
                max = apart;
                worst = Some(Element { row: index / cols.max(1), col: index % cols.max(1), reference: a, other: b });
            }
        }
        let n = count(a.len().max(1));
        let error = match dtype {
            _ if a.len() != b.len() => f64::INFINITY,
            ElemType::I32 => count(unequal) / n,
            _ if squares == 0.0 => 0.0,
            _ => squares / size,
        };
        Difference { elements: a.len(), max, mean: sum / n, rms: (size / n).sqrt(), error, worst }
    }

    /// The difference of two parts together: the larger error, and the mean over the elements of both.
    pub fn and(&self, next: &Difference) -> Difference {
        let (a, b) = (count(self.elements), count(next.elements));
        let n = (a + b).max(1.0);
        Difference {
            elements: self.elements + next.elements,
            max: self.max.max(next.max),
            mean: (a * self.mean + b * next.mean) / n,
            rms: ((a * self.rms * self.rms + b * next.rms * next.rms) / n).sqrt(),
            error: self.error.max(next.error),
            worst: if next.max > self.max { next.worst } else { self.worst },
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a number of elements")]
fn count(n: usize) -> f64 {
    n as f64
}

fn values(dtype: ElemType, bytes: &[u8]) -> Vec<f64> {
    match (dtype, dtype.float()) {
        (_, Some(float)) => float.widen(bytes).into_iter().map(f64::from).collect(),
        (ElemType::F8E4M3, _) => bytes.iter().map(|&b| f64::from(fp8::from_bits(b))).collect(),
        (ElemType::U8, _) => bytes.iter().map(|&b| f64::from(b)).collect(),
        _ => bytes.as_chunks().0.iter().map(|b| f64::from(i32::from_le_bytes(*b))).collect(),
    }
}
