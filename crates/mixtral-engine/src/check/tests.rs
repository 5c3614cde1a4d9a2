//! Buffers that overlap, and the bounds of limits, weights and pieces.

use std::ops::Range;

use mixtral_model::{DType, ElemType, Piece, WeightFormat};

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
        kv: KvLayout {
            num_layers: 1,
            num_kv_heads: 1,
            head_dim: 4,
            dtype: DType::F32,
            format: mixtral_model::CacheFormat::Plain,
        },
        kv_scales: Vec::new(),
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
    // It uses the memory of `a` again, which nothing needs when `c` is written.
    let mut program = sums(&[("a", 0), ("b", 0), ("c", 0)], &[["a", "a", "b"], ["b", "b", "c"]]);
    program.plan_arena();
    assert_eq!(program.arena_bytes, 2 * 128);
}

#[test]
fn a_buffer_without_rows_is_in_nobodys_way() {
    // Assignments of tokens to experts, of which a model without experts has none.
    let silu = |input: &str, out: &str| Op::SiluMul { input: input.to_owned(), out: out.to_owned() };
    let mut program = sums(&[("a", 0), ("b", 0), ("c", 0)], &[["c", "c", "c"]]);
    program.ops.insert(0, silu("a", "b"));
    program.ops.push(silu("a", "b"));
    for (buffer, cols) in program.buffers.iter_mut().zip([8, 4]) {
        (buffer.rows, buffer.cols) = (Rows::Assignments, cols);
    }
    program.check().unwrap();
}

#[test]
fn buffers_end_where_the_arena_does() {
    let program = |offset| sums(&[("a", offset)], &[["a", "a", "a"]]);
    program(1024 - 128).check().unwrap();
    let ends = |program: Program| program.check().unwrap_err().to_string();
    assert_eq!(ends(program(1024 - 64)), "program: buffer `a` ends at byte 1088, past the arena's 1024");
    assert_eq!(ends(program(32)), "program: buffer `a` starts at byte 32, which is not a multiple of 64");
}

#[test]
fn limits_have_bounds() {
    let most = Limits {
        max_batch_size: 1 << 20,
        max_num_tokens: 1 << 24,
        max_seq_len: 1 << 30,
        max_num_logits: 1 << 24,
        block_size: 1 << 12,
    };
    let least = Limits { max_batch_size: 1, max_num_tokens: 1, max_seq_len: 1, max_num_logits: 1, block_size: 1 };
    assert_eq!((most.check(), least.check()), (Ok(()), Ok(())));
    let said = [
        Limits { max_batch_size: most.max_batch_size + 1, ..most },
        Limits { max_batch_size: 0, ..least },
        Limits { max_num_tokens: most.max_num_tokens + 1, ..most },
        Limits { max_num_tokens: 0, ..least },
        Limits { max_seq_len: most.max_seq_len + 1, ..most },
        Limits { max_seq_len: 0, ..least },
        Limits { max_num_logits: most.max_num_logits + 1, ..most },
        Limits { max_num_logits: 0, ..least },
        Limits { block_size: most.block_size + 1, ..most },
        Limits { block_size: 0, ..least },
    ]
    .map(|limits| limits.check().unwrap_err().to_string());
    insta::assert_snapshot!(said.join("\n"));
}

#[test]
fn weights_and_their_pieces_have_bounds() {
    let piece = Piece { source: "w".to_owned(), source_rows: 8, source_cols: 6, rows: 1..4, cols: 2..6, target_row: 2 };
    // No operation reads it, so nothing else says what it must be.
    let of = |shape: &[usize], piece: Option<Piece>| {
        let mut program = sums(&[("a", 0)], &[["a", "a", "a"]]);
        let (name, shape, pieces) = ("w".to_owned(), shape.to_vec(), piece.into_iter().collect());
        program.weights.push(Weight {
            name,
            dtype: DType::F32,
            shape,
            format: WeightFormat::Plain,
            pieces,
            sharded: None,
        });
        program.check()
    };
    for shape in [&[5][..], &[5, 4], &[3, 5, 4], &[1 << 24, 1 << 24, 1 << 8]] {
        assert_eq!(of(shape, None), Ok(()), "{shape:?}");
    }
    for shape in [&[][..], &[1, 1, 1, 1], &[0, 4], &[(1 << 24) + 1], &[1 << 24, 1 << 24, (1 << 8) + 1]] {
        of(shape, None).expect_err("a shape that no weight has");
    }
    assert_eq!(of(&[5, 4], Some(piece.clone())), Ok(()));
    for (what, changed) in [
        ("rows behind the source's", Piece { source_rows: 3, ..piece.clone() }),
        ("columns behind the source's", Piece { source_cols: 5, ..piece.clone() }),
        ("rows from behind", Piece { rows: Range { start: 4, end: 1 }, ..piece.clone() }),
        ("columns from behind", Piece { cols: Range { start: 6, end: 2 }, ..piece.clone() }),
        ("fewer columns than the weight has", Piece { cols: 3..6, ..piece.clone() }),
        ("more columns than the weight has", Piece { cols: 1..6, ..piece.clone() }),
        ("rows behind the weight's", Piece { target_row: 3, ..piece.clone() }),
        ("rows that overflow", Piece { target_row: usize::MAX, ..piece.clone() }),
    ] {
        of(&[5, 4], Some(changed)).expect_err(what);
    }
}
