//! How a session's steps are computed: by one backend, or by the ranks of a job.

use std::collections::VecDeque;
use std::time::Duration;

use mixtral_engine::{Backend, BackendError, StepInputs, StepOutputs};

/// Computes steps, in the order in which they are launched.
pub trait Executor: Send {
    /// Steps that can be under way at a time: the stages of a pipeline.
    fn depth(&self) -> usize;

    /// Begins a step. At most [`Executor::depth`] may be begun and not collected.
    ///
    /// # Errors
    /// As [`Backend::step`]; a rank that is gone.
    fn launch(&mut self, inputs: &StepInputs<'_>) -> Result<(), BackendError>;

    /// Waits for the oldest step that was begun.
    ///
    /// # Errors
    /// As [`Executor::launch`].
    fn collect(&mut self) -> Result<StepOutputs, BackendError>;

    /// Blocks of the cache, the same on every rank.
    fn kv_blocks(&self) -> usize;

    /// Tokens that each expert has been given, `[num_layers][num_experts]`.
    ///
    /// # Errors
    /// A rank that is gone.
    fn expert_counts(&mut self) -> Result<Vec<Vec<u64>>, BackendError>;

    /// Time that this rank spent in each operation of its program; empty unless it was asked to measure.
    fn op_times(&self) -> Vec<Duration>;
}

/// One backend, which computes a step when it is launched.
pub struct Local {
    backend: Box<dyn Backend>,
    outputs: VecDeque<StepOutputs>,
}

impl Local {
    /// Steps by `backend` alone.
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
