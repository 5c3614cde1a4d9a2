//! Watches who is alive. One thread of each process receives and sends heartbeats, and decides when the job is over. It
//! never computes and never waits for long.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use super::assemble::{Assembled, Control};
use super::door::{Event, until};
use super::mesh::{self, Wire};
use super::wire::{Member, Message};
use super::{JoinError, JoinOptions, signals};
use crate::endpoint::{Buffers, Endpoint, Link};
use crate::inbox::Inbox;
use crate::{CommError, Death, World};

/// How long the last message may take to arrive.
const LAST_WORD: Duration = Duration::from_secs(1);

/// When a data connection breaks, a rank waits this long for a better reason for the job's end. Rank 0 may hear one
/// from the failed rank itself; the others hear it from rank 0.
const REASON_AT_HOST: Duration = Duration::from_secs(1);
const REASON_AT_GUEST: Duration = Duration::from_secs(3);

/// The rank's side of the watch.
#[derive(Debug)]
pub(super) struct Watch {
    events: Sender<Event>,
    inbox: Arc<Inbox>,
}

impl Watch {
    /// Ends well, together with all other ranks.
    pub(super) fn finish(self, world: &World) -> Result<(), CommError> {
        for link in &world.endpoint.links {
            if let Link::Wire(wire) = link {
                wire.goodbye();
            }
        }
        let _ = self.events.send(Event::Finish);
        self.inbox.await_end()
    }

    /// Tells all other ranks that this rank failed, unless the job is over already.
    pub(super) fn fail(self, reason: String) {
        let _ = self.events.send(Event::Fail(reason));
        let _ = self.inbox.await_end();
    }
}

/// Starts the threads of a process whose ranks have come together.
pub(super) fn start(all: Assembled, options: &JoinOptions) -> Result<(World, Watch), JoinError> {
    let Assembled { rank, members, control, mesh, sender, events } = all;
    let io = |error: std::io::Error| JoinError::io("setting up the connections")(error);
    let inbox = Arc::new(Inbox::new(members.len()));
    let hosts = members.iter().map(|member| member.host.clone()).collect();
    let mut links = Vec::with_capacity(members.len());
    let mut streams = Vec::with_capacity(members.len());
    for (other, stream) in mesh.into_iter().enumerate() {
        let Some(stream) = stream else {
            links.push(Link::Memory(Arc::clone(&inbox)));
            continue;
        };
        let (clone, inbox, events) = (stream.try_clone().map_err(io)?, Arc::clone(&inbox), sender.clone());
        streams.push(stream.try_clone().map_err(io)?);
        let reader = thread::Builder::new().name(format!("from rank {other}"));
        reader.spawn(move || mesh::read(clone, other, &inbox, &events)).map_err(io)?;
        links.push(Link::Wire(Wire::new(other, stream, sender.clone())));
    }
    let peers = control.into_iter().map(Peer::new).collect::<Result<_, _>>().map_err(io)?;
    let watcher = Watcher {
        rank,
        members,
        peers,
        events,
        heartbeat: options.heartbeat,
        stall_limit: options.stall_limit,
        suspect: None,
        ending: None,
        is_finishing: false,
    };
    let watched = Arc::clone(&inbox);
    thread::Builder::new().name("watch".to_owned()).spawn(move || watcher.run(&watched, &streams)).map_err(io)?;
    let endpoint = Endpoint { rank, hosts, inbox: Arc::clone(&inbox), links, buffers: Buffers::default() };
    Ok((World::new(endpoint), Watch { events: sender, inbox }))
}

struct Watcher {
    rank: usize,
    members: Vec<Member>,
    /// Rank 0 watches all, the others watch rank 0.
    peers: Vec<Peer>,
    events: Receiver<Event>,
    heartbeat: Duration,
    stall_limit: Duration,
    /// A rank to which a data connection was lost, and until when a better reason may come.
    suspect: Option<(usize, Instant)>,
    /// The reason for which this rank asked rank 0 to end the job, and until when rank 0 may answer.
    ending: Option<(Death, Instant)>,
    is_finishing: bool,
}

struct Peer {
    rank: usize,
    connection: usize,
    stream: TcpStream,
    heard: Instant,
    said_goodbye: bool,
    is_gone: bool,
}

impl Peer {
    fn new(Control { rank, connection, stream }: Control) -> std::io::Result<Self> {
        // The connection of a stopped process accepts many heartbeats before a write blocks. This limits how long it
        // blocks.
        stream.set_write_timeout(Some(LAST_WORD))?;
        Ok(Self { rank, connection, stream, heard: Instant::now(), said_goodbye: false, is_gone: false })
    }

    /// Sends a message. A failed write is ignored, because the connection then reports that the rank is gone.
    fn tell(&self, message: &Message) {
        let _ = message.write(&self.stream);
    }
}

impl Watcher {
    fn run(mut self, inbox: &Inbox, mesh: &[TcpStream]) {
        match self.watch() {
            Ok(()) => {
                signals::release();
                inbox.conclude();
            }
            Err(failure) => {
                inbox.fail(failure);
                // This wakes a rank that waits for room to send.
                mesh.iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
            }
        }
        self.peers.iter().for_each(|peer| drop(peer.stream.shutdown(Shutdown::Both)));
    }

    /// Returns when the job is over: `Ok` if it ended well, else its failure.
    fn watch(&mut self) -> Result<(), CommError> {
        let mut awake = Instant::now();
        let mut next_beat = awake;
        loop {
            let now = Instant::now();
            if now - awake > self.stall_limit / 2 {
                // This process itself was stopped. The others' messages of that time are still unread, so nobody counts
                // as silent yet.
                self.peers.iter_mut().for_each(|peer| peer.heard = now);
            }
            awake = now;
            if now >= next_beat {
                self.tell_all(&Message::Heartbeat);
                next_beat = now + self.heartbeat;
            }
            let mut wake = next_beat;
            let watched = self.peers.iter().filter(|peer| !peer.said_goodbye);
            if let Some((heard, rank)) = watched.map(|peer| (peer.heard, peer.rank)).min() {
                if now >= heard + self.stall_limit {
                    let milliseconds = u64::try_from(self.stall_limit.as_millis()).unwrap_or(u64::MAX);
                    return Err(self.over(rank, Death::Stalled { milliseconds }));
                }
                wake = wake.min(heard + self.stall_limit);
            }
            if let Some((rank, limit)) = self.suspect {
                if now >= limit {
                    return Err(self.over(rank, Death::Closed));
                }
                wake = wake.min(limit);
            }
            if let Some((reason, limit)) = &self.ending {
                if now >= *limit {
                    return Err(self.dead(self.rank, reason.clone()));
                }
                wake = wake.min(*limit);
            }
            if let Ok(event) = self.events.recv_timeout(until(wake)) {
                self.handle(event)?;
                if self.has_concluded() {
                    return Ok(());
                }
            }
        }
    }

    fn handle(&mut self, event: Event) -> Result<(), CommError> {
        match event {
            Event::Message { connection, message } => {
                let Some(at) = self.peers.iter().position(|peer| peer.connection == connection) else { return Ok(()) };
                self.peers[at].heard = Instant::now();
                self.hear(at, message)
            }
            Event::Gone { connection, reason } => {
                let Some(peer) = self.peers.iter_mut().find(|peer| peer.connection == connection) else {
                    return Ok(());
                };
                peer.is_gone = true;
                let (rank, said_goodbye) = (peer.rank, peer.said_goodbye);
                if said_goodbye { Ok(()) } else { Err(self.over(rank, reason)) }
            }
            Event::MeshBroken { rank } => {
                if self.rank != 0 {
                    self.tell_all(&Message::Lost { rank });
                }
                self.suspect(rank);
                Ok(())
            }
            Event::Signal(number) => self.end(Death::Signal(number)),
            Event::Fail(reason) => self.end(Death::Failed(reason)),
            Event::Finish => {
                self.is_finishing = true;
                if self.rank != 0 {
                    self.tell_all(&Message::Goodbye);
                }
                Ok(())
            }
            Event::Joined { stream, join, .. } => {
                let here = &self.members[0];
                let late = format!(
                    "the job of process {} on {} has already started without rank {}'s process {}; every process needs \
                     its own rank",
                    here.pid, here.host, join.rank, join.pid
                );
                let _ = Message::Refused(late).write(stream);
                Ok(())
            }
            Event::Meshed { .. } | Event::Stranger { .. } => Ok(()),
        }
    }

    /// Handles a message of a peer.
    fn hear(&mut self, at: usize, message: Message) -> Result<(), CommError> {
        let from = self.peers[at].rank;
        match message {
            Message::Goodbye => {
                self.peers[at].said_goodbye = true;
                Ok(())
            }
            Message::Failed(reason) if self.rank == 0 => Err(self.over(from, reason)),
            Message::Lost { rank } if self.rank == 0 && rank < self.members.len() => {
                // If the lost connection was to rank 0 (this rank), the rank that lost it is the suspect.
                self.suspect(if rank == 0 { from } else { rank });
                Ok(())
            }
            Message::Dead { rank, reason } if self.rank != 0 && rank < self.members.len() => {
                self.tell_all(&Message::Seen);
                Err(self.dead(rank, reason))
            }
            _ => Ok(()),
        }
    }

    fn suspect(&mut self, rank: usize) {
        let said_goodbye = self.peers.iter().any(|peer| peer.rank == rank && peer.said_goodbye);
        if self.suspect.is_none() && !said_goodbye {
            let patience = if self.rank == 0 { REASON_AT_HOST } else { REASON_AT_GUEST };
            self.suspect = Some((rank, Instant::now() + patience));
        }
    }

    /// Ends the job because of this rank. Rank 0 tells all others; another rank asks rank 0 to do so.
    fn end(&mut self, reason: Death) -> Result<(), CommError> {
        if self.rank == 0 {
            return Err(self.over(0, reason));
        }
        if self.ending.is_none() {
            self.tell_all(&Message::Failed(reason.clone()));
            self.ending = Some((reason, Instant::now() + LAST_WORD));
        }
        Ok(())
    }

    /// The failure of a job that is over because of `rank`. Rank 0 tells all others first and waits a moment until they
    /// know, because they might notice rank 0's own end before they read the message.
    fn over(&mut self, rank: usize, reason: Death) -> CommError {
        if self.rank == 0 {
            self.tell_all(&Message::Dead { rank, reason: reason.clone() });
            self.await_seen();
        }
        self.dead(rank, reason)
    }

    fn dead(&self, rank: usize, reason: Death) -> CommError {
        let Member { host, pid, .. } = self.members[rank].clone();
        CommError::Dead { rank, host, pid, reason }
    }

    /// Whether all ranks have said goodbye. If so, rank 0 has told them.
    fn has_concluded(&self) -> bool {
        if !self.is_finishing || !self.peers.iter().all(|peer| peer.said_goodbye) {
            return false;
        }
        if self.rank == 0 {
            self.tell_all(&Message::Goodbye);
            self.await_seen();
        } else {
            self.tell_all(&Message::Seen);
        }
        true
    }

    fn tell_all(&self, message: &Message) {
        self.peers.iter().filter(|peer| !peer.is_gone).for_each(|peer| peer.tell(message));
    }

    fn await_seen(&self) {
        let deadline = Instant::now() + LAST_WORD;
        let mut waiting: Vec<_> = self.peers.iter().filter(|peer| !peer.is_gone).map(|peer| peer.connection).collect();
        while !waiting.is_empty() && Instant::now() < deadline {
            match self.events.recv_timeout(until(deadline)) {
                Ok(Event::Message { connection, message: Message::Seen } | Event::Gone { connection, .. }) => {
                    waiting.retain(|waiting| *waiting != connection);
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }
}
