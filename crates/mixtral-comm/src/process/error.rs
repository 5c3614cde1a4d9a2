//! Why the ranks of a job did not come together.

use std::path::PathBuf;

use crate::Death;

/// Why the ranks of a job did not come together. Rank 0 tells its reason to every rank that it can reach.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// Rank 0's reason.
    #[error("{0}")]
    Refused(String),
    /// Two ranks were started for worlds of different sizes.
    #[error(
        "rank {rank} on {host} (process {pid}) was started for a world of {found}, rank 0 for a world of {expected}; \
         start every rank with the same number of ranks"
    )]
    WorldSize {
        /// The other rank.
        rank: usize,
        /// Its host.
        host: String,
        /// Its process.
        pid: u32,
        /// Its world's size.
        found: usize,
        /// Rank 0's world's size.
        expected: usize,
    },
    /// Two processes are the same rank.
    #[error(
        "rank {rank} was started twice: as process {first} and as process {second}; every process needs its own rank"
    )]
    RankTwice {
        /// The rank.
        rank: usize,
        /// "1234 on node1".
        first: String,
        /// "1235 on node1".
        second: String,
    },
    /// Two ranks have different engines.
    #[error(
        "rank {rank} on {host} (process {pid}) brings engine {found}, rank 0 engine {expected}; start every rank with \
         the same engine"
    )]
    Identity {
        /// The other rank.
        rank: usize,
        /// Its host.
        host: String,
        /// Its process.
        pid: u32,
        /// The first digits of its identity.
        found: String,
        /// The first digits of rank 0's.
        expected: String,
    },
    /// Some ranks did not come in time.
    #[error(
        "{} did not {what} within {seconds} s, of a world of {world_size}; look at why, or start all at once",
        ranks(missing)
    )]
    Missing {
        /// The ranks.
        missing: Vec<usize>,
        /// "join", or "connect to all others".
        what: &'static str,
        /// All ranks.
        world_size: usize,
        /// The limit.
        seconds: u64,
    },
    /// A rank ended while the others were still coming.
    #[error("rank {rank} on {host} (process {pid}) {reason}, while the job was starting")]
    Ended {
        /// The rank.
        rank: usize,
        /// Its host.
        host: String,
        /// Its process.
        pid: u32,
        /// What happened to it.
        reason: Death,
    },
    /// Rank 0 was not found.
    #[error("rank 0 was not reached at {place} within {seconds} s ({last}); {hint}")]
    NoHost {
        /// The rendezvous file or address.
        place: String,
        /// The limit.
        seconds: u64,
        /// How the last attempt failed.
        last: String,
        /// What to try.
        hint: &'static str,
    },
    /// The rendezvous file is of another host or network.
    #[error(
        "rank 0 runs on another machine ({there}) than this rank ({here}). Set on every rank: MASTER_ADDR to an address \
         of rank 0's host, MASTER_PORT to a free port there, and MIXTRAL_SECRET to the same secret text"
    )]
    OtherMachine {
        /// This rank's host and network.
        here: String,
        /// Rank 0's.
        there: String,
    },
    /// Rank 0 has another secret.
    #[error("rank 0 at {address} has another secret; set MIXTRAL_SECRET to the same text on every rank")]
    WrongSecret {
        /// Rank 0's address.
        address: String,
    },
    /// Another job of the same name is starting.
    #[error(
        "process {pid} is starting a job of the same name ({}); wait for it, or give this job a MASTER_PORT of its own",
        path.display()
    )]
    Busy {
        /// The rendezvous file.
        path: PathBuf,
        /// The other job's rank 0.
        pid: u32,
    },
    /// There is something else where the rendezvous file should be.
    #[error("{} is {what}, so the ranks cannot meet there; remove it, or set XDG_RUNTIME_DIR to a folder of your own", path.display())]
    Foreign {
        /// The rendezvous file.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// The operating system refused something.
    #[error("{what} failed: {error}")]
    Io {
        /// What was tried, and where.
        what: String,
        /// The system's words.
        error: String,
    },
    /// Another rank cannot be reached.
    #[error(
        "rank {from} cannot reach rank {to} on {host} at {address} ({error}); ranks need to reach each other on any port"
    )]
    Mesh {
        /// This rank.
        from: usize,
        /// The other rank.
        to: usize,
        /// Its host.
        host: String,
        /// Its address.
        address: String,
        /// How the last attempt failed.
        error: String,
    },
    /// Rank 0 ended while the job was starting.
    #[error("rank 0 on the other end of {address} ended while the job was starting")]
    HostEnded {
        /// Its address.
        address: String,
    },
    /// This process was told to end.
    #[error("ended by signal {0} while the job was starting")]
    Signal(i32),
}

impl JoinError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |error| Self::Io { what, error: error.to_string() }
    }
}

/// "rank 1", "ranks 1 and 3", "ranks 1, 2 and 5".
fn ranks(ranks: &[usize]) -> String {
    let words: Vec<String> = ranks.iter().map(usize::to_string).collect();
    match words.split_last() {
        Some((last, [])) => format!("rank {last}"),
        Some((last, first)) => format!("ranks {} and {last}", first.join(", ")),
        None => "no rank".to_owned(),
    }
}
