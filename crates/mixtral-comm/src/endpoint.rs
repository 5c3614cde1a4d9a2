//! One rank's ends of its links to all ranks.

use std::sync::{Arc, Mutex, PoisonError};

use crate::CommError;
use crate::inbox::{Body, Inbox, Key, NoMessage};
use crate::process::mesh::Wire;
use crate::world::MAX_MESSAGE_BYTES;

/// How to reach one rank.
#[derive(Debug)]
pub(crate) enum Link {
    /// A thread of this process, or the rank itself. Messages go straight into its inbox.
    Memory(Arc<Inbox>),
    /// Another process.
    Wire(Wire),
}

/// A rank, its inbox and its links.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) rank: usize,
    /// Where each rank runs.
    pub(crate) hosts: Arc<[String]>,
    pub(crate) inbox: Arc<Inbox>,
    /// A link for each rank, the rank itself included.
    pub(crate) links: Vec<Link>,
    /// The buffers in which the bytes of collectives wait.
    pub(crate) buffers: Buffers,
}

impl Endpoint {
    pub(crate) fn world_size(&self) -> usize {
        self.links.len()
    }

    /// Sends the same bytes to several ranks, copying them at most once.
    pub(crate) fn post(
        &self,
        to: impl Iterator<Item = usize>,
        key: Key,
        bytes: &[u8],
        copy: impl Fn(&[u8]) -> Body,
    ) -> Result<(), CommError> {
        let mut copied = None;
        for to in to {
            if bytes.len() > MAX_MESSAGE_BYTES {
                return Err(CommError::TooLong { to, bytes: bytes.len(), limit: MAX_MESSAGE_BYTES });
            }
            match &self.links[to] {
                Link::Memory(inbox) => {
                    let body = copied.get_or_insert_with(|| copy(bytes));
                    inbox.push(self.rank, key, Arc::clone(body))?;
                }
                Link::Wire(wire) => wire.send(key, bytes, &self.inbox)?,
            }
        }
        Ok(())
    }

    /// The oldest message of `from` with this key.
    pub(crate) fn take(&self, from: usize, key: Key) -> Result<Body, CommError> {
        self.inbox.take(from, key).map_err(|reason| match reason {
            NoMessage::Failed(error) => error,
            NoMessage::Finished => CommError::Finished { rank: from },
            NoMessage::Mismatch(found) => self.mismatch(from, key.to_string(), found.to_string()),
        })
    }

    pub(crate) fn mismatch(&self, rank: usize, expected: String, found: String) -> CommError {
        CommError::Mismatch { here: format!("rank {}", self.rank), rank, expected, found }
    }
}

/// Buffers that are used again once every receiver has dropped them. The page faults of a new buffer cost more than a
/// copy.
#[derive(Debug, Default)]
pub(crate) struct Buffers(Mutex<Vec<Body>>);

/// How many buffers are kept. More collectives than this are rarely under way.
const KEPT_BUFFERS: usize = 8;

impl Buffers {
    /// An empty vector to fill, with the capacity of an earlier one if one is free.
    pub(crate) fn take(&self) -> Vec<u8> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let free = kept.iter_mut().find_map(Arc::get_mut).map(std::mem::take);
        kept.retain(|body| body.capacity() > 0);
        drop(kept);
        let mut free = free.unwrap_or_default();
        free.clear();
        free
    }

    /// Makes the filled vector a message body. When all receivers have dropped the body, [`Buffers::take`] uses its
    /// memory again.
    pub(crate) fn share(&self, filled: Vec<u8>) -> Body {
        let body = Arc::new(filled);
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT_BUFFERS {
            kept.push(Arc::clone(&body));
        }
        body
    }
}
