//! Buffers that overlap.

use mixtral_model::DType;

use super::*;
use crate::KvLayout;

/// A program of sums `out = a + b`, over buffers at the given offsets.
fn sums(buffers: &[(&str, usize)], ops: &[[&str; 3]]) -> Program {
    let buffer = |&(name, offset): &(&str, usize)| Buffer {
        name: name.to_owned(),
        dtype: ElemType::F32,
        rows: Rows::Tokens,
        cols: 4,
        offset,
    };
    let sum = |[a, b, out]: &[&str; 3]| Op::Add { a: (*a).to_owned(), b: (*b).to_owned(), out: (*out).to_owned() };
    Program {
        rank: 0,
        world_size: 1,
        tp_size: 1,
        dtype: DType::F32,
        vocab_size: 1,
        num_layers: 1,
        num_experts: 0,
        top_k: 0,
        limits: Limits { max_batch_size: 1, max_num_tokens: 8, max_seq_len: 8, max_num_logits: 1, block_size: 4 },
        kv: KvLayout { num_layers: 1, num_kv_heads: 1, head_dim: 4, dtype: DType::F32 },
        arena_bytes: 1024,
        buffers: buffers.iter().map(buffer).collect(),
        weights: vec![],
        ops: ops.iter().map(sum).collect(),
    }
}

#[test]
fn buffers_that_are_needed_together_lie_apart() {
    // Each is 128 bytes: 8 tokens of 4 elements of 4 bytes.
    let said = |buffers: &[(&str, usize)], ops: &[[&str; 3]]| sums(buffers, ops).check().unwrap_err().to_string();
    let said = [
        said(&[("a", 0), ("b", 0)], &[["a", "a", "b"]]),
        said(&[("a", 0), ("b", 64)], &[["a", "a", "b"]]),
        said(&[("a", 64), ("b", 0)], &[["a", "a", "b"]]),
        // A buffer that is not needed in between, but again later.
        said(&[("a", 0), ("b", 128), ("c", 0)], &[["b", "b", "b"], ["a", "b", "b"], ["b", "b", "c"], ["a", "c", "b"]]),
        // A buffer whose last use is the operation that first uses the other: the operation needs both.
        said(&[("a", 0), ("b", 128), ("c", 64)], &[["a", "a", "b"], ["a", "b", "c"]]),
        // A third buffer that overlaps one of two that do not overlap.
        said(&[("a", 0), ("b", 192), ("c", 128)], &[["a", "a", "b"], ["a", "b", "c"], ["a", "b", "c"]]),
    ];
    insta::assert_snapshot!(said.join("\n"));
}

#[test]
fn memory_may_be_used_again_and_in_place() {
    // Side by side; at the place of a buffer that is no longer needed; in place.
    sums(&[("a", 0), ("b", 128)], &[["a", "a", "b"]]).check().unwrap();
    sums(&[("a", 0), ("b", 128), ("c", 64)], &[["a", "a", "b"], ["b", "b", "b"]]).check().unwrap();
    sums(&[("a", 0), ("b", 128), ("c", 0)], &[["a", "a", "b"], ["b", "b", "c"]]).check().unwrap();
    sums(&[("a", 0), ("b", 128), ("c", 64)], &[["a", "a", "a"], ["a", "a", "a"]]).check().unwrap();
    // The planner's offsets pass, whatever they were before.
    let mut program = sums(&[("a", 0), ("b", 0), ("c", 0)], &[["a", "a", "b"], ["a", "b", "c"], ["c", "c", "c"]]);
    program.check().unwrap_err();
    program.plan_arena();
    program.check().unwrap();
}
