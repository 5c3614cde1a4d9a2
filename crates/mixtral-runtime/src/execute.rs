//! Computes a session's steps, by one backend or by the ranks of a job.

use std::collections::VecDeque;
use std::time::Duration;

use mixtral_engine::{Backend, BackendError, DeviceIdle, Launched, StepInputs, StepOutputs};

/// Computes steps in the order in which they are launched.
pub trait Executor: Send {
    /// How many steps have to be under way at a time so that all have work: as many as the pipeline has stages.
    fn depth(&self) -> usize;

    /// Whether a second step can be launched while the first is under way, with tokens that the first draws. Only an
    /// executor of depth 1 can do that.
    fn runs_ahead(&self) -> bool;

    /// Begins a step. At most [`Executor::depth`] steps may be begun and not yet collected, or two if it runs ahead.
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

    /// How long this rank's device had nothing to do between steps, if the backend can tell.
    fn device_idle(&self) -> Option<DeviceIdle>;
}

/// An executor of one backend.
pub struct Local {
    backend: Box<dyn Backend>,
    under_way: VecDeque<Launched>,
}

impl Local {
    /// An executor that computes steps on `backend`.
    #[must_use]
    pub fn new(backend: Box<dyn Backend>) -> Self {
        Local { backend, under_way: VecDeque::new() }
    }
}

impl Executor for Local {
    fn depth(&self) -> usize {
        1
    }

    fn runs_ahead(&self) -> bool {
        self.backend.runs_ahead()
    }

    fn launch(&mut self, inputs: &StepInputs<'_>) -> Result<(), BackendError> {
        self.under_way.push_back(self.backend.launch(inputs)?);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutputs, BackendError> {
        match self.under_way.pop_front() {
            Some(Launched::Done(outputs)) => Ok(outputs),
            Some(Launched::UnderWay) => self.backend.collect(),
            None => Err(BackendError::Other("no step is under way".to_owned())),
        }
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

    fn device_idle(&self) -> Option<DeviceIdle> {
        self.backend.device_idle()
    }
}
