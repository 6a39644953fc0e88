//! Counts running requests, so that a server asked to stop can refuse new ones and wait for the others. Must not know
//! HTTP.

use std::sync::Arc;

use tokio::sync::watch;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Phase {
    Serving,
    Draining,
    Cut,
}

struct State {
    phase: Phase,
    active: usize,
}

/// Shared by every request of a server.
#[derive(Clone)]
pub(crate) struct Drain {
    state: Arc<watch::Sender<State>>,
}

/// A running request; dropping it says that the request ended.
pub(crate) struct Active {
    state: Arc<watch::Sender<State>>,
}

impl Drain {
    pub(crate) fn new() -> Self {
        Self { state: Arc::new(watch::Sender::new(State { phase: Phase::Serving, active: 0 })) }
    }

    /// Lets a request in unless the server is stopping.
    pub(crate) fn enter(&self) -> Option<Active> {
        let entered = self.state.send_if_modified(|state| {
            let open = state.phase == Phase::Serving;
            state.active += usize::from(open);
            open
        });
        entered.then(|| Active { state: self.state.clone() })
    }

    /// Lets no further request in.
    pub(crate) fn begin(&self) {
        self.state.send_modify(|state| state.phase = Phase::Draining);
    }

    /// Ends the requests that still run.
    pub(crate) fn cut(&self) {
        self.state.send_modify(|state| state.phase = Phase::Cut);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.state.borrow().phase != Phase::Serving
    }

    /// Waits until no request runs.
    pub(crate) async fn idle(&self) {
        // `self` holds the sender, so the channel cannot close while this waits.
        let _ = self.state.subscribe().wait_for(|state| state.active == 0).await;
    }
}

impl Active {
    /// Waits until requests are cut off.
    pub(crate) async fn cut(&self) {
        let _ = self.state.subscribe().wait_for(|state| state.phase == Phase::Cut).await;
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.state.send_modify(|state| state.active -= 1);
    }
}
