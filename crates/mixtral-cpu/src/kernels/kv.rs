//! `write_kv`.

use mixtral_model::{ElemType, fp8};

use super::rope::{RopeTable, rotate};
use super::workers::Workers;
use crate::cache::KvShape;

/// Where the heads of each row lie in a buffer. Rows have `stride` bytes, and the heads begin at `start` of a row.
#[derive(Clone, Copy)]
pub(crate) struct Heads<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) start: usize,
    pub(crate) stride: usize,
}

/// The directions of a layer's keys (`KeyDirections`), and the angles of the step's positions.
#[derive(Clone, Copy)]
pub(crate) struct Directions<'a> {
    /// `[kv_heads, d]`.
    pub(crate) of_heads: &'a [f32],
    pub(crate) table: &'a RopeTable,
}

/// `cache[slot_mapping[t]] = data[t]`, or `e4m3(data[t] / scale)` in an fp8 cache; a slot of −1 writes nothing.
pub(crate) fn write_kv(
    workers: &Workers<'_>,
    data: Heads<'_>,
    slot_mapping: &[i32],
    shape: KvShape,
    scale: f32,
    directions: Option<Directions<'_>>,
    cache: &mut [u8],
) {
    let (size, stored) = (workers.row_bytes(shape.head_dim), shape.head_dim * shape.elem.size());
    let mut turned = vec![0.0; shape.head_dim];
    for (token, (&slot, row)) in slot_mapping.iter().zip(data.bytes.chunks_exact(data.stride)).enumerate() {
        let Ok(slot) = usize::try_from(slot) else { continue };
        for (head, vector) in row[data.start..].chunks_exact(size).take(shape.num_kv_heads).enumerate() {
            let place = &mut cache[shape.offset(slot, head)..][..stored];
            if shape.elem != ElemType::F8E4M3 {
                place.copy_from_slice(vector);
                continue;
            }
            let mut values = workers.dtype.widen(vector);
            values.iter_mut().for_each(|x| *x /= scale);
            place.iter_mut().zip(&values).for_each(|(byte, &x)| *byte = fp8::to_bits(x));
            if let Some(Directions { of_heads, table }) = directions {
                turned.copy_from_slice(&of_heads[head * shape.head_dim..][..shape.head_dim]);
                rotate(&mut turned, table.at(token, shape.head_dim));
                take_alternatives(&values, &turned, place);
            }
        }
    }
}

/// How many elements of a key take their alternative at most.
const TIMES: usize = 2;

/// Replaces bytes of a key by their alternatives, as `KeyDirections` says. `values` is the key over its scale, `u` its direction, turned.
fn take_alternatives(values: &[f32], u: &[f32], bytes: &mut [u8]) {
    let others: Vec<u8> =
        values.iter().zip(&*bytes).map(|(&x, &byte)| fp8::other_side(byte, x).unwrap_or(byte)).collect();
    let mut errors: Vec<f32> = values.iter().zip(&*bytes).map(|(x, &byte)| x - fp8::from_bits(byte)).collect();
    let mut steps: Vec<f32> =
        bytes.iter().zip(&others).map(|(&byte, &other)| fp8::from_bits(byte) - fp8::from_bits(other)).collect();
    let half = values.len() / 2;
    let pair = |i: usize| u[half + i].mul_add(errors[half + i], u[i] * errors[i]);
    let mut sums: Vec<f32> = (0..half).map(pair).collect();
    while sums.len() > 1 {
        sums = sums.chunks_exact(2).map(|pair| pair[0] + pair[1]).collect();
    }
    let mut rho = sums[0];
    for _ in 0..TIMES {
        let cost = |i: usize| {
            let slope = rho.mul_add(u[i], errors[i]);
            steps[i] * u[i].mul_add(u[i], 1.0).mul_add(steps[i], slope + slope)
        };
        let least = (0..values.len()).map(|i| (cost(i), i)).filter(|&(cost, _)| cost < 0.0);
        let Some((_, i)) = least.reduce(|least, next| if next.0 < least.0 { next } else { least }) else { break };
        bytes[i] = if bytes[i] == others[i] { fp8::to_bits(values[i]) } else { others[i] };
        errors[i] += steps[i];
        rho = u[i].mul_add(steps[i], rho);
        steps[i] = -steps[i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::cast_possible_truncation, reason = "f32s")]
    fn values(name: &str, n: usize, scale: f32) -> Vec<f32> {
        mixtral_testkit::elements::values(name, n, scale).into_iter().map(|x| x as f32).collect()
    }

    /// Σ u·e and Σ e² of a key's bytes.
    fn errors(values: &[f32], u: &[f32], bytes: &[u8]) -> (f64, f64) {
        let errors = values.iter().zip(bytes).map(|(&x, &byte)| f64::from(x) - f64::from(fp8::from_bits(byte)));
        let along = errors.clone().zip(u).map(|(e, &u)| e * f64::from(u)).sum();
        (along, errors.map(|e| e * e).sum())
    }

    #[test]
    fn the_two_best_alternatives_are_taken() {
        let mut random = values("keys", 64 * 40, 30.0).into_iter();
        let mut take = |n: usize, by: f32| -> Vec<f32> { random.by_ref().take(n).map(|x| x * by).collect() };
        let (mut before, mut after) = (0.0, 0.0);
        for _ in 0..20 {
            let (values, u) = (take(64, 1.0), take(64, 0.05));
            let nearest: Vec<u8> = values.iter().map(|&x| fp8::to_bits(x)).collect();
            let mut bytes = nearest.clone();
            take_alternatives(&values, &u, &mut bytes);
            let cost = |bytes: &[u8]| {
                let (along, square) = errors(&values, &u, bytes);
                along * along + square
            };
            // No single change would have been better than the first, and no other second one.
            let changed = |bytes: &[u8], i: usize| {
                let mut changed = bytes.to_vec();
                changed[i] = fp8::other_side(nearest[i], values[i]).unwrap_or(nearest[i]);
                changed
            };
            let best_of = |bytes: &[u8]| {
                let all = (0..64).map(|i| changed(bytes, i)).map(|bytes| (cost(&bytes), bytes));
                all.min_by(|a, b| a.0.total_cmp(&b.0)).expect("64 of them")
            };
            let first = best_of(&nearest);
            let best = if first.0 >= cost(&nearest) { nearest.clone() } else { first.1 };
            let second = best_of(&best);
            let best = if second.0 >= cost(&best) { best } else { second.1 };
            assert_eq!(bytes, best);
            assert!(nearest.iter().zip(&bytes).filter(|(a, b)| a != b).count() <= TIMES);
            before += errors(&values, &u, &nearest).0.powi(2);
            after += errors(&values, &u, &bytes).0.powi(2);
        }
        assert!(after < 0.05 * before, "{after} {before}");
    }

    #[test]
    fn without_a_direction_nothing_changes() {
        let values = values("keys", 32, 3.0);
        let nearest: Vec<u8> = values.iter().map(|&x| fp8::to_bits(x)).collect();
        let mut bytes = nearest.clone();
        take_alternatives(&values, &[0.0; 32], &mut bytes);
        assert_eq!(bytes, nearest);
        // What is too large, and NaN, has no alternative.
        let (values, u) = ([1e9, f32::NAN, 448.0, -500.0].repeat(4), [1.0; 16]);
        let mut bytes: Vec<u8> = values.iter().map(|&x| fp8::to_bits(x)).collect();
        let nearest = bytes.clone();
        take_alternatives(&values, &u, &mut bytes);
        assert_eq!(bytes, nearest);
    }
}
