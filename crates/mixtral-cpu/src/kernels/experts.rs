//! `expert_gate_up` and `expert_down`: one linear for each expert, over the tokens that were sent to it.

use mixtral_engine::BackendError;
use rayon::prelude::*;

use super::elementwise::silu_mul_row;
use super::linear::{Workspace, linear, store};
use super::workers::{Workers, index};
use crate::weights::Matrix;

/// The assignments of the local experts: those of expert e are `order[offsets[e]..offsets[e + 1]]`.
#[derive(Clone, Copy)]
pub(crate) struct ExpertLists<'a> {
    pub(crate) offsets: &'a [i32],
    pub(crate) order: &'a [i32],
}

impl<'a> ExpertLists<'a> {
    /// For each expert, where its list starts, and the list. An error if they are not lists of the step's assignments.
    fn experts(&self) -> Result<Vec<(usize, &'a [i32])>, BackendError> {
        let problem = || BackendError::Other("the expert lists are not lists of this step's assignments".to_owned());
        let num_assignments = self.order.len();
        let within = |&a: &i32| usize::try_from(a).is_ok_and(|a| a < num_assignments);
        self.offsets
            .windows(2)
            .map(|edge| {
                let (start, end) = (index(edge[0]), index(edge[1]));
                let list = self.order.get(start..end).filter(|list| list.iter().all(within)).ok_or_else(problem)?;
                Ok((start, list))
            })
            .collect()
    }
}

/// One expert's product: its weight, its tokens, and where they go.
struct Product<'a> {
    weight: Matrix<'a>,
    inputs: Vec<&'a [u8]>,
    outs: Vec<&'a mut [u8]>,
}

/// If an expert's matrix has at most this many elements, each worker computes whole experts. Dividing so small a
/// product among workers costs more than it saves. All workers together stream larger matrices faster.
const SMALL: usize = 1 << 19;

/// Computes all products of an operation. `finish` turns each row of accumulators into output.
fn multiply(
    workers: &Workers<'_>,
    work: &mut Workspace,
    mut products: Vec<Product<'_>>,
    finish: impl Fn(&mut [f32], &mut [u8]) + Sync,
) -> Result<(), BackendError> {
    products.retain(|p| !p.inputs.is_empty());
    let one = |workers: &Workers<'_>, work: &mut Workspace, mut p: Product<'_>| {
        linear(workers, work, p.weight, &p.inputs, &mut p.outs, 0, |acc, out, _| finish(acc, out))
    };
    let elements = |p: &Product<'_>| p.weight.num_rows() * p.weight.cols;
    let work_in_all = products.iter().map(|p| elements(p) * p.inputs.len()).sum();
    let is_small = products.iter().all(|p| elements(p) <= SMALL);
    if products.len() > 1 && is_small && workers.is_parallel(work_in_all) {
        // The longest products come first, so that a short one finishes last.
        products.sort_by_key(|p| std::cmp::Reverse(p.inputs.len()));
        let spaces = work.apart(products.len())?;
        products.into_par_iter().zip(spaces).with_max_len(1).try_for_each(|(p, work)| one(&workers.alone(), work, p))
    } else {
        products.into_iter().try_for_each(|p| one(workers, work, p))
    }
}

/// Row p of `out` is the product of token `order[p] / top_k` with its expert's rows, up ‖ gate. `silu_mul` combines the
/// halves.
pub(crate) fn expert_gate_up(
    workers: &Workers<'_>,
    work: &mut Workspace,
    input: &[u8],
    weight: Matrix<'_>,
    lists: ExpertLists<'_>,
    top_k: usize,
    silu_mul: bool,
    out: &mut [u8],
) -> Result<(), BackendError> {
    let experts = lists.experts()?;
    let rows = weight.num_rows() / experts.len();
    let in_bytes = workers.row_bytes(weight.cols);
    let out_bytes = workers.row_bytes(if silu_mul { rows / 2 } else { rows });
    let mut products = Vec::with_capacity(experts.len());
    // The lists lie one after another, and so do their rows of the output.
    let first = experts.first().map_or(0, |(start, _)| *start);
    let mut rest = &mut out[first * out_bytes..];
    for (e, (_, list)) in experts.into_iter().enumerate() {
        let (outs, others) = rest.split_at_mut(list.len() * out_bytes);
        rest = others;
        products.push(Product {
            weight: weight.rows(e * rows, (e + 1) * rows),
            inputs: list.iter().map(|&a| &input[index(a) / top_k * in_bytes..][..in_bytes]).collect(),
            outs: outs.chunks_exact_mut(out_bytes).collect(),
        });
    }
    multiply(workers, work, products, |acc, out| {
        if silu_mul {
            workers.simd.round(workers.dtype, acc);
            silu_mul_row(workers, acc, out);
        } else {
            store(workers, acc, out);
        }
    })
}

/// Row `order[p]` of `out` is the product of row p of `input` with its expert's rows.
pub(crate) fn expert_down(
    workers: &Workers<'_>,
    work: &mut Workspace,
    input: &[u8],
    weight: Matrix<'_>,
    lists: ExpertLists<'_>,
    out: &mut [u8],
) -> Result<(), BackendError> {
    let experts = lists.experts()?;
    let rows = weight.num_rows() / experts.len();
    let (in_bytes, out_bytes) = (workers.row_bytes(weight.cols), workers.row_bytes(rows));
    let mut free: Vec<Option<&mut [u8]>> = out.chunks_exact_mut(out_bytes).map(Some).collect();
    let mut products = Vec::with_capacity(experts.len());
    for (e, (start, list)) in experts.into_iter().enumerate() {
        let outs: Option<Vec<&mut [u8]>> = list.iter().map(|&a| free[index(a)].take()).collect();
        products.push(Product {
            weight: weight.rows(e * rows, (e + 1) * rows),
            inputs: input[start * in_bytes..][..list.len() * in_bytes].chunks_exact(in_bytes).collect(),
            outs: outs.ok_or_else(|| BackendError::Other("the expert lists name an assignment twice".to_owned()))?,
        });
    }
    multiply(workers, work, products, |acc, out| store(workers, acc, out))
}
