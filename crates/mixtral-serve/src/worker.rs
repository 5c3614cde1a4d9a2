//! The session's thread: takes what handlers submit, computes steps, and tells the handlers what came of them.
//!
//! It never waits for a client. What a client has not yet read lies in its own channel, which holds no more than the longest
//! sequence of the engine.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use mixtral_runtime::{Event, Refusal, Request, RequestId, Session};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use crate::error::ApiError;

/// How often an idle session looks whether its ranks are alive.
const PULSE: Duration = Duration::from_secs(1);

/// What handlers tell the session's thread.
#[derive(Debug)]
pub(crate) enum Command {
    /// Generate the sequences of one HTTP request. All are taken before the next step.
    Submit(Vec<Ask>),
    /// End now; what still runs is given up.
    Stop,
}

/// A sequence that a client wants.
#[derive(Debug)]
pub(crate) struct Ask {
    /// What to generate.
    pub(crate) request: Request,
    /// Its number among the sequences of one HTTP request.
    pub(crate) index: usize,
    /// Where its updates go. If nobody is there any more, the sequence is cancelled.
    pub(crate) to: UnboundedSender<(usize, Update)>,
    /// When it must have ended.
    pub(crate) deadline: Instant,
    /// Its place among the sequences that may be there. It is given back when the sequence ends.
    pub(crate) place: OwnedSemaphorePermit,
}

/// What a handler is told of a sequence.
#[derive(Debug)]
pub(crate) enum Update {
    /// The session took it.
    Accepted,
    /// The session can never answer it.
    Refused(Refusal),
    /// Something happened to it.
    Event(Box<Event>),
    /// It ended without an answer.
    Failed(ApiError),
}

impl Ask {
    fn split(self) -> (Request, Live) {
        let Ask { request, index, to, deadline, place } = self;
        (request, Live { index, to, deadline, _place: place })
    }
}

/// A sequence under way.
struct Live {
    index: usize,
    to: UnboundedSender<(usize, Update)>,
    deadline: Instant,
    _place: OwnedSemaphorePermit,
}

impl Live {
    /// Whether the client is still there.
    fn tell(&self, update: Update) -> bool {
        self.to.send((self.index, update)).is_ok()
    }
}

/// Runs the session until it is told to stop. `check` says whether all of the engine's ranks are alive.
///
/// # Errors
/// Why the session cannot be used any more. All sequences were told.
pub(crate) fn run(
    session: &mut Session,
    commands: &Receiver<Command>,
    check: &mut dyn FnMut() -> Result<(), String>,
) -> Result<(), String> {
    let mut live = HashMap::new();
    let ended = work(session, commands, check, &mut live);
    let why = match &ended {
        Ok(()) => ApiError::unavailable("the server was stopped before the answer was complete"),
        Err(error) => ApiError::internal(format!("the engine failed: {error}")),
    };
    let untaken = commands.try_iter().flat_map(|command| match command {
        Command::Submit(asks) => asks,
        Command::Stop => Vec::new(),
    });
    for sequence in live.into_values().chain(untaken.map(|ask| ask.split().1)) {
        sequence.tell(Update::Failed(why.clone()));
    }
    ended
}

fn work(
    session: &mut Session,
    commands: &Receiver<Command>,
    check: &mut dyn FnMut() -> Result<(), String>,
    live: &mut HashMap<RequestId, Live>,
) -> Result<(), String> {
    loop {
        let mut next = commands.try_recv().ok();
        if next.is_none() && session.is_idle() {
            next = match commands.recv_timeout(PULSE) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => {
                    check()?;
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
        }
        while let Some(command) = next {
            match command {
                Command::Submit(asks) => asks.into_iter().for_each(|ask| submit(session, ask, live)),
                Command::Stop => return Ok(()),
            }
            next = commands.try_recv().ok();
        }
        let now = Instant::now();
        live.retain(|id, sequence| {
            let is_late = sequence.deadline <= now;
            if is_late {
                sequence.tell(Update::Failed(ApiError::late("the answer took longer than this server allows")));
            }
            let stays = !is_late && !sequence.to.is_closed();
            if !stays {
                session.cancel(*id);
            }
            stays
        });
        for event in session.step().map_err(|error| error.to_string())? {
            let id = event.id;
            let has_ended = event.finished.is_some();
            let is_heard = live.get(&id).is_some_and(|sequence| sequence.tell(Update::Event(Box::new(event))));
            if has_ended {
                live.remove(&id);
            } else if !is_heard {
                session.cancel(id);
                live.remove(&id);
            }
        }
    }
}

fn submit(session: &mut Session, ask: Ask, live: &mut HashMap<RequestId, Live>) {
    let (request, sequence) = ask.split();
    match session.submit(request) {
        Ok(id) if sequence.tell(Update::Accepted) => drop(live.insert(id, sequence)),
        Ok(id) => drop(session.cancel(id)),
        Err(refusal) => drop(sequence.tell(Update::Refused(refusal))),
    }
}
