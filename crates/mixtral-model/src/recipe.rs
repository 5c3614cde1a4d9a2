//! How a rank's tensor is cut out of the model's whole tensors.
//!
//! The shard plan is data: `convert` copies pieces out of source files by it, and dummy weights are generated
//! piece by piece from it, so that a sharded dummy model equals the shards of the whole one.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::DType;

/// A rectangle of one whole tensor, seen as a matrix `[source_rows, source_cols]` (a vector is one row).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Name of the whole tensor, in Hugging Face's per-expert spelling.
    pub source: String,
    /// Rows of the whole tensor.
    pub source_rows: usize,
    /// Columns of the whole tensor.
    pub source_cols: usize,
    /// Rows taken from it.
    pub rows: Range<usize>,
    /// Columns taken from it; always as many as the target has.
    pub cols: Range<usize>,
    /// Row of the target that the first taken row becomes.
    pub target_row: usize,
}

/// One tensor of a rank's file. Rows of the target that no piece covers are zero.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recipe {
    /// Name in the checkpoint.
    pub name: String,
    /// Data type in the checkpoint.
    pub dtype: DType,
    /// Shape in the checkpoint: `[n]`, `[rows, cols]` or `[experts, rows, cols]`.
    pub shape: Vec<usize>,
    /// Where its elements come from, in ascending target rows, not overlapping.
    pub pieces: Vec<Piece>,
}

impl Recipe {
    /// Columns of the target seen as a matrix: its last dimension.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Rows of the target seen as a matrix: the product of all dimensions but the last.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// Elements of the target.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows() * self.cols()
    }

    /// Whether the target has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the target.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }
}
