//! Who would hold which block once a plan is begun. Knows nothing of sequences.

use std::collections::BTreeMap;

use r1_core::BlockId;

use crate::BlockPool;

/// Blocks that can be had, and what the plan changes about who holds which.
#[derive(Clone)]
pub(super) struct Available {
    /// Free or evictable.
    pub(super) num: usize,
    /// Tables that will hold a block, less those that do. Only where a plan preempts or shares.
    change: BTreeMap<BlockId, i32>,
}

impl Available {
    pub(super) fn new(pool: &BlockPool) -> Self {
        Self { num: pool.num_available(), change: BTreeMap::new() }
    }

    /// Tables that will hold `block`.
    pub(super) fn refs(&self, pool: &BlockPool, block: BlockId) -> i64 {
        i64::from(pool.refs(block)) + i64::from(self.change.get(&block).copied().unwrap_or(0))
    }

    /// One more table holds `block`.
    pub(super) fn share(&mut self, pool: &BlockPool, block: BlockId) {
        self.num -= usize::from(self.refs(pool, block) == 0);
        *self.change.entry(block).or_default() += 1;
    }

    /// `table` gives up its blocks. Returns how many come free: those that no other table holds.
    pub(super) fn release(&mut self, pool: &BlockPool, table: &[BlockId]) -> usize {
        let before = self.num;
        for &block in table {
            *self.change.entry(block).or_default() -= 1;
            self.num += usize::from(self.refs(pool, block) == 0);
        }
        self.num - before
    }
}
