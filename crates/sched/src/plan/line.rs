//! Whose turn it is to be prefilled. Knows nothing of budgets and blocks.

use std::collections::btree_map::Values;
use std::iter::{Enumerate, Peekable};

use r1_core::SeqId;

use crate::sequence::Turn;
use crate::{Sequence, State};

/// A sequence whose turn it is to be prefilled.
pub(super) struct Next<'a> {
    pub(super) seq: &'a Sequence,
    pub(super) waits: bool,
}

impl Next<'_> {
    /// Tokens that are prefill, those done included.
    pub(super) fn prefill_len(&self) -> usize {
        if self.waits { self.seq.tokens.len() } else { self.seq.prefill_len }
    }
}

/// Running and waiting sequences with something to prefill, in one order of service.
pub(super) struct Line<'a> {
    state: &'a State,
    /// With their places among the running.
    running: Peekable<Enumerate<Values<'a, Turn, SeqId>>>,
    waiting: Peekable<Values<'a, Turn, SeqId>>,
    /// Whether the waiting ones still have a turn.
    pub(super) admits: bool,
}

impl<'a> Line<'a> {
    pub(super) fn new(state: &'a State) -> Self {
        Self {
            state,
            running: state.running.values().enumerate().peekable(),
            waiting: state.waiting.values().peekable(),
            admits: true,
        }
    }

    /// The next in service, from the first `num_running` and the waiting.
    pub(super) fn next(&mut self, num_running: usize) -> Option<Next<'a>> {
        let sequences = &self.state.sequences;
        let skip = |&(at, id): &(usize, &SeqId)| at < num_running && !sequences[id].is_prefilling();
        while self.running.next_if(skip).is_some() {}
        let runs = self.running.peek().filter(|&&(at, _)| at < num_running).map(|&(_, id)| &sequences[id]);
        let waits = self.waiting.peek().filter(|_| self.admits).map(|&id| &sequences[id]);
        match (runs, waits) {
            (Some(seq), None) => {
                self.running.next();
                Some(Next { seq, waits: false })
            }
            (Some(seq), Some(other)) if seq.turn < other.turn => {
                self.running.next();
                Some(Next { seq, waits: false })
            }
            (_, Some(seq)) => {
                self.waiting.next();
                Some(Next { seq, waits: true })
            }
            (None, None) => None,
        }
    }
}
