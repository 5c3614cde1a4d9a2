//! The pool of KV blocks.

use mixtral_model::BlockId;

/// Hands out blocks of the cache. It counts the holders of each block, so that sequences can share a prefix.
#[derive(Clone, Debug)]
pub struct BlockPool {
    free: Vec<BlockId>,
    references: Vec<u32>,
}

impl BlockPool {
    /// A pool of `num_blocks` free blocks.
    #[must_use]
    pub fn new(num_blocks: usize) -> Self {
        let num_blocks = u32::try_from(num_blocks).unwrap_or(u32::MAX);
        // The lowest id is handed out first.
        BlockPool { free: (0..num_blocks).rev().map(BlockId).collect(), references: vec![0; num_blocks as usize] }
    }

    /// How many blocks there are.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.references.len()
    }

    /// Blocks that nobody holds.
    #[must_use]
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Takes `count` blocks; `None` if fewer are free.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<BlockId>> {
        let start = self.free.len().checked_sub(count)?;
        let mut blocks = self.free.split_off(start);
        blocks.reverse();
        for block in &blocks {
            self.references[block.0 as usize] = 1;
        }
        Some(blocks)
    }

    /// Adds a holder to blocks that are held already.
    ///
    /// # Panics
    /// If one of them is free: a bug of the caller.
    pub fn share(&mut self, blocks: &[BlockId]) {
        for block in blocks {
            let references = &mut self.references[block.0 as usize];
            assert!(*references > 0, "block {block} is shared, but nobody holds it");
            *references += 1;
        }
    }

    /// Gives blocks back. Blocks without another holder become free.
    ///
    /// # Panics
    /// If one of them is free: a bug of the caller.
    pub fn release(&mut self, blocks: Vec<BlockId>) {
        for block in blocks.into_iter().rev() {
            let references = &mut self.references[block.0 as usize];
            assert!(*references > 0, "block {block} is released, but nobody holds it");
            *references -= 1;
            if *references == 0 {
                self.free.push(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Compares the pool with a naive model: a map from each block to its number of holders.
        #[test]
        fn behaves_like_a_map_of_holders(actions in prop::collection::vec((0u8..3, 0usize..5, any::<prop::sample::Index>()), 1..80)) {
            let mut pool = BlockPool::new(8);
            let mut holders: HashMap<BlockId, u32> = HashMap::new();
            let mut held: Vec<Vec<BlockId>> = Vec::new();
            for (action, count, pick) in actions {
                match action {
                    0 => {
                        let fits = 8 - holders.len() >= count;
                        let blocks = pool.allocate(count);
                        prop_assert_eq!(blocks.is_some(), fits);
                        for block in blocks.iter().flatten() {
                            prop_assert!(holders.insert(*block, 1).is_none(), "{} was held", block);
                        }
                        held.extend(blocks);
                    }
                    1 if !held.is_empty() => {
                        let blocks = held[pick.index(held.len())].clone();
                        pool.share(&blocks);
                        blocks.iter().for_each(|b| *holders.get_mut(b).unwrap() += 1);
                        held.push(blocks);
                    }
                    2 if !held.is_empty() => {
                        let blocks = held.swap_remove(pick.index(held.len()));
                        for block in &blocks {
                            let count = holders.get_mut(block).unwrap();
                            *count -= 1;
                            if *count == 0 {
                                holders.remove(block);
                            }
                        }
                        pool.release(blocks);
                    }
                    _ => {}
                }
                prop_assert_eq!(pool.num_free(), 8 - holders.len());
            }
        }
    }
}
