//! Who holds which block of the KV cache, and which blocks can be found by what they hold. Knows nothing of sequences.
//!
//! Each block is in one of three places:
//! - *used*: in at least one block table; its reference count is the number of those tables;
//! - *cached*: in none, but known by its hash, so that a sequence with the same beginning finds it. The least recently
//!   used one is evicted when a block is wanted and none is free;
//! - *free*: in none, and what it holds is worth nothing.
//!
//! The index is a chained hash table whose chains run through the blocks themselves, and the order of eviction is a
//! list through them too: neither ever allocates.

use r1_core::BlockId;

use crate::prefix::BlockHash;

/// Ends a chain or a list. Never a block: there are at most 2^32 - 1.
const NONE: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Block {
    /// Tables that hold it.
    refs: u32,
    /// What it is found by.
    hash: Option<BlockHash>,
    /// The next block in its bucket of the index, if it has a hash.
    next: u32,
    /// Neighbours in the order of eviction, if it is cached.
    older: u32,
    newer: u32,
}

/// All blocks of the KV cache.
#[derive(Clone, Debug)]
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    /// Taken from the end, so that the block given back last is used first, while it may still be in a cache.
    free: Vec<BlockId>,
    /// First block of each bucket of the index; a power of two of them.
    heads: Vec<u32>,
    /// Cached blocks, to be evicted from `oldest` on.
    oldest: u32,
    newest: u32,
    num_cached: usize,
    num_used: usize,
    /// Sum of all reference counts.
    num_refs: usize,
}

impl BlockPool {
    /// A pool of `num_blocks` free blocks, handed out from block 0 up.
    pub(crate) fn new(num_blocks: usize) -> Self {
        let last = u32::try_from(num_blocks).expect("SchedConfig::validate bounds num_blocks");
        let block = Block { refs: 0, hash: None, next: NONE, older: NONE, newer: NONE };
        Self {
            blocks: vec![block; num_blocks],
            free: (0..last).rev().map(BlockId).collect(),
            heads: vec![NONE; num_blocks.next_power_of_two()],
            oldest: NONE,
            newest: NONE,
            num_cached: 0,
            num_used: 0,
            num_refs: 0,
        }
    }

    /// Blocks in all.
    pub(crate) fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody holds and that hold nothing of worth.
    pub(crate) fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks in at least one table.
    pub(crate) fn num_used(&self) -> usize {
        self.num_used
    }

    /// Blocks in no table that can be found by what they hold.
    pub(crate) fn num_cached(&self) -> usize {
        self.num_cached
    }

    /// Blocks that a table can be extended by: free ones, then cached ones.
    pub(crate) fn num_available(&self) -> usize {
        self.num_free() + self.num_cached
    }

    /// Sum over all blocks of the tables that hold it.
    pub(crate) fn num_refs(&self) -> usize {
        self.num_refs
    }

    /// Tables that hold a block.
    pub(crate) fn refs(&self, block: BlockId) -> u32 {
        self.blocks[block.0 as usize].refs
    }

    fn bucket(&self, hash: BlockHash) -> usize {
        hash.0 as usize & (self.heads.len() - 1)
    }

    /// The block that holds what `hash` stands for.
    pub(crate) fn find(&self, hash: BlockHash) -> Option<BlockId> {
        let mut at = self.heads[self.bucket(hash)];
        while at != NONE {
            let block = &self.blocks[at as usize];
            if block.hash == Some(hash) {
                return Some(BlockId(at));
            }
            at = block.next;
        }
        None
    }

    /// Makes a used block known by its hash. It stays anonymous when another used block is known by that hash; a cached
    /// one gives the name up, since it can go.
    pub(crate) fn register(&mut self, block: BlockId, hash: BlockHash) {
        let this = &self.blocks[block.0 as usize];
        assert!(this.refs > 0 && this.hash.is_none(), "block {block} registered while it is {this:?}");
        if let Some(twin) = self.find(hash) {
            if self.refs(twin) > 0 {
                return;
            }
            self.leave_cached(twin);
            self.unregister(twin);
            self.free.push(twin);
        }
        let bucket = self.bucket(hash);
        let this = &mut self.blocks[block.0 as usize];
        this.hash = Some(hash);
        this.next = std::mem::replace(&mut self.heads[bucket], block.0);
    }

    /// Makes a block anonymous. A cached one must change its place, too, which is up to the caller.
    pub(crate) fn unregister(&mut self, block: BlockId) {
        let this = &mut self.blocks[block.0 as usize];
        let next = std::mem::replace(&mut this.next, NONE);
        let Some(hash) = this.hash.take() else { return };
        let bucket = self.bucket(hash);
        if self.heads[bucket] == block.0 {
            self.heads[bucket] = next;
            return;
        }
        let mut at = self.heads[bucket];
        while self.blocks[at as usize].next != block.0 {
            at = self.blocks[at as usize].next;
        }
        self.blocks[at as usize].next = next;
    }

    /// Adds a block that was found to a table.
    pub(crate) fn share(&mut self, table: &mut Vec<BlockId>, block: BlockId) {
        if self.refs(block) == 0 {
            self.leave_cached(block);
            self.num_used += 1;
        }
        self.blocks[block.0 as usize].refs += 1;
        self.num_refs += 1;
        table.push(block);
    }

    /// Extends `table` to `num_blocks` blocks of its own, evicting cached ones where none is free. Panics when too few
    /// are available: a plan counts before it promises.
    pub(crate) fn extend(&mut self, table: &mut Vec<BlockId>, num_blocks: usize) {
        while table.len() < num_blocks {
            let block = self.free.pop().unwrap_or_else(|| self.evict());
            self.blocks[block.0 as usize].refs = 1;
            self.num_used += 1;
            self.num_refs += 1;
            table.push(block);
        }
    }

    /// Takes back every block of `table` from it. Panics when one of them is in no table. Those that nobody else holds
    /// become cached if they have a hash, else free.
    pub(crate) fn release(&mut self, table: &mut Vec<BlockId>) {
        // Backwards, so that the deepest block is evicted first and a prefix outlives its extensions; and so that,
        // without a prefix cache, the same sequence readmitted at once gets the same table.
        for block in table.drain(..).rev() {
            let this = &mut self.blocks[block.0 as usize];
            assert!(this.refs > 0, "block {block} given back twice");
            this.refs -= 1;
            self.num_refs -= 1;
            if this.refs > 0 {
                continue;
            }
            self.num_used -= 1;
            if this.hash.is_some() {
                this.older = self.newest;
                match this.older {
                    NONE => self.oldest = block.0,
                    older => self.blocks[older as usize].newer = block.0,
                }
                self.newest = block.0;
                self.num_cached += 1;
            } else {
                self.free.push(block);
            }
        }
    }

    /// Forgets what every block holds: cached ones become free, used ones anonymous.
    pub(crate) fn flush(&mut self) {
        while self.num_cached > 0 {
            let block = self.evict();
            self.free.push(block);
        }
        for block in 0..self.blocks.len() as u32 {
            self.unregister(BlockId(block));
        }
    }

    fn evict(&mut self) -> BlockId {
        assert!(self.oldest != NONE, "a plan never promises blocks that are not available");
        let block = BlockId(self.oldest);
        self.leave_cached(block);
        self.unregister(block);
        block
    }

    /// Takes a cached block out of the order of eviction.
    fn leave_cached(&mut self, block: BlockId) {
        let this = &mut self.blocks[block.0 as usize];
        assert!(this.refs == 0, "block {block} is used, not cached");
        let older = std::mem::replace(&mut this.older, NONE);
        let newer = std::mem::replace(&mut this.newer, NONE);
        match older {
            NONE => self.oldest = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.blocks[newer as usize].older = older,
        }
        self.num_cached -= 1;
    }

    /// Free + used + cached = all, by the counters.
    pub(crate) fn check_totals(&self) {
        let (free, used, cached, total) = (self.num_free(), self.num_used, self.num_cached, self.total());
        assert_eq!(
            free + used + cached,
            total,
            "{free} blocks free, {used} used and {cached} cached of {total}"
        );
    }

    /// Checks counts, index and order of eviction against the blocks and the given tables, exactly. Panics when one
    /// does not agree.
    pub(crate) fn audit<'a>(&self, tables: impl Iterator<Item = &'a [BlockId]>) {
        self.check_totals();
        let mut refs = vec![0; self.total()];
        for block in tables.flatten() {
            refs[block.0 as usize] += 1;
        }
        let mut place = vec![0; self.total()];
        for block in &self.free {
            place[block.0 as usize] += 1;
            assert_eq!(self.blocks[block.0 as usize].hash, None, "free block {block} has a hash");
        }
        let (mut at, mut older, mut num_cached) = (self.oldest, NONE, 0);
        while at != NONE {
            let block = &self.blocks[at as usize];
            assert!(block.hash.is_some() && block.older == older, "cached block {at} is {block:?}");
            place[at as usize] += 1;
            num_cached += 1;
            assert!(num_cached <= self.num_cached, "more blocks in the order of eviction than cached ones");
            (older, at) = (at, block.newer);
        }
        assert_eq!((older, num_cached), (self.newest, self.num_cached), "the order of eviction");
        let mut num_hashed = 0;
        for (at, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.refs, refs[at], "tables that hold block {at}");
            assert_eq!(place[at], u32::from(block.refs == 0), "block {at} is not in exactly one place");
            if let Some(hash) = block.hash {
                num_hashed += 1;
                assert_eq!(self.find(hash), Some(BlockId(at as u32)), "block {at} in the index");
            }
        }
        let mut num_indexed = 0;
        for &head in &self.heads {
            let mut at = head;
            while at != NONE {
                num_indexed += 1;
                assert!(num_indexed <= num_hashed, "the index holds a block without a hash, or one twice");
                at = self.blocks[at as usize].next;
            }
        }
        assert_eq!(num_indexed, num_hashed, "blocks in the index");
        assert_eq!(self.num_refs, refs.iter().sum::<u32>() as usize, "sum of reference counts");
        assert_eq!(self.num_used, refs.iter().filter(|&&refs| refs > 0).count(), "used blocks");
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

    /// A pool whose blocks all went through one table each of `lens`, with hashes `100 * table + depth`.
    fn cached(lens: &[usize]) -> BlockPool {
        let mut pool = BlockPool::new(lens.iter().sum());
        let mut tables = vec![Vec::new(); lens.len()];
        for (at, (table, &len)) in tables.iter_mut().zip(lens).enumerate() {
            pool.extend(table, len);
            for (depth, &block) in table.iter().enumerate() {
                pool.register(block, hash(100 * at + depth));
            }
        }
        for table in &mut tables {
            pool.release(table);
        }
        pool.audit(std::iter::empty());
        pool
    }

    fn hash(of: usize) -> BlockHash {
        BlockHash(of as u128)
    }

    #[test]
    fn the_least_recently_used_is_evicted_first_and_the_deepest_of_its_release() {
        let mut pool = cached(&[2, 2]);
        let mut table = Vec::new();
        pool.share(&mut table, pool.find(hash(0)).unwrap());
        pool.release(&mut table);
        let mut order = Vec::new();
        for len in 1..=4 {
            let known = |pool: &BlockPool| [0, 1, 100, 101].map(|of| pool.find(hash(of)).is_some());
            let before = known(&pool);
            pool.extend(&mut table, len);
            let after = known(&pool);
            order.extend(
                [0, 1, 100, 101]
                    .into_iter()
                    .enumerate()
                    .filter(|&(at, _)| before[at] && !after[at])
                    .map(|(_, of)| of),
            );
        }
        assert_eq!(order, [1, 101, 100, 0]);
        pool.audit([table.as_slice()].into_iter());
    }

    #[test]
    fn free_blocks_are_taken_before_cached_ones() {
        let mut pool = cached(&[3]);
        pool.unregister(BlockId(9).min(BlockId(2)));
        pool.leave_cached(BlockId(2));
        pool.free.push(BlockId(2));
        let mut table = Vec::new();
        pool.extend(&mut table, 1);
        assert_eq!((table[0], pool.num_cached()), (BlockId(2), 2));
    }

    #[test]
    fn the_second_of_two_twins_stays_anonymous_unless_the_first_is_only_cached() {
        let mut pool = BlockPool::new(3);
        let mut tables = [Vec::new(), Vec::new(), Vec::new()];
        for table in &mut tables {
            pool.extend(table, 1);
        }
        pool.register(BlockId(0), hash(7));
        pool.register(BlockId(1), hash(7));
        assert_eq!(pool.find(hash(7)), Some(BlockId(0)));
        pool.release(&mut tables[1]);
        assert_eq!((pool.num_cached(), pool.num_free()), (0, 1));
        pool.release(&mut tables[0]);
        assert_eq!(pool.num_cached(), 1);
        pool.register(BlockId(2), hash(7));
        assert_eq!((pool.find(hash(7)), pool.num_cached(), pool.num_free()), (Some(BlockId(2)), 0, 2));
        pool.audit(tables.iter().map(Vec::as_slice));
    }

    #[test]
    fn flush_forgets_used_and_cached_blocks() {
        let mut pool = cached(&[2, 1]);
        let mut table = Vec::new();
        pool.share(&mut table, pool.find(hash(0)).unwrap());
        pool.flush();
        assert_eq!((pool.num_cached(), pool.num_free(), pool.num_used()), (0, 2, 1));
        assert!([0, 1, 100].iter().all(|&of| pool.find(hash(of)).is_none()));
        pool.audit([table.as_slice()].into_iter());
    }

    proptest! {
        /// Few hashes, so that buckets are shared and twins are common.
        #[test]
        fn counts_index_and_order_of_eviction_always_agree(
            num_blocks in 1_usize..40,
            ops in prop::collection::vec((0_usize..6, 0_usize..12, 0_u32..4), 0..200),
        ) {
            let mut pool = BlockPool::new(num_blocks);
            let mut tables = vec![Vec::new(); 6];
            for (at, want, what) in ops {
                let table: &mut Vec<BlockId> = &mut tables[at];
                let wanted = BlockHash(want as u128 * 5);
                match what {
                    0 => pool.release(table),
                    1 => if want.saturating_sub(table.len()) <= pool.num_available() {
                        pool.extend(table, want);
                    },
                    2 => if let Some(&last) = table.last() && pool.blocks[last.0 as usize].hash.is_none() {
                        pool.register(last, wanted);
                    },
                    _ => if let Some(block) = pool.find(wanted) && !table.contains(&block) {
                        pool.share(table, block);
                    },
                }
                pool.audit(tables.iter().map(Vec::as_slice));
            }
        }
    }
}
