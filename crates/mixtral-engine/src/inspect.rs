//! The trait of backends that can be looked into. Tests and the comparison of two backends use it.

use std::ops::Range;

use crate::{Backend, BackendError, Program, StepInputs, StepOutputs};

/// A backend that can run operations separately, on operands that the caller writes and reads.
///
/// The caller runs a step's operations in their order. An operation may leave data for later ones outside of buffers
/// and cache, such as a table of the step's positions. The later ones find it only if that operation ran before them in
/// the same step.
pub trait Inspect: Backend {
    /// The program.
    fn program(&self) -> &Program;

    /// The indices at which a range of operations may begin or end, ascending: 0, the number of operations, and each
    /// index between operations that are not computed together.
    fn boundaries(&self) -> Vec<usize>;

    /// Runs the operations between two boundaries. Outputs come from the `sample` operation, if it is among them.
    ///
    /// # Errors
    /// As [`Backend::step`]; a range outside the program.
    fn run_ops(&mut self, ops: Range<usize>, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError>;

    /// The first `len` bytes of a buffer, as the last run left them.
    ///
    /// # Errors
    /// A name that the program does not have, more bytes than the buffer has at the limits, or a device failure.
    fn read_buffer(&self, name: &str, len: usize) -> Result<Vec<u8>, BackendError>;

    /// Writes the first bytes of a buffer.
    ///
    /// # Errors
    /// As [`Inspect::read_buffer`].
    fn write_buffer(&mut self, name: &str, bytes: &[u8]) -> Result<(), BackendError>;

    /// Keys and values of one of this rank's layers, each `[blocks, num_kv_heads, block_size, head_dim]`.
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
