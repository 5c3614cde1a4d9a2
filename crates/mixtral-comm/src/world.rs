//! All ranks, seen from one of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::endpoint::Endpoint;
use crate::inbox::{Key, Op};
use crate::{CommError, Group};

/// The longest message, and the longest part of a collective.
pub const MAX_MESSAGE_BYTES: usize = 1 << 30;

/// All ranks of a job, seen from one of them. It belongs to the rank's thread; a clone is the same world.
#[derive(Clone, Debug)]
pub struct World {
    pub(crate) endpoint: Arc<Endpoint>,
    /// How often each list of members was made into a group, so that two groups of the same members stay apart.
    groups: Arc<Mutex<HashMap<Vec<usize>, u64>>>,
}

impl World {
    pub(crate) fn new(endpoint: Endpoint) -> Self {
        Self { endpoint: Arc::new(endpoint), groups: Arc::default() }
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.endpoint.rank
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.endpoint.world_size()
    }

    /// The name of this rank's host.
    pub fn host(&self) -> &str {
        &self.endpoint.hosts[self.endpoint.rank]
    }

    /// The ranks that run on this rank's host, itself included: what its cores are to be divided by.
    pub fn local_size(&self) -> usize {
        self.endpoint.hosts.iter().filter(|host| *host == self.host()).count()
    }

    /// This rank's place among those of its host.
    pub fn local_rank(&self) -> usize {
        self.endpoint.hosts[..self.rank()].iter().filter(|host| *host == self.host()).count()
    }

    /// The group of these ranks, which are ascending and hold this one. Every member calls this with the same list;
    /// a member that makes several groups of the same list makes them in the same order as the others. Nothing is sent.
    pub fn group(&self, members: &[usize]) -> Result<Group, CommError> {
        let rank = self.rank();
        let ascending = members.windows(2).all(|pair| pair[0] < pair[1]);
        let Some(at) = members.iter().position(|member| *member == rank).filter(|_| ascending) else {
            return Err(CommError::BadGroup { rank, members: members.to_vec() });
        };
        if let Some(member) = members.iter().find(|member| **member >= self.world_size()) {
            return Err(CommError::NoSuchRank { rank: *member, size: self.world_size() });
        }
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let made = groups.entry(members.to_vec()).or_default();
        let channel = channel(members, *made);
        *made += 1;
        Ok(Group::new(Arc::clone(&self.endpoint), members.into(), at, channel))
    }

    /// The group of all ranks.
    pub fn everyone(&self) -> Result<Group, CommError> {
        self.group(&(0..self.world_size()).collect::<Vec<_>>())
    }

    /// Sends a message. It waits at its receiver, up to 256 MiB a sender; only beyond that does this call wait.
    pub fn send(&self, to: usize, tag: u32, bytes: &[u8]) -> Result<(), CommError> {
        self.check_rank(to)?;
        let key = Key { channel: 0, op: Op::Send, tag };
        self.endpoint.post(std::iter::once(to), key, bytes, |bytes| Arc::new(bytes.to_vec()))
    }

    /// The oldest message of `from` with this tag, after waiting for it.
    pub fn recv(&self, from: usize, tag: u32) -> Result<Vec<u8>, CommError> {
        self.check_rank(from)?;
        let body = self.endpoint.take(from, Key { channel: 0, op: Op::Send, tag })?;
        Ok(Arc::try_unwrap(body).unwrap_or_else(|shared| shared.to_vec()))
    }

    /// Looks whether the job is over, and never waits: for a rank that waits for something else than a message, such as
    /// memory that another rank writes. It may be called thousands of times a second.
    ///
    /// # Errors
    /// What ended the job, as every other call says it. That a rank has ended well is no error.
    pub fn check(&self) -> Result<(), CommError> {
        self.endpoint.inbox.failure().map_or(Ok(()), Err)
    }

    fn check_rank(&self, rank: usize) -> Result<(), CommError> {
        let size = self.world_size();
        if rank < size { Ok(()) } else { Err(CommError::NoSuchRank { rank, size }) }
    }
}

/// The name of a group on the wire. Ranks make groups that others do not, so a running number would not agree.
fn channel(members: &[usize], made: u64) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&made.to_le_bytes());
    for member in members {
        hasher.update(&(*member as u64).to_le_bytes());
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// The name of this host.
pub(crate) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
