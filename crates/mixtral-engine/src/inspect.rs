//! The trait of backends that can be looked into: what tests, and the comparison of two backends, drive them by.

use std::ops::Range;

use crate::{Backend, BackendError, Program, StepInputs, StepOutputs};

/// A backend whose operations can be run apart, on operands that are written and read from outside.
///
/// A step's operations are run in their order. What an operation leaves to later ones outside of buffers and cache
/// (a table of the step's positions, say) is there only if it ran before them in the same step.
pub trait Inspect: Backend {
    /// The program.
    fn program(&self) -> &Program;

    /// Where a range of operations may begin or end, ascending: 0, the number of operations, and what lies between
    /// operations that are not computed together.
    fn boundaries(&self) -> Vec<usize>;

    /// Runs the operations between two boundaries. Outputs come from the `sample` operation, if it is among them.
    ///
    /// # Errors
    /// As [`Backend::step`]; a range outside the program.
    fn run_ops(&mut self, ops: Range<usize>, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError>;

    /// The first `len` bytes of a buffer, as the last operations left them.
    ///
    /// # Errors
    /// A name that the program does not have, more bytes than the buffer's at the limits, or a device failure.
    fn read_buffer(&self, name: &str, len: usize) -> Result<Vec<u8>, BackendError>;

    /// Writes the first bytes of a buffer.
    ///
    /// # Errors
    /// As [`Inspect::read_buffer`].
    fn write_buffer(&mut self, name: &str, bytes: &[u8]) -> Result<(), BackendError>;

    /// Keys and values of a layer of this rank, each `[blocks, num_kv_heads, block_size, head_dim]`.
    ///
    /// # Errors
    /// A layer that the program does not have, or a device failure.
    fn read_cache(&self, layer: usize) -> Result<[Vec<u8>; 2], BackendError>;

    /// Writes keys and values of a layer.
    ///
    /// # Errors
    /// As [`Inspect::read_cache`]; bytes of another length.
    fn write_cache(&mut self, layer: usize, keys: &[u8], values: &[u8]) -> Result<(), BackendError>;
}
