//! Carries a plan out: [`begin`] when the step is handed to the device, [`commit`] when its tokens are known.

use r1_core::{FinishReason, SeqId, TokenId};

use crate::{BlockPool, Finished, Outcome, Phase, Plan, Sequence, State};

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
    /// Known tokens it runs; 0 for a decode row.
    pub(crate) chunk_len: usize,
}

/// Reserves what `plan` promised: preempts, admits, extends block tables, and counts every token that is not known yet
/// as placed. Blocks that the step fills with known tokens can be hit from now on. Afterwards `block_table` is what the
/// step's input tensors need.
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
    // Before anything is evicted: what the plan found must still be there when its turn comes.
    for chunk in &plan.prefill {
        take_found(state, chunk.seq, chunk.start);
    }
    let block_size = state.config.block_size;
    let mut rows = state.spare_rows.pop().unwrap_or_default();
    for row in &plan.decode {
        let seq = state.sequences.get_mut(&row.seq).expect("a planned sequence exists");
        assert!(seq.phase == Phase::Running && seq.placed == row.start, "stale plan: sequence {}", row.seq);
        let max_tokens = 1 + row.num_drafts;
        seq.placed += max_tokens;
        seq.pending += max_tokens;
        seq.steps_in_flight += 1;
        state.pool.extend(&mut seq.blocks, seq.placed.div_ceil(block_size));
        register(&mut state.pool, seq, block_size);
        rows.push(Row { seq: row.seq, max_tokens, chunk_len: 0 });
    }
    for chunk in &plan.prefill {
        admit(state, chunk.seq, chunk.start);
        let seq = state.sequences.get_mut(&chunk.seq).expect("a planned sequence exists");
        assert!(
            seq.phase == Phase::Running && seq.placed == chunk.start,
            "stale plan: sequence {}",
            chunk.seq
        );
        seq.placed += chunk.len;
        let max_tokens = usize::from(chunk.samples);
        seq.pending += max_tokens;
        seq.steps_in_flight += 1;
        register(&mut state.pool, seq, block_size);
        rows.push(Row { seq: chunk.seq, max_tokens, chunk_len: chunk.len });
    }
    let id = StepId(state.num_steps);
    state.num_steps += 1;
    state.in_flight.push_back(Step { id, rows });
    id
}

/// Takes a sequence's blocks and puts it back into the queue, where its turn is before all that came later. What it has
/// generated stays and is computed anew together with the prompt, as far as the prefix cache has lost it.
fn preempt(state: &mut State, id: SeqId) {
    let seq = state.sequences.get_mut(&id).expect("a planned sequence exists");
    assert!(
        seq.phase == Phase::Running && !seq.is_in_flight(),
        "stale plan: sequence {id} cannot be preempted"
    );
    state.pool.release(&mut seq.blocks);
    seq.keep_logits();
    seq.phase = Phase::Waiting;
    seq.placed = 0;
    seq.settled = 0;
    seq.num_registered = 0;
    seq.prefill_len = 0;
    state.running.remove(&seq.turn);
    state.waiting.insert(seq.turn, id);
    state.num_preemptions += 1;
}

/// Adds the blocks below position `start` that can be hit now to the table of a waiting sequence.
fn take_found(state: &mut State, id: SeqId, start: usize) {
    let block_size = state.config.block_size;
    let seq = state.sequences.get_mut(&id).expect("a planned sequence exists");
    if seq.phase != Phase::Waiting {
        return;
    }
    // Room for all it can come to, so that decoding it never allocates.
    seq.tokens.reserve_exact(seq.max_len - seq.tokens.len());
    seq.blocks.reserve_exact(seq.max_len.div_ceil(block_size));
    seq.chain.reserve(seq.max_len / block_size);
    for at in 0..start / block_size {
        let Some(block) = state.pool.find(seq.shareable(block_size)[at]) else { return };
        state.pool.share(&mut seq.blocks, block);
    }
}

/// Gives a waiting sequence, whose first chunk begins at `start`, the rest of its blocks, and lets it run.
fn admit(state: &mut State, id: SeqId, start: usize) {
    let block_size = state.config.block_size;
    let seq = state.sequences.get_mut(&id).expect("a planned sequence exists");
    if seq.phase != Phase::Waiting {
        return;
    }
    assert!(start.is_multiple_of(block_size), "stale plan: sequence {id} starts inside a block");
    let num_shared = start / block_size;
    // The chunks before this one have filled what was not found above.
    for at in seq.blocks.len()..num_shared {
        let block = state.pool.find(seq.chain.hashes()[at]);
        state.pool.share(&mut seq.blocks, block.expect("stale plan: a chunk before fills this block"));
    }
    seq.phase = Phase::Running;
    seq.prefill_len = seq.tokens.len();
    state.pool.extend(&mut seq.blocks, seq.prefill_len.div_ceil(block_size));
    seq.placed = start;
    seq.settled = start;
    seq.num_registered = num_shared;
    if seq.cached_tokens.is_none() {
        seq.cached_tokens = Some(start);
        if state.config.prefix_cache.is_some() {
            state.prefix_queries_tokens += seq.prefill_len as u64;
            state.prefix_hits_tokens += start as u64;
        }
    }
    state.waiting.remove(&seq.turn);
    state.running.insert(seq.turn, id);
}

/// Makes the blocks known that a step has filled, or a step in flight fills, with tokens that are known.
///
/// Blocks that are known are only read. So one that ends with a token which may be run again is not known yet.
///
/// Position `p` holds token `p` once a row that runs that token has begun. The rows begun run every known token below
/// `placed`: `placed` counts drafts in flight as accepted, and where some are rejected it is still past the last known
/// token as long as a row is in flight, which runs that token; when none is, `placed` is exact. No later row writes
/// below the last known token.
fn register(pool: &mut BlockPool, seq: &mut Sequence, block_size: usize) {
    let num_full = seq.placed.min(seq.num_final()) / block_size;
    let full = seq.blocks.iter().zip(seq.chain.hashes()).take(num_full);
    for (&block, &hash) in full.skip(seq.num_registered) {
        pool.register(block, hash);
        seq.num_registered += 1;
    }
}

/// Applies what came of the oldest step in flight, and returns the sequences that ended with it.
///
/// Every row that samples has one outcome, in the order of the step's rows: decodes, then prefill chunks, as planned. One
/// of a sequence that may not run ahead can be without tokens, and the same position is decoded again. A chunk that does not sample may have one without tokens. Rows of sequences that ended while the step was in flight
/// need none, and one they have is discarded. A step that failed goes to [`fail`] instead.
///
/// Panics when steps are committed out of order, when outcomes do not match the step's rows, and when blocks are lost.
pub fn commit<'a>(
    state: &mut State,
    step: StepId,
    outcomes: impl IntoIterator<Item = Outcome<'a>>,
) -> Vec<Finished> {
    let mut rows = pop_oldest(state, step);
    let mut outcomes = outcomes.into_iter().peekable();
    let mut finished = Vec::new();
    for row in &rows {
        let outcome = outcomes.next_if(|outcome| outcome.seq == row.seq);
        let seq = state.sequences.get_mut(&row.seq).expect("a sequence outlives its steps");
        seq.steps_in_flight -= 1;
        if seq.phase == Phase::Draining {
            // What the row drew is not kept; that it ran its first position is.
            seq.settled += row.chunk_len.max(1);
            state.drop_if_drained(row.seq);
            continue;
        }
        finished.extend(apply(state, *row, outcome));
    }
    if let Some(Outcome { seq, .. }) = outcomes.next() {
        let known = rows.iter().any(|row| row.seq == seq);
        assert!(known, "an outcome for sequence {seq}, which is not in the step");
        panic!("a second outcome for sequence {seq}, or one out of the order of the step's rows");
    }
    rows.clear();
    state.spare_rows.push(rows);
    state.check_totals();
    finished
}

/// Takes the rows of the oldest step in flight, which must be `step`.
fn pop_oldest(state: &mut State, step: StepId) -> Vec<Row> {
    let oldest = state.in_flight.front().map(|step| step.id);
    assert_eq!(oldest, Some(step), "steps are committed in the order they were begun");
    state.in_flight.pop_front().expect("its id was looked at").rows
}

/// Applies one outcome to a live sequence, and ends it if this was its last.
fn apply(state: &mut State, row: Row, outcome: Option<Outcome<'_>>) -> Option<Finished> {
    const NOTHING: (&[TokenId], Option<FinishReason>) = (&[], None);
    let id = row.seq;
    let is_given = outcome.is_some();
    let (tokens, finish) = outcome.map_or(NOTHING, |outcome| (outcome.tokens, outcome.finish));
    let drawn = tokens.len();
    assert!(
        drawn <= row.max_tokens,
        "sequence {id}: {drawn} tokens, at most {} were asked for",
        row.max_tokens
    );
    let block_size = state.config.block_size;
    let seq = state.sequences.get_mut(&id).expect("the caller looked it up");
    assert!(
        drawn > 0 || row.max_tokens == 0 || finish.is_some() || is_given && !seq.run_ahead,
        "sequence {id}: no token and no reason to finish, or its outcome is out of the order of the step's rows"
    );
    seq.tokens.extend_from_slice(tokens);
    seq.pending -= row.max_tokens;
    // Rejected drafts: rows of later steps in flight move down by as many positions, and so does what comes next.
    seq.placed -= row.max_tokens - drawn;
    // A decode row ran the token before the first it drew, and every draft it accepted.
    seq.settled += if row.chunk_len > 0 { row.chunk_len } else { drawn };
    if drawn == 0 && row.max_tokens > 0 {
        // Where it was a chunk, its last token will be run again by a decode row.
        seq.settled = seq.settled.min(seq.placed);
        seq.prefill_len = seq.prefill_len.min(seq.placed);
    }
    assert!(seq.tokens.len() <= seq.max_len, "sequence {id} is past its limit of {} tokens", seq.max_len);
    seq.chain.extend(&seq.tokens, block_size);
    register(&mut state.pool, seq, block_size);
    let reason = finish.or((seq.tokens.len() == seq.max_len).then_some(FinishReason::Length));
    reason.map(|reason| state.end(id, reason))
}

/// The oldest step in flight has failed on the device, and with it every later one: none of them is to be committed.
/// All their sequences that are live end with [`FinishReason::Abort`], in the order of the rows, and no block that they
/// were to write can be hit afterwards. Nothing is in flight then, and the other sequences go on.
///
/// Panics when `step` is not the oldest in flight.
pub fn fail(state: &mut State, step: StepId) -> Vec<Finished> {
    let oldest = state.in_flight.front().map(|step| step.id);
    assert_eq!(oldest, Some(step), "only the oldest step in flight can fail");
    let block_size = state.config.block_size;
    // Whoever has hit one of these blocks was admitted by these steps too, since it was registered by one of them.
    for row in state.in_flight.iter().flat_map(|step| &step.rows) {
        let seq = &state.sequences[&row.seq];
        for &block in &seq.blocks[seq.settled / block_size..] {
            state.pool.unregister(block);
        }
    }
    let mut finished = Vec::new();
    while let Some(Step { mut rows, .. }) = state.in_flight.pop_front() {
        for row in &rows {
            let seq = state.sequences.get_mut(&row.seq).expect("a sequence outlives its steps");
            seq.steps_in_flight -= 1;
            if seq.phase == Phase::Draining {
                state.drop_if_drained(row.seq);
            } else {
                finished.push(state.end(row.seq, FinishReason::Abort));
            }
        }
        rows.clear();
        state.spare_rows.push(rows);
    }
    state.check_totals();
    finished
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{
        KEY, config, drawn, finish, sequence, shape, start, start_with, state, step, stopped,
    };
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
        let finished = commit(&mut state, id, [stopped(SeqId(1), &[TokenId(2)])]);
        assert_eq!(finished[0].reason, FinishReason::Stop(TokenId(2)));
    }

    #[test]
    fn a_stop_discards_what_the_step_ahead_drew() {
        let mut state = state(SchedConfig { depth: 2, ..config(8) });
        state.add(sequence(1, 4, 9)).unwrap();
        let first = start(&mut state);
        let second = start(&mut state);
        let finished = commit(&mut state, first.0, [stopped(SeqId(1), &[TokenId(2)])]);
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
        assert_eq!(commit(&mut state, id, [outcome])[0].output(), []);
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
        let finished = commit(&mut state, id, [drawn(SeqId(1), &[10, 11, 12].map(TokenId))]);
        assert_eq!(finished[0].output(), [9, 10, 11, 12].map(TokenId));
        assert_eq!(finished[0].reason, FinishReason::Length);
    }

    #[test]
    fn outcomes_may_be_left_out_where_nothing_is_drawn_but_not_be_in_another_order() {
        let mut state = state(config(20));
        state.add(sequence(1, 4, 4)).unwrap();
        state.add(sequence(2, 40, 4)).unwrap();
        let (id, chosen) = start(&mut state);
        assert_eq!(chosen.prefill.iter().map(|chunk| chunk.samples).collect::<Vec<_>>(), [true, false]);
        assert_eq!(commit(&mut state, id, [drawn(SeqId(1), &[TokenId(5)])]), []);
        let (id, _) = start(&mut state);
        let both = [drawn(SeqId(2), &[]), drawn(SeqId(1), &[TokenId(5)])];
        let swapped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| commit(&mut state, id, both)));
        let message = *swapped.unwrap_err().downcast::<String>().unwrap();
        assert!(message.contains("out of the order of the step's rows"), "{message}");
    }

    #[test]
    fn a_row_that_drew_nothing_decodes_the_same_position_again() {
        let mut state = state(SchedConfig { prefix_cache: Some(KEY), ..config(8) });
        state.add(crate::NewSequence { run_ahead: false, ..sequence(1, 8, 4) }).unwrap();
        let (id, chosen) = start(&mut state);
        assert_eq!(shape(&chosen).1, [(1, 0, 8, true)]);
        assert_eq!(commit(&mut state, id, [drawn(SeqId(1), &[])]), []);
        // Its last token's block is written to again, so nobody else may read it; the one before is done with.
        let mut longer = sequence(2, 12, 4);
        longer.prompt.fill(TokenId(1001));
        state.add(longer).unwrap();
        let (id, chosen) = start(&mut state);
        assert_eq!((chosen.decode[0].start, shape(&chosen).1), (7, vec![(2, 4, 8, true)]));
        let nothing = drawn(SeqId(1), &[]);
        commit(&mut state, id, [nothing, drawn(SeqId(2), &[TokenId(5)])]);
        state.pause(SeqId(1));
        assert_eq!(shape(&step(&mut state, 6).0).0, [2], "a paused sequence sits out");
        state.resume(SeqId(1));
        let (id, chosen) = start(&mut state);
        assert_eq!((chosen.decode[0].seq, chosen.decode[0].start), (SeqId(1), 7));
        let tokens = [TokenId(9)];
        commit(&mut state, id, [drawn(SeqId(1), &tokens), drawn(SeqId(2), &tokens)]);
        assert_eq!(state.tokens(SeqId(1))[8..], tokens);
        assert_eq!(shape(&start(&mut state).1).0, [1, 2]);
    }

    #[test]
    #[should_panic(expected = "no token and no reason to finish")]
    fn a_row_that_runs_ahead_draws_something() {
        let (mut state, id) = prefilling(1);
        commit(&mut state, id, [drawn(SeqId(1), &[])]);
    }

    #[test]
    fn a_failure_ends_every_sequence_in_flight_and_no_other() {
        let mut state = state(SchedConfig { depth: 2, prefix_cache: Some(KEY), ..config(8) });
        for id in 1..=3 {
            state.add(sequence(id, 4, 6)).unwrap();
        }
        step(&mut state, 9);
        let only = |max_num_seqs| Limits { max_num_seqs, ..SchedConfig::default().limits() };
        let first = start_with(&mut state, &only(1));
        let second = start_with(&mut state, &only(2));
        assert_eq!((first.1.num_seqs(), second.1.num_seqs()), (1, 2));
        state.abort(SeqId(1)).unwrap();
        let ended = fail(&mut state, first.0);
        assert_eq!(ended.len(), 1, "1 had been reported already, and 3 is in neither step");
        assert_eq!((ended[0].seq, ended[0].reason), (SeqId(2), FinishReason::Abort));
        state.audit();
        assert_eq!((state.steps_in_flight(), state.stats().running, state.stats().draining), (0, 1, 0));
        assert_eq!(shape(&step(&mut state, 9).0).0, [3], "goes on");
    }

    #[test]
    #[should_panic(expected = "only the oldest step in flight can fail")]
    fn a_failure_of_a_later_step_alone_is_a_broken_invariant() {
        let (mut state, _) = prefilling(2);
        let second = start(&mut state);
        fail(&mut state, second.0);
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
        commit(&mut state, id, [drawn(SeqId(1), &[5, 6].map(TokenId))]);
    }

    #[test]
    #[should_panic(expected = "no token and no reason to finish")]
    fn a_missing_outcome_is_a_broken_invariant() {
        let (mut state, id) = prefilling(1);
        commit(&mut state, id, []);
    }

    #[test]
    #[should_panic(expected = "a second outcome for sequence 1")]
    fn a_doubled_outcome_is_a_broken_invariant() {
        let (mut state, id) = prefilling(1);
        commit(&mut state, id, [drawn(SeqId(1), &[TokenId(5)]), drawn(SeqId(1), &[TokenId(5)])]);
    }

    #[test]
    #[should_panic(expected = "not in the step")]
    fn an_outcome_for_a_stranger_is_a_broken_invariant() {
        let (mut state, id) = prefilling(1);
        commit(&mut state, id, [drawn(SeqId(1), &[TokenId(5)]), drawn(SeqId(2), &[TokenId(5)])]);
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
