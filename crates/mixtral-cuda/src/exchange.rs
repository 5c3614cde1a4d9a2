//! The memory between ranks: every rank has an inbox, and the other ranks' kernels write to it
//! (`kernels/collective/exchange.cuh`). This module allocates a rank's inbox and tells kernels where those of the others
//! are (`peers` finds them). The host also waits here for a step whose kernels wait for other ranks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mixtral_engine::{BackendError, Collectives, Op, Program};
use mixtral_kernels::{self as kernels, ExchangeArg, Launch, Schedule};

use crate::CudaError;
use crate::driver::{Context, DeviceMemory, Event, OpenedMemory, Pinned, Stream};
use crate::peers::{Link, Peers};
use crate::remote::{Remote, Transfer};

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

        let mut peers = Peers::new(context, program, &*ranks, &memory, maps);
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
        neighbours.iter().try_for_each(|&neighbour| peers.introduce(neighbour))?;
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
