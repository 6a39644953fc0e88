//! Where ranks meet: one barrier per collective, mailboxes for pairs, and the news that a rank has left.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;

use r1_backend::CommError;

/// What a rank lays out for the others to read.
#[derive(Debug, Default)]
pub struct Staging {
    /// Of float tensors, widened; empty for ids.
    pub floats: Vec<f32>,
    /// Of U32 tensors; empty for floats.
    pub ids: Vec<u32>,
}

/// What a rank called. All ranks of a collective must have called the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) op: &'static str,
    pub(crate) elements: usize,
    /// Who broadcasts; 0 for other collectives.
    pub(crate) root: usize,
}

/// Staging is laid out alternately in two sets. A rank lays out collective n + 2 only after all have arrived at n + 1, and so
/// have read n: one barrier per collective is enough.
const SETS: usize = 2;

/// Turns of a waiting rank before it parks: some tens of microseconds, about how far apart ranks that do the same work arrive.
/// To be woken takes as long, and longer than a small sum.
const SPINS: u32 = 2000;

#[derive(Debug)]
struct State {
    /// Collectives that all ranks have arrived at.
    completed: usize,
    /// Ranks that have arrived at the next one.
    arrived: usize,
    /// By set and rank.
    calls: [Vec<Call>; SETS],
    /// By sender and receiver: elements of the message that waits.
    mail: Vec<Option<usize>>,
    /// Ranks that have left, in order: the first is why the others cannot go on.
    gone: Vec<usize>,
    /// Ranks that must be woken.
    parked: usize,
}

impl State {
    fn first_gone(&self, op: &'static str) -> Option<CommError> {
        self.gone.first().map(|&rank| CommError::PeerGone { op, rank })
    }
}

/// What the ranks share.
#[derive(Debug)]
pub(crate) struct Group {
    world_size: usize,
    /// `SPINS`, or 0 where ranks share cores: one that spins would keep another from arriving.
    spins: u32,
    state: Mutex<State>,
    /// Goes up with every change that somebody can wait for; what spins looks at, so that it leaves the lock alone.
    changes: AtomicUsize,
    changed: Condvar,
    /// By set and rank.
    staging: [Vec<RwLock<Staging>>; SETS],
    /// By sender and receiver.
    messages: Vec<RwLock<Staging>>,
}

impl Group {
    pub(crate) fn new(world_size: usize, max_elements: usize) -> Self {
        let staging = |capacity| {
            RwLock::new(Staging { floats: Vec::with_capacity(capacity), ids: Vec::with_capacity(0) })
        };
        let set = || (0..world_size).map(|_| staging(max_elements)).collect();
        let call = Call { op: "", elements: 0, root: 0 };
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self {
            world_size,
            spins: if world_size <= cores { SPINS } else { 0 },
            changes: AtomicUsize::new(0),
            state: Mutex::new(State {
                completed: 0,
                arrived: 0,
                calls: [vec![call; world_size], vec![call; world_size]],
                mail: vec![None; world_size * world_size],
                gone: Vec::with_capacity(world_size),
                parked: 0,
            }),
            changed: Condvar::new(),
            staging: [set(), set()],
            messages: (0..world_size * world_size).map(|_| staging(0)).collect(),
        }
    }

    pub(crate) fn world_size(&self) -> usize {
        self.world_size
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` gives something: for a short while awake, then parked.
    fn wait<T>(&self, mut done: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut spins = self.spins;
        let mut state = self.state();
        loop {
            if let Some(result) = done(&mut state) {
                return result;
            }
            if spins > 0 {
                let seen = self.changes.load(Ordering::Relaxed);
                drop(state);
                while spins > 0 && self.changes.load(Ordering::Relaxed) == seen {
                    spins -= 1;
                    std::hint::spin_loop();
                }
                state = self.state();
            } else {
                state.parked += 1;
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.parked -= 1;
            }
        }
    }

    /// Lets those that wait look at the state again.
    fn announce(&self, state: MutexGuard<'_, State>) {
        self.changes.fetch_add(1, Ordering::Relaxed);
        let parked = state.parked > 0;
        drop(state);
        if parked {
            self.changed.notify_all();
        }
    }

    /// Says that `rank` takes no further part; whoever waits for it stops waiting.
    pub(crate) fn leave(&self, rank: usize) {
        let mut state = self.state();
        if !state.gone.contains(&rank) {
            state.gone.push(rank);
        }
        self.announce(state);
    }

    /// One collective: `lay_out` fills this rank's staging, and once all ranks have arrived, `read` is given everyone's.
    pub(crate) fn collective(
        &self,
        rank: usize,
        call: Call,
        lay_out: impl FnOnce(&mut Staging) -> Result<(), CommError>,
        read: impl FnOnce(&[RwLock<Staging>]) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        let (round, broken) = {
            let state = self.state();
            (state.completed, state.first_gone(call.op))
        };
        if let Some(error) = broken {
            return Err(error);
        }
        let set = round % SETS;
        lay_out(&mut self.staging[set][rank].write().unwrap_or_else(PoisonError::into_inner))?;

        let mut state = self.state();
        state.calls[set][rank] = call;
        state.arrived += 1;
        if state.arrived == self.world_size {
            state.arrived = 0;
            state.completed += 1;
            self.announce(state);
        } else {
            drop(state);
        }
        self.wait(|state| {
            if state.completed > round {
                // Complete, even if someone has left since.
                return Some(mismatch(&state.calls[set], call));
            }
            state.first_gone(call.op).map(Err)
        })?;
        read(&self.staging[set])
    }

    /// Hands `to` a message of `elements`, once the one before has been taken.
    pub(crate) fn send(
        &self,
        from: usize,
        to: usize,
        elements: usize,
        lay_out: impl FnOnce(&mut Staging) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        let pair = from * self.world_size + to;
        self.wait(|state| match state.mail[pair] {
            _ if state.gone.contains(&to) => Some(Err(CommError::PeerGone { op: "send", rank: to })),
            Some(_) => None,
            None => Some(Ok(())),
        })?;
        lay_out(&mut self.messages[pair].write().unwrap_or_else(PoisonError::into_inner))?;
        let mut state = self.state();
        state.mail[pair] = Some(elements);
        self.announce(state);
        Ok(())
    }

    /// Takes the message of `from`, which must have `elements`.
    pub(crate) fn recv(
        &self,
        from: usize,
        to: usize,
        elements: usize,
        read: impl FnOnce(&Staging) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        let pair = from * self.world_size + to;
        let sent = self.wait(|state| match state.mail[pair] {
            Some(sent) => Some(Ok(sent)),
            None if state.gone.contains(&from) => Some(Err(CommError::PeerGone { op: "recv", rank: from })),
            None => None,
        })?;
        let result = if sent == elements {
            read(&self.messages[pair].read().unwrap_or_else(PoisonError::into_inner))
        } else {
            Err(CommError::Mismatch { op: "recv", rank: from, found: "send", found_elements: sent, elements })
        };
        let mut state = self.state();
        state.mail[pair] = None;
        self.announce(state);
        result
    }
}

/// The first rank that called something else.
fn mismatch(calls: &[Call], call: Call) -> Result<(), CommError> {
    match calls.iter().position(|other| *other != call) {
        None => Ok(()),
        Some(rank) => Err(CommError::Mismatch {
            op: call.op,
            rank,
            found: calls[rank].op,
            found_elements: calls[rank].elements,
            elements: call.elements,
        }),
    }
}
