//! Every rank a process of its own, on one host or several.
//!
//! Rank 0 listens; the others call it and tell who they are. When all are there and agree, they connect to each other,
//! rank 0 says go, and nobody listens any more. Data goes straight between any two ranks. The connections to rank 0 stay
//! open for heartbeats, from a thread that never computes: one that closes is a death at once, one that is silent for too
//! long a stall, and rank 0 tells everyone who it was.
//!
//! Who may join is decided by a secret, which never travels. On one host it is in the rendezvous file beside the port,
//! readable by the user alone; across hosts it is the text of `MIXTRAL_SECRET`. Connections are not encrypted: they belong
//! on a network that is trusted with the model's activations.
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
    /// What every rank must present alike: the engine's run id.
    pub identity: [u8; 32],
    /// Where the rendezvous file is: the user's runtime folder (`XDG_RUNTIME_DIR`), or else the folder for temporary files.
    pub directory: PathBuf,
    /// How long rank 0 waits for the others, and they for it: 60 s.
    pub start_limit: Duration,
    /// How long a caller may take to prove that it is of the job: 10 s.
    pub greeting_limit: Duration,
    /// Between heartbeats: 2 s.
    pub heartbeat: Duration,
    /// Silence that counts as a stall: 30 s.
    pub stall_limit: Duration,
    /// What to do with a warning: print it to standard error.
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
            warn: Arc::new(|warning| eprintln!("warning: {warning}")),
        }
    }
}

impl fmt::Debug for JoinOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinOptions").field("directory", &self.directory).finish_non_exhaustive()
    }
}

/// Joins the other ranks, runs `rank_main`, and ends together with them: this returns a value only if every rank's
/// `rank_main` did. An error or panic here ends every other rank's calls with [`CommError::Dead`](crate::CommError::Dead),
/// and theirs ends this one's. So do SIGTERM and SIGINT, which are handled from the call on and, the second time, end the
/// process as they always do.
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
