//! Device memory: one reservation made at the start, from which tensors are cut. Freed ranges are used again; since all work
//! runs on one stream, a range that is given anew is written after its last reader has run.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::driver::DevicePtr;

/// Every range begins at a multiple of this: vector loads and bulk copies want no more.
const ALIGN: usize = 256;

struct State {
    /// Free ranges by offset; neighbours are joined.
    free: BTreeMap<usize, usize>,
    used_bytes: usize,
}

/// The reservation.
pub(crate) struct Arena {
    base: DevicePtr,
    size_bytes: usize,
    state: Mutex<State>,
}

impl Arena {
    pub(crate) fn new(base: DevicePtr, size_bytes: usize) -> Arc<Self> {
        let state = State { free: BTreeMap::from([(0, size_bytes)]), used_bytes: 0 };
        Arc::new(Self { base, size_bytes, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    pub(crate) fn used_bytes(&self) -> usize {
        self.state().used_bytes
    }

    /// The longest range that is free.
    pub(crate) fn largest_free_bytes(&self) -> usize {
        self.state().free.values().copied().max().unwrap_or(0)
    }

    /// A range, or nothing where none is long enough. The lowest one that fits is taken, so that what is loaded in order lies
    /// in order.
    pub(crate) fn take(self: &Arc<Self>, size_bytes: usize) -> Option<Range> {
        let len = size_bytes.max(1).checked_next_multiple_of(ALIGN)?;
        let mut state = self.state();
        let (&start, &room) = state.free.iter().find(|&(_, &room)| room >= len)?;
        state.free.remove(&start);
        if room > len {
            state.free.insert(start + len, room - len);
        }
        state.used_bytes += len;
        Some(Range { arena: self.clone(), start, len })
    }

    fn give_back(&self, start: usize, len: usize) {
        let mut state = self.state();
        let (mut start, mut end) = (start, start + len);
        if let Some(after) = state.free.remove(&end) {
            end += after;
        }
        if let Some((&before, &room)) = state.free.range(..start).next_back()
            && before + room == start
        {
            state.free.remove(&before);
            start = before;
        }
        state.free.insert(start, end - start);
        state.used_bytes -= len;
    }
}

/// A part of the arena, given back when it is dropped.
pub(crate) struct Range {
    arena: Arc<Arena>,
    start: usize,
    len: usize,
}

impl Range {
    pub(crate) fn at(&self) -> DevicePtr {
        self.arena.base.offset(self.start)
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        self.arena.give_back(self.start, self.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_apart_aligned_and_joined_again() {
        let arena = Arena::new(DevicePtr(1 << 20), 4096);
        let ranges: Vec<_> = [1, 256, 257, 1000].map(|len| arena.take(len).expect("room")).into();
        let starts: Vec<_> = ranges.iter().map(|range| range.at().0 - (1 << 20)).collect();
        assert_eq!(starts, [0, 256, 512, 1024]);
        assert_eq!(arena.used_bytes(), 2048);
        assert!(arena.take(2049).is_none());
        let mut ranges = ranges;
        // In an order that joins to the left, to the right and on both sides.
        for index in [1, 0, 1, 0] {
            ranges.remove(index);
        }
        assert_eq!((arena.used_bytes(), arena.largest_free_bytes()), (0, 4096));
        assert!(arena.take(4096).is_some());
        assert!(arena.take(usize::MAX).is_none());
    }
}
