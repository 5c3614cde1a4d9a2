//! The memory between ranks: every rank has an inbox, and the other ranks' kernels write to it
//! (`kernels/collective/exchange.cuh`). This module allocates a rank's inbox and finds the inboxes of the others. In
//! the same process their addresses can be used directly; other processes send handles. Where that does not do, NCCL carries
//! the rows (`remote`). The host also waits here for a step whose kernels wait for other ranks.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use mixtral_engine::{BackendError, Collectives, Op, Program};
use mixtral_kernels::{self as kernels, ExchangeArg, Launch, Schedule};

use crate::CudaError;
use crate::driver::{
    Communicator, Context, DeviceMemory, Event, HANDLE_BYTES, ID_BYTES, OpenedMemory, Pinned, Stream, UniqueId,
    nccl_version,
};
use crate::remote::{self, Remote, Transfer};

/// Offsets of the control block's words, in bytes from the memory's start. Each word has a cache line of its own.
const DONE: usize = 0;
const STEPS: usize = 128;
const TAKEN: usize = 256;
const STOP: usize = 384;
/// Where the inboxes of the group begin.
const INBOXES: usize = 512;
/// Bytes of the control block. Behind it lies the inbox of the stage, then that of the group.
const CONTROL: usize = 4096;

/// A byte of an empty inbox: `exchange::EMPTY`.
const EMPTY: u8 = 0xff;

/// How often the host checks whether a rank is gone, while it waits for the device.
const LOOK_EVERY: Duration = Duration::from_micros(200);

/// What the report says: a kernel waited too long, or waits just now (`exchange::GAVE_UP`, `exchange::WAITS`).
const GAVE_UP: u32 = 1;
const WAITS: u32 = 2;

/// How long kernels may take to stop.
const TO_STOP: Duration = Duration::from_secs(5);

/// How long a rank whose GPU failed while it waited for another rank waits for the news that the other one failed.
const FOR_NEWS: Duration = Duration::from_secs(2);

/// What a rank tells the others about its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Introduction {
    /// A number that no other host has.
    host: u64,
    /// A number that no other process has.
    process: u64,
    /// The GPU's number in that process.
    device: u64,
    /// Where the memory begins in that process.
    address: u64,
    /// The handle with which other processes open the memory. Zeros, which no driver opens, if there is none.
    handle: [u8; HANDLE_BYTES],
}

impl Introduction {
    const BYTES: usize = 32 + HANDLE_BYTES;

    fn to_bytes(self) -> Vec<u8> {
        let words = [self.host, self.process, self.device, self.address];
        words.iter().flat_map(|word| word.to_le_bytes()).chain(self.handle).collect()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Introduction> {
        let word = |n: usize| Some(u64::from_le_bytes(bytes.get(8 * n..8 * n + 8)?.try_into().ok()?));
        let handle = bytes.get(32..Self::BYTES)?.try_into().ok()?;
        Some(Introduction { host: word(0)?, process: word(1)?, device: word(2)?, address: word(3)?, handle })
    }
}

/// This process's number.
fn process() -> u64 {
    static NUMBER: OnceLock<u64> = OnceLock::new();
    *NUMBER.get_or_init(|| RandomState::new().build_hasher().finish())
}

/// This host's number. `NCCL_HOSTID` names the host, as for NCCL; else it is the one that was started with this boot id.
fn host() -> u64 {
    let boot = || std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let name = std::env::var("NCCL_HOSTID").unwrap_or_else(|_| boot());
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

/// A rank's part in the memory between ranks. Fields are dropped in their order.
pub(crate) struct Exchange {
    ranks: Arc<dyn Collectives>,
    /// Connections to ranks whose memory is not mapped.
    remote: Remote,
    /// How this rank reaches the others, in words.
    links: String,
    /// The ranks of the stages before and after.
    neighbours: Vec<usize>,
    tp_size: usize,
    /// Whether a step failed.
    broken: bool,
    context: Context,
    /// A stream for copies that must not queue behind kernels that wait.
    aside: Stream,
    stop: Pinned,
    report: Pinned,
    words: Words,
    /// Other processes' memory, for as long as kernels write there.
    _opened: Vec<OpenedMemory>,
    memory: DeviceMemory,
}

/// Addresses of the memory between ranks.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Words {
    control: u64,
    next_inbox: u64,
    taken_before: u64,
    report: u64,
    inbox: u64,
}

impl Words {
    /// The value of a kernel's argument.
    pub(crate) fn word(&self, what: ExchangeArg) -> u64 {
        let control = |offset: usize| self.control + offset as u64;
        match what {
            ExchangeArg::Inboxes => control(INBOXES),
            ExchangeArg::Done => control(DONE),
            ExchangeArg::Steps => control(STEPS),
            ExchangeArg::StageInbox => control(CONTROL),
            ExchangeArg::NextInbox => self.next_inbox,
            ExchangeArg::Taken => control(TAKEN),
            ExchangeArg::TakenBefore => self.taken_before,
            ExchangeArg::Stop => control(STOP),
            ExchangeArg::Report => self.report,
        }
    }
}

/// The ranks of the stages before and after this one with which a program exchanges rows.
fn neighbours(program: &Program) -> (Option<usize>, Option<usize>) {
    let from = program.ops.iter().find_map(|op| if let Op::Recv { from, .. } = op { Some(*from) } else { None });
    let to = program.ops.iter().find_map(|op| if let Op::Send { to, .. } = op { Some(*to) } else { None });
    (from, to)
}

/// Bytes of the inbox for rows of the stage before, if there is one.
fn stage_inbox_bytes(program: &Program, sizes: &kernels::Exchange) -> usize {
    if neighbours(program).0.is_some() { sizes.stage_inbox_bytes() } else { 0 }
}

/// Bytes of the memory between ranks that a program needs.
pub(crate) fn bytes(program: &Program, sizes: &kernels::Exchange) -> usize {
    let inboxes = stage_inbox_bytes(program, sizes).saturating_add(sizes.inbox_bytes(program.tp_size));
    inboxes.saturating_add(CONTROL)
}

impl Exchange {
    /// Allocates this rank's inboxes and finds those of the others. All ranks of a job must call it; it returns when
    /// the ranks that this one needs have allocated theirs. Without `maps`, it maps no memory.
    pub(crate) fn new(
        context: &Context,
        program: &Program,
        sizes: &kernels::Exchange,
        ranks: Arc<dyn Collectives>,
        maps: bool,
    ) -> Result<Exchange, BackendError> {
        let aside = Stream::new(context)?;
        let memory = DeviceMemory::new(context, bytes(program, sizes))?;
        aside.fill(&memory, 0, CONTROL, 0)?;
        aside.fill(&memory, CONTROL, memory.len() - CONTROL, EMPTY)?;
        aside.synchronize()?;

        let mine = Introduction {
            host: host(),
            process: process(),
            device: context.device().ordinal as u64,
            address: memory.address(),
            handle: memory.handle(context).unwrap_or([0; HANDLE_BYTES]),
        };
        let mut peers = Peers { context, program, ranks: &*ranks, mine, maps, opened: Vec::new(), links: Vec::new() };
        let (before, next) = neighbours(program);
        let neighbours: Vec<usize> = [before, next].into_iter().flatten().collect();
        let inbox = (CONTROL + stage_inbox_bytes(program, sizes)) as u64;
        let mut remote = Remote::default();
        let (starts, group) = peers.group()?;
        remote.group = group;
        let table: Vec<u8> = starts.iter().flat_map(|start| (start + inbox).to_le_bytes()).collect();
        if table.len() > CONTROL - INBOXES {
            return Err(CudaError::Unsupported(format!("{} ranks in a tensor-parallel group", program.tp_size)).into());
        }
        aside.upload(&table, &memory, INBOXES)?;
        neighbours.iter().try_for_each(|&neighbour| ranks.send(neighbour, &mine.to_bytes()))?;
        let (mut taken_before, mut next_inbox) = (0, 0);
        if let Some(rank) = before {
            match peers.neighbour(rank, 1)? {
                Link::Mapped(start) => taken_before = start + TAKEN as u64,
                Link::Remote(communicator) => remote.before = Some(communicator),
            }
        }
        if let Some(rank) = next {
            match peers.neighbour(rank, 0)? {
                Link::Mapped(start) => next_inbox = start + CONTROL as u64,
                Link::Remote(communicator) => remote.next = Some(communicator),
            }
        }
        let Peers { opened, links, .. } = peers;

        let mut stop = Pinned::new(context, size_of::<u32>())?;
        stop.bytes()?.fill(1);
        let report = Pinned::new(context, size_of::<u32>())?;
        let inbox = memory.address() + inbox;
        let words = Words { control: memory.address(), next_inbox, taken_before, report: report.address(), inbox };
        let (tp_size, broken) = (program.tp_size, false);
        let context = context.clone();
        let links = format!("rank {} reaches {}", program.rank, links.join(", "));
        Ok(Exchange {
            ranks,
            remote,
            links,
            neighbours,
            tp_size,
            broken,
            context,
            aside,
            stop,
            report,
            words,
            _opened: opened,
            memory,
        })
    }

    /// How this rank reaches the others, in words.
    pub(crate) fn links(&self) -> &str {
        &self.links
    }

    /// What NCCL does for a launch, if anything.
    pub(crate) fn transfer(&self, program: &Program, schedule: &Schedule, launch: &Launch) -> Option<Transfer> {
        self.remote.transfer(program, schedule, launch, self.words.inbox)
    }

    /// The addresses that kernels get as arguments.
    pub(crate) fn words(&self) -> Words {
        self.words
    }

    /// Waits until the device has passed `end`. The kernels before it may wait for other ranks. If one of those is gone, all
    /// kernels in the stream are told to stop, and the error says which rank.
    pub(crate) fn wait(&mut self, end: &Event) -> Result<(), CudaError> {
        self.broken = true;
        self.wait_or_fail(end)?;
        self.broken = false;
        Ok(())
    }

    fn wait_or_fail(&mut self, end: &Event) -> Result<(), CudaError> {
        let mut looked = Instant::now();
        while !end.is_passed()? {
            if looked.elapsed() < LOOK_EVERY {
                std::hint::spin_loop();
                continue;
            }
            looked = Instant::now();
            let gone = self.ranks.check().err().map(|gone| CudaError::Rank(gone.to_string()));
            let Some(failure) = gone.or_else(|| self.remote.failure()) else { continue };
            // This fails if the other rank's failure has reached this GPU too. That the rank is gone says more.
            let _ = self.stop.upload(&self.aside, 0, size_of::<u32>(), &self.memory, STOP);
            self.remote.abort();
            let stopped = Instant::now();
            while stopped.elapsed() < TO_STOP && end.is_passed().is_ok_and(|passed| !passed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            return Err(match failure {
                CudaError::Rank(_) => failure,
                // A connection ends when the process at its other end does.
                _ => self.news(|_| true).unwrap_or(failure),
            });
        }
        if self.report()? == GAVE_UP {
            return Err(CudaError::Rank(
                "a kernel waited for two minutes for what another rank should have sent, and no rank is known to be gone"
                    .to_owned(),
            ));
        }
        self.report.bytes()?.fill(0);
        Ok(())
    }

    /// The failure that caused `error`, with which this rank's GPU was lost. If another rank's GPU fails, those that use
    /// its memory may fail with it. They wait for that rank then, and it does not wait for them: so it says what
    /// happened to it, and the others wait a moment to hear of it.
    pub(crate) fn cause(&mut self, error: CudaError) -> CudaError {
        self.news(|exchange| exchange.report().is_ok_and(|report| report == WAITS)).unwrap_or(error)
    }

    /// Waits a moment, if `is_worth_it`, for the news that a rank has failed.
    fn news(&mut self, is_worth_it: impl FnOnce(&mut Self) -> bool) -> Option<CudaError> {
        if !is_worth_it(self) {
            return None;
        }
        let begun = Instant::now();
        while begun.elapsed() < FOR_NEWS {
            if let Err(gone) = self.ranks.check() {
                return Some(CudaError::Rank(gone.to_string()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// What the kernels report.
    fn report(&mut self) -> Result<u32, CudaError> {
        Ok(self.report.bytes()?.first_chunk().map_or(0, |word| u32::from_le_bytes(*word)))
    }
}

impl Drop for Exchange {
    /// Waits until all neighbours and all ranks of the group have come this far, so that none of them will write to
    /// this rank's memory any more. Otherwise a rank that is done could free memory to which a slower rank still
    /// writes. Ranks that have failed do not wait for each other, and free nothing: their process ends soon.
    fn drop(&mut self) {
        if self.broken || std::thread::panicking() || self.ranks.check().is_err() {
            self.context.abandon();
            return;
        }
        let part = || -> Result<(), BackendError> {
            self.ranks.all_gather(&[0], &mut vec![0; self.tp_size])?;
            self.neighbours.iter().try_for_each(|&neighbour| self.ranks.send(neighbour, &[0]))?;
            self.neighbours.iter().try_for_each(|&neighbour| self.ranks.recv(neighbour, &mut [0]))
        };
        // An error means that a rank is gone, and then it writes nothing.
        let _ = part();
    }
}

/// How to reach a rank's memory.
enum Link {
    /// It begins at this address in this process.
    Mapped(u64),
    /// Not at all, so NCCL carries what goes there.
    Remote(Arc<Communicator>),
}

/// Finds the memory of other ranks.
struct Peers<'a> {
    context: &'a Context,
    program: &'a Program,
    ranks: &'a dyn Collectives,
    mine: Introduction,
    maps: bool,
    opened: Vec<OpenedMemory>,
    /// What was found, in words.
    links: Vec<String>,
}

impl Peers<'_> {
    /// Where the memory of each rank of the group begins. If one of them cannot map the memory of all others, none does, and
    /// all are connected.
    fn group(&mut self) -> Result<(Vec<u64>, Option<Arc<Communicator>>), BackendError> {
        let tp_size = self.program.tp_size;
        let (place, first) = (self.program.rank % tp_size, self.program.rank - self.program.rank % tp_size);
        let mine = self.mine.to_bytes();
        let mut all = vec![0; mine.len() * tp_size];
        self.ranks.all_gather(&mine, &mut all)?;
        let mut opened = Vec::new();
        let found = all.chunks_exact(mine.len()).enumerate().map(|(other, bytes)| match other == place {
            true => Ok(Ok(self.mine.address)),
            false => Ok(self.find(introduction(first + other, bytes)?, &mut opened)),
        });
        let found: Result<Vec<u64>, CudaError> = found.collect::<Result<Vec<_>, BackendError>>()?.into_iter().collect();
        let mut reached = vec![0; tp_size];
        self.ranks.all_gather(&[u8::from(found.is_ok())], &mut reached)?;
        let others: Vec<usize> = (first..first + tp_size).filter(|&rank| rank != self.program.rank).collect();
        if others.is_empty() {
            return Ok((vec![self.mine.address], None));
        }
        if reached.iter().all(|&reached| reached == 1) {
            self.opened.extend(opened);
            self.say(&others, "mapped memory");
            return Ok((found?, None));
        }
        let mut ids = vec![0; ID_BYTES * tp_size];
        let id = if place == 0 { UniqueId::new()?.0 } else { [0; ID_BYTES] };
        self.ranks.all_gather(&id, &mut ids)?;
        let id = ids.first_chunk().copied().unwrap_or(id);
        let communicator = remote::connect(self.context, self.ranks, id, place, tp_size)?;
        self.say(&others, &reason(&nccl_version()?, found.err().as_ref()));
        let mut starts = vec![0; tp_size];
        starts[place] = self.mine.address;
        Ok((starts, Some(communicator)))
    }

    /// The link to the rank of another stage, which has heard of this one. This rank has `place` 0 if it sends.
    fn neighbour(&mut self, rank: usize, place: usize) -> Result<Link, BackendError> {
        let mut theirs = self.mine.to_bytes();
        self.ranks.recv(rank, &mut theirs)?;
        let mut opened = Vec::new();
        let found = self.find(introduction(rank, &theirs)?, &mut opened);
        let mut reached = [0];
        self.ranks.send(rank, &[u8::from(found.is_ok())])?;
        self.ranks.recv(rank, &mut reached)?;
        if let (Ok(start), 1) = (&found, reached[0]) {
            self.opened.extend(opened);
            self.say(&[rank], "mapped memory");
            return Ok(Link::Mapped(*start));
        }
        let mut id = [0; ID_BYTES];
        if place == 0 {
            id = UniqueId::new()?.0;
            self.ranks.send(rank, &id)?;
        } else {
            self.ranks.recv(rank, &mut id)?;
        }
        let communicator = remote::connect(self.context, self.ranks, id, place, 2)?;
        self.say(&[rank], &reason(&nccl_version()?, found.err().as_ref()));
        Ok(Link::Remote(communicator))
    }

    /// Where another rank's memory begins in this process.
    fn find(&self, theirs: Introduction, opened: &mut Vec<OpenedMemory>) -> Result<u64, CudaError> {
        if theirs.host != self.mine.host {
            return Err(CudaError::Unsupported("it is on another host".to_owned()));
        }
        if !self.maps {
            return Err(CudaError::Unsupported("memory is not to be mapped".to_owned()));
        }
        if theirs.process != self.mine.process {
            let memory = OpenedMemory::new(self.context, theirs.handle)?;
            let address = memory.address();
            opened.push(memory);
            return Ok(address);
        }
        let device = usize::try_from(theirs.device).unwrap_or(usize::MAX);
        if device != self.context.device().ordinal {
            self.context.reach(&Context::new(device)?)?;
        }
        Ok(theirs.address)
    }

    fn say(&mut self, ranks: &[usize], how: &str) {
        let ranks: Vec<String> = ranks.iter().map(ToString::to_string).collect();
        let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
        self.links.push(format!("{noun} {} through {how}", ranks.join(", ")));
    }
}

/// NCCL, and why it is needed, as far as this rank knows.
fn reason(nccl: &str, why: Option<&CudaError>) -> String {
    why.map_or_else(|| nccl.to_owned(), |why| format!("{nccl} ({why})"))
}

fn introduction(rank: usize, bytes: &[u8]) -> Result<Introduction, BackendError> {
    let damaged = || BackendError::Other(format!("rank {rank} said something else than where its memory is"));
    Introduction::from_bytes(bytes).ok_or_else(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_introduction_is_read_back() {
        let mut handle = [0; HANDLE_BYTES];
        (0..).zip(&mut handle).for_each(|(n, byte)| *byte = n);
        let mine = Introduction { host: host(), process: process(), device: 3, address: 0x7f00_0000_1000, handle };
        let bytes = mine.to_bytes();
        assert_eq!(bytes.len(), Introduction::BYTES);
        assert_eq!(Introduction::from_bytes(&bytes), Some(mine));
        assert_eq!(Introduction::from_bytes(&bytes[1..]), None);
    }
}
