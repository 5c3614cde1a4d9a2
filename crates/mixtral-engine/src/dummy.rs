//! Dummy weights. An element is a function of the seed, the Hugging Face name of its tensor, and its index in the
//! whole, unsharded tensor. So every layout of ranks holds the same model. No math library is involved, and each
//! backend has the same few lines.

use mixtral_model::{Bits, DType, Piece, Quantization, fp8};

/// Hash of the seed and a tensor's name: FNV-1a over the name's bytes, started from the seed.
#[must_use]
pub fn key(seed: u64, name: &str) -> u64 {
    name.bytes()
        .fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A 32-bit integer mix with full avalanche.
#[must_use]
#[inline(always)]
pub const fn mix(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// The factor that gives elements a standard deviation of 1/√`fan_in`. An element is a sum of four uniform bytes, which
/// has variance 4 · (256² − 1) / 12 = 21845.
#[must_use]
#[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "one f32 constant is the contract")]
pub fn scale(fan_in: usize) -> f32 {
    (1.0 / (21_845.0 * fan_in as f64).sqrt()) as f32
}

/// Element `index` of a whole tensor, before rounding to its data type.
#[must_use]
#[inline(always)]
pub fn element(key: u64, index: u64, scale: f32) -> f32 {
    let word = word(key, index);
    let sum = (word & 0xff) + ((word >> 8) & 0xff) + ((word >> 16) & 0xff) + (word >> 24);
    // At most 1020: exact in f32.
    (sum as f32 - 510.0) * scale
}

/// Whether the tensor is an RMSNorm weight. All its elements are 1.
#[must_use]
pub fn is_norm(name: &str) -> bool {
    name.ends_with("norm.weight")
}

/// Fills `out` with row `row` of a piece, rounded to `dtype` and widened to f32.
pub fn fill_row(seed: u64, piece: &Piece, row: usize, dtype: DType, out: &mut [f32]) {
    if is_norm(&piece.source) {
        out.fill(1.0);
        return;
    }
    let (key, scale) = (key(seed, &piece.source), scale(piece.source_cols));
    let first = row as u64 * piece.source_cols as u64 + piece.cols.start as u64;
    for (index, value) in (first..).zip(out) {
        *value = dtype.round(element(key, index, scale));
    }
}

/// The random word of element `index` of a whole tensor.
#[must_use]
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the two halves of a 64-bit number")]
pub const fn word(key: u64, index: u64) -> u32 {
    let (low, high) = (index as u32, (index >> 32) as u32);
    mix(mix(low ^ (key as u32) ^ high.wrapping_mul(0x9e37_79b9)).wrapping_add((key >> 32) as u32))
}

/// Integers of a quantized dummy weight are uniform in `1..=2 middle − 1`, so their mean is `middle`.
const fn integer(word: u32, bits: Bits) -> u32 {
    1 + word % (2 * bits.middle() as u32 - 1)
}

/// Fills `out` with the packed integers of row `row` of a piece. The piece's columns begin and end at whole bytes, or at the end
/// of the row.
#[expect(clippy::cast_possible_truncation, reason = "at most 255")]
pub fn fill_integers(seed: u64, piece: &Piece, row: usize, quantization: Quantization, out: &mut [u8]) {
    let (key, bits) = (key(seed, &piece.source), quantization.bits);
    let first = row as u64 * piece.source_cols as u64;
    let at = |col: usize| if col < piece.cols.end { integer(word(key, first + col as u64), bits) as u8 } else { 0 };
    for (cols, byte) in piece.cols.clone().step_by(bits.per_byte()).zip(out) {
        *byte = match bits {
            Bits::Four => at(cols) | at(cols + 1) << 4,
            Bits::Eight => at(cols),
        };
    }
}

/// The part of a row's groups that a piece's columns lie in: their first group, counted over the whole tensor.
fn first_group(piece: &Piece, row: usize, quantization: Quantization) -> u64 {
    let groups = quantization.groups(piece.source_cols) as u64;
    row as u64 * groups + (piece.cols.start / quantization.group_len(piece.source_cols)) as u64
}

/// The middle of the scales of a quantized dummy weight whose rows have `fan_in` elements. Integers that are uniform over
/// `n = 2 middle − 1` values have variance (n² − 1) / 12, so elements have a standard deviation of about 1/√`fan_in`.
#[must_use]
#[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "one f32 constant is the contract")]
pub fn scale_of_integers(fan_in: usize, bits: Bits) -> f32 {
    let values = 2.0 * f64::from(bits.middle()) - 1.0;
    (1.0 / ((values * values - 1.0) / 12.0 * fan_in as f64).sqrt() / 256.0) as f32
}

/// Fills `out` with the scales of row `row` of a piece, rounded to their type: uniform between 3/4 and 5/4 of
/// 256 [`scale_of_integers`].
#[expect(clippy::cast_precision_loss, reason = "at most 319: exact in f32")]
pub fn fill_scales(seed: u64, piece: &Piece, row: usize, quantization: Quantization, out: &mut [f32]) {
    let key = key(seed, &format!("{}.scales", piece.source));
    let scale = scale_of_integers(piece.source_cols, quantization.bits);
    for (index, value) in (first_group(piece, row, quantization)..).zip(out) {
        *value = quantization.scale.round((192 + (word(key, index) & 127)) as f32 * scale);
    }
}

/// Fills `out` with the zeros of row `row` of a piece: `middle` or one of its neighbours.
pub fn fill_zeros(seed: u64, piece: &Piece, row: usize, quantization: Quantization, out: &mut [u8]) {
    let key = key(seed, &format!("{}.zeros", piece.source));
    for (index, zero) in (first_group(piece, row, quantization)..).zip(out) {
        *zero = quantization.bits.middle() - 1 + (word(key, index) % 3) as u8;
    }
}

/// The scale of an fp8 dummy weight: its largest element is the largest number of the format.
#[must_use]
pub fn scale_of_fp8(fan_in: usize) -> f32 {
    510.0 * scale(fan_in) / fp8::MAX
}

/// The scale of the input of an fp8 dummy weight. A norm makes numbers around 1, of which few are above 14.
pub const FP8_INPUT_SCALE: f32 = 1.0 / 32.0;

/// Fills `out` with row `row` of a piece of an fp8 dummy weight.
pub fn fill_fp8(seed: u64, piece: &Piece, row: usize, out: &mut [u8]) {
    let (key, scale) = (key(seed, &piece.source), scale(piece.source_cols));
    let first = row as u64 * piece.source_cols as u64 + piece.cols.start as u64;
    for (index, byte) in (first..).zip(out) {
        *byte = fp8::to_bits(element(key, index, scale) / scale_of_fp8(piece.source_cols));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_pinned() {
        let key = key(7, "model.layers.0.self_attn.q_proj.weight");
        let scale = scale(4096);
        let values: Vec<f32> = [0, 1, 4095, 4096, 1 << 33].map(|i| element(key, i, scale)).to_vec();
        insta::assert_debug_snapshot!((key, scale, values));
    }

    #[test]
    fn a_row_is_that_part_of_the_whole_tensor() {
        let piece = |source: &str| Piece {
            source: source.to_owned(),
            source_rows: 4,
            source_cols: 6,
            rows: 1..4,
            cols: 2..5,
            target_row: 0,
        };
        let row = |source: &str, dtype: DType| {
            let mut values = [0.0; 3];
            fill_row(9, &piece(source), 3, dtype, &mut values);
            values
        };
        let expected = [20, 21, 22].map(|index| element(key(9, "w"), index, scale(6)));
        assert_eq!(row("w", DType::F32), expected);
        assert_eq!(row("w", DType::Bf16), expected.map(|value| DType::Bf16.round(value)));
        assert_eq!(row("model.norm.weight", DType::F32), [1.0; 3]);
    }

    #[test]
    fn moments_are_those_of_the_contract() {
        let key = key(0, "w");
        let scale = scale(100);
        let n = 200_000u64;
        let (mut sum, mut squares) = (0.0f64, 0.0f64);
        for i in 0..n {
            let x = f64::from(element(key, i, scale));
            sum += x;
            squares += x * x;
        }
        let n = 200_000.0;
        assert!((sum / n).abs() < 1e-3);
        assert!(((squares / n).sqrt() - 0.1).abs() < 1e-3);
    }
}
