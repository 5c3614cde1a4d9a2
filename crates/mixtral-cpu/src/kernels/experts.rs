//! `expert_gate_up` and `expert_down`: one linear an expert, over the tokens that were sent to it.

use mixtral_engine::BackendError;

use super::context::{Context, index};
use super::elementwise::silu_mul_row;
use super::linear::{Workspace, linear, store};
use crate::weights::Matrix;

/// The assignments of the local experts: those of expert e are `order[offsets[e]..offsets[e + 1]]`.
#[derive(Clone, Copy)]
pub(crate) struct ExpertLists<'a> {
    pub(crate) offsets: &'a [i32],
    pub(crate) order: &'a [i32],
}

impl<'a> ExpertLists<'a> {
    /// The lists of each expert, if they are lists of the step's assignments.
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

/// Row p of `out` is token `order[p] / top_k` by its expert's rows, up ‖ gate; `silu_mul` joins the halves.
pub(crate) fn expert_gate_up(
    ctx: &Context<'_>,
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
    let in_bytes = ctx.row_bytes(weight.cols);
    let out_bytes = ctx.row_bytes(if silu_mul { rows / 2 } else { rows });
    for (e, (start, list)) in experts.into_iter().enumerate() {
        let inputs: Vec<&[u8]> = list.iter().map(|&a| &input[index(a) / top_k * in_bytes..][..in_bytes]).collect();
        let outs = &mut out[start * out_bytes..][..list.len() * out_bytes];
        let mut outs: Vec<&mut [u8]> = outs.chunks_exact_mut(out_bytes).collect();
        linear(ctx, work, weight.rows(e * rows, (e + 1) * rows), &inputs, &mut outs, 0, |acc, out, _| {
            if silu_mul {
                ctx.simd.round(ctx.dtype, acc);
                silu_mul_row(ctx, acc, out);
            } else {
                store(ctx, acc, out);
            }
        })?;
    }
    Ok(())
}

/// Row `order[p]` of `out` is row p of `input` by its expert's rows.
pub(crate) fn expert_down(
    ctx: &Context<'_>,
    work: &mut Workspace,
    input: &[u8],
    weight: Matrix<'_>,
    lists: ExpertLists<'_>,
    out: &mut [u8],
) -> Result<(), BackendError> {
    let experts = lists.experts()?;
    let rows = weight.num_rows() / experts.len();
    let (in_bytes, out_bytes) = (ctx.row_bytes(weight.cols), ctx.row_bytes(rows));
    let mut free: Vec<Option<&mut [u8]>> = out.chunks_exact_mut(out_bytes).map(Some).collect();
    for (e, (start, list)) in experts.into_iter().enumerate() {
        let inputs: Vec<&[u8]> = input[start * in_bytes..][..list.len() * in_bytes].chunks_exact(in_bytes).collect();
        let outs: Option<Vec<&mut [u8]>> = list.iter().map(|&a| free[index(a)].take()).collect();
        let mut outs =
            outs.ok_or_else(|| BackendError::Other("the expert lists name an assignment twice".to_owned()))?;
        linear(ctx, work, weight.rows(e * rows, (e + 1) * rows), &inputs, &mut outs, 0, |acc, out, _| {
            store(ctx, acc, out);
        })?;
    }
    Ok(())
}
