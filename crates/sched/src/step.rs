//! Carries a plan out: [`begin`] when the step is handed to the device, [`commit`] when its tokens are known.

use std::collections::BTreeMap;

use r1_core::{FinishReason, SeqId};

use crate::{Finished, Outcome, Phase, Plan, State};

/// A step's place in the order of all steps, counted from 0. Steps are committed in the order they were begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StepId(pub u64);

/// A step that the device has and whose tokens are not known.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) id: StepId,
    pub(crate) rows: Vec<Row>,
}

/// What one step may do to one sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) seq: SeqId,
    /// Most tokens it may draw; 0 for a prefill chunk that does not sample.
    pub(crate) max_tokens: usize,
}

/// Reserves what `plan` promised: preempts, admits, extends block tables, and counts every token that is not known yet
/// as placed. Afterwards `block_table` is what the step's input tensors need.
///
/// Panics when the plan is empty or was not made from this state as it is now: only `add` may come in between.
pub fn begin(state: &mut State, plan: &Plan) -> StepId {
    assert!(!plan.is_empty(), "an empty plan is no step");
    assert!(
        state.in_flight.len() < state.config.depth,
        "{} steps are in flight already",
        state.in_flight.len()
    );
    for &id in &plan.preempt {
        preempt(state, id);
    }
    let mut rows = Vec::with_capacity(plan.num_seqs());
    for row in &plan.decode {
        let seq = state.sequences.get_mut(&row.seq).expect("a planned sequence exists");
        assert!(seq.phase == Phase::Running && seq.placed == row.start, "stale plan: sequence {}", row.seq);
        seq.placed += 1 + row.num_drafts;
        seq.pending += 1 + row.num_drafts;
        seq.steps_in_flight += 1;
        let num_blocks = state.config.blocks_for(seq.placed);
        state.pool.extend(&mut seq.blocks, num_blocks);
        rows.push(Row { seq: row.seq, max_tokens: 1 + row.num_drafts });
    }
    for chunk in &plan.prefill {
        let seq = state.sequences.get_mut(&chunk.seq).expect("a planned sequence exists");
        if seq.phase == Phase::Waiting {
            seq.phase = Phase::Running;
            seq.prefill_len = seq.tokens.len();
            let num_blocks = state.config.blocks_for(seq.prefill_len);
            state.pool.extend(&mut seq.blocks, num_blocks);
            state.waiting.remove(&seq.turn);
            state.running.insert(seq.turn, seq.id);
        }
        assert!(
            seq.phase == Phase::Running && seq.placed == chunk.start,
            "stale plan: sequence {}",
            chunk.seq
        );
        seq.placed += chunk.len;
        let max_tokens = usize::from(chunk.samples);
        seq.pending += max_tokens;
        seq.steps_in_flight += 1;
        rows.push(Row { seq: chunk.seq, max_tokens });
    }
    let id = StepId(state.num_steps);
    state.num_steps += 1;
    state.in_flight.push_back(Step { id, rows });
    id
}

/// Takes a sequence's blocks and puts it back into the queue, where its turn is before all that came later. What it has
/// generated stays and is computed anew together with the prompt.
fn preempt(state: &mut State, id: SeqId) {
    let seq = state.sequences.get_mut(&id).expect("a planned sequence exists");
    assert!(
        seq.phase == Phase::Running && !seq.is_in_flight(),
        "stale plan: sequence {id} cannot be preempted"
    );
    state.pool.release(&mut seq.blocks);
    seq.phase = Phase::Waiting;
    seq.placed = 0;
    seq.prefill_len = 0;
    seq.num_preemptions += 1;
    state.running.remove(&seq.turn);
    state.waiting.insert(seq.turn, id);
    state.num_preemptions += 1;
}

/// Applies what came of the oldest step in flight, and returns the sequences that ended with it.
///
/// Every row that samples has one outcome, in any order; a chunk that does not sample may have one without tokens. Rows
/// of sequences that ended while the step was in flight need none, and one they have is discarded. A step that failed:
/// `abort` its sequences, then commit it with no outcomes.
///
/// Panics when steps are committed out of order, when outcomes do not match the step's rows, and when blocks are lost.
pub fn commit(state: &mut State, step: StepId, outcomes: &[Outcome]) -> Vec<Finished> {
    let oldest = state.in_flight.front().map(|step| step.id);
    assert_eq!(oldest, Some(step), "steps are committed in the order they were begun");
    let rows = state.in_flight.pop_front().expect("its id was looked at").rows;
    let mut by_seq: BTreeMap<SeqId, &Outcome> = BTreeMap::new();
    for outcome in outcomes {
        assert!(by_seq.insert(outcome.seq, outcome).is_none(), "two outcomes for sequence {}", outcome.seq);
    }
    let mut finished = Vec::new();
    for row in rows {
        let outcome = by_seq.remove(&row.seq);
        let seq = state.sequences.get_mut(&row.seq).expect("a sequence outlives its steps");
        seq.steps_in_flight -= 1;
        if seq.phase == Phase::Draining {
            state.drop_if_drained(row.seq);
            continue;
        }
        finished.extend(apply(state, row, outcome));
    }
    assert!(by_seq.is_empty(), "outcomes for sequences that are not in the step: {:?}", by_seq.keys());
    state.check_totals();
    finished
}

/// Applies one outcome to a live sequence, and ends it if this was its last.
fn apply(state: &mut State, row: Row, outcome: Option<&Outcome>) -> Option<Finished> {
    let id = row.seq;
    let (tokens, finish) =
        outcome.map_or((&[][..], None), |outcome| (outcome.tokens.as_slice(), outcome.finish));
    let drawn = tokens.len();
    assert!(
        drawn <= row.max_tokens,
        "sequence {id}: {drawn} tokens, at most {} were asked for",
        row.max_tokens
    );
    assert!(
        drawn > 0 || row.max_tokens == 0 || finish.is_some(),
        "sequence {id}: no token and no reason to finish"
    );
    let seq = state.sequences.get_mut(&id).expect("the caller looked it up");
    seq.tokens.extend_from_slice(tokens);
    seq.pending -= row.max_tokens;
    // Rejected drafts: rows of later steps in flight move down by as many positions, and so does what comes next.
    seq.placed -= row.max_tokens - drawn;
    assert!(seq.tokens.len() <= seq.max_len, "sequence {id} is past its limit of {} tokens", seq.max_len);
    let reason = finish.or((seq.tokens.len() == seq.max_len).then_some(FinishReason::Length));
    reason.map(|reason| state.end(id, reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{config, drawn, finish, sequence, start, start_with, state, step, stopped};
    use crate::{Limits, SchedConfig, plan};
    use r1_core::TokenId;

    #[test]
    fn length_ends_a_sequence_at_max_new_tokens_and_at_the_model_length() {
        for (max_new_tokens, expect) in [(3, 3), (100, 7)] {
            let mut state = state(SchedConfig { max_model_len: 12, ..config(8) });
            state.add(sequence(1, 5, max_new_tokens)).unwrap();
            let mut finished = Vec::new();
            for token in 0..expect {
                assert_eq!(finished, [], "ended before token {token}");
                finished = step(&mut state, token).1;
            }
            assert_eq!(finished[0].reason, FinishReason::Length);
            let output: Vec<_> = (0..expect).map(TokenId).collect();
            assert_eq!(finished[0].output(), output);
            assert!(state.is_idle());
        }
    }

    #[test]
    fn the_callers_reason_wins_over_length() {
        let mut state = state(config(8));
        state.add(sequence(1, 5, 1)).unwrap();
        let (id, _) = start(&mut state);
        let finished = commit(&mut state, id, &[stopped(SeqId(1), 2)]);
        assert_eq!(finished[0].reason, FinishReason::Stop(TokenId(2)));
    }

    #[test]
    fn a_stop_discards_what_the_step_ahead_drew() {
        let mut state = state(SchedConfig { depth: 2, ..config(8) });
        state.add(sequence(1, 4, 9)).unwrap();
        let first = start(&mut state);
        let second = start(&mut state);
        let finished = commit(&mut state, first.0, &[stopped(SeqId(1), 2)]);
        assert_eq!(finished[0].output(), [TokenId(2)]);
        assert_eq!(state.stats().blocks_used, 2, "the step ahead still writes to them");
        assert!(plan(&state, &state.limits()).is_empty());
        assert_eq!(finish(&mut state, &second, 3), []);
        assert!(state.is_idle());
        assert_eq!(state.stats().blocks_free, 8);
    }

    #[test]
    fn a_sequence_may_end_without_a_token() {
        let mut state = state(config(12));
        state.add(sequence(1, 40, 9)).unwrap();
        let (id, chosen) = start(&mut state);
        assert!(!chosen.prefill[0].samples);
        let outcome = Outcome { finish: Some(FinishReason::Abort), ..drawn(SeqId(1), &[]) };
        assert_eq!(commit(&mut state, id, &[outcome])[0].output(), []);
        assert!(state.is_idle());
    }

    #[test]
    fn several_tokens_of_one_outcome_all_count() {
        let mut state = state(config(8));
        state.add(sequence(1, 4, 4)).unwrap();
        step(&mut state, 9);
        let limits = Limits { num_drafts: 5, ..state.limits() };
        let (id, chosen) = start_with(&mut state, &limits);
        assert_eq!(chosen.decode[0].num_drafts, 2);
        let finished = commit(&mut state, id, &[drawn(SeqId(1), &[10, 11, 12])]);
        assert_eq!(finished[0].output(), [9, 10, 11, 12].map(TokenId));
        assert_eq!(finished[0].reason, FinishReason::Length);
    }

    #[test]
    fn a_failed_step_is_aborted_and_committed_without_outcomes() {
        let mut state = state(config(8));
        state.add(sequence(1, 4, 4)).unwrap();
        state.add(sequence(2, 4, 4)).unwrap();
        let (id, chosen) = start(&mut state);
        for chunk in &chosen.prefill {
            state.abort(chunk.seq).unwrap();
        }
        assert_eq!(commit(&mut state, id, &[]), []);
        assert!(state.is_idle());
    }

    /// A sequence whose prefill is in flight.
    fn prefilling(depth: usize) -> (State, StepId) {
        let mut state = state(SchedConfig { depth, ..config(8) });
        state.add(sequence(1, 4, 4)).unwrap();
        let (id, _) = start(&mut state);
        (state, id)
    }

    #[test]
    #[should_panic(expected = "2 tokens, at most 1 were asked for")]
    fn more_tokens_than_asked_for_are_a_broken_invariant() {
        let (mut state, id) = prefilling(1);
        commit(&mut state, id, &[drawn(SeqId(1), &[5, 6])]);
    }

    #[test]
    #[should_panic(expected = "no token and no reason to finish")]
    fn a_missing_outcome_is_a_broken_invariant() {
        let (mut state, id) = prefilling(1);
        commit(&mut state, id, &[]);
    }

    #[test]
    #[should_panic(expected = "two outcomes for sequence 1")]
    fn a_doubled_outcome_is_a_broken_invariant() {
        let (mut state, id) = prefilling(1);
        commit(&mut state, id, &[drawn(SeqId(1), &[5]), drawn(SeqId(1), &[5])]);
    }

    #[test]
    #[should_panic(expected = "not in the step")]
    fn an_outcome_for_a_stranger_is_a_broken_invariant() {
        let (mut state, id) = prefilling(1);
        commit(&mut state, id, &[drawn(SeqId(1), &[5]), drawn(SeqId(2), &[5])]);
    }

    #[test]
    #[should_panic(expected = "in the order they were begun")]
    fn steps_out_of_order_are_a_broken_invariant() {
        let (mut state, _) = prefilling(2);
        let second = start(&mut state);
        finish(&mut state, &second, 5);
    }

    #[test]
    #[should_panic(expected = "stale plan")]
    fn a_plan_that_was_begun_already_is_a_broken_invariant() {
        let mut state = state(SchedConfig { depth: 2, ..config(8) });
        state.add(sequence(1, 4, 4)).unwrap();
        let chosen = plan(&state, &state.limits());
        begin(&mut state, &chosen);
        begin(&mut state, &chosen);
    }

    #[test]
    #[should_panic(expected = "an empty plan is no step")]
    fn an_empty_plan_is_no_step() {
        begin(&mut state(config(1)), &Plan::default());
    }
}
