//! Rounds rows of floats to integers and scales.
//!
//! The scale of a group comes from the unsharded row, so all layouts of ranks have the same weights. Integers of 8 bits use the
//! range −127 to 127, and the group's largest element becomes an end of it. With 4 bits such a scale wastes much: one large
//! element makes the steps of all others coarse, and −8 is not used. So the scale is searched for. A candidate maps the largest
//! element, or a number somewhat smaller, to −8 or to 7, for which the scale may have to be negative. The candidate whose
//! decoded elements are nearest to the floats, by the sum of squares, is taken.
//!
//! With statistics of calibration text, errors of important inputs count more, and the rounding of each element of 4 bits is made
//! up for by the elements behind it ([`mod@crate::feedback`]).

use std::ops::Range;

use mixtral_model::{Bits, DType, Quantization};

use crate::feedback::Block;
use crate::statistics::BLOCK;

/// Parts of the largest element that candidates map to an end of the range. On normally distributed weights in groups of 128 the
/// search leaves 0.68 of plain rounding's squared error, and a search in steps of 0.01 leaves 0.68 too.
const REACHES: [f32; 7] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7];

/// Squares of a tensor's elements and of what rounding changed, summed. With statistics: squares of what they make of calibration
/// text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Σ (w − ŵ)².
    pub error: f64,
    /// Σ w².
    pub energy: f64,
}

impl Loss {
    /// Adds another part of the tensor.
    pub fn add(&mut self, other: Loss) {
        self.error += other.error;
        self.energy += other.energy;
    }

    /// The error as a part of the elements' size: √(Σ (w − ŵ)² / Σ w²).
    #[must_use]
    pub fn relative(&self) -> f64 {
        if self.energy > 0.0 { (self.error / self.energy).sqrt() } else { 0.0 }
    }
}

/// Adding it to a number below 2^22 rounds to an integer, ties to even. It is 1.5 · 2^23.
const ROUND: f32 = 12_582_912.0;

/// One group's scale, and the integers that it allows.
#[derive(Clone, Copy)]
struct Rounding {
    scale: f32,
    /// 1 / scale; 0 for the scale 0.
    inverse: f32,
    low: f32,
    high: f32,
}

impl Rounding {
    fn new(scale: f32, dtype: DType, low: f32, high: f32) -> Self {
        let scale = dtype.round(scale);
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        // A scale so small that its inverse overflows decodes to next to nothing, whatever the integer.
        Rounding { scale, inverse: if inverse.is_finite() { inverse } else { 0.0 }, low, high }
    }

    /// The integer of an element as it is stored.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the integer is between 0 and 255")]
    fn unsigned(self, x: f32, bits: Bits) -> u8 {
        // The sum's last bits are the integer.
        (self.integer(x) + f32::from(bits.middle()) + ROUND).to_bits() as u8
    }

    /// The integer of an element, as a float.
    #[inline(always)]
    fn integer(self, x: f32) -> f32 {
        (x * self.inverse + ROUND - ROUND).max(self.low).min(self.high)
    }

    /// Σ (w − ŵ)².
    #[inline(always)]
    fn error(self, values: &[f32]) -> f32 {
        sum(values, |x| self.square(x))
    }

    /// Σ importance · (w − ŵ)².
    #[inline(always)]
    fn weighted_error(self, values: &[f32], importance: &[f32]) -> f32 {
        values.iter().zip(importance).map(|(&x, importance)| self.square(x) * importance).sum()
    }

    /// (w − ŵ)².
    #[inline(always)]
    fn square(self, x: f32) -> f32 {
        let difference = x - self.integer(x) * self.scale;
        difference * difference
    }
}

/// Σ w².
#[inline(always)]
fn energy(values: &[f32]) -> f32 {
    sum(values, |x| x * x)
}

/// The sum of `f` over all values, in sixteen partial sums, so that it is computed with vectors.
#[inline(always)]
fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0f32; 16];
    let (whole, rest) = values.as_chunks::<16>();
    for chunk in whole {
        for lane in 0..16 {
            sums[lane] += f(chunk[lane]);
        }
    }
    sums.iter_mut().zip(rest).for_each(|(sum, &x)| *sum += f(x));
    sums.iter().sum()
}

/// The element of the largest size; 0 if there is none.
#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let (mut least, mut most) = ([0f32; 16], [0f32; 16]);
    for chunk in values.chunks(16) {
        for (lane, &x) in chunk.iter().enumerate() {
            least[lane] = least[lane].min(x);
            most[lane] = most[lane].max(x);
        }
    }
    let (least, most) = (least.into_iter().fold(0.0, f32::min), most.into_iter().fold(0.0, f32::max));
    if most >= -least { most } else { least }
}

/// Chooses the rounding of a group: `values` are all its elements in the unsharded row. If there are `importances`, the squared
/// error of each element counts so much.
#[inline(always)]
fn choose(values: &[f32], importances: Option<&[f32]>, Quantization { bits, scale, .. }: Quantization) -> Rounding {
    let largest = largest(values);
    if bits == Bits::Eight {
        return Rounding::new(largest.abs() / 127.0, scale, -127.0, 127.0);
    }
    let mut best = (f32::INFINITY, Rounding::new(largest / -8.0, scale, -8.0, 7.0));
    for reach in REACHES {
        for end in [-8.0, 7.0] {
            let candidate = Rounding::new(largest * reach / end, scale, -8.0, 7.0);
            let error = match importances {
                None => candidate.error(values),
                Some(importances) => candidate.weighted_error(values, importances),
            };
            if error < best.0 {
                best = (error, candidate);
            }
        }
    }
    best.1
}

/// Quantizes a row of finite elements. `values` are its columns from a border of groups on: all of it if the whole row has one
/// scale. The integers of the columns `taken` of `values` are appended to `integers`, and the scales of their groups to
/// `scales`. `taken` begins at a border of groups. With `feedback`, `values` begin at one of its blocks, the first of those given.
///
/// The zero of every group is the middle of the range.
pub fn quantize_row(
    values: &[f32],
    taken: Range<usize>,
    quantization: Quantization,
    feedback: Option<&[Block]>,
    integers: &mut Vec<u8>,
    scales: &mut Vec<f32>,
) -> Loss {
    // The loops below are compiled for the widest vectors of this machine. Each operation rounds as it does without them.
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || match feedback {
            Some(blocks) => quantize_blocks(values, taken, quantization, blocks, integers, scales),
            None => quantize_groups(values, taken, quantization, integers, scales),
        },
    )
}

#[inline(always)]
fn quantize_groups(
    values: &[f32],
    taken: Range<usize>,
    quantization: Quantization,
    integers: &mut Vec<u8>,
    scales: &mut Vec<f32>,
) -> Loss {
    let bits = quantization.bits;
    let len = quantization.group_len(values.len());
    let mut loss = Loss::default();
    for (index, group) in values.chunks(len).enumerate() {
        let from = (index * len).max(taken.start);
        let to = (index * len + group.len()).min(taken.end);
        if from >= to {
            continue;
        }
        let rounding = choose(group, None, quantization);
        scales.push(rounding.scale);
        let values = &values[from..to];
        loss.add(Loss { error: f64::from(rounding.error(values)), energy: f64::from(energy(values)) });
        pack(values.iter().map(|&x| rounding.unsigned(x, bits)), bits, integers);
    }
    loss
}

/// The same for integers of 4 bits, where elements make up for the rounding of those before them in the block. A group's scale is
/// chosen when its first element is rounded, for the elements as they are then.
#[inline(always)]
fn quantize_blocks(
    values: &[f32],
    taken: Range<usize>,
    quantization: Quantization,
    blocks: &[Block],
    integers: &mut Vec<u8>,
    scales: &mut Vec<f32>,
) -> Loss {
    let len = quantization.group_len(values.len());
    let importances: Vec<f32> = blocks.iter().flat_map(|block| &block.unexplained).copied().collect();
    let mut row = values.to_vec();
    let mut rounded = Vec::with_capacity(values.len());
    let mut rounding = choose(&[], None, quantization);
    let mut loss = Loss::default();
    for (block, start) in blocks.iter().zip((0..values.len()).step_by(BLOCK)) {
        let end = (start + BLOCK).min(values.len());
        for k in start..end {
            if k % len == 0 {
                let group = k..(k + len).min(values.len());
                rounding = choose(&row[group.clone()], Some(&importances[group.clone()]), quantization);
                if group.start < taken.end && group.end > taken.start {
                    scales.push(rounding.scale);
                }
            }
            rounded.push(rounding.unsigned(row[k], quantization.bits));
            let error = row[k] - rounding.integer(row[k]) * rounding.scale;
            block.make_up(k - start, error, &mut row[start..end]);
            if taken.contains(&k) {
                loss.error += f64::from(error * error * importances[k]);
            }
        }
        // What the block makes of calibration text is the error of leaving it out.
        let mut left_out = [0.0; BLOCK];
        let left_out = &mut left_out[..end - start];
        left_out.copy_from_slice(&values[start..end]);
        for k in 0..left_out.len() {
            let error = left_out[k];
            block.make_up(k, error, left_out);
            if taken.contains(&(start + k)) {
                loss.energy += f64::from(error * error * importances[start + k]);
            }
        }
    }
    pack(rounded[taken].iter().copied(), quantization.bits, integers);
    loss
}

/// Appends integers as they are stored.
#[inline(always)]
fn pack(mut rounded: impl Iterator<Item = u8>, bits: Bits, integers: &mut Vec<u8>) {
    match bits {
        Bits::Eight => integers.extend(rounded),
        Bits::Four => {
            while let Some(low) = rounded.next() {
                integers.push(low | rounded.next().unwrap_or(0) << 4);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn quantization(bits: Bits, group: Option<usize>) -> Quantization {
        Quantization { bits, group, zeros: false, scale: DType::F32 }
    }

    fn decoded(values: &[f32], taken: Range<usize>, q: Quantization) -> (Vec<f32>, Vec<f32>) {
        let (mut integers, mut scales) = (Vec::new(), Vec::new());
        quantize_row(values, taken.clone(), q, None, &mut integers, &mut scales);
        let len = q.group_len(values.len());
        let unsigned = |col: usize| match q.bits {
            Bits::Four => integers[col / 2] >> (col % 2 * 4) & 15,
            Bits::Eight => integers[col],
        };
        let values =
            (0..taken.len()).map(|col| (f32::from(unsigned(col)) - f32::from(q.bits.middle())) * scales[col / len]);
        (values.collect(), scales)
    }

    proptest! {
        #[test]
        fn elements_are_decoded_within_half_a_step(
            values in prop::collection::vec(-3f32..3.0, 1..200),
            group in prop::sample::select(vec![None, Some(32), Some(64)]),
            eight: bool,
        ) {
            let q = quantization(if eight { Bits::Eight } else { Bits::Four }, group);
            let (found, scales) = decoded(&values, 0..values.len(), q);
            let len = q.group_len(values.len());
            for (col, (x, y)) in values.iter().zip(&found).enumerate() {
                let step = scales[col / len].abs();
                // With 4 bits an element may lie outside the range: then it is decoded to the range's end.
                let is_end = !eight && (y.abs() >= 7.0 * step * 0.999);
                prop_assert!((x - y).abs() <= step * 0.500_01 || is_end && x.abs() > y.abs(), "{x} {y} {step}");
            }
        }

        #[test]
        fn a_part_of_a_row_is_quantized_as_in_the_whole_row(
            values in prop::collection::vec(-3f32..3.0, 96..=96), start in 0usize..3, row: bool, eight: bool,
        ) {
            let q = quantization(if eight { Bits::Eight } else { Bits::Four }, (!row).then_some(32));
            let whole = decoded(&values, 0..96, q).0;
            let part = decoded(&values, start * 32..96, q).0;
            prop_assert_eq!(&whole[start * 32..], &part[..]);
        }
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "any weights will do")]
    fn the_search_loses_less_than_plain_rounding() {
        let values: Vec<f32> =
            mixtral_testkit::elements::values("weights", 128 * 64, 1.0).into_iter().map(|x| x as f32).collect();
        let q = quantization(Bits::Four, Some(128));
        let loss = quantize_row(&values, 0..values.len(), q, None, &mut Vec::new(), &mut Vec::new());
        let plain: f32 = values
            .chunks(128)
            .map(|group| {
                let largest = group.iter().fold(0f32, |m, x| m.max(x.abs()));
                Rounding::new(largest / 7.0, DType::F32, -7.0, 7.0).error(group)
            })
            .sum();
        assert!(loss.error < 0.75 * f64::from(plain), "{} of {plain}", loss.error);
        assert!((loss.relative() - (loss.error / loss.energy).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn zeros_and_tiny_numbers_stay_finite() {
        for values in [vec![0.0; 32], vec![1e-45; 32], vec![3.3e38; 32], vec![-1e-38; 32]] {
            for bits in [Bits::Four, Bits::Eight] {
                for scale in [DType::F32, DType::F16, DType::Bf16] {
                    let q = Quantization { scale, ..quantization(bits, None) };
                    if scale == DType::F16 && values[0] == 3.3e38 {
                        continue;
                    }
                    let (found, _) = decoded(&values, 0..32, q);
                    assert!(found.iter().all(|x| x.is_finite()), "{bits:?} {scale} {values:?} {found:?}");
                    let exact = values[0] == 0.0;
                    assert!(!exact || found == values);
                }
            }
        }
    }
}
