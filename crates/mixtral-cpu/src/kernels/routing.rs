//! `softmax`, `top_k`, `expert_sort`; `route` is the three of them.

use std::ops::Range;

use mixtral_engine::math;
use mixtral_model::MoeNormalization;

use super::workers::index;

/// `exp(x − max)`, divided by their sum in ascending order.
pub(crate) fn softmax_row(logits: &[f32], probs: &mut [f32]) {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max });
    let mut sum = 0.0;
    for (p, x) in probs.iter_mut().zip(logits) {
        *p = math::exp(x - max);
        sum += *p;
    }
    probs.iter_mut().for_each(|p| *p /= sum);
}

/// The k largest values, in ascending id. Ties go to the lower id, and NaNs are taken last.
pub(crate) fn top_k_row(probs: &[f32], normalization: MoeNormalization, ids: &mut [i32], weights: &mut [f32]) {
    let mut taken: Vec<usize> = Vec::with_capacity(ids.len());
    for _ in 0..ids.len() {
        let mut best = None;
        for (expert, &p) in probs.iter().enumerate() {
            let better = |best: usize| p > probs[best] || probs[best].is_nan() && !p.is_nan();
            if !taken.contains(&expert) && best.is_none_or(better) {
                best = Some(expert);
            }
        }
        // A checked program has at least k experts, so there is always one left.
        taken.extend(best);
    }
    taken.sort_unstable();
    for ((expert, id), weight) in taken.iter().zip(ids).zip(&mut *weights) {
        *id = i32::try_from(*expert).unwrap_or(i32::MAX);
        *weight = probs[*expert];
    }
    if normalization == MoeNormalization::Renorm {
        let sum = weights.iter().fold(0.0, |sum, w| sum + w);
        weights.iter_mut().for_each(|w| *w /= sum);
    }
}

/// Lists the assignments of each local expert. Each list ascends.
pub(crate) fn expert_sort(ids: &[i32], experts: &Range<usize>, offsets: &mut [i32], order: &mut [i32]) {
    let local = |id: i32| usize::try_from(id).ok().filter(|id| experts.contains(id)).map(|id| id - experts.start);
    offsets.fill(0);
    for expert in ids.iter().filter_map(|&id| local(id)) {
        offsets[expert + 1] += 1;
    }
    for e in 1..offsets.len() {
        offsets[e] += offsets[e - 1];
    }
    let mut next: Vec<usize> = offsets.iter().map(|&o| index(o)).collect();
    for (assignment, &id) in (0i32..).zip(ids) {
        if let Some(expert) = local(id) {
            order[next[expert]] = assignment;
            next[expert] += 1;
        }
    }
}
