//! Copies of cache blocks before a step: within the cache, and between it and pinned memory of the host.

use std::collections::HashMap;
use std::ops::Range;

use mixtral_engine::{BackendError, BlockMove, BlockPlace};

use crate::driver::{Context, DeviceMemory, Pinned, Stream};

/// The blocks that are in the host's memory, by their numbers.
pub(crate) type HostBlocks = HashMap<u32, Pinned>;

/// How the cache lies in its memory: equal parts, one for each layer's keys and one for its values, each of all blocks.
#[derive(Clone, Copy)]
pub(crate) struct CacheShape {
    /// How many parts.
    pub(crate) parts: usize,
    /// Bytes of a part.
    pub(crate) part_bytes: usize,
    /// Blocks of a part.
    pub(crate) blocks: usize,
}

impl CacheShape {
    fn block_bytes(&self) -> usize {
        self.part_bytes / self.blocks.max(1)
    }

    /// Where a block lies in each part.
    fn spans(&self, block: u32) -> impl Iterator<Item = Range<usize>> + use<> {
        let CacheShape { parts, part_bytes, .. } = *self;
        let bytes = self.block_bytes();
        let first = block as usize * bytes;
        (0..parts).map(move |part| part * part_bytes + first..part * part_bytes + first + bytes)
    }
}

/// Puts the copies into the stream, in order. A step that follows in the stream sees them done.
pub(crate) fn carry_out(
    moves: &[BlockMove],
    shape: CacheShape,
    cache: &DeviceMemory,
    host: &mut HostBlocks,
    stream: &Stream,
    context: &Context,
) -> Result<(), BackendError> {
    let missing = |number: u32| BackendError::Other(format!("nothing was kept as block {number} of the host"));
    for BlockMove { from, to } in moves {
        match (from, to) {
            (BlockPlace::Cache(from), BlockPlace::Cache(to)) => {
                for (from, to) in shape.spans(from.0).zip(shape.spans(to.0)) {
                    stream.copy(cache, from, cache, to.start)?;
                }
            }
            (BlockPlace::Cache(from), BlockPlace::Host(number)) => {
                if !host.contains_key(number) {
                    host.insert(*number, Pinned::new(context, shape.parts * shape.block_bytes())?);
                }
                let kept = host.get_mut(number).ok_or_else(|| missing(*number))?;
                kept.download_spans(stream, cache, shape.spans(from.0))?;
            }
            (BlockPlace::Host(number), BlockPlace::Cache(to)) => {
                let kept = host.get_mut(number).ok_or_else(|| missing(*number))?;
                let bytes = shape.block_bytes();
                for (part, span) in shape.spans(to.0).enumerate() {
                    kept.upload(stream, part * bytes, bytes, cache, span.start)?;
                }
            }
            (BlockPlace::Host(from), BlockPlace::Host(to)) => {
                let contents = host.get_mut(from).ok_or_else(|| missing(*from))?.bytes()?.to_vec();
                if !host.contains_key(to) {
                    host.insert(*to, Pinned::new(context, contents.len())?);
                }
                host.get_mut(to).ok_or_else(|| missing(*to))?.bytes()?.copy_from_slice(&contents);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_lies_in_every_part() {
        let shape = CacheShape { parts: 4, part_bytes: 60, blocks: 3 };
        assert_eq!(shape.spans(2).collect::<Vec<_>>(), [40..60, 100..120, 160..180, 220..240]);
        assert_eq!(CacheShape { parts: 1, part_bytes: 0, blocks: 0 }.block_bytes(), 0);
    }
}
