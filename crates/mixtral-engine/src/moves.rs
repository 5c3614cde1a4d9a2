//! Blocks of the cache that a step copies before it computes anything.

use mixtral_model::BlockId;

/// Where a block's keys and values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockPlace {
    /// In the cache, where a step can read and write them.
    Cache(BlockId),
    /// In the host's memory, under this number. Each rank keeps its own part of the block there.
    Host(u32),
}

/// A copy of a block's contents. A step's copies happen in their order, before its first operation. They touch what
/// earlier steps wrote, and nothing of the step itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockMove {
    /// Read.
    pub from: BlockPlace,
    /// Written. A place in the host's memory comes into being when it is first written.
    pub to: BlockPlace,
}
