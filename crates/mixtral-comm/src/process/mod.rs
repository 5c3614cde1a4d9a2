//! Runs every rank in a process of its own, on one host or several.
//!
//! Rank 0 listens. The others call it and tell who they are. When all have come and agree, they connect to each other,
//! rank 0 says go, and all stop listening. Data goes directly between any two ranks. The connections to rank 0 stay
//! open for heartbeats, which a thread sends that never computes. If such a connection closes, the rank counts as dead
//! immediately. If it is silent for too long, the rank counts as stalled. Rank 0 tells all others which rank it was.
//!
//! Only a rank that knows the secret may join; the secret itself never travels. On one host it is in the rendezvous
//! file, beside the port, and only the user can read that file. Across hosts it is the text of `MIXTRAL_SECRET`.
//! Connections are not encrypted, so use them only on a network that you trust with the model's activations.
//!
//! Reading order: `wire` (the messages), `greeting` (the secret), `notice` (the file), `door` (listening and calling),
//! `assemble` (the start), `mesh` (data), `watch` (who is alive), `signals`.

use std::fmt::{self, Display};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::error::panic_message;
use crate::launch::Process;
use crate::world::host_name;
use crate::{Cause, RankFailure, World};

mod assemble;
mod door;
mod error;
mod greeting;
pub(crate) mod hostile;
pub(crate) mod mesh;
mod notice;
mod signals;
mod watch;
mod wire;

pub use error::JoinError;

/// How to join.
#[derive(Clone)]
pub struct JoinOptions {
    /// The engine's run id, hashed. It must be the same on every rank.
    pub identity: [u8; 32],
    /// The folder of the rendezvous file: the user's runtime folder (`XDG_RUNTIME_DIR`), or else the folder for
    /// temporary files.
    pub directory: PathBuf,
    /// How long rank 0 waits for the others, and they wait for it: 60 s.
    pub start_limit: Duration,
    /// How long a caller may take to prove that it belongs to the job: 10 s.
    pub greeting_limit: Duration,
    /// Time between heartbeats: 2 s.
    pub heartbeat: Duration,
    /// How long a rank may be silent before it counts as stalled: 30 s.
    pub stall_limit: Duration,
    /// Whether SIGTERM and SIGINT end the job. If not, they are left to the caller.
    pub signals: bool,
    /// What to do with a warning. By default it is printed to standard error.
    pub warn: Arc<dyn Fn(&str) + Send + Sync>,
}

impl JoinOptions {
    /// The usual options, for a job of this identity.
    pub fn new(identity: [u8; 32]) -> Self {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|folder| folder.is_dir());
        Self {
            identity,
            directory: runtime.unwrap_or_else(std::env::temp_dir),
            start_limit: Duration::from_secs(60),
            greeting_limit: Duration::from_secs(10),
            heartbeat: Duration::from_secs(2),
            stall_limit: Duration::from_secs(30),
            signals: true,
            warn: Arc::new(|warning| eprintln!("warning: {warning}")),
        }
    }
}

impl fmt::Debug for JoinOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinOptions").field("directory", &self.directory).finish_non_exhaustive()
    }
}

/// Joins the other ranks, runs `rank_main`, and ends together with them: it returns a value only if every rank's
/// `rank_main` did. An error or panic on this rank ends every other rank's calls with
/// [`CommError::Dead`](crate::CommError::Dead), and theirs end this rank's. SIGTERM and SIGINT do the same, unless
/// the options leave them to the caller; this call starts to handle them. A second signal ends the process as usual.
pub fn run<T, E: Display>(
    process: &Process,
    options: &JoinOptions,
    rank_main: impl FnOnce(&World) -> Result<T, E>,
) -> Result<T, RankFailure<E>> {
    let failure = |cause| RankFailure { rank: process.rank, host: host_name(), cause };
    let (world, watch) = match assemble::assemble(process, options).and_then(|all| watch::start(all, options)) {
        Ok(joined) => joined,
        Err(error) => return Err(failure(Cause::Join(error))),
    };
    match catch_unwind(AssertUnwindSafe(|| rank_main(&world))) {
        Ok(Ok(value)) => match watch.finish(&world) {
            Ok(()) => Ok(value),
            Err(error) => Err(failure(Cause::Comm(error))),
        },
        Ok(Err(error)) => {
            watch.fail(error.to_string());
            Err(failure(Cause::Error(error)))
        }
        Err(payload) => {
            let message = panic_message(payload.as_ref());
            watch.fail(format!("panicked: {message}"));
            Err(failure(Cause::Panic(message)))
        }
    }
}
