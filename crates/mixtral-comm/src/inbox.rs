//! Holds the messages to one rank until the rank asks for them, and tells the rank that the job is over.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::CommError;

/// How many bytes of one sender's messages may wait. Beyond them the sender waits. Two exceptions keep ranks from
/// waiting for each other forever: a message larger than this is let in if no other waits, and a sender is always let
/// in if the receiver waits for its message.
const MAX_WAITING_BYTES: usize = 256 << 20;

/// How long a waiting thread looks for a message before it parks. It yields its core while it looks. Waking a parked
/// thread takes up to 50 µs on a virtual machine, and ranks that arrive at about the same time save that.
const LOOK: Duration = Duration::from_micros(30);

/// What a message is for. A receiver asks for one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    /// The group whose collective this is, or 0 for a point-to-point message.
    pub(crate) channel: u64,
    /// What the sender does.
    pub(crate) op: Op,
    /// For a point-to-point message, the caller's tag. Else the collective's number in its group.
    pub(crate) tag: u32,
}

/// What a sender does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// Point to point.
    Send,
    /// One rank's part of an all-gather.
    AllGather,
    /// The root's bytes.
    Broadcast,
    /// One rank's arrival at a barrier.
    Barrier,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.op {
            Op::Send => return write!(f, "message {}", self.tag),
            Op::AllGather => "all-gather",
            Op::Broadcast => "broadcast",
            Op::Barrier => "barrier",
        };
        write!(f, "{name} (the group's collective {})", self.tag)
    }
}

/// The bytes of a message. Ranks of one process that get the same message share them.
pub(crate) type Body = Arc<Vec<u8>>;

/// All messages to one rank, by sender.
pub(crate) struct Inbox {
    state: Mutex<State>,
    arrived: Condvar,
    taken: Condvar,
    /// Counts changes, so that a waiting rank can look for one without taking the lock.
    changes: AtomicU64,
}

struct State {
    senders: Vec<Sender>,
    /// Why the job is over. It is set once, and every later call returns it.
    failure: Option<CommError>,
    /// Whether all ranks have said goodbye.
    concluded: bool,
}

#[derive(Default)]
struct Sender {
    messages: VecDeque<(Key, Body)>,
    waiting_bytes: usize,
    /// Threads that wait for a message of this sender.
    waiters: usize,
    /// Threads that wait for room for a message of this sender.
    pushers: usize,
    /// Whether it will send no more.
    finished: bool,
}

/// Why a message will not come.
#[derive(Debug)]
pub(crate) enum NoMessage {
    /// The job is over.
    Failed(CommError),
    /// The sender has finished.
    Finished,
    /// The sender is in another collective of the same group.
    Mismatch(Key),
}

impl Inbox {
    /// An empty inbox.
    pub(crate) fn new(world_size: usize) -> Self {
        Self {
            state: Mutex::new(State {
                senders: std::iter::repeat_with(Sender::default).take(world_size).collect(),
                failure: None,
                concluded: false,
            }),
            arrived: Condvar::new(),
            taken: Condvar::new(),
            changes: AtomicU64::new(0),
        }
    }

    /// No code panics while it holds the lock, so the data is sound even if the lock is poisoned.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Waits for room, then puts a message in.
    pub(crate) fn push(&self, from: usize, key: Key, body: Body) -> Result<(), CommError> {
        let mut state = self.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let sender = &state.senders[from];
            let fits = sender.waiting_bytes.saturating_add(body.len()) <= MAX_WAITING_BYTES;
            if fits || sender.messages.is_empty() || sender.waiters > 0 {
                break;
            }
            state.senders[from].pushers += 1;
            state = self.taken.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.senders[from].pushers -= 1;
        }
        let sender = &mut state.senders[from];
        sender.waiting_bytes = sender.waiting_bytes.saturating_add(body.len());
        sender.messages.push_back((key, body));
        let wake = sender.waiters > 0;
        self.changed();
        drop(state);
        if wake {
            self.arrived.notify_all();
        }
        Ok(())
    }

    /// Waits for a message of `from` with this key, and takes the oldest.
    pub(crate) fn take(&self, from: usize, key: Key) -> Result<Body, NoMessage> {
        let mut looked = false;
        let mut state = self.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(NoMessage::Failed(failure.clone()));
            }
            if let Some(body) = state.senders[from].find(key)? {
                if state.senders[from].pushers > 0 {
                    self.taken.notify_all();
                }
                return Ok(body);
            }
            if state.senders[from].finished {
                return Err(NoMessage::Finished);
            }
            if looked {
                state.senders[from].waiters += 1;
                if state.senders[from].pushers > 0 {
                    // A sender that waits for room is let in, now that its message is asked for.
                    self.taken.notify_all();
                }
                state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.senders[from].waiters -= 1;
            } else {
                let seen = self.changes.load(Ordering::Acquire);
                drop(state);
                looked = !self.look_for_change(seen);
                state = self.lock();
            }
        }
    }

    /// Looks for a change for at most [`LOOK`]. Returns whether there was one.
    fn look_for_change(&self, seen: u64) -> bool {
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                if self.changes.load(Ordering::Acquire) != seen {
                    return true;
                }
                std::hint::spin_loop();
            }
            thread::yield_now();
            if start.elapsed() > LOOK {
                return false;
            }
        }
    }

    /// Ends every pending and later call with this error, unless an error is set already or all ranks have said
    /// goodbye.
    pub(crate) fn fail(&self, failure: CommError) {
        let mut state = self.lock();
        if !state.concluded && state.failure.is_none() {
            state.failure = Some(failure);
        }
        self.wake_all(state);
    }

    /// Notes that a sender will send no more.
    pub(crate) fn finish(&self, from: usize) {
        let mut state = self.lock();
        state.senders[from].finished = true;
        self.wake_all(state);
    }

    /// Why the job is over, if it is.
    pub(crate) fn failure(&self) -> Option<CommError> {
        self.lock().failure.clone()
    }

    /// True if the sender has said that it will send no more.
    pub(crate) fn is_finished(&self, from: usize) -> bool {
        self.lock().senders[from].finished
    }

    /// Notes that all ranks have said goodbye, so nothing can fail any more.
    pub(crate) fn conclude(&self) {
        let mut state = self.lock();
        state.concluded = true;
        self.wake_all(state);
    }

    /// Waits until the job has failed or all ranks have said goodbye.
    pub(crate) fn await_end(&self) -> Result<(), CommError> {
        let mut state = self.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if state.concluded {
                return Ok(());
            }
            state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn wake_all(&self, state: MutexGuard<'_, State>) {
        self.changed();
        drop(state);
        self.arrived.notify_all();
        self.taken.notify_all();
    }
}

impl Sender {
    fn find(&mut self, key: Key) -> Result<Option<Body>, NoMessage> {
        let wanted = |found: &Key| match key.op {
            Op::Send => *found == key,
            // The collectives of a group come in the same order from all ranks, so only the first message of the group
            // is looked at. If it has another key, that is a mistake.
            _ => found.channel == key.channel && found.op != Op::Send,
        };
        let Some(at) = self.messages.iter().position(|(found, _)| wanted(found)) else { return Ok(None) };
        if self.messages[at].0 != key {
            return Err(NoMessage::Mismatch(self.messages[at].0));
        }
        let body = self.messages.remove(at).map(|(_, body)| body);
        self.waiting_bytes = self.waiting_bytes.saturating_sub(body.as_ref().map_or(0, |body| body.len()));
        Ok(body)
    }
}

impl fmt::Debug for Inbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox").finish_non_exhaustive()
    }
}
