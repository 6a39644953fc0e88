//! The pinned ring that writes pass through. Knows no operation.

use std::ops::Range;
use std::ptr;

use super::{Api, Handle};
use crate::driver::{DriverError, Rows};

/// Parts of the ring, each with an event: a small write costs none, and a part is waited for only when the ring has come round.
const SEGMENTS: usize = 8;
/// Every piece begins at a multiple of this.
const ALIGN: usize = 256;

/// Pinned memory in parts that are filled one after the other.
pub(super) struct Ring {
    base: *mut u8,
    segment_bytes: usize,
    /// The part that is filled, and how far.
    segment: usize,
    used_bytes: usize,
    /// Recorded when a part was left.
    left: [Option<Handle>; SEGMENTS],
    events: [Handle; SEGMENTS],
}

// SAFETY: memory of the host that only the holder of the lock around the ring touches.
unsafe impl Send for Ring {}

impl Ring {
    pub(super) fn new<A: Api>(api: &A, size_bytes: usize) -> Result<Self, DriverError> {
        let mut events = [Handle(ptr::null_mut()); SEGMENTS];
        for event in &mut events {
            *event = api.event()?;
        }
        let base = api.reserve_pinned(size_bytes)?;
        let segment_bytes = size_bytes / SEGMENTS / ALIGN * ALIGN;
        Ok(Self { base, segment_bytes, segment: 0, used_bytes: 0, left: [None; SEGMENTS], events })
    }

    /// Most bytes of a piece.
    pub(super) fn segment_bytes(&self) -> usize {
        self.segment_bytes
    }

    /// Copies a piece to the ring and enqueues its copy to the device.
    pub(super) fn write<A: Api>(
        &mut self,
        api: &A,
        src: &[u8],
        to: Rows,
        stream: Handle,
    ) -> Result<(), DriverError> {
        if src.len() > self.segment_bytes - self.used_bytes {
            self.turn(api, stream)?;
        }
        let offset = self.segment * self.segment_bytes + self.used_bytes;
        // SAFETY: within this part, of which the stream has passed all copies that were made before it was entered, and nothing
        // after `used_bytes` was handed out since.
        let at = unsafe {
            let at = self.base.add(offset);
            ptr::copy_nonoverlapping(src.as_ptr(), at, src.len());
            at
        };
        let after = (self.used_bytes + src.len()).next_multiple_of(ALIGN);
        self.used_bytes = after.min(self.segment_bytes);
        // SAFETY: the ring's memory stays, and this piece is written again only when the part's event has passed.
        unsafe { api.copy_in(at, to, stream) }
    }

    /// Leaves a part for the next.
    fn turn<A: Api>(&mut self, api: &A, stream: Handle) -> Result<(), DriverError> {
        let event = self.events[self.segment];
        api.record(event, stream)?;
        self.left[self.segment] = Some(event);
        let next = (self.segment + 1) % SEGMENTS;
        if let Some(event) = self.left[next].take() {
            api.wait(event)?;
        }
        (self.segment, self.used_bytes) = (next, 0);
        Ok(())
    }

    /// Gives the memory back; the stream has passed everything.
    pub(super) fn release<A: Api>(&mut self, api: &A) {
        self.events.iter().for_each(|&event| api.release_event(event));
        // SAFETY: from `reserve_pinned`, and no copy is under way.
        unsafe { api.release_pinned(self.base) };
    }
}

/// Cuts rows into pieces of at most `most` bytes, with the range of each among the dense bytes.
pub(super) fn pieces(rows: Rows, most: usize) -> impl Iterator<Item = (Range<usize>, Rows)> {
    let Rows { at, num_rows, width_bytes, pitch_bytes } = rows;
    // Rows without gaps are one row.
    let (num_rows, width_bytes, pitch_bytes) = if pitch_bytes == width_bytes {
        (1, num_rows * width_bytes, num_rows * width_bytes)
    } else {
        (num_rows, width_bytes, pitch_bytes)
    };
    let is_empty = num_rows == 0 || width_bytes == 0;
    // Several whole rows, or parts of one.
    let rows_each = (most / width_bytes.max(1)).max(1);
    let width_each = width_bytes.min(most).max(1);
    let starts = (0..if is_empty { 0 } else { num_rows }).step_by(rows_each);
    starts.flat_map(move |row| {
        (0..width_bytes).step_by(width_each).map(move |column| {
            let num_rows = rows_each.min(num_rows - row);
            let width = width_each.min(width_bytes - column);
            let from = row * width_bytes + column;
            let at = at.offset(row * pitch_bytes + column);
            (from..from + num_rows * width, Rows { at, num_rows, width_bytes: width, pitch_bytes })
        })
    })
}
