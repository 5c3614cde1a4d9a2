//! How a rank finds the memory of the others. In the same process their addresses can be used directly; other processes
//! send handles. Ranks that cannot map each other's memory are connected through NCCL.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher};
use std::sync::{Arc, OnceLock};

use mixtral_engine::{BackendError, Collectives, Program};

use crate::CudaError;
use crate::driver::{
    Communicator, Context, DeviceMemory, HANDLE_BYTES, ID_BYTES, OpenedMemory, UniqueId, nccl_version,
};
use crate::remote;

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

/// How to reach a rank's memory.
pub(crate) enum Link {
    /// It begins at this address in this process.
    Mapped(u64),
    /// Not at all, so NCCL carries what goes there.
    Remote(Arc<Communicator>),
}

/// Finds the memory of other ranks.
pub(crate) struct Peers<'a> {
    context: &'a Context,
    program: &'a Program,
    ranks: &'a dyn Collectives,
    mine: Introduction,
    maps: bool,
    /// Other processes' memory, for as long as kernels write there.
    pub(crate) opened: Vec<OpenedMemory>,
    /// What was found, in words.
    pub(crate) links: Vec<String>,
}

impl<'a> Peers<'a> {
    /// None yet. `memory` is what this rank tells the others of. Without `maps`, no memory is mapped.
    pub(crate) fn new(
        context: &'a Context,
        program: &'a Program,
        ranks: &'a dyn Collectives,
        memory: &DeviceMemory,
        maps: bool,
    ) -> Peers<'a> {
        let mine = Introduction {
            host: host(),
            process: process(),
            device: context.device().ordinal as u64,
            address: memory.address(),
            handle: memory.handle(context).unwrap_or([0; HANDLE_BYTES]),
        };
        Peers { context, program, ranks, mine, maps, opened: Vec::new(), links: Vec::new() }
    }

    /// Tells a rank of another stage where this rank's memory is.
    pub(crate) fn introduce(&self, rank: usize) -> Result<(), BackendError> {
        self.ranks.send(rank, &self.mine.to_bytes())
    }

    /// Where the memory of each rank of the group begins. If one of them cannot map the memory of all others, none does, and
    /// all are connected.
    pub(crate) fn group(&mut self) -> Result<(Vec<u64>, Option<Arc<Communicator>>), BackendError> {
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
    pub(crate) fn neighbour(&mut self, rank: usize, place: usize) -> Result<Link, BackendError> {
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
