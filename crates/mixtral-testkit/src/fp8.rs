//! The 8-bit float e4m3 by its definition, and the cases of operations on weights and caches of it.

use std::sync::LazyLock;

use mixtral_engine::{KvScale, Weight, WeightSource};
use mixtral_model::{CacheFormat, DType, Fp8Input, WeightFormat};

use crate::cases::{self, Case};
use crate::quantized;
use crate::tolerance::Tolerance;

/// The scale of the inputs of fp8 weights in cases. Inputs of standard deviation 1 are often too large for it.
pub(crate) const INPUT_SCALE: f32 = 1.0 / 256.0;

/// The byte of 448, the largest number.
const LARGEST: u8 = 0x7e;

/// The number of a byte; NaN for the byte of NaN.
#[must_use]
pub fn from_bits(byte: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f64::NAN,
        (0, _) => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The byte of the number that is nearest to `x`; of two that are equally near, the even one.
#[must_use]
pub fn to_bits(x: f64) -> u8 {
    if x.is_nan() {
        return 0x7f;
    }
    static MAGNITUDES: LazyLock<Vec<f64>> = LazyLock::new(|| (0..=LARGEST).map(from_bits).collect());
    // Magnitudes ascend with their bytes.
    let above = MAGNITUDES.partition_point(|magnitude| *magnitude <= x.abs()).min(usize::from(LARGEST));
    let [low, high] = [above.saturating_sub(1), above];
    let [to_low, to_high] = [low, high].map(|byte| (MAGNITUDES[byte] - x.abs()).abs());
    let nearest = if to_low < to_high || to_low == to_high && low % 2 == 0 { low } else { high };
    u8::try_from(nearest).expect("a byte") | if x.is_sign_negative() { 0x80 } else { 0 }
}

/// `x / scale`, a quotient in f32, as its nearest number. By scales that are no powers of two many exact quotients would lie
/// just beside the middle of two numbers, where those in f32 lie in it.
#[expect(clippy::cast_possible_truncation, reason = "it was an f32")]
pub(crate) fn round(x: f64, scale: f32) -> f64 {
    from_bits(to_bits(f64::from(x as f32 / scale)))
}

/// The limits of attention in fp8. A probability p that lies nearly between two numbers of e4m3 may become either of them, which are
/// at most an eighth of it apart. An output, a mean of values, then moves by at most p · (1 − p) / 8 of the distance between that value
/// and the mean. Few of them do so, and the mean error stays small; leaving a rounding out makes a mean square of 7e-4.
pub(crate) fn context(dtype: DType) -> Tolerance {
    let half_steps = if dtype == DType::F16 { 128.0 } else { 16.0 };
    Tolerance { f32_error: 1e-5, half_error: 3e-5, f32_element: 0.125, half_steps, half_unequal: 0.02 }
}

/// What scores of attention in fp8 become: probabilities rounded relative to a power of two.
pub(crate) fn probabilities(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let from = (max / std::f64::consts::LN_2).ceil() * std::f64::consts::LN_2;
    let p: Vec<f64> = scores.iter().map(|score| from_bits(to_bits(256.0 * (score - from).exp()))).collect();
    let sum: f64 = p.iter().sum();
    p.iter().map(|p| p / sum).collect()
}

/// What inputs, a row for each token, stand for when they are multiplied with this weight: for an fp8 weight, the numbers that they are
/// rounded to, times their scales.
#[expect(clippy::cast_possible_truncation, reason = "scales were f32")]
pub(crate) fn input(weight: &Weight, source: &dyn WeightSource, x: &[f64]) -> Vec<f64> {
    let scale: &dyn Fn(&[f64]) -> f64 = match weight.format {
        WeightFormat::Fp8 | WeightFormat::Fp8Rows(Fp8Input::Static) => &|_| quantized::floats(weight, source, 2)[0],
        WeightFormat::Fp8Rows(Fp8Input::Token) => &|row| f64::from(token_scale(row)),
        _ => return x.to_vec(),
    };
    let of_row = |row: &[f64]| {
        let scale = scale(row);
        row.iter().map(|x| round(*x, scale as f32) * scale).collect::<Vec<_>>()
    };
    x.chunks(weight.cols()).flat_map(of_row).collect()
}

/// The scale of a token's row: a rounded quotient, as the contract has it.
#[expect(clippy::cast_possible_truncation, reason = "it was an f32")]
fn token_scale(x: &[f64]) -> f32 {
    let amax = x.iter().fold(0.0, |amax, x| x.abs().max(amax)) as f32;
    if amax == 0.0 { 1.0 } else { amax / 448.0 }
}

/// Linears and experts with fp8 weights.
#[must_use]
pub fn linears(dtype: DType) -> Vec<Case> {
    // Rows of 16 bytes and more, which Hopper's tensor cores take, up to several tiles of tokens.
    let sizes = [(1, 144, 8), (17, 4096, 40), (65, 272, 136), (300, 400, 264), (520, 256, 136)];
    let whole = [quantized::linears(dtype, "fp8", &sizes), quantized::experts(dtype, "fp8", [144, 80])].concat();
    // With scales for each row, and in two types for each token. (The GPU tests' short_sums.rs explains a limit by one of 160 × 72.)
    let word = if dtype == DType::F16 { "fp8:row:static" } else { "fp8:row:token" };
    let some = [quantized::linears(dtype, word, &sizes[2..3]), quantized::experts(dtype, word, [144, 80])].concat();
    let rows = [quantized::cases_of(dtype, word, [160, 72]), some, extremes(dtype, word)].concat();
    // Steps of the tallest tiles, with one to three boxes of tokens in an expert's last tile; in bf16 with more blocks of K than a
    // ring has stages, and several tiles of rows.
    let widths = if dtype == DType::Bf16 { [528, 160] } else { [144, 80] };
    let long = [quantized::long_step(dtype, "fp8", widths, 360), quantized::long_step(dtype, word, [144, 80], 360)];
    [quantized::cases_of(dtype, "fp8", [160, 72]), whole, extremes(dtype, "fp8"), rows, long.concat()].concat()
}

/// Inputs that are too small or too large for e4m3, or not numbers.
fn extremes(dtype: DType, word: &str) -> Vec<Case> {
    let [small, large, odd] = ["small", "large", "odd"].map(|name| {
        let case = quantized::linears(dtype, word, &[(9, 272, 72)]).remove(0);
        Case { name: format!("{} of {name} inputs", case.name), ..case }
    });
    // Divided by their scale, these are at most a few times e4m3's smallest number, and often 0.
    let small = small.fill("x", 1e-5);
    let large = large.fill("x", 30.0);
    let x = (0..9 * 272).map(|i| match i % 700 {
        1 => f64::INFINITY,
        2 => f64::NEG_INFINITY,
        600 => f64::NAN,
        _ => f64::from(i % 13) / 8.0 - 0.75,
    });
    vec![small, large, odd.floats("x", x.collect())]
}

/// Rotations, writes and attention with an fp8 cache. The scales let many values saturate; some cases have scales that leave
/// little but subnormal numbers and zeros.
#[must_use]
pub fn caches(dtype: DType) -> Vec<Case> {
    let mut cases = cases::attention(dtype);
    if dtype != DType::F32 {
        cases.extend([cases::attention_by_tiles(dtype), cases::decodes_by_tiles(dtype)].concat());
    }
    // Windows of one token, and windows larger than a sequence, do not depend on what the cache stores.
    let is_left_out =
        |name: &str| name.starts_with("rope ") || [" Some(1) ", " Some(1000) "].iter().any(|w| name.contains(w));
    cases.retain(|case| !is_left_out(&case.name));
    let is_small = |case: &&Case| ["1x6x128 ", "1x128 "].iter().any(|shape| case.name.contains(shape));
    let small: Vec<Case> = cases.iter().filter(is_small).cloned().collect();
    let with = |cases: Vec<Case>, key, value| {
        cases.into_iter().map(move |case| case.with_cache(CacheFormat::Fp8, KvScale { key, value }))
    };
    let suits = |case: &&Case| {
        case.name.starts_with("rope_write_kv")
            && mixtral_model::fp8::suits_directions(case.assembly.program.kv.head_dim)
    };
    let directed: Vec<Case> = cases.iter().filter(suits).cloned().collect();
    // Nearly no value saturates, so that nearly all have alternatives.
    let directed = with(directed, 0.0031, 0.0031).map(Case::with_directions);
    with(cases, 0.0117, 0.0031).chain(with(small, 40.0, 250.0)).chain(directed).collect()
}

/// The bytes of a key over its scale, rounded by a direction as `mixtral_engine::KeyDirections` says.
pub(crate) fn by_direction(values: &[f64], direction: &[f64]) -> Vec<u8> {
    let mut bytes: Vec<u8> = values.iter().map(|&x| to_bits(x)).collect();
    let nearest = bytes.clone();
    let other = |i: usize| match nearest[i] & 0x7f {
        0x7f => nearest[i],
        _ if from_bits(nearest[i]).abs() > values[i].abs() => nearest[i] - 1,
        LARGEST => nearest[i],
        _ => nearest[i] + 1,
    };
    let others: Vec<u8> = (0..values.len()).map(other).collect();
    for _ in 0..2 {
        let errors: Vec<f64> = values.iter().zip(&bytes).map(|(x, &byte)| x - from_bits(byte)).collect();
        let along: f64 = errors.iter().zip(direction).map(|(e, u)| e * u).sum();
        let square: f64 = errors.iter().map(|e| e * e).sum();
        // What the errors would be with the alternative of element i.
        let cost = |i: usize| {
            let error = values[i] - from_bits(if bytes[i] == nearest[i] { others[i] } else { nearest[i] });
            let along = along + (error - errors[i]) * direction[i];
            along * along + square - errors[i] * errors[i] + error * error
        };
        let least = (0..values.len()).map(|i| (cost(i), i)).reduce(|a, b| if b.0 < a.0 { b } else { a });
        match least {
            Some((least, i)) if least < along * along + square => {
                bytes[i] = if bytes[i] == nearest[i] { others[i] } else { nearest[i] };
            }
            _ => break,
        }
    }
    bytes
}

/// Attention of prompts in fp8, beside decodes, which are not. Some queries are so large that one key gets nearly everything, and some
/// are too large for e4m3.
#[must_use]
pub fn contexts(dtype: DType) -> Vec<Case> {
    let mut cases = [cases::attention(dtype), cases::attention_by_tiles(dtype)].concat();
    cases.retain(|case| {
        let of_window = [" None ", " Some(21) "].iter().any(|window| case.name.contains(window));
        case.name.starts_with("attention ") && of_window
    });
    let like =
        |case: &&Case| case.name.contains("tiles 2x2x128 window None ") || case.name.contains("1x6x128 window None ");
    let with_queries = |scale: f32| {
        let of =
            move |case: &Case| Case { name: format!("{} of {scale}", case.name), ..case.clone() }.fill("qkv", scale);
        cases.iter().filter(like).map(of).collect::<Vec<_>>()
    };
    let (strong, large) = (with_queries(6.0), with_queries(300.0));
    let with = |cases: Vec<Case>, key| {
        let scale = KvScale { key, value: 0.0031 };
        cases.into_iter().map(move |case| case.with_cache(CacheFormat::Fp8, scale).with_fp8_context())
    };
    with(cases.clone(), 0.0117).chain(with(strong, 0.0117)).chain(with(large, 1e-4)).collect()
}
