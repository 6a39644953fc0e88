//! Weights on their way: threads that read a mapped file and hand it to the driver piece by piece, so that the disk, the
//! copies and the device work at the same time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use r1_backend::HostTensor;
use r1_core::DType;

use crate::arena::Range;
use crate::driver::{Driver, DriverError, Rows};

/// What a thread reads at once.
const PIECE_BYTES: usize = 8 << 20;
/// Smaller tensors are written by the caller.
const SMALL_BYTES: usize = 1 << 20;
/// Readers of a file system that serves several requests at a time.
const THREADS: usize = 4;
/// Pieces that may wait: what the caller reports as done is not far ahead of what is.
const MAX_WAITING: usize = 16;

/// A tensor that is read in pieces.
struct Load {
    host: HostTensor,
    /// Kept until all is written: a range that is given anew is not written to by an older tensor.
    range: Arc<Range>,
    pieces_left: AtomicUsize,
}

struct Piece {
    load: Arc<Load>,
    start: usize,
    end: usize,
}

#[derive(Default)]
struct State {
    waiting: Vec<Piece>,
    /// Pieces that wait or are being written.
    open: usize,
    failure: Option<DriverError>,
    ends: bool,
}

struct Shared {
    driver: Arc<dyn Driver>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads, once a large tensor has come.
pub(crate) struct Staging {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Pieces that are open, for who only wants to know that there are none.
    open: Arc<AtomicUsize>,
}

/// -0, which is NaN to units that read FNUZ, becomes 0.
fn without_negative_zero(codes: &mut [u8]) {
    for code in codes {
        if *code == 0x80 {
            *code = 0;
        }
    }
}

impl Staging {
    pub(crate) fn new(driver: Arc<dyn Driver>) -> Self {
        let shared = Shared { driver, state: Mutex::default(), changed: Condvar::new() };
        Self { shared: Arc::new(shared), threads: Mutex::default(), open: Arc::default() }
    }

    /// Writes a tensor to its range, at once or behind the caller's back: see [`settle`](Staging::settle).
    pub(crate) fn load(&self, host: &HostTensor, range: &Arc<Range>) -> Result<(), DriverError> {
        let bytes = host.bytes();
        if bytes.len() < SMALL_BYTES {
            write(&*self.shared.driver, host, 0..bytes.len(), range, &mut Vec::new())?;
            host.discard();
            return Ok(());
        }
        self.start()?;
        let num_pieces = bytes.len().div_ceil(PIECE_BYTES);
        let load = Arc::new(Load {
            host: host.clone(),
            range: range.clone(),
            pieces_left: AtomicUsize::new(num_pieces),
        });
        for start in (0..bytes.len()).step_by(PIECE_BYTES) {
            let end = bytes.len().min(start + PIECE_BYTES);
            let mut state = self.shared.state();
            while state.waiting.len() >= MAX_WAITING {
                state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if let Some(failure) = state.failure.take() {
                return Err(failure);
            }
            state.waiting.insert(0, Piece { load: load.clone(), start, end });
            state.open += 1;
            self.open.fetch_add(1, Ordering::Relaxed);
            self.shared.changed.notify_all();
        }
        Ok(())
    }

    /// Waits until everything is enqueued on the stream; what is enqueued afterwards comes after it.
    pub(crate) fn settle(&self) -> Result<(), DriverError> {
        if self.open.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        let mut state = self.shared.state();
        while state.open > 0 {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        self.open.store(0, Ordering::Relaxed);
        state.failure.take().map_or(Ok(()), Err)
    }

    fn start(&self) -> Result<(), DriverError> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        while threads.len() < THREADS {
            let shared = self.shared.clone();
            let thread = thread::Builder::new().name("weights".into()).spawn(move || work(&shared));
            threads.push(
                thread
                    .map_err(|error| DriverError::Call { call: "start a thread", why: error.to_string() })?,
            );
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        self.shared.state().ends = true;
        self.shared.changed.notify_all();
        for thread in self.threads.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = thread.join();
        }
    }
}

/// Hands `bytes` of the tensor to the driver, which copies them before it returns.
fn write(
    driver: &dyn Driver,
    host: &HostTensor,
    bytes: std::ops::Range<usize>,
    range: &Range,
    room: &mut Vec<u8>,
) -> Result<(), DriverError> {
    let rows = Rows::dense(range.at().offset(bytes.start), bytes.len());
    let bytes = &host.bytes()[bytes];
    if host.dtype() != DType::F8E4M3 || !driver.info().fnuz {
        return driver.write(bytes, rows);
    }
    room.clear();
    room.extend_from_slice(bytes);
    without_negative_zero(room);
    driver.write(room, rows)
}

fn work(shared: &Shared) {
    let mut room = Vec::new();
    let mut state = shared.state();
    loop {
        if let Some(Piece { load, start, end }) = state.waiting.pop() {
            shared.changed.notify_all();
            let has_failed = state.failure.is_some();
            drop(state);
            let written = if has_failed {
                Ok(())
            } else {
                write(&*shared.driver, &load.host, start..end, &load.range, &mut room)
            };
            if load.pieces_left.fetch_sub(1, Ordering::AcqRel) == 1 {
                load.host.discard();
            }
            state = shared.state();
            if let Err(error) = written {
                state.failure.get_or_insert(error);
            }
            state.open -= 1;
            shared.changed.notify_all();
        } else if state.ends {
            return;
        } else {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_negative_zero_is_mapped() {
        let mut codes: Vec<u8> = (0..=255).collect();
        without_negative_zero(&mut codes);
        for (before, &after) in (0..=255u8).zip(&codes) {
            assert_eq!(after, if before == 0x80 { 0 } else { before });
        }
    }
}
