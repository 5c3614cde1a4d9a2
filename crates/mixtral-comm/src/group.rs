//! Collectives.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::CommError;
use crate::endpoint::Endpoint;
use crate::inbox::{Key, Op};

/// Ranks that do collectives together. Every member calls the same collectives in the same order. A clone is the same
/// group.
#[derive(Clone, Debug)]
pub struct Group {
    endpoint: Arc<Endpoint>,
    members: Arc<[usize]>,
    /// This rank's place in `members`.
    rank: usize,
    channel: u64,
    /// How many collectives the group has done so far.
    count: Arc<AtomicU32>,
}

impl Group {
    pub(crate) fn new(endpoint: Arc<Endpoint>, members: Arc<[usize]>, rank: usize, channel: u64) -> Self {
        Self { endpoint, members, rank, channel, count: Arc::default() }
    }

    /// This rank's place in the group.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of members.
    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// The members' ranks in the world, ascending.
    pub fn members(&self) -> &[usize] {
        &self.members
    }

    /// Fills `all` with every member's `mine`, in the order of their ranks. Every member's `mine` has the same length,
    /// and `all` has `size · mine.len()` bytes.
    pub fn all_gather(&self, mine: &[u8], all: &mut [u8]) -> Result<(), CommError> {
        let expected = mine.len().saturating_mul(self.size());
        if all.len() != expected {
            return Err(CommError::Size { what: "an all-gather's result", expected, found: all.len() });
        }
        let key = self.next(Op::AllGather);
        self.post(self.others(), key, mine)?;
        if mine.is_empty() {
            return self.others().try_for_each(|member| self.expect(member, key, 0).map(drop));
        }
        for (place, part) in all.chunks_exact_mut(mine.len()).enumerate() {
            if place == self.rank {
                part.copy_from_slice(mine);
            } else {
                part.copy_from_slice(&self.expect(place, key, mine.len())?);
            }
        }
        Ok(())
    }

    /// Replaces every member's `data` by that of the member at place `root`. That member waits for nobody.
    pub fn broadcast(&self, root: usize, data: &mut Vec<u8>) -> Result<(), CommError> {
        if root >= self.size() {
            return Err(CommError::NoSuchRank { rank: root, size: self.size() });
        }
        let key = self.next(Op::Broadcast);
        if root == self.rank {
            return self.post(self.others(), key, data);
        }
        let body = self.endpoint.take(self.members[root], key)?;
        data.clear();
        data.extend_from_slice(&body);
        Ok(())
    }

    /// Returns when every member has called it.
    pub fn barrier(&self) -> Result<(), CommError> {
        let key = self.next(Op::Barrier);
        self.post(self.others(), key, &[])?;
        self.others().try_for_each(|member| self.expect(member, key, 0).map(drop))
    }

    fn next(&self, op: Op) -> Key {
        Key { channel: self.channel, op, tag: self.count.fetch_add(1, Ordering::Relaxed) }
    }

    /// The other members' places. They begin behind this member's place, so that members do not all send to the same
    /// one first.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (size, rank) = (self.size(), self.rank);
        (1..size).map(move |step| (rank + step) % size)
    }

    fn post(&self, places: impl Iterator<Item = usize>, key: Key, bytes: &[u8]) -> Result<(), CommError> {
        let endpoint = &self.endpoint;
        endpoint.post(places.map(|place| self.members[place]), key, bytes, |bytes| {
            let mut buffer = endpoint.buffers.take();
            buffer.extend_from_slice(bytes);
            endpoint.buffers.share(buffer)
        })
    }

    /// The message of the member at this place. It must have this many bytes.
    fn expect(&self, place: usize, key: Key, bytes: usize) -> Result<crate::inbox::Body, CommError> {
        let member = self.members[place];
        let body = self.endpoint.take(member, key)?;
        if body.len() == bytes {
            return Ok(body);
        }
        let describe = |bytes: usize| format!("{bytes} bytes of {key}");
        Err(self.endpoint.mismatch(member, describe(bytes), describe(body.len())))
    }
}
