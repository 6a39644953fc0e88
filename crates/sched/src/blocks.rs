//! Who owns which block of the KV cache: each block is either free or in exactly one block table. Knows nothing of
//! sequences; a prefix cache would live here, as a third place for a block that nobody uses but somebody may.

use r1_core::BlockId;

/// All blocks of the KV cache, and which of them are free.
#[derive(Clone, Debug)]
pub struct BlockPool {
    /// Taken from the end, so that the block given back last is used first, while it may still be in a cache.
    free: Vec<BlockId>,
    /// Indexed by block.
    is_free: Vec<bool>,
}

impl BlockPool {
    /// A pool of `num_blocks` free blocks, handed out from block 0 up.
    pub(crate) fn new(num_blocks: usize) -> Self {
        let last = u32::try_from(num_blocks).expect("SchedConfig::validate bounds num_blocks");
        Self { free: (0..last).rev().map(BlockId).collect(), is_free: vec![true; num_blocks] }
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.is_free.len()
    }

    /// Blocks that nobody owns.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// The blocks that nobody owns, in no useful order.
    pub fn free(&self) -> &[BlockId] {
        &self.free
    }

    /// Extends `table` to `num_blocks` blocks. Panics when too few are free: a plan counts before it promises.
    pub(crate) fn extend(&mut self, table: &mut Vec<BlockId>, num_blocks: usize) {
        while table.len() < num_blocks {
            let block = self.free.pop().expect("a plan never promises blocks that are not free");
            self.is_free[block.0 as usize] = false;
            table.push(block);
        }
    }

    /// Takes back every block of `table`. Panics when one of them is free already.
    pub(crate) fn release(&mut self, table: &mut Vec<BlockId>) {
        // Backwards, so that the same sequence readmitted at once gets the same table.
        for block in table.drain(..).rev() {
            let is_free = &mut self.is_free[block.0 as usize];
            assert!(!*is_free, "block {block} given back twice");
            *is_free = true;
            self.free.push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hands_out_from_block_zero_and_reuses_the_latest() {
        let mut pool = BlockPool::new(4);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        pool.extend(&mut a, 2);
        pool.extend(&mut b, 1);
        assert_eq!(
            (a.as_slice(), b.as_slice()),
            ([BlockId(0), BlockId(1)].as_slice(), [BlockId(2)].as_slice())
        );
        pool.release(&mut a);
        pool.extend(&mut b, 2);
        assert_eq!(b, [BlockId(2), BlockId(0)]);
        assert_eq!((pool.num_free(), pool.total()), (2, 4));
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn a_block_given_back_twice_is_a_broken_invariant() {
        let mut pool = BlockPool::new(1);
        let mut table = Vec::new();
        pool.extend(&mut table, 1);
        pool.release(&mut table.clone());
        pool.release(&mut table);
    }

    proptest! {
        #[test]
        fn each_block_is_in_exactly_one_place(
            num_blocks in 1_usize..40,
            ops in prop::collection::vec((0_usize..6, 0_usize..12), 0..200),
        ) {
            let mut pool = BlockPool::new(num_blocks);
            let mut tables = vec![Vec::new(); 6];
            for (table, want) in ops {
                let table: &mut Vec<BlockId> = &mut tables[table];
                if want == 0 {
                    pool.release(table);
                } else if want.saturating_sub(table.len()) <= pool.num_free() {
                    pool.extend(table, want);
                }
                let mut seen: Vec<_> = tables.iter().flatten().chain(pool.free()).map(|b| b.0 as usize).collect();
                seen.sort_unstable();
                prop_assert_eq!(seen, (0..num_blocks).collect::<Vec<_>>());
            }
        }
    }
}
