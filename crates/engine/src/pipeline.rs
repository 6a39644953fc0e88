//! Steps on their way: begins what was planned, keeps up to `depth` of them in flight on the ranks, and hands back what the
//! oldest one has drawn. Used by the server's loop and by the bench alike.

use std::cell::Cell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use r1_backend::{Backend, RowSampling};
use r1_core::SeqId;
use r1_sched::{Finished, Limits, Plan, SchedConfig, State, StepId, begin, fail, plan_into};

use crate::bell::Bell;
use crate::live::{Live, Row};
use crate::rank::{Drawn, Failure, panic_text};
use crate::ranks::Ranks;

/// How long a step waits for the masks of its rows once its forward pass is enqueued, all of them together. A row whose mask
/// comes later draws nothing, so that no constraint holds up its neighbours by more in a step.
const PATIENCE: Duration = Duration::from_millis(2);
/// The same where no sequence of the step can draw, and no other step runs: only what arrives meanwhile is held up, and the
/// forward pass would have to be run again.
const LONE_PATIENCE: Duration = Duration::from_millis(20);

/// Where a step finds the sampling state of its sequences.
pub(crate) trait Lives {
    /// The state of a sequence in the step.
    fn get(&mut self, seq: SeqId) -> &mut Live;
}

/// A step in flight, or room for one.
#[derive(Default)]
struct Step {
    id: Option<StepId>,
    plan: Plan,
    /// Sequences of the rows of logits, in their order.
    sampled: Vec<SeqId>,
    /// Why it never got to the ranks whole.
    failure: Option<Failure>,
    /// Rows that draw something that counts for nothing, since their masks came too late.
    late: Vec<Late>,
    /// Sequences whose constraints have failed, and why; their draws count for nothing either.
    spoilt: Vec<(SeqId, String)>,
}

/// A row whose mask was not known when the others' were.
#[derive(Clone, Copy, Debug)]
struct Late {
    row: usize,
    seq: SeqId,
    position: usize,
}

/// The ranks, the scheduler's state, and the steps between them.
pub(crate) struct Pipeline<B: Backend> {
    ranks: Ranks<B>,
    state: State,
    /// One per slot of the ranks.
    steps: Vec<Step>,
    /// Slots of the steps in flight, oldest first.
    in_flight: VecDeque<usize>,
    next_slot: usize,
    drawn: Drawn,
    /// Rung when a mask is known.
    bell: Arc<Bell>,
}

/// Steps that failed.
pub(crate) struct Failed {
    pub(crate) why: String,
    /// Sequences that were in them and lived.
    pub(crate) ended: Vec<Finished>,
    pub(crate) num_steps: usize,
    /// Why no step can run any more, if so.
    pub(crate) fatal: Option<String>,
}

/// The oldest step, which was waited for.
pub(crate) struct Done<'a> {
    pub(crate) id: StepId,
    pub(crate) plan: &'a Plan,
    /// Sequences that drew a token, in the order of rows.
    pub(crate) sampled: &'a [SeqId],
    pub(crate) drawn: &'a Drawn,
    /// Of these, those that drew nothing after all.
    late: &'a [Late],
    /// Of these, those whose constraints have failed, and why.
    spoilt: &'a [(SeqId, String)],
    pub(crate) state: &'a mut State,
}

/// What became of a row that samples.
pub(crate) enum Became<'a> {
    Drawn,
    /// Nothing: its mask came too late.
    Late,
    /// Nothing, since its constraint has failed.
    Spoilt(&'a str),
}

impl Done<'_> {
    /// What became of a sequence's row.
    pub(crate) fn became(&self, seq: SeqId) -> Became<'_> {
        if self.late.iter().any(|late| late.seq == seq) {
            return Became::Late;
        }
        let spoilt = self.spoilt.iter().find(|(spoilt, _)| *spoilt == seq);
        spoilt.map_or(Became::Drawn, |(_, why)| Became::Spoilt(why))
    }
}

impl<B: Backend> Pipeline<B> {
    /// `bell` rings when a mask is known.
    pub(crate) fn new(ranks: Ranks<B>, state: State, bell: Arc<Bell>) -> Self {
        let SchedConfig { depth, max_num_seqs, .. } = *state.config();
        let drawn = Drawn::with_room(state.config());
        let step = || Step { sampled: Vec::with_capacity(max_num_seqs), ..Step::default() };
        Self {
            ranks,
            state,
            steps: (0..depth).map(|_| step()).collect(),
            in_flight: VecDeque::with_capacity(depth),
            next_slot: 0,
            drawn,
            bell,
        }
    }

    pub(crate) fn ranks(&self) -> &Ranks<B> {
        &self.ranks
    }

    /// Another step may be begun before the oldest is waited for.
    pub(crate) fn has_room(&self) -> bool {
        self.in_flight.len() < self.steps.len()
    }

    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    /// The scheduler's state; a caller may add and abort.
    pub(crate) fn state_mut(&mut self) -> &mut State {
        &mut self.state
    }

    /// Begins the next step, if one can run now; gives its plan. `lives` holds the sampling state of every sequence. Whether
    /// the step fails is known when it is waited for.
    pub(crate) fn begin(&mut self, limits: &Limits, lives: &mut impl Lives) -> Option<&Plan> {
        // What has failed is given up before anything else begins.
        let has_failed = self.steps.iter().any(|step| step.failure.is_some());
        if !self.has_room() || has_failed {
            return None;
        }
        let slot = self.next_slot;
        let step = &mut self.steps[slot];
        plan_into(&self.state, limits, &mut step.plan);
        if step.plan.is_empty() {
            return None;
        }
        step.id = Some(begin(&mut self.state, &step.plan));
        self.in_flight.push_back(slot);
        self.next_slot = (slot + 1) % self.steps.len();
        let filled = catch_unwind(AssertUnwindSafe(|| self.enqueue(slot, lives)));
        if let Err(panic) = filled {
            self.steps[slot].failure = Some(Failure::cause(panic_text(&*panic)));
        }
        Some(&self.steps[slot].plan)
    }

    /// Hands the step in `slot` to the ranks.
    fn enqueue(&mut self, slot: usize, lives: &mut impl Lives) {
        let before = (slot + self.steps.len() - 1) % self.steps.len();
        let before = &self.steps[before].sampled;
        // Both steps are in order of service, so that the row wanted next mostly stands next.
        let cursor = Cell::new(0);
        let drawn_by = |seq| {
            let mut rows = (0..before.len()).map(|ahead| (cursor.get() + ahead) % before.len());
            let row = rows.find(|&row| before[row] == seq);
            let row = row.expect("a token in flight is drawn by the step before");
            cursor.set(row + 1);
            row as u32
        };
        let mut input = self.ranks.slot(slot).input_mut();
        input.fill(&self.state, &self.steps[slot].plan, self.ranks.buckets(), drawn_by);
        drop(input);
        self.ranks.forward(slot);

        let is_alone = self.in_flight.len() == 1;
        let Step { plan, sampled, late, spoilt, .. } = &mut self.steps[slot];
        sampled.clear();
        late.clear();
        spoilt.clear();
        let mut sampling = self.ranks.slot(slot).sampling_mut();
        sampling.batch.clear();
        // Prompts whose logits are wanted have rows behind those that sample.
        sampling.wants_logprobs = !self.ranks.slot(slot).input().prompt_tokens().is_empty();
        let decodes = plan.decode.iter().map(|row| (row.seq, row.start + 1));
        let prefills = plan.prefill.iter().filter(|chunk| chunk.samples);
        for (seq, position) in decodes.chain(prefills.map(|chunk| (chunk.seq, chunk.start + chunk.len))) {
            let live = lives.get(seq);
            let row = match live.row(position, &mut sampling.batch) {
                Row::Known(row) => row,
                Row::Waits => {
                    late.push(Late { row: sampled.len(), seq, position });
                    RowSampling::greedy()
                }
                Row::Failed(why) => {
                    spoilt.push((seq, why));
                    RowSampling::greedy()
                }
            };
            sampling.batch.rows.push(row);
            sampling.wants_logprobs |= live.logprobs().is_some();
            sampled.push(seq);
        }
        if !late.is_empty() {
            let is_lone = is_alone && late.len() == plan.num_seqs();
            let deadline = Instant::now() + if is_lone { LONE_PATIENCE } else { PATIENCE };
            loop {
                late.retain(|&Late { row, seq, position }| {
                    match lives.get(seq).row(position, &mut sampling.batch) {
                        Row::Known(known) => sampling.batch.rows[row] = known,
                        Row::Failed(why) => spoilt.push((seq, why)),
                        Row::Waits => return true,
                    }
                    false
                });
                if late.is_empty() || !self.bell.wait_until(deadline) {
                    break;
                }
            }
        }
        drop(sampling);
        self.ranks.sample(slot);
    }

    /// Waits for the oldest step in flight. `None`: there is none.
    pub(crate) fn wait(&mut self) -> Option<Result<Done<'_>, Failed>> {
        let slot = *self.in_flight.front()?;
        let prepared = self.steps[slot].failure.clone().map_or(Ok(()), Err);
        let waited = self.ranks.wait(slot).and(prepared).and_then(|()| {
            let read = catch_unwind(AssertUnwindSafe(|| self.ranks.read(slot, &mut self.drawn)));
            match read {
                Ok(read) => read.map_err(|error| Failure::cause(error.to_string())),
                Err(panic) => Err(Failure::cause(panic_text(&*panic))),
            }
        });
        Some(match waited {
            Ok(()) => {
                self.in_flight.pop_front();
                let Step { id, plan, sampled, late, spoilt, .. } = &mut self.steps[slot];
                let id = id.take().expect("a step in flight has an id");
                Ok(Done { id, plan, sampled, drawn: &self.drawn, late, spoilt, state: &mut self.state })
            }
            Err(failure) => Err(self.fail(slot, failure)),
        })
    }

    /// Gives up the oldest step, which is in `slot`, and every later one: their blocks hold nothing.
    fn fail(&mut self, slot: usize, mut failure: Failure) -> Failed {
        let id = self.steps[slot].id.expect("a step in flight has an id");
        let num_steps = self.in_flight.len();
        for later in self.in_flight.drain(..) {
            // Nothing may still run when its buffers are used again. A rank that ran ahead and broke takes its group along, so
            // the cause may lie in a later step.
            if let Err(of_later) = self.ranks.wait(later)
                && failure.is_consequence
            {
                failure = of_later;
            }
            let step = &mut self.steps[later];
            (step.id, step.failure) = (None, None);
            step.sampled.clear();
        }
        let fatal = self.ranks.rejoin().err();
        Failed { why: failure.why, ended: fail(&mut self.state, id), num_steps, fatal }
    }
}
