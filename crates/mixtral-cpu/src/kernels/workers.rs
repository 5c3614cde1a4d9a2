//! What every kernel gets: the vector kernels, the data type, scratch memory, and functions that divide rows among
//! workers.

use std::sync::{Mutex, PoisonError};

use mixtral_engine::BackendError;
use mixtral_model::DType;
use rayon::prelude::*;

use crate::memory::Memory;
use crate::simd::Simd;

/// The workers of the backend's pool, and what kernels need on each of them. All kernels of a step share it.
#[derive(Clone, Copy)]
pub(crate) struct Workers<'a> {
    pub(crate) simd: Simd,
    /// Data type of the activations.
    pub(crate) dtype: DType,
    /// Whether this work is already one worker's share, so that it is not divided again.
    alone: bool,
    /// Each worker's scratch. It holds at least [`ROW_SCRATCH`] times the widest row.
    scratch: &'a [Mutex<Memory>],
}

/// How many rows, widened and padded, an elementwise kernel may keep in scratch.
pub(crate) const ROW_SCRATCH: usize = 3;

/// Work of fewer elementary operations than this is not worth waking another thread.
const MIN_PARALLEL: usize = 1 << 15;

impl<'a> Workers<'a> {
    pub(crate) fn new(simd: Simd, dtype: DType, scratch: &'a [Mutex<Memory>]) -> Self {
        Workers { simd, dtype, alone: false, scratch }
    }

    /// The index of the worker that this runs on.
    fn worker(&self) -> usize {
        rayon::current_thread_index().unwrap_or(0) % self.scratch.len()
    }

    /// How many workers the pool has.
    pub(crate) fn num_workers(&self) -> usize {
        self.scratch.len()
    }

    /// The same for work that is one worker's share.
    pub(crate) fn alone(self) -> Self {
        Workers { alone: true, ..self }
    }

    /// Whether a loop of `work` elementary operations is divided among workers.
    pub(crate) fn is_parallel(&self, work: usize) -> bool {
        !self.alone && self.scratch.len() > 1 && work >= MIN_PARALLEL
    }

    /// Makes room for `floats` f32 in the scratch of every worker that takes part.
    pub(crate) fn reserve_scratch(&self, floats: usize) -> Result<(), BackendError> {
        let workers = if self.alone { std::slice::from_ref(&self.scratch[self.worker()]) } else { self.scratch };
        workers
            .iter()
            .try_for_each(|scratch| scratch.lock().unwrap_or_else(PoisonError::into_inner).reserve_floats(floats))
    }

    /// Runs `f` with this worker's scratch. `f` must not divide work among workers itself.
    pub(crate) fn with_scratch<R>(&self, f: impl FnOnce(&mut [f32]) -> R) -> R {
        let mut scratch = self.scratch[self.worker()].lock().unwrap_or_else(PoisonError::into_inner);
        f(scratch.floats_mut())
    }

    /// Calls `f(index, chunk)` for each chunk of `size` elements, in parallel where it pays.
    pub(crate) fn for_chunks<T: Send>(
        &self,
        data: &mut [T],
        size: usize,
        work: usize,
        f: impl Fn(usize, &mut [T]) + Sync + Send,
    ) {
        if self.is_parallel(work) {
            data.par_chunks_mut(size).enumerate().for_each(|(i, chunk)| f(i, chunk));
        } else {
            data.chunks_mut(size).enumerate().for_each(|(i, chunk)| f(i, chunk));
        }
    }

    /// Bytes of `cols` activations.
    pub(crate) fn row_bytes(&self, cols: usize) -> usize {
        cols * self.dtype.size()
    }
}

/// Converts an i32 that was checked to be an index.
pub(crate) fn index(value: i32) -> usize {
    usize::try_from(value).unwrap_or(0)
}

/// Calls `f` with one worker that has `floats` f32 of scratch.
#[cfg(test)]
pub(crate) fn with_worker<R>(dtype: DType, floats: usize, f: impl FnOnce(&Workers<'_>) -> R) -> R {
    let scratch = [Mutex::new(Memory::empty().expect("nothing"))];
    let workers = Workers::new(Simd::detect(), dtype, &scratch);
    workers.reserve_scratch(floats).expect("a few bytes");
    f(&workers)
}
