//! A server, from listening to the last answer.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use mixtral_runtime::session::Capabilities;
use mixtral_runtime::{Session, Tokenizer};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::listen::{listen, raise_limit_of_files};
use crate::metrics::UPKEEP;
use crate::options::Options;
use crate::routes::router;
use crate::shared::{Phase, Shared};
use crate::worker::{self, Command};

/// Threads that read requests and write answers.
const THREADS: usize = 2;

/// Threads that the tokenizer may keep busy.
const TOKENIZER_THREADS: usize = 4;

/// How long `/health` tells that the engine failed, before the process ends.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How long connections may take to send the end of their answers, when the server ends.
const FLUSH: Duration = Duration::from_secs(5);

/// Why a server could not be started, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another --host or --port")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// The threads of the server cannot be started.
    #[error("cannot start the server's threads: {0}")]
    Threads(io::Error),
    /// The engine failed while the server was running.
    #[error("{0}")]
    Engine(String),
}

/// A server that listens. It answers requests as soon as it has a session.
pub struct Server {
    runtime: Runtime,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    address: SocketAddr,
    stop_listening: watch::Sender<bool>,
    listening: JoinHandle<()>,
}

/// Stops a server from another thread.
#[derive(Clone)]
pub struct Stopper {
    shared: Arc<Shared>,
    runtime: Handle,
}

impl Server {
    /// Listens. Until [`Server::run`], requests are answered with an error that says that the engine is being loaded.
    ///
    /// # Errors
    /// If the address cannot be listened on.
    pub fn start(options: Options, capabilities: Capabilities, tokenizer: Arc<Tokenizer>) -> Result<Self, ServeError> {
        raise_limit_of_files();
        let (bounds, wanted) = (options.bounds, options.address);
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(THREADS).max_blocking_threads(TOKENIZER_THREADS).thread_name("serve").enable_all();
        let runtime = builder.build().map_err(ServeError::Threads)?;
        let failed = |source| ServeError::Listen { address: wanted, source };
        let listener = runtime.block_on(TcpListener::bind(wanted)).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let (to_session, commands) = channel();
        let shared = Arc::new(Shared::new(options, capabilities, tokenizer, to_session));
        let (stop_listening, stop) = watch::channel(false);
        let counting = shared.clone();
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(UPKEEP).await;
                counting.metrics.upkeep();
            }
        });
        let listening = runtime.spawn(listen(listener, router(shared.clone()), bounds, stop));
        Ok(Server { runtime, shared, commands, address, stop_listening, listening })
    }

    /// The address that it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops it from another thread.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper { shared: self.shared.clone(), runtime: self.runtime.handle().clone() }
    }

    /// Answers requests until the server is stopped. The session runs on this thread. `check` says whether all of the
    /// engine's ranks are alive; it is asked when there is nothing to do.
    ///
    /// # Errors
    /// If the engine failed.
    pub fn run(self, mut session: Session, mut check: impl FnMut() -> Result<(), String>) -> Result<(), ServeError> {
        self.shared.phase.send_if_modified(|phase| {
            let was_loading = *phase == Phase::Loading;
            if was_loading {
                *phase = Phase::Ready;
            }
            was_loading
        });
        let ended = worker::run(&mut session, self.commands, &self.shared.metrics, &mut check);
        if let Err(why) = &ended {
            self.shared.phase.send_replace(Phase::Failed(why.as_str().into()));
            std::thread::sleep(LAST_WORDS);
        }
        self.stop_listening.send_replace(true);
        self.runtime.block_on(async {
            let _ = tokio::time::timeout(FLUSH, self.listening).await;
        });
        self.runtime.shutdown_background();
        ended.map_err(ServeError::Engine)
    }
}

impl Stopper {
    /// Lets running sequences finish, for as long as the options say, takes nothing new, and ends the server. Returns
    /// whether the server was answering requests: otherwise nothing happens.
    pub fn stop(&self) -> bool {
        let was_ready = self.shared.phase.send_if_modified(|phase| {
            let was_ready = *phase == Phase::Ready;
            if was_ready {
                *phase = Phase::Draining;
            }
            was_ready
        });
        if was_ready {
            let shared = self.shared.clone();
            self.runtime.spawn(async move {
                let all = u32::try_from(shared.most_sequences()).unwrap_or(u32::MAX);
                let drained = shared.places.acquire_many(all);
                let _ = tokio::time::timeout(shared.options.bounds.drain, drained).await;
                let _ = shared.commands.send(Command::Stop);
            });
        }
        was_ready
    }
}
