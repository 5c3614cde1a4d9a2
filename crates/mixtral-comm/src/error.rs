//! What can go wrong between ranks that have found each other.

use std::fmt::{self, Display};

use crate::process::JoinError;

/// Why a call on a [`World`](crate::World) or a [`Group`](crate::Group) failed. The first three variants mean that the
/// job is over; every later call returns the same error. The others are mistakes in the calling program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommError {
    /// A rank that is a thread of this process returned an error or panicked.
    #[error("rank {rank} on {host} failed: {reason}")]
    Poisoned {
        /// The first rank that failed.
        rank: usize,
        /// Its host, which is this one.
        host: String,
        /// Its error or panic message.
        reason: String,
    },
    /// A rank that is a process has died, or does not answer.
    #[error("rank {rank} on {host} (process {pid}) {reason}")]
    Dead {
        /// The rank. It is this rank if this process got a signal.
        rank: usize,
        /// Where it ran.
        host: String,
        /// Its process there.
        pid: u32,
        /// What happened to it.
        reason: Death,
    },
    /// This rank waits for a message of a rank that has finished and will send no more.
    #[error("rank {rank} has finished, but this rank still waits for it; the ranks run different programs")]
    Finished {
        /// The rank that has finished.
        rank: usize,
    },
    /// Two ranks are in different collectives of one group, or in the same one with different sizes.
    #[error("{here} expected {expected} of rank {rank}, which sent {found}; the ranks run different programs")]
    Mismatch {
        /// The rank that noticed.
        here: String,
        /// The other rank.
        rank: usize,
        /// What this rank does, in words.
        expected: String,
        /// What the other rank does, in words.
        found: String,
    },
    /// A buffer's length does not suit the collective.
    #[error("{what} has {found} bytes, expected {expected}")]
    Size {
        /// The buffer, in words.
        what: &'static str,
        /// Bytes it must have.
        expected: usize,
        /// Bytes it has.
        found: usize,
    },
    /// There is no such rank.
    #[error("rank {rank} is not one of the {size} ranks")]
    NoSuchRank {
        /// The rank that was asked for.
        rank: usize,
        /// Ranks in the world or group.
        size: usize,
    },
    /// A list of ranks that is not a group of the calling rank.
    #[error(
        "{members:?} is not a group for rank {rank}: it must be ascending, without repeats, and hold the rank itself"
    )]
    BadGroup {
        /// The calling rank.
        rank: usize,
        /// The list.
        members: Vec<usize>,
    },
    /// A message longer than [`MAX_MESSAGE_BYTES`](crate::world::MAX_MESSAGE_BYTES).
    #[error("a message of {bytes} bytes to rank {to} is longer than the limit of {limit}; send it in parts")]
    TooLong {
        /// The receiver.
        to: usize,
        /// The message's length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
}

/// What happened to a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Death {
    /// Its connection closed without a goodbye: it was killed, crashed, or exited early.
    Closed,
    /// Its connection is open, but nothing came from it for this many milliseconds. The process is stopped, or its host
    /// or network is down.
    Stalled {
        /// The limit that passed.
        milliseconds: u64,
    },
    /// It reported this failure.
    Failed(String),
    /// This signal told it to end.
    Signal(i32),
}

impl Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => write!(f, "died: its connection closed without a goodbye"),
            Self::Stalled { milliseconds } => {
                let seconds = *milliseconds as f64 / 1000.0;
                write!(f, "stalled: no heartbeat for {seconds} s (stopped, or its host or network is down)")
            }
            Self::Failed(reason) => write!(f, "failed: {reason}"),
            Self::Signal(number) => match signal_name(*number) {
                Some(name) => write!(f, "was ended by {name}"),
                None => write!(f, "was ended by signal {number}"),
            },
        }
    }
}

fn signal_name(number: i32) -> Option<&'static str> {
    match number {
        signal_hook::consts::SIGINT => Some("SIGINT"),
        signal_hook::consts::SIGTERM => Some("SIGTERM"),
        _ => None,
    }
}

/// Why a job failed, as seen from the process that returns this.
#[derive(Debug, PartialEq, Eq)]
pub struct RankFailure<E> {
    /// With threads, the first rank that failed. With processes, this process's rank.
    pub rank: usize,
    /// Its host.
    pub host: String,
    /// How it failed.
    pub cause: Cause<E>,
}

/// How a rank failed.
#[derive(Debug, PartialEq, Eq)]
pub enum Cause<E> {
    /// Its function returned this.
    Error(E),
    /// Its function panicked with this message.
    Panic(String),
    /// Its function ended well, but another rank did not.
    Comm(CommError),
    /// Its thread could not be started.
    Spawn(String),
    /// Its process could not join the others.
    Join(JoinError),
}

impl<E: Display> Display for Cause<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Error(error) => error.fmt(f),
            Self::Panic(message) => write!(f, "panicked: {message}"),
            Self::Comm(error) => error.fmt(f),
            Self::Join(error) => error.fmt(f),
            Self::Spawn(message) => write!(f, "its thread could not be started: {message}"),
        }
    }
}

impl<E: Display> Display for RankFailure<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} on {}: {}", self.rank, self.host, self.cause)
    }
}

impl<E: Display + fmt::Debug> std::error::Error for RankFailure<E> {}

/// The message of a panic.
pub(crate) fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "a panic without a message".to_owned()
    }
}
