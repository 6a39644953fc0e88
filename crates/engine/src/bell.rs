//! Wakes the engine thread where it waits for several things at once. Knows nothing of what they are.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A bell with one listener. It stays rung until it is heard, so nothing that rings before the listener waits is missed;
/// it may ring for something that the listener has seen already.
#[derive(Default)]
pub(crate) struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    /// Something has changed.
    pub(crate) fn ring(&self) {
        *self.lock() = true;
        self.changed.notify_one();
    }

    /// Waits until it rings, or until `deadline`; `false`: it did not ring.
    pub(crate) fn wait_until(&self, deadline: Instant) -> bool {
        let mut rung = self.lock();
        while !*rung {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            rung = self.changed.wait_timeout(rung, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *rung = false;
        true
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.rung.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_ring_before_the_wait_is_heard_once() {
        let bell = Bell::default();
        let soon = || Instant::now() + Duration::from_millis(5);
        assert!(!bell.wait_until(soon()));
        bell.ring();
        bell.ring();
        assert!(bell.wait_until(soon()));
        assert!(!bell.wait_until(soon()));
    }

    #[test]
    fn a_ring_ends_the_wait() {
        let bell = Bell::default();
        std::thread::scope(|scope| {
            scope.spawn(|| bell.ring());
            assert!(bell.wait_until(Instant::now() + Duration::from_mins(1)));
        });
    }
}
