//! Where the messages to one rank wait until it asks for them, and where it learns that the job is over.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::CommError;

/// Bytes of one sender's messages that may wait; beyond them the sender waits. A message larger than this passes alone,
/// and a sender whose message is being waited for always passes, so that the limit cannot lock two ranks up.
const MAX_WAITING_BYTES: usize = 256 << 20;

/// How long a wait looks, yielding its core, before it parks. Waking a parked thread costs up to 50 µs on a virtual
/// machine, which a collective of ranks in step need not pay.
const LOOK: Duration = Duration::from_micros(30);

/// What a message is for. A receiver asks for exactly one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    /// The group whose collective this is, or 0.
    pub(crate) channel: u64,
    /// What the sender does.
    pub(crate) op: Op,
    /// The caller's tag of a point-to-point message; else the collective's running number in its group.
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

/// A message's bytes, shared between the ranks of one process that all get the same ones.
pub(crate) type Body = Arc<Vec<u8>>;

/// All messages to one rank, by sender.
pub(crate) struct Inbox {
    state: Mutex<State>,
    arrived: Condvar,
    taken: Condvar,
    /// Counts changes, so that a waiting rank can look without the lock.
    changes: AtomicU64,
}

struct State {
    senders: Vec<Sender>,
    /// Set once; the answer to every later call.
    failure: Option<CommError>,
    /// All ranks have said goodbye.
    concluded: bool,
}

#[derive(Default)]
struct Sender {
    messages: VecDeque<(Key, Body)>,
    waiting_bytes: usize,
    /// Threads that wait for a message of this sender.
    waiters: usize,
    /// Threads that wait for room to put one in.
    pushers: usize,
    /// It will send no more.
    finished: bool,
}

/// Why a message cannot be had.
#[derive(Debug)]
pub(crate) enum NoMessage {
    /// The job is over.
    Failed(CommError),
    /// The sender is done.
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

    /// No code panics while it holds the lock, so a poisoned lock guards sound data.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Puts a message in, after waiting for room.
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

    /// Takes the oldest message of `from` with this key, after waiting for it.
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
                    // A sender that waits for room may pass now that its message is asked for.
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

    /// True if something changed within the time to look.
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

    /// Ends every pending and later call with this error, unless one is set already or all have said goodbye.
    pub(crate) fn fail(&self, failure: CommError) {
        let mut state = self.lock();
        if !state.concluded && state.failure.is_none() {
            state.failure = Some(failure);
        }
        self.wake_all(state);
    }

    /// A sender will send no more.
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

    /// All ranks have said goodbye: nothing can fail any more.
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
            // Collectives of one group come in one order; anything else at the head is a mistake.
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
