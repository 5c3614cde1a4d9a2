//! All ranks of a job, seen from one of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::endpoint::Endpoint;
use crate::inbox::{Key, Op};
use crate::{CommError, Group};

/// The longest message, and the longest part of a collective.
pub const MAX_MESSAGE_BYTES: usize = 1 << 30;

/// All ranks of a job, seen from one of them. It belongs to the rank's thread. A clone is the same world.
#[derive(Clone, Debug)]
pub struct World {
    pub(crate) endpoint: Arc<Endpoint>,
    /// How many groups each list of members was made into, so that groups with the same members do not mix up their
    /// messages.
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

    /// The ranks that run on this rank's host, itself included, ascending.
    pub fn local_ranks(&self) -> impl Iterator<Item = usize> {
        let hosts = self.endpoint.hosts.iter().enumerate();
        hosts.filter(|(_, host)| *host == self.host()).map(|(rank, _)| rank)
    }

    /// How many ranks run on this rank's host, itself included. They share the host's cores.
    pub fn local_size(&self) -> usize {
        self.local_ranks().count()
    }

    /// This rank's place among those of its host.
    pub fn local_rank(&self) -> usize {
        self.local_ranks().take_while(|&rank| rank < self.rank()).count()
    }

    /// The group of these ranks. The list is ascending and contains this rank. Every member calls this with the same
    /// list. If members make several groups from the same list, they make them in the same order. Nothing is sent.
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

    /// Sends a message. The receiver stores up to 256 MiB of messages from each sender; this call waits only beyond
    /// that.
    pub fn send(&self, to: usize, tag: u32, bytes: &[u8]) -> Result<(), CommError> {
        self.check_rank(to)?;
        let key = Key { channel: 0, op: Op::Send, tag };
        self.endpoint.post(std::iter::once(to), key, bytes, |bytes| Arc::new(bytes.to_vec()))
    }

    /// Waits for a message of `from` with this tag, and returns the oldest.
    pub fn recv(&self, from: usize, tag: u32) -> Result<Vec<u8>, CommError> {
        self.check_rank(from)?;
        let body = self.endpoint.take(from, Key { channel: 0, op: Op::Send, tag })?;
        Ok(Arc::try_unwrap(body).unwrap_or_else(|shared| shared.to_vec()))
    }

    /// Checks whether the job is over, and never waits. It is for a rank that waits for something other than a message,
    /// such as memory that another rank writes. It may be called thousands of times a second.
    ///
    /// # Errors
    /// What ended the job, the same error as from every other call. It is no error if a rank has ended well.
    pub fn check(&self) -> Result<(), CommError> {
        self.endpoint.inbox.failure().map_or(Ok(()), Err)
    }

    fn check_rank(&self, rank: usize) -> Result<(), CommError> {
        let size = self.world_size();
        if rank < size { Ok(()) } else { Err(CommError::NoSuchRank { rank, size }) }
    }
}

/// The number of a group in messages. A running number would differ between ranks, since each makes groups that others
/// do not, so this is a hash of the members.
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
