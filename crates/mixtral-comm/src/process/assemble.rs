//! How the ranks of a job come together. The others call rank 0. It sends all of them the roster, and says go when all
//! ranks are connected to each other.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::door::{Door, Event, call, listen, until};
use super::greeting::{Secret, Stranger, random};
use super::notice::{self, Found, NotPublished, Notice, Published};
use super::wire::{Join, Member, Message};
use super::{JoinError, JoinOptions, signals};
use crate::Death;
use crate::launch::{Meeting, Process};
use crate::world::host_name;

/// When rank 0 has refused a job, it waits this long to tell ranks that are still coming.
const LINGER: Duration = Duration::from_secs(2);

/// The other ranks wait this much longer than rank 0, so that its reason for giving up reaches them.
const GRACE: Duration = Duration::from_secs(5);

/// After this many failed calls, a rank counts as out of reach.
const CALLS: usize = 3;

/// Ranks that have come together.
pub(super) struct Assembled {
    pub(super) rank: usize,
    pub(super) members: Vec<Member>,
    /// On rank 0, a connection to each other rank. On another rank, one connection to rank 0.
    pub(super) control: Vec<Control>,
    /// Data connections by rank; `None` for this rank itself.
    pub(super) mesh: Vec<Option<TcpStream>>,
    pub(super) sender: Sender<Event>,
    pub(super) events: Receiver<Event>,
}

pub(super) struct Control {
    pub(super) rank: usize,
    /// The number that its events carry.
    pub(super) connection: usize,
    pub(super) stream: TcpStream,
}

/// Joins the other ranks.
pub(super) fn assemble(process: &Process, options: &JoinOptions) -> Result<Assembled, JoinError> {
    let (sender, events) = channel();
    if options.signals {
        signals::listen(sender.clone()).map_err(JoinError::io("listening for signals"))?;
    }
    let start = Start { process, options, sender, events, deadline: Instant::now() + options.start_limit };
    let job = process.job.clone().unwrap_or_else(|| format!("parent-{}", std::os::unix::process::parent_id()));
    let path = notice::path(&options.directory, &job);
    if process.rank == 0 { host(start, &path) } else { guest(start, &path) }
}

/// What both sides start with.
struct Start<'a> {
    process: &'a Process,
    options: &'a JoinOptions,
    sender: Sender<Event>,
    events: Receiver<Event>,
    deadline: Instant,
}

impl Start<'_> {
    /// The next event, if one comes before the deadline.
    fn next(&self) -> Result<Option<Event>, JoinError> {
        match self.events.recv_timeout(until(self.deadline)) {
            Ok(Event::Signal(number)) => Err(JoinError::Signal(number)),
            Ok(Event::Stranger { address, reason }) => {
                (self.options.warn)(&format!(
                    "dropped a connection from {address}, which is no rank of this job: {reason}"
                ));
                Ok(None)
            }
            Ok(event) => Ok(Some(event)),
            Err(_) => Ok(None),
        }
    }

    fn is_late(&self) -> bool {
        Instant::now() >= self.deadline
    }

    fn open(&self, address: SocketAddr, secret: &Secret) -> Result<Door, JoinError> {
        Door::open(address, secret.clone(), self.options.greeting_limit, self.sender.clone())
            .map_err(JoinError::io(format!("listening on {address}")))
    }

    fn me(&self, port: u16) -> Join {
        let Process { rank, world_size, .. } = *self.process;
        let (identity, pid) = (self.options.identity, std::process::id());
        Join { rank, world_size, identity, pid, host: host_name(), port }
    }
}

fn host(start: Start<'_>, path: &Path) -> Result<Assembled, JoinError> {
    let (door, published) = open_to_all(&start, path)?;
    let world_size = start.process.world_size;
    let mut host = Host {
        joined: (0..world_size).map(|_| None).collect(),
        mesh: (0..world_size).map(|_| None).collect(),
        ready: vec![false; world_size],
        largest_world: world_size,
        start,
    };
    let members = host.gather(&door);
    // The door closes here, so a rank that comes later finds nothing.
    let members = members.inspect_err(|error| host.refuse(error))?;
    drop((published, door));
    let Host { start, joined, mesh, .. } = host;
    let control = joined.into_iter().flatten().map(|guest| guest.control).collect();
    Ok(Assembled { rank: 0, members, control, mesh, sender: start.sender, events: start.events })
}

/// Opens rank 0's door. On one host, also publishes the notice that tells where it is.
fn open_to_all(start: &Start<'_>, path: &Path) -> Result<(Door, Option<Published>), JoinError> {
    match &start.process.meeting {
        Meeting::File => {
            let bytes = random().map_err(JoinError::io("making a secret"))?;
            let door = start.open((Ipv4Addr::LOCALHOST, 0).into(), &Secret::new(&bytes))?;
            let published = Notice::new(door.address.port(), bytes).publish(path).map_err(|reason| match reason {
                NotPublished::Busy(pid) => JoinError::Busy { path: path.to_owned(), pid },
                NotPublished::Foreign(what) => JoinError::Foreign { path: path.to_owned(), what },
                NotPublished::Io(error) => JoinError::io(format!("writing {}", path.display()))(error),
            })?;
            Ok((door, Some(published)))
        }
        Meeting::Address { host, port, secret } => {
            let what = format!("rank 0 looking up MASTER_ADDR {host}");
            let addresses = (host.as_str(), *port).to_socket_addrs().map_err(JoinError::io(what))?;
            let mut last = JoinError::Io { what: format!("looking up {host}"), error: "no address".to_owned() };
            for address in addresses {
                match start.open(address, &Secret::new(secret.as_bytes())) {
                    Ok(door) => return Ok((door, None)),
                    Err(error) => last = error,
                }
            }
            let JoinError::Io { what, error } = last else { return Err(last) };
            let what = format!("rank 0 {what} (MASTER_ADDR must be an address of its host, MASTER_PORT free there)");
            Err(JoinError::Io { what, error })
        }
    }
}

struct Host<'a> {
    start: Start<'a>,
    joined: Vec<Option<Guest>>,
    mesh: Vec<Option<TcpStream>>,
    ready: Vec<bool>,
    /// The largest world that any rank was started for.
    largest_world: usize,
}

struct Guest {
    control: Control,
    member: Member,
}

impl Host<'_> {
    fn gather(&mut self, door: &Door) -> Result<Vec<Member>, JoinError> {
        let mut roster: Option<Vec<Member>> = None;
        loop {
            match &roster {
                None if self.joined.iter().skip(1).all(Option::is_some) => {
                    let me = Member { host: host_name(), pid: std::process::id(), address: door.address };
                    let others = self.joined.iter().flatten().map(|guest| guest.member.clone());
                    let members: Vec<_> = std::iter::once(me).chain(others).collect();
                    self.tell_all(&Message::Roster(members.clone()));
                    roster = Some(members);
                    self.start.deadline =
                        self.start.deadline.max(Instant::now() + 2 * self.start.options.greeting_limit);
                }
                Some(members) if (1..self.ready.len()).all(|rank| self.ready[rank] && self.mesh[rank].is_some()) => {
                    self.tell_all(&Message::Go);
                    return Ok(members.clone());
                }
                _ => {}
            }
            if let Some(event) = self.start.next()? {
                self.handle(event)?;
            } else if self.start.is_late() {
                return Err(self.missing(roster.is_some()));
            }
        }
    }

    fn handle(&mut self, event: Event) -> Result<(), JoinError> {
        match event {
            Event::Joined { stream, join, connection } => self.admit(stream, join, connection),
            Event::Meshed { stream, from } => {
                // A second connection, or one of a rank that does not exist, is a mistake of one of our ranks. The
                // first connection stays.
                if let Some(place @ None) = self.mesh.get_mut(from) {
                    *place = Some(stream);
                }
                Ok(())
            }
            Event::Message { connection, message: Message::Ready } => {
                if let Some(guest) = self.guest(connection) {
                    let rank = guest.control.rank;
                    self.ready[rank] = true;
                }
                Ok(())
            }
            Event::Message { connection, message: Message::Failed(reason) } | Event::Gone { connection, reason } => {
                let Some(Guest { control, member }) = self.guest(connection) else { return Ok(()) };
                let Member { host, pid, .. } = member.clone();
                Err(JoinError::Ended { rank: control.rank, host, pid, reason })
            }
            _ => Ok(()),
        }
    }

    fn guest(&self, connection: usize) -> Option<&Guest> {
        self.joined.iter().flatten().find(|guest| guest.control.connection == connection)
    }

    fn admit(&mut self, stream: TcpStream, join: Join, connection: usize) -> Result<(), JoinError> {
        let Join { rank, world_size, identity, pid, host, port } = join;
        self.largest_world = self.largest_world.max(world_size);
        let expected = self.joined.len();
        // The rank is told why it is refused, whatever is wrong with it.
        let refused = |error: JoinError| {
            let _ = Message::Refused(error.to_string()).write(&stream);
            Err(error)
        };
        if world_size != expected {
            return refused(JoinError::WorldSize { rank, host, pid, found: world_size, expected });
        }
        let here = (std::process::id(), host_name());
        let taken = match self.joined.get(rank) {
            Some(Some(guest)) => Some((guest.member.pid, guest.member.host.clone())),
            Some(None) if rank > 0 => None,
            _ => Some(here),
        };
        if let Some((first_pid, first_host)) = taken {
            let (first, second) = (format!("{first_pid} on {first_host}"), format!("{pid} on {host}"));
            return refused(JoinError::RankTwice { rank, first, second });
        }
        if identity != self.start.options.identity {
            let (found, expected) = (short(&identity), short(&self.start.options.identity));
            return refused(JoinError::Identity { rank, host, pid, found, expected });
        }
        // If the connection is closed already, an event of its own reports that.
        let ip = stream.peer_addr().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip());
        let member = Member { host, pid, address: SocketAddr::new(ip, port) };
        self.joined[rank] = Some(Guest { control: Control { rank, connection, stream }, member });
        Ok(())
    }

    fn missing(&self, has_roster: bool) -> JoinError {
        let there = |rank: &usize| match has_roster {
            false => self.joined[*rank].is_some(),
            true => self.ready[*rank] && self.mesh[*rank].is_some(),
        };
        let missing = (1..self.joined.len()).filter(|rank| !there(rank)).collect();
        let what = if has_roster { "connect to all others" } else { "join" };
        let seconds = self.start.options.start_limit.as_secs();
        JoinError::Missing { missing, what, world_size: self.joined.len(), seconds }
    }

    /// Sends a message to all. A failed write is ignored: that rank is gone, and an event of its own reports it.
    fn tell_all(&self, message: &Message) {
        for guest in self.joined.iter().flatten() {
            let _ = message.write(&guest.control.stream);
        }
    }

    /// Tells all ranks why there will be no job, and waits a moment to tell those that are still coming.
    fn refuse(&mut self, error: &JoinError) {
        let refused = Message::Refused(error.to_string());
        self.tell_all(&refused);
        if matches!(error, JoinError::Missing { .. } | JoinError::Signal(_)) {
            return;
        }
        let mut told: BTreeSet<usize> = self.joined.iter().flatten().map(|guest| guest.control.rank).collect();
        self.start.deadline = Instant::now() + LINGER;
        while told.len() + 1 < self.largest_world && !self.start.is_late() {
            if let Ok(Some(Event::Joined { stream, join, .. })) = self.start.next() {
                let _ = refused.write(&stream);
                told.insert(join.rank);
                self.largest_world = self.largest_world.max(join.world_size);
            }
        }
    }
}

/// The first digits of an identity.
fn short(identity: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*identity).to_hex()[..12].to_owned()
}

fn guest(mut start: Start<'_>, path: &Path) -> Result<Assembled, JoinError> {
    let (stream, secret) = reach_host(&start, path)?;
    let io = |error: std::io::Error| JoinError::io("setting up the connection to rank 0")(error);
    let host_address = stream.peer_addr().map_err(io)?;
    let door = start.open(SocketAddr::new(stream.local_addr().map_err(io)?.ip(), 0), &secret)?;
    let _ = Message::Join(start.me(door.address.port())).write(&stream);
    let (clone, events) = (stream.try_clone().map_err(io)?, start.sender.clone());
    let listener = thread::Builder::new().name("rank 0's messages".to_owned());
    listener.spawn(move || listen(clone, 0, &events)).map_err(io)?;

    // Rank 0 decides when the wait is over and tells the others, so this rank waits longer than rank 0.
    start.deadline = Instant::now() + start.options.start_limit + 2 * start.options.greeting_limit + GRACE;
    let mut guest = GuestStart {
        mesh: (0..start.process.world_size).map(|_| None).collect(),
        members: Vec::new(),
        host_address,
        secret,
        is_ready: false,
        stream: &stream,
        start: &start,
    };
    let gathered = guest.gather();
    let GuestStart { mesh, members, .. } = guest;
    match gathered {
        Ok(()) => {
            let control = vec![Control { rank: 0, connection: 0, stream }];
            Ok(Assembled {
                rank: start.process.rank,
                members,
                control,
                mesh,
                sender: start.sender,
                events: start.events,
            })
        }
        Err(error) => {
            let reason = match &error {
                JoinError::Signal(number) => Death::Signal(*number),
                other => Death::Failed(other.to_string()),
            };
            if !matches!(error, JoinError::Refused(_) | JoinError::HostEnded { .. }) {
                let _ = Message::Failed(reason).write(&stream);
                // Wait until rank 0 has read it. It then refuses or closes the connection.
                start.deadline = Instant::now() + LINGER;
                while !start.is_late() {
                    let answer = start.next();
                    if let Ok(Some(Event::Message { message: Message::Refused(_), .. } | Event::Gone { .. })) = answer {
                        break;
                    }
                }
            }
            if let JoinError::HostEnded { .. } = error {
                // If rank 0 was killed, its notice is still there and has to be removed.
                notice::remove_stale(path, Duration::from_secs(1));
            }
            Err(error)
        }
    }
}

/// Calls rank 0 until it answers.
fn reach_host(start: &Start<'_>, path: &Path) -> Result<(TcpStream, Secret), JoinError> {
    let mut pause = Duration::from_millis(10);
    let mut last = "nothing there".to_owned();
    loop {
        let (addresses, secret) = match &start.process.meeting {
            Meeting::File => match notice::find(path).map_err(JoinError::io(format!("reading {}", path.display())))? {
                Found::Nothing => (Vec::new(), None),
                Found::Foreign(what) => return Err(JoinError::Foreign { path: path.to_owned(), what }),
                Found::Notice(notice) if notice.machine != notice::machine() => {
                    return Err(JoinError::OtherMachine { here: notice::machine(), there: notice.machine });
                }
                Found::Notice(notice) => {
                    (vec![SocketAddr::from((Ipv4Addr::LOCALHOST, notice.port))], Some(Secret::new(&notice.secret)))
                }
            },
            Meeting::Address { host, port, secret } => {
                let addresses = (host.as_str(), *port).to_socket_addrs().map(Iterator::collect);
                let addresses = addresses.unwrap_or_else(|error| {
                    last = error.to_string();
                    Vec::new()
                });
                (addresses, Some(Secret::new(secret.as_bytes())))
            }
        };
        for (address, secret) in addresses.into_iter().zip(secret.iter().cycle()) {
            match call(address, secret, start.options.greeting_limit) {
                Ok(stream) => return Ok((stream, secret.clone())),
                Err(Stranger::WrongSecret) if start.process.meeting != Meeting::File => {
                    return Err(JoinError::WrongSecret { address: address.to_string() });
                }
                Err(error) => last = error.to_string(),
            }
        }
        if start.is_late() {
            let seconds = start.options.start_limit.as_secs();
            let (place, hint) = match &start.process.meeting {
                Meeting::File => (
                    path.display().to_string(),
                    "start every rank from one launcher, or give all the same MASTER_PORT; if rank 0 is on another \
                     host, set MASTER_ADDR, MASTER_PORT and MIXTRAL_SECRET",
                ),
                Meeting::Address { host, port, .. } => (
                    format!("{host}:{port}"),
                    "see that rank 0 runs there, and that MASTER_ADDR and MASTER_PORT are right",
                ),
            };
            return Err(JoinError::NoHost { place, seconds, last, hint });
        }
        if let Ok(Event::Signal(number)) = start.events.recv_timeout(pause.min(until(start.deadline))) {
            return Err(JoinError::Signal(number));
        }
        pause = (2 * pause).min(Duration::from_millis(200));
    }
}

/// A rank that has joined and waits for rank 0's go.
struct GuestStart<'a> {
    start: &'a Start<'a>,
    stream: &'a TcpStream,
    host_address: SocketAddr,
    secret: Secret,
    members: Vec<Member>,
    mesh: Vec<Option<TcpStream>>,
    is_ready: bool,
}

impl GuestStart<'_> {
    fn gather(&mut self) -> Result<(), JoinError> {
        let rank = self.start.process.rank;
        loop {
            let all_there = (0..self.mesh.len()).all(|other| other == rank || self.mesh[other].is_some());
            if all_there && !self.is_ready {
                let _ = Message::Ready.write(self.stream);
                self.is_ready = true;
            }
            match self.start.next()? {
                Some(Event::Message { message: Message::Roster(members), .. }) if members.len() == self.mesh.len() => {
                    self.members = members;
                    for other in 0..rank {
                        self.mesh[other] = Some(self.call(other)?);
                    }
                }
                Some(Event::Meshed { stream, from }) if from > rank => {
                    if let Some(place @ None) = self.mesh.get_mut(from) {
                        *place = Some(stream);
                    }
                }
                Some(Event::Message { message: Message::Go, .. }) if self.is_ready => return Ok(()),
                Some(Event::Message { message: Message::Refused(reason), .. }) => {
                    return Err(JoinError::Refused(reason));
                }
                Some(Event::Gone { .. }) => {
                    return Err(JoinError::HostEnded { address: self.host_address.to_string() });
                }
                None if self.start.is_late() => {
                    return Err(JoinError::NoHost {
                        place: self.host_address.to_string(),
                        seconds: self.start.options.start_limit.as_secs(),
                        last: "it answered, but never said go".to_owned(),
                        hint: "see whether rank 0 is stopped",
                    });
                }
                _ => {}
            }
        }
    }

    /// Opens a data connection to a rank of the roster.
    fn call(&self, other: usize) -> Result<TcpStream, JoinError> {
        let mut address = if other == 0 { self.host_address } else { self.members[other].address };
        if address.ip().is_loopback() {
            // That rank is on rank 0's host, so it has the address by which this rank reached rank 0.
            address.set_ip(self.host_address.ip());
        }
        let from = self.start.process.rank;
        let mut error = String::new();
        for _ in 0..CALLS {
            let called = call(address, &self.secret, self.start.options.greeting_limit).and_then(|stream| {
                Message::Mesh { from }.write(&stream)?;
                stream.set_write_timeout(None)?;
                Ok(stream)
            });
            match called {
                Ok(stream) => return Ok(stream),
                Err(reason) => error = reason.to_string(),
            }
            thread::sleep(Duration::from_millis(50));
        }
        let host = self.members[other].host.clone();
        Err(JoinError::Mesh { from, to: other, host, address: address.to_string(), error })
    }
}
