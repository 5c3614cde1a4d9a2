//! How processes connect: a listener that lets in only ranks of the job, the caller's side, and the events that they
//! cause.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::greeting::{Secret, Stranger, greet_caller, greet_door};
use super::wire::{Join, Message};
use crate::Death;

/// How many connections may be in the middle of their greeting. Further ones are closed immediately; a rank then calls
/// again.
const MAX_GREETINGS: usize = 256;

/// How often a listener checks whether it is still needed.
const LOOK: Duration = Duration::from_millis(100);

/// Something that happened to a process, sent by the thread that learned of it.
#[derive(Debug)]
pub(crate) enum Event {
    /// A rank has joined at rank 0. Its messages follow as [`Event::Message`] with the same `connection`.
    Joined { stream: TcpStream, join: Join, connection: usize },
    /// A rank has opened a data connection.
    Meshed { stream: TcpStream, from: usize },
    /// A control message has come.
    Message { connection: usize, message: Message },
    /// A control connection has closed.
    Gone { connection: usize, reason: Death },
    /// A caller that is no rank of this job was refused.
    Stranger { address: String, reason: Stranger },
    /// A data connection broke without a goodbye.
    MeshBroken { rank: usize },
    /// This process got a signal.
    Signal(i32),
    /// This rank has failed.
    Fail(String),
    /// This rank has ended well.
    Finish,
}

/// An open door; closed when dropped.
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) address: SocketAddr,
    closed: Arc<AtomicBool>,
}

impl Drop for Door {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Release);
    }
}

impl Door {
    /// Listens. A caller that proves to be of the job becomes an event. A caller that stays silent is refused after
    /// `patience`; meanwhile others are let in.
    pub(crate) fn open(
        address: SocketAddr,
        secret: Secret,
        patience: Duration,
        events: Sender<Event>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let door = Self { address: listener.local_addr()?, closed: Arc::default() };
        let closed = Arc::clone(&door.closed);
        let accept = move || {
            let greetings = Arc::new(AtomicUsize::new(0));
            let mut connection = 0;
            while !closed.load(Ordering::Acquire) {
                if !is_waiting(&listener) {
                    continue;
                }
                let Ok((stream, address)) = listener.accept() else {
                    // The process may be out of descriptors. The pause avoids a busy loop.
                    thread::sleep(Duration::from_millis(10));
                    continue;
                };
                if greetings.fetch_add(1, Ordering::AcqRel) >= MAX_GREETINGS {
                    greetings.fetch_sub(1, Ordering::AcqRel);
                    continue;
                }
                connection += 1;
                let (secret, events, greetings) = (secret.clone(), events.clone(), Arc::clone(&greetings));
                let visit = move || {
                    let first = let_in(&stream, &secret, patience);
                    greetings.fetch_sub(1, Ordering::AcqRel);
                    serve(stream, address, connection, first, &events);
                };
                // If no thread can be started, the connection is closed and the rank calls again.
                let _ = thread::Builder::new().name("visitor".to_owned()).spawn(visit);
            }
        };
        thread::Builder::new().name("door".to_owned()).spawn(accept)?;
        Ok(door)
    }
}

fn is_waiting(listener: &TcpListener) -> bool {
    let limit = Timespec::try_from(LOOK).ok();
    matches!(poll(&mut [PollFd::new(&listener.as_fd(), PollFlags::IN)], limit.as_ref()), Ok(1))
}

/// The caller's first message, if it is of this job.
fn let_in(stream: &TcpStream, secret: &Secret, patience: Duration) -> Result<Message, Stranger> {
    stream.set_nonblocking(false)?;
    set_up(stream, patience)?;
    greet_caller(stream, secret)?;
    Ok(Message::read(stream)?)
}

fn serve(
    stream: TcpStream,
    address: SocketAddr,
    connection: usize,
    first: Result<Message, Stranger>,
    events: &Sender<Event>,
) {
    // If the receiver is gone, nobody needs the events.
    let ready = stream.set_read_timeout(None).and_then(|()| stream.set_write_timeout(None));
    let _ = match (first, ready, stream.try_clone()) {
        (Ok(Message::Join(join)), Ok(()), Ok(clone)) => {
            let sent = events.send(Event::Joined { stream: clone, join, connection });
            listen(stream, connection, events);
            sent
        }
        (Ok(Message::Mesh { from }), Ok(()), Ok(_)) => events.send(Event::Meshed { stream, from }),
        (Ok(_), Ok(()), Ok(_)) => {
            events.send(Event::Stranger { address: address.to_string(), reason: Stranger::NotARank })
        }
        (Ok(_), Err(error), _) | (Ok(_), _, Err(error)) => {
            events.send(Event::Stranger { address: address.to_string(), reason: error.into() })
        }
        (Err(reason), ..) => events.send(Event::Stranger { address: address.to_string(), reason }),
    };
}

/// Turns the messages of a control connection into events until it closes.
pub(crate) fn listen(stream: TcpStream, connection: usize, events: &Sender<Event>) {
    let reason = loop {
        match Message::read(&stream) {
            Ok(message) => {
                if events.send(Event::Message { connection, message }).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => break Death::Failed(error.to_string()),
            Err(_) => break Death::Closed,
        }
    };
    let _ = stream.shutdown(Shutdown::Both);
    let _ = events.send(Event::Gone { connection, reason });
}

/// Calls a door and greets it.
pub(crate) fn call(address: SocketAddr, secret: &Secret, patience: Duration) -> Result<TcpStream, Stranger> {
    let stream = TcpStream::connect_timeout(&address, patience)?;
    if stream.local_addr()? == stream.peer_addr()? {
        // On one host, TCP can connect a port to itself if nobody listens on it.
        return Err(io::Error::from(io::ErrorKind::ConnectionRefused).into());
    }
    set_up(&stream, patience)?;
    greet_door(&stream, secret)?;
    stream.set_read_timeout(None)?;
    Ok(stream)
}

fn set_up(stream: &TcpStream, patience: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))
}

/// The time left until `deadline`, but at least a millisecond, because a timeout of zero is not allowed.
pub(crate) fn until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}
