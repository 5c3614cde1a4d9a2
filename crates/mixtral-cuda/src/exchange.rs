//! The memory between ranks: every rank has an inbox, and the other ranks' kernels write to it
//! (`kernels/collective/exchange.cuh`). This module allocates a rank's inbox and finds the inboxes of the others. In
//! the same process their addresses can be used directly; other processes send handles. The host also waits here for a
//! step whose kernels wait for other ranks.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use mixtral_engine::{BackendError, Collectives, Op, Program};
use mixtral_kernels::{self as kernels, ExchangeArg};

use crate::CudaError;
use crate::driver::{Context, DeviceMemory, Event, HANDLE_BYTES, OpenedMemory, Pinned, Stream};

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

/// How long a rank whose GPU failed while it waited for another rank waits for the news that the other one failed.
const FOR_NEWS: Duration = Duration::from_secs(2);

/// What a rank tells the others about its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Introduction {
    /// A number that no other process has.
    process: u64,
    /// The GPU's number in that process.
    device: u64,
    /// Where the memory begins in that process.
    address: u64,
    /// The handle with which other processes open the memory.
    handle: [u8; HANDLE_BYTES],
}

impl Introduction {
    const BYTES: usize = 24 + HANDLE_BYTES;

    fn to_bytes(self) -> Vec<u8> {
        let words = [self.process, self.device, self.address];
        words.iter().flat_map(|word| word.to_le_bytes()).chain(self.handle).collect()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Introduction> {
        let word = |n: usize| Some(u64::from_le_bytes(bytes.get(8 * n..8 * n + 8)?.try_into().ok()?));
        let handle = bytes.get(24..Self::BYTES)?.try_into().ok()?;
        Some(Introduction { process: word(0)?, device: word(1)?, address: word(2)?, handle })
    }
}

/// This process's number.
fn process() -> u64 {
    static NUMBER: OnceLock<u64> = OnceLock::new();
    *NUMBER.get_or_init(|| RandomState::new().build_hasher().finish())
}

/// A rank's part in the memory between ranks. Fields are dropped in their order.
pub(crate) struct Exchange {
    ranks: Arc<dyn Collectives>,
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
    /// the ranks that this one needs have allocated theirs.
    pub(crate) fn new(
        context: &Context,
        program: &Program,
        sizes: &kernels::Exchange,
        ranks: Arc<dyn Collectives>,
    ) -> Result<Exchange, BackendError> {
        let aside = Stream::new(context)?;
        let memory = DeviceMemory::new(context, bytes(program, sizes))?;
        aside.fill(&memory, 0, CONTROL, 0)?;
        aside.fill(&memory, CONTROL, memory.len() - CONTROL, EMPTY)?;
        aside.synchronize()?;

        let device = context.device().ordinal as u64;
        let (address, handle) = (memory.address(), memory.handle(context)?);
        let mine = Introduction { process: process(), device, address, handle }.to_bytes();
        let mut all = vec![0; mine.len() * program.tp_size];
        ranks.all_gather(&mine, &mut all)?;
        let (before, next) = neighbours(program);
        let neighbours: Vec<usize> = [before, next].into_iter().flatten().collect();
        neighbours.iter().try_for_each(|&neighbour| ranks.send(neighbour, &mine))?;

        let mut opened = Vec::new();
        let mut find = |rank: usize, bytes: &[u8]| {
            let damaged = || BackendError::Other(format!("rank {rank} said something else than where its memory is"));
            let theirs = Introduction::from_bytes(bytes).ok_or_else(damaged)?;
            find(context, theirs, &mut opened).map_err(|error| unreachable_memory(context, rank, &error))
        };
        let first = program.rank - program.rank % program.tp_size;
        let inbox = (CONTROL + stage_inbox_bytes(program, sizes)) as u64;
        let mut table = Vec::new();
        for (place, bytes) in all.chunks_exact(mine.len()).enumerate() {
            let start = if first + place == program.rank { memory.address() } else { find(first + place, bytes)? };
            table.extend((start + inbox).to_le_bytes());
        }
        if table.len() > CONTROL - INBOXES {
            return Err(CudaError::Unsupported(format!("{} ranks in a tensor-parallel group", program.tp_size)).into());
        }
        aside.upload(&table, &memory, INBOXES)?;
        let mut of_neighbour = |rank: Option<usize>, offset: usize| -> Result<u64, BackendError> {
            let Some(rank) = rank else { return Ok(0) };
            let mut theirs = vec![0; mine.len()];
            ranks.recv(rank, &mut theirs)?;
            Ok(find(rank, &theirs)? + offset as u64)
        };
        let taken_before = of_neighbour(before, TAKEN)?;
        let next_inbox = of_neighbour(next, CONTROL)?;

        let mut stop = Pinned::new(context, size_of::<u32>())?;
        stop.bytes()?.fill(1);
        let report = Pinned::new(context, size_of::<u32>())?;
        let words = Words { control: memory.address(), next_inbox, taken_before, report: report.address() };
        let (tp_size, broken) = (program.tp_size, false);
        let context = context.clone();
        Ok(Exchange {
            ranks,
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

    /// The addresses that kernels get as arguments.
    pub(crate) fn words(&self) -> Words {
        self.words
    }

    /// Waits until the stream has passed `end`. The kernels before it may wait for other ranks. If one of those is gone, all
    /// kernels in the stream are told to stop, and the error says which rank.
    pub(crate) fn wait(&mut self, stream: &Stream, end: &Event) -> Result<(), CudaError> {
        self.broken = true;
        self.wait_or_fail(stream, end)?;
        self.broken = false;
        Ok(())
    }

    fn wait_or_fail(&mut self, stream: &Stream, end: &Event) -> Result<(), CudaError> {
        let mut looked = Instant::now();
        while !end.is_passed()? {
            if looked.elapsed() < LOOK_EVERY {
                std::hint::spin_loop();
                continue;
            }
            looked = Instant::now();
            if let Err(gone) = self.ranks.check() {
                // These fail if the other rank's failure has reached this GPU too. That the rank is gone says more.
                let stopped = self.stop.upload(&self.aside, 0, size_of::<u32>(), &self.memory, STOP);
                let _ = stopped.and_then(|()| stream.synchronize());
                return Err(CudaError::Rank(gone.to_string()));
            }
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
        let begun = Instant::now();
        while self.report().is_ok_and(|report| report == WAITS) && begun.elapsed() < FOR_NEWS {
            if let Err(gone) = self.ranks.check() {
                return CudaError::Rank(gone.to_string());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        error
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

/// Where another rank's memory begins in this process.
fn find(context: &Context, theirs: Introduction, opened: &mut Vec<OpenedMemory>) -> Result<u64, CudaError> {
    if theirs.process != process() {
        let memory = OpenedMemory::new(context, theirs.handle)?;
        let address = memory.address();
        opened.push(memory);
        return Ok(address);
    }
    let device = usize::try_from(theirs.device).unwrap_or(usize::MAX);
    if device != context.device().ordinal {
        context.reach(&Context::new(device)?)?;
    }
    Ok(theirs.address)
}

fn unreachable_memory(context: &Context, rank: usize, error: &CudaError) -> BackendError {
    let gpu = context.device().ordinal;
    CudaError::Unsupported(format!(
        "GPU {gpu} cannot reach the memory of rank {rank}'s GPU: {error}; the ranks of an engine need GPUs of one host that can access each other (nvidia-smi topo -p2p w shows which can), and processes need a common IPC namespace (in containers: --ipc=host); or run with --backend cpu"
    ))
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_introduction_is_read_back() {
        let mut handle = [0; HANDLE_BYTES];
        (0..).zip(&mut handle).for_each(|(n, byte)| *byte = n);
        let mine = Introduction { process: process(), device: 3, address: 0x7f00_0000_1000, handle };
        let bytes = mine.to_bytes();
        assert_eq!(bytes.len(), Introduction::BYTES);
        assert_eq!(Introduction::from_bytes(&bytes), Some(mine));
        assert_eq!(Introduction::from_bytes(&bytes[1..]), None);
    }
}
