//! The pool of KV blocks.

use std::collections::{BTreeMap, HashMap};

use mixtral_model::BlockId;

use crate::prefix::Content;

/// Hands out blocks of the cache. It counts the holders of each block, so that sequences can share blocks. It also knows
/// what some blocks contain, and finds them again by that, also when nobody holds them any more.
#[derive(Clone, Debug)]
pub struct BlockPool {
    /// Free blocks of unknown content. The last is handed out first.
    blank: Vec<BlockId>,
    /// Free blocks of known content, by the time at which they became free. The oldest is handed out first.
    kept: BTreeMap<u64, BlockId>,
    blocks: Vec<Block>,
    by_content: HashMap<Content, BlockId>,
    clock: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Block {
    holders: u32,
    content: Option<Content>,
    /// When it became free.
    freed: u64,
}

impl BlockPool {
    /// A pool of `num_blocks` free blocks.
    #[must_use]
    pub fn new(num_blocks: usize) -> Self {
        let num_blocks = u32::try_from(num_blocks).unwrap_or(u32::MAX);
        BlockPool {
            // The lowest id is handed out first.
            blank: (0..num_blocks).rev().map(BlockId).collect(),
            kept: BTreeMap::new(),
            blocks: vec![Block::default(); num_blocks as usize],
            by_content: HashMap::new(),
            clock: 0,
        }
    }

    /// How many blocks there are.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody holds.
    #[must_use]
    pub fn num_free(&self) -> usize {
        self.blank.len() + self.kept.len()
    }

    /// Those of them whose content is known.
    #[must_use]
    pub fn num_kept(&self) -> usize {
        self.kept.len()
    }

    /// How many hold a block.
    #[must_use]
    pub fn holders(&self, block: BlockId) -> u32 {
        self.blocks[block.0 as usize].holders
    }

    /// Takes a block: one of unknown content, or else the one whose content was not used for the longest time. `None` if
    /// no block is free.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.blank.pop().or_else(|| self.kept.pop_first().map(|(_, block)| block))?;
        let state = &mut self.blocks[block.0 as usize];
        if let Some(content) = state.content.take() {
            self.by_content.remove(&content);
        }
        state.holders = 1;
        Some(block)
    }

    /// Takes the block of this content, if there is one, beside its other holders.
    pub fn find(&mut self, content: &Content) -> Option<BlockId> {
        let block = *self.by_content.get(content)?;
        let state = &mut self.blocks[block.0 as usize];
        if state.holders == 0 {
            self.kept.remove(&state.freed);
        }
        state.holders += 1;
        Some(block)
    }

    /// Says what a block contains. Nobody writes to it any more. If another block has the same content, that one is found
    /// as before.
    ///
    /// # Panics
    /// If nobody holds the block: a bug of the caller.
    pub fn describe(&mut self, block: BlockId, content: Content) {
        let state = &mut self.blocks[block.0 as usize];
        assert!(state.holders > 0, "block {block} is described, but nobody holds it");
        if state.content.is_none() && !self.by_content.contains_key(&content) {
            state.content = Some(content);
            self.by_content.insert(content, block);
        }
    }

    /// Adds a holder to blocks that are held already.
    ///
    /// # Panics
    /// If one of them is free: a bug of the caller.
    pub fn share(&mut self, blocks: &[BlockId]) {
        for block in blocks {
            let holders = &mut self.blocks[block.0 as usize].holders;
            assert!(*holders > 0, "block {block} is shared, but nobody holds it");
            *holders += 1;
        }
    }

    /// Gives blocks back. Blocks without another holder become free. Of one sequence's blocks the last become free first, so
    /// that a prefix lives longer than what follows it.
    ///
    /// # Panics
    /// If one of them is free: a bug of the caller.
    pub fn release(&mut self, blocks: impl DoubleEndedIterator<Item = BlockId>) {
        for block in blocks.rev() {
            let state = &mut self.blocks[block.0 as usize];
            assert!(state.holders > 0, "block {block} is released, but nobody holds it");
            state.holders -= 1;
            if state.holders > 0 {
                continue;
            }
            if state.content.is_some() {
                self.clock += 1;
                state.freed = self.clock;
                self.kept.insert(self.clock, block);
            } else {
                self.blank.push(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use mixtral_model::TokenId;
    use proptest::prelude::*;

    use super::*;

    fn content(n: u32) -> Content {
        Content::START.followed_by(&[TokenId(n)])
    }

    #[test]
    fn the_block_that_was_not_used_for_the_longest_time_goes_first() {
        let mut pool = BlockPool::new(3);
        let blocks: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        assert_eq!(blocks, [0, 1, 2].map(BlockId));
        (0..2).for_each(|n| pool.describe(BlockId(n), content(n)));
        pool.release(blocks.into_iter());
        assert_eq!((pool.num_free(), pool.num_kept()), (3, 2));
        // The block of unknown content goes first. Of the others, the one that comes later in its sequence does.
        assert_eq!(pool.allocate(), Some(BlockId(2)));
        assert_eq!(pool.find(&content(1)), Some(BlockId(1)));
        pool.release([BlockId(1)].into_iter());
        assert_eq!(pool.allocate(), Some(BlockId(0)));
        assert_eq!((pool.find(&content(0)), pool.find(&content(1))), (None, Some(BlockId(1))));
        assert_eq!(pool.allocate(), None);
    }

    #[test]
    fn equal_contents_are_found_once() {
        let mut pool = BlockPool::new(2);
        let blocks = [pool.allocate().unwrap(), pool.allocate().unwrap()];
        blocks.iter().for_each(|&block| pool.describe(block, content(7)));
        pool.release(blocks.into_iter());
        assert_eq!((pool.num_kept(), pool.find(&content(7))), (1, Some(blocks[0])));
    }

    /// A naive pool: for each block its holders and its content.
    #[derive(Default, Clone)]
    struct Naive {
        holders: u32,
        content: Option<u32>,
    }

    proptest! {
        #[test]
        fn behaves_like_a_table(actions in prop::collection::vec((0u8..5, 0u32..6, any::<prop::sample::Index>()), 1..200)) {
            let mut pool = BlockPool::new(8);
            let mut naive = vec![Naive::default(); 8];
            let mut held: Vec<BlockId> = Vec::new();
            for (action, number, pick) in actions {
                match action {
                    0 => {
                        let block = pool.allocate();
                        prop_assert_eq!(block.is_some(), naive.iter().any(|b| b.holders == 0));
                        if let Some(block) = block {
                            let state = &mut naive[block.0 as usize];
                            prop_assert_eq!(state.holders, 0);
                            *state = Naive { holders: 1, content: None };
                            held.push(block);
                        }
                    }
                    1 => {
                        let block = pool.find(&content(number));
                        let known = naive.iter().position(|b| b.content == Some(number));
                        prop_assert_eq!(block.map(|b| b.0 as usize), known);
                        if let Some(block) = block {
                            naive[block.0 as usize].holders += 1;
                            held.push(block);
                        }
                    }
                    2 if !held.is_empty() => {
                        let block = held[pick.index(held.len())];
                        pool.share(&[block]);
                        naive[block.0 as usize].holders += 1;
                        held.push(block);
                    }
                    3 if !held.is_empty() => {
                        let block = held[pick.index(held.len())];
                        pool.describe(block, content(number));
                        let known = naive.iter().any(|b| b.content == Some(number));
                        let state = &mut naive[block.0 as usize];
                        state.content = state.content.or((!known).then_some(number));
                    }
                    4 if !held.is_empty() => {
                        let block = held.swap_remove(pick.index(held.len()));
                        naive[block.0 as usize].holders -= 1;
                        pool.release([block].into_iter());
                    }
                    _ => {}
                }
                prop_assert_eq!(pool.num_free(), naive.iter().filter(|b| b.holders == 0).count());
                for (block, state) in naive.iter().enumerate() {
                    prop_assert_eq!(pool.holders(BlockId(u32::try_from(block).unwrap())), state.holders);
                }
            }
        }
    }
}
