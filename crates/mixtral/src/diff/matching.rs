//! Checks that two programs can be compared: the same operations on buffers of the same names.

use std::ops::RangeInclusive;

use anyhow::{Result, anyhow, bail};
use mixtral_engine::{EngineConfig, Op, Program};

use super::operands::{label, reads, writes};

/// Checks that two engines are of one model and take the same steps, whatever ranks they have.
///
/// # Errors
/// The difference.
pub fn same_model(reference: &EngineConfig, other: &EngineConfig) -> Result<()> {
    let unlike = |what: &str, a: String, b: String| {
        anyhow!(
            "the engines cannot be compared: {what} {a} in the reference and {b} in the other; build both with the same limits, from checkpoints of the same model"
        )
    };
    let (a, b) = (reference, other);
    if a.model != b.model {
        return Err(unlike("the model is", format!("({})", a.model), format!("({})", b.model)));
    }
    if a.limits != b.limits {
        return Err(unlike("the limits are", format!("{:?}", a.limits), format!("{:?}", b.limits)));
    }
    Ok(())
}

/// Checks that two programs have the same operations on the same buffers. What an operation computes with (a weight, an
/// epsilon, a window, kernels) may differ: the comparison is to find that.
///
/// # Errors
/// The first difference.
pub fn same_operations(reference: &Program, other: &Program) -> Result<()> {
    let unlike = |what: String| {
        anyhow!(
            "the engines cannot be compared: {what}; build both with the same limits, from checkpoints of the same geometry and data type"
        )
    };
    let numbers = |p: &Program| {
        [
            ("ranks", p.world_size),
            ("vocab_size", p.vocab_size),
            ("num_experts", p.num_experts),
            ("top_k", p.top_k),
            ("layers", p.kv.num_layers),
            ("KV heads", p.kv.num_kv_heads),
            ("head_dim", p.kv.head_dim),
            ("max_batch_size", p.limits.max_batch_size),
            ("max_num_tokens", p.limits.max_num_tokens),
            ("max_seq_len", p.limits.max_seq_len),
            ("max_num_logits", p.limits.max_num_logits),
            ("block_size", p.limits.block_size),
        ]
    };
    for ((what, a), (_, b)) in numbers(reference).into_iter().zip(numbers(other)) {
        if a != b {
            return Err(unlike(format!("{what} is {a} in the reference and {b} in the other")));
        }
    }
    if reference.kv.elem() != other.kv.elem() {
        return Err(unlike(format!(
            "the cache is {} in the reference and {} in the other",
            reference.kv.elem(),
            other.kv.elem()
        )));
    }
    for a in &reference.buffers {
        let Some(b) = other.buffer(&a.name) else {
            return Err(unlike(format!("the other has no buffer `{}`", a.name)));
        };
        if (a.dtype, a.rows, a.cols) != (b.dtype, b.rows, b.cols) {
            let (name, a, b) = (&a.name, (a.dtype, a.cols), (b.dtype, b.cols));
            return Err(unlike(format!(
                "buffer `{name}` is {} × {} in the reference and {} × {} in the other",
                a.0, a.1, b.0, b.1
            )));
        }
    }
    for (index, (a, b)) in reference.ops.iter().zip(&other.ops).enumerate() {
        if a.name() != b.name() || reads(a) != reads(b) || writes(a) != writes(b) {
            return Err(unlike(format!(
                "operation {index} is {} in the reference and {} in the other",
                label(a),
                label(b)
            )));
        }
    }
    let (a, b) = (reference.ops.len(), other.ops.len());
    if a != b { Err(unlike(format!("the reference has {a} operations and the other {b}"))) } else { Ok(()) }
}

/// The operations from the one that `first` names to the one that `last` names: by index, or by a buffer that they write.
///
/// # Errors
/// A name that no operation has, or a last operation before the first.
pub fn find(program: &Program, first: Option<&str>, last: Option<&str>) -> Result<RangeInclusive<usize>> {
    let index = |name: &str| -> Result<usize> {
        if let Ok(index) = name.parse::<usize>()
            && index < program.ops.len()
        {
            return Ok(index);
        }
        let writes = |op: &Op| op.writes().contains(&name);
        program.ops.iter().position(writes).ok_or_else(|| {
            anyhow!(
                "there is no operation `{name}`: give an index below {}, or a buffer that the operation writes, as `mixtral inspect` shows them",
                program.ops.len()
            )
        })
    };
    let first = first.map_or(Ok(0), index)?;
    let last = last.map_or(Ok(program.ops.len() - 1), index)?;
    if last < first {
        bail!("--stop names operation {last}, which is before operation {first} of --start");
    }
    Ok(first..=last)
}
