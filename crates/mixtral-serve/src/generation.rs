//! The sequences of one HTTP request, as its handler sees them.

use std::sync::Arc;
use std::time::Instant;

use mixtral_runtime::{Event, Request};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::error::ApiError;
use crate::shared::Shared;
use crate::worker::{Command, Submission, Update};

tokio::task_local! {
    /// The name of the HTTP request that a handler answers.
    pub(crate) static NAME: Arc<str>;
}

/// Sequences that the session has taken. Dropping it cancels those that have not ended.
pub(crate) struct Generation {
    updates: UnboundedReceiver<(usize, Update)>,
    /// How many of the sequences have not ended.
    running: usize,
}

impl Generation {
    /// Submits sequences. Their number is their index in `requests`; `prompt` is the field of the HTTP request that the
    /// prompts came from.
    ///
    /// # Errors
    /// If there is no room for them now, or the session refuses one of them. None of them runs then.
    pub(crate) async fn start(
        shared: &Arc<Shared>,
        requests: Vec<Request>,
        prompt: &'static str,
    ) -> Result<Self, ApiError> {
        let (count, most) = (requests.len(), shared.most_sequences());
        let places = u32::try_from(count).ok().and_then(|n| shared.places.clone().try_acquire_many_owned(n).ok());
        let Some(mut places) = places else {
            shared.answers()?;
            return Err(ApiError::busy(format!("{most} sequences are running or waiting already; try again later")));
        };
        let (to, updates) = unbounded_channel();
        let name = NAME.try_with(Clone::clone).unwrap_or_default();
        let asked = Instant::now();
        let deadline = asked + shared.options.bounds.answer;
        let submissions = requests.into_iter().enumerate().filter_map(|(index, request)| {
            let place = places.split(1)?;
            Some(Submission { request, index, name: name.clone(), to: to.clone(), asked, deadline, place })
        });
        // It fails only after the session's thread has ended. The channel is then closed, which is noticed below.
        let _ = shared.commands.send(Command::Submit(submissions.collect()));
        drop(to);
        let mut generation = Generation { updates, running: count };
        for _ in 0..count {
            match generation.updates.recv().await {
                Some((_, Update::Accepted)) => {}
                Some((_, Update::Refused(refusal))) => return Err(ApiError::refused(&refusal, prompt)),
                Some((_, Update::Failed(error))) => return Err(error),
                Some((_, Update::Event(_))) | None => return Err(gone()),
            }
        }
        Ok(generation)
    }

    /// The next event, with the index of its sequence; `None` after the last sequence has ended.
    ///
    /// # Errors
    /// If a sequence failed. The others are of no use then.
    pub(crate) async fn next(&mut self) -> Result<Option<(usize, Event)>, ApiError> {
        if self.running == 0 {
            return Ok(None);
        }
        let update = self.updates.recv().await;
        self.take(update)
    }

    /// The next event, if it is there already.
    pub(crate) fn try_next(&mut self) -> Option<Result<(usize, Event), ApiError>> {
        let update = self.updates.try_recv().ok()?;
        self.take(Some(update)).transpose()
    }

    fn take(&mut self, update: Option<(usize, Update)>) -> Result<Option<(usize, Event)>, ApiError> {
        match update {
            Some((index, Update::Event(event))) => {
                self.running -= usize::from(event.finished.is_some());
                Ok(Some((index, *event)))
            }
            Some((_, Update::Failed(error))) => Err(error),
            Some((_, Update::Accepted | Update::Refused(_))) | None => Err(gone()),
        }
    }
}

fn gone() -> ApiError {
    ApiError::internal("the session ended before the answer was complete")
}
