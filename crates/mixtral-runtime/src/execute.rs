//! Computes a session's steps, by one backend or by the ranks of a job.

use std::collections::VecDeque;
use std::time::Duration;

use mixtral_engine::{Backend, BackendError, StepInputs, StepOutputs};

/// Computes steps in the order in which they are launched.
pub trait Executor: Send {
    /// How many steps can be under way at a time: as many as the pipeline has stages.
    fn depth(&self) -> usize;

    /// Begins a step. At most [`Executor::depth`] steps may be begun and not yet collected.
    ///
    /// # Errors
    /// As [`Backend::step`]; a rank that is gone.
    fn launch(&mut self, inputs: &StepInputs<'_>) -> Result<(), BackendError>;

    /// Waits for the oldest step that was begun.
    ///
    /// # Errors
    /// As [`Executor::launch`].
    fn collect(&mut self) -> Result<StepOutputs, BackendError>;

    /// How many blocks the cache has, which is the same on every rank.
    fn kv_blocks(&self) -> usize;

    /// How many tokens each expert got, `[num_layers][num_experts]`.
    ///
    /// # Errors
    /// A rank that is gone.
    fn expert_counts(&mut self) -> Result<Vec<Vec<u64>>, BackendError>;

    /// Time that this rank spent in each operation of its program. Empty unless the backend was asked to measure.
    fn op_times(&self) -> Vec<Duration>;
}

/// An executor of one backend. It computes a step when the step is launched.
pub struct Local {
    backend: Box<dyn Backend>,
    outputs: VecDeque<StepOutputs>,
}

impl Local {
    /// An executor that computes steps on `backend`.
    #[must_use]
    pub fn new(backend: Box<dyn Backend>) -> Self {
        Local { backend, outputs: VecDeque::new() }
    }
}

impl Executor for Local {
    fn depth(&self) -> usize {
        1
    }

    fn launch(&mut self, inputs: &StepInputs<'_>) -> Result<(), BackendError> {
        self.outputs.push_back(self.backend.step(inputs)?);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutputs, BackendError> {
        self.outputs.pop_front().ok_or_else(|| BackendError::Other("no step is under way".to_owned()))
    }

    fn kv_blocks(&self) -> usize {
        self.backend.kv_blocks()
    }

    fn expert_counts(&mut self) -> Result<Vec<Vec<u64>>, BackendError> {
        Ok(self.backend.expert_counts())
    }

    fn op_times(&self) -> Vec<Duration> {
        self.backend.op_times()
    }
}
