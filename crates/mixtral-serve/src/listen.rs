//! Connections: how they are accepted, and how long they may be silent.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use crate::options::Bounds;

/// Pause after a connection could not be accepted, which is so when the process has too many open files.
const PAUSE: Duration = Duration::from_millis(50);

/// The most bytes of a request's head.
const MAX_HEAD: usize = 64 << 10;

/// Raises the number of files that this process may have open to the most that the system allows: connections are files.
pub(crate) fn raise_limit_of_files() {
    let limit = getrlimit(Resource::Nofile);
    // Where that is not allowed, connections beyond the limit have to wait.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Accepts connections until `stop` is true, then waits until those with an unfinished answer have sent it.
pub(crate) async fn listen(listener: TcpListener, router: Router, bounds: Bounds, mut stop: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(bounds.connections.min(Semaphore::MAX_PERMITS)));
    let open = GracefulShutdown::new();
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(bounds.receive).max_buf_size(MAX_HEAD);
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
            Ok::<_, io::Error>((place, listener.accept().await?.0))
        };
        let accepted = tokio::select! {
            accepted = accepted => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        let (place, stream) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if let Err(error) = prepare(&stream, bounds.receive) {
            tracing::debug!(%error, "a connection closed at once");
            continue;
        }
        let service = TowerToHyperService::new(router.clone());
        let connection = open.watch(server.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    open.shutdown().await;
}

/// Sends pieces of answers at once, and lets the system close a connection whose client does not confirm what was sent, or
/// is silent and does not answer probes.
fn prepare(stream: &TcpStream, patience: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    #[cfg(target_os = "linux")]
    {
        let probes = 3;
        sockopt::set_tcp_keepidle(stream, patience / 2)?;
        sockopt::set_tcp_keepintvl(stream, patience / (2 * probes))?;
        sockopt::set_tcp_keepcnt(stream, probes)?;
        sockopt::set_tcp_user_timeout(stream, u32::try_from(patience.as_millis()).unwrap_or(u32::MAX))?;
    }
    Ok(())
}
