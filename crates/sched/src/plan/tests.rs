//! What is planned, and what is not, one rule at a time. Rules that need many steps and much luck are the simulator's.

use super::*;
use crate::fixture::{KEY, config, drawn, finish, sequence, shape, start, start_with, state, step};
use crate::{NewSequence, SchedConfig, begin, commit};
use proptest::prelude::*;
use r1_core::TokenId;

#[test]
fn prompts_are_cut_into_chunks_and_only_the_last_one_samples() {
    let mut state = state(config(20));
    state.add(sequence(1, 40, 3)).unwrap();
    let chunks: Vec<_> = (0..4).map(|_| shape(&step(&mut state, 9).0)).collect();
    assert_eq!(chunks[0], (vec![], vec![(1, 0, 16, false)], vec![]));
    assert_eq!(chunks[1], (vec![], vec![(1, 16, 16, false)], vec![]));
    assert_eq!(chunks[2], (vec![], vec![(1, 32, 8, true)], vec![]));
    assert_eq!(chunks[3], (vec![1], vec![], vec![]));
}

#[test]
fn decode_comes_first_and_prefill_fills_the_budget() {
    let mut state = state(config(20));
    state.add(sequence(1, 6, 9)).unwrap();
    state.add(sequence(2, 6, 9)).unwrap();
    step(&mut state, 9);
    state.add(sequence(3, 20, 9)).unwrap();
    let (chosen, _) = step(&mut state, 9);
    assert_eq!(shape(&chosen), (vec![1, 2], vec![(3, 0, 14, false)], vec![]));
    assert_eq!((chosen.num_tokens(), chosen.num_seqs()), (16, 3));
}

#[test]
fn priority_then_arrival_orders_running_and_waiting_prefills_alike() {
    let mut state = state(config(30));
    let with = |id, len, priority| NewSequence { priority, ..sequence(id, len, 2) };
    state.add(with(1, 20, 1)).unwrap();
    assert_eq!(shape(&step(&mut state, 9).0).1, [(1, 0, 16, false)]);
    state.add(with(2, 3, 1)).unwrap();
    state.add(with(3, 3, 0)).unwrap();
    state.add(with(4, 3, -1)).unwrap();
    let expect = [(4, 0, 3, true), (3, 0, 3, true), (1, 16, 4, true), (2, 0, 3, true)];
    assert_eq!(shape(&step(&mut state, 9).0).1, expect);
}

#[test]
fn nobody_passes_a_sequence_that_does_not_fit_yet() {
    let mut state = state(config(6));
    state.add(sequence(1, 12, 4)).unwrap();
    state.add(sequence(2, 16, 4)).unwrap();
    state.add(sequence(3, 1, 1)).unwrap();
    assert_eq!(shape(&step(&mut state, 9).0).1, [(1, 0, 12, true)]);
    assert_eq!(shape(&step(&mut state, 9).0), (vec![1], vec![], vec![]), "3 would fit, but waits behind 2");
}

#[test]
fn at_most_max_num_seqs_hold_blocks_even_while_some_drain() {
    let mut state = state(SchedConfig { depth: 2, ..config(20) });
    for id in 1..=5 {
        state.add(sequence(id, 2, 9)).unwrap();
    }
    let first = start(&mut state);
    assert_eq!(first.1.num_seqs(), 4);
    state.abort(SeqId(1)).unwrap();
    let second = start(&mut state);
    assert_eq!(shape(&second.1), (vec![2, 3, 4], vec![], vec![]));
    finish(&mut state, &first, 9);
    assert_eq!(shape(&plan(&state, &state.limits())), (vec![2, 3, 4], vec![(5, 0, 2, true)], vec![]));
}

#[test]
fn headroom_holds_back_a_newcomer_but_never_a_lone_sequence() {
    let admitted = |headroom_tokens| {
        let mut state = state(SchedConfig { headroom_tokens, ..config(5) });
        state.add(sequence(1, 8, 12)).unwrap();
        state.add(sequence(2, 8, 12)).unwrap();
        plan(&state, &state.limits()).prefill.len()
    };
    assert_eq!((admitted(0), admitted(4), admitted(5), admitted(1000)), (2, 2, 1, 1));
}

#[test]
fn headroom_is_no_more_than_a_sequence_can_grow() {
    let mut state = state(SchedConfig { headroom_tokens: 1000, ..config(5) });
    state.add(sequence(1, 8, 4)).unwrap();
    state.add(sequence(2, 8, 12)).unwrap();
    assert_eq!(plan(&state, &state.limits()).prefill.len(), 2);
}

/// Two sequences of two full blocks each, and nothing free.
fn full(depth: usize) -> State {
    let mut state = state(SchedConfig { depth, ..config(4) });
    state.add(sequence(1, 8, 8)).unwrap();
    state.add(sequence(2, 8, 8)).unwrap();
    state
}

#[test]
fn the_last_running_sequence_gives_its_blocks_to_the_first_that_lacks_one() {
    let mut state = full(1);
    step(&mut state, 9);
    let (chosen, _) = step(&mut state, 10);
    assert_eq!(shape(&chosen), (vec![1], vec![], vec![2]));
    let seq = state.sequence(SeqId(2)).unwrap();
    assert_eq!((seq.tokens().len(), seq.block_table().len()), (9, 0), "what it has drawn stays");
    assert_eq!(state.stats().preemptions, 1);
    state.add(sequence(3, 1, 1)).unwrap();
    let order: Vec<_> = state.waiting().map(|seq| seq.id().0).collect();
    assert_eq!(order, [2, 3], "back in front");
    let mut last = Vec::new();
    while last.is_empty() {
        last = step(&mut state, 11).1;
    }
    assert_eq!((last[0].seq, last[0].output().len()), (SeqId(1), 8));
    let (chosen, _) = step(&mut state, 12);
    assert_eq!(shape(&chosen).1, [(2, 0, 9, true), (3, 0, 1, true)], "prompt and output are computed anew");
}

#[test]
fn a_better_priority_arriving_later_takes_the_blocks_of_a_worse_one() {
    let mut state = state(config(4));
    state.add(NewSequence { priority: 5, ..sequence(1, 8, 8) }).unwrap();
    state.add(NewSequence { priority: 0, ..sequence(2, 8, 8) }).unwrap();
    step(&mut state, 9);
    assert_eq!(shape(&step(&mut state, 9).0), (vec![2], vec![], vec![1]));
}

#[test]
fn the_last_sequence_waits_with_its_blocks() {
    let mut state = state(config(5));
    state.add(sequence(1, 10, 3)).unwrap();
    state.add(sequence(2, 8, 8)).unwrap();
    // 1 fills its third block and ends; 2 lacks a block meanwhile and takes none from anybody.
    assert_eq!(shape(&step(&mut state, 9).0).1.len(), 2);
    assert_eq!(shape(&step(&mut state, 9).0).0, [1]);
    assert_eq!(step(&mut state, 9).1[0].seq, SeqId(1));
    assert_eq!(shape(&step(&mut state, 9).0), (vec![2], vec![], vec![]));
    assert_eq!(state.stats().preemptions, 0);
}

#[test]
fn a_victim_in_flight_sits_out_a_step_and_gives_up_its_blocks_in_the_next() {
    let mut state = full(2);
    let first = start(&mut state);
    assert!(plan(&state, &state.limits()).is_empty(), "1 lacks a block, 2 is in flight and may not go on");
    finish(&mut state, &first, 9);
    assert_eq!(shape(&plan(&state, &state.limits())), (vec![1], vec![], vec![2]));
}

#[test]
fn a_victim_kept_out_is_spared_when_blocks_come_free_meanwhile() {
    let mut state = state(SchedConfig { depth: 2, ..config(5) });
    state.add(sequence(1, 4, 12)).unwrap();
    state.add(sequence(2, 4, 12)).unwrap();
    state.add(sequence(3, 8, 4)).unwrap();
    let first = start(&mut state);
    let second = start(&mut state);
    assert_eq!(shape(&second.1), (vec![1], vec![], vec![]), "2 lacks a block, and 3 sits out for it");
    state.abort(SeqId(3)).unwrap();
    finish(&mut state, &first, 9);
    let third = start(&mut state);
    assert_eq!(shape(&third.1), (vec![1, 2], vec![], vec![]));
    assert_eq!(state.stats().preemptions, 0);
}

#[test]
fn a_draining_sequence_spares_a_preemption() {
    let mut state = state(SchedConfig { depth: 2, ..config(3) });
    state.add(sequence(1, 2, 8)).unwrap();
    state.add(sequence(2, 4, 8)).unwrap();
    state.add(sequence(3, 2, 8)).unwrap();
    let first = start(&mut state);
    finish(&mut state, &first, 9);
    let limits = Limits { max_num_seqs: 1, ..state.limits() };
    let second = start_with(&mut state, &limits);
    state.abort(SeqId(1)).unwrap();
    // 2 lacks a block and 3 could give its own at once, but that of 1 comes free without recomputing anything.
    let third = start(&mut state);
    assert_eq!(shape(&third.1), (vec![3], vec![], vec![]));
    commit(&mut state, second.0, []);
    assert_eq!(shape(&plan(&state, &state.limits())), (vec![2, 3], vec![], vec![]));
}

#[test]
fn run_ahead_plans_a_token_that_is_still_in_flight_but_none_past_the_limit() {
    let mut state = state(SchedConfig { depth: 2, ..config(8) });
    state.add(sequence(1, 4, 2)).unwrap();
    let first = start(&mut state);
    let second = start(&mut state);
    assert_eq!(second.1.decode, [Decode { seq: SeqId(1), start: 4, num_drafts: 0 }]);
    assert_eq!(state.tokens(SeqId(1)).len(), 4, "the token at position 4 is not known yet");
    assert!(plan(&state, &state.limits()).is_empty(), "depth is reached");
    finish(&mut state, &first, 9);
    assert!(plan(&state, &state.limits()).is_empty(), "both tokens are in flight");
    assert_eq!(finish(&mut state, &second, 9).len(), 1);
}

#[test]
fn drafts_stay_within_limit_budget_and_cache() {
    let drafts = |new, budget, num_blocks| {
        let mut state = state(config(num_blocks));
        state.add(sequence(1, 5, new)).unwrap();
        step(&mut state, 9);
        let limits = Limits { num_drafts: 6, max_num_batched_tokens: budget, ..state.limits() };
        start_with(&mut state, &limits).1.decode[0].num_drafts
    };
    assert_eq!(drafts(20, 16, 8), 6);
    assert_eq!(drafts(4, 16, 8), 2, "6 tokens known, 9 at most: the row may draw 3");
    assert_eq!(drafts(20, 4, 8), 3);
    assert_eq!(drafts(4, 16, 2), 2);
    let mut state = state(config(4));
    state.add(sequence(1, 5, 8)).unwrap();
    state.add(sequence(2, 5, 8)).unwrap();
    step(&mut state, 9);
    let limits = Limits { num_drafts: 6, ..state.limits() };
    let rows: Vec<_> = start_with(&mut state, &limits).1.decode.iter().map(|row| row.num_drafts).collect();
    assert_eq!(rows, [2, 2], "no free block, so up to the end of the last one");
}

#[test]
fn drafts_leave_a_token_for_each_prefill() {
    let mut state = state(SchedConfig { max_num_batched_tokens: 4, ..config(20) });
    state.add(sequence(1, 2, 20)).unwrap();
    state.add(sequence(2, 10, 2)).unwrap();
    step(&mut state, 9);
    let chosen = plan(&state, &Limits { num_drafts: 9, ..state.limits() });
    assert_eq!((chosen.decode[0].num_drafts, chosen.prefill[0].len), (2, 1));
}

#[test]
fn drafts_in_flight_count_as_accepted() {
    let mut state = state(SchedConfig { depth: 2, ..config(20) });
    state.add(sequence(1, 4, 9)).unwrap();
    let first = start(&mut state);
    let limits = Limits { num_drafts: 3, ..state.limits() };
    let second = start_with(&mut state, &limits);
    finish(&mut state, &first, 9);
    let third = start_with(&mut state, &limits);
    assert_eq!(third.1.decode, [Decode { seq: SeqId(1), start: 8, num_drafts: 3 }]);
    commit(&mut state, second.0, [drawn(SeqId(1), &[10, 11].map(TokenId))]);
    // Two of four were drawn: what was planned at 8 ran at 6.
    commit(&mut state, third.0, [drawn(SeqId(1), &[TokenId(12)])]);
    assert_eq!(plan(&state, &limits).decode, [Decode { seq: SeqId(1), start: 7, num_drafts: 3 }]);
    state.audit();
}

proptest! {
    /// Whatever waits: a plan is within its limits, begins cleanly, and is the same for the same state.
    #[test]
    fn plans_respect_limits(
        prompts in prop::collection::vec((1_usize..40, 1_u32..20, -2..3_i32), 1..8),
        num_blocks in 10_usize..40,
        depth in 1_usize..=2,
        budgets in prop::collection::vec((1_usize..20, 1_usize..6, 0_usize..4), 1..30),
    ) {
        let mut state = state(SchedConfig { depth, ..config(num_blocks) });
        for (id, (len, new, priority)) in prompts.into_iter().enumerate() {
            // Those too large for the cache are refused, which is another test.
            let _ = state.add(NewSequence { priority, ..sequence(id as u64, len, new) });
        }
        let mut in_flight = std::collections::VecDeque::new();
        for (max_num_batched_tokens, max_num_seqs, num_drafts) in budgets {
            let limits = Limits { max_num_batched_tokens, max_num_seqs, num_drafts, max_prompt_logits: 0 };
            let chosen = plan(&state, &limits);
            prop_assert_eq!(&chosen, &plan(&state.clone(), &limits));
            prop_assert!(chosen.num_tokens() <= max_num_batched_tokens.min(16));
            prop_assert!(chosen.num_seqs() <= max_num_seqs.min(4));
            if !chosen.is_empty() {
                let id = begin(&mut state, &chosen);
                state.audit();
                in_flight.push_back((id, chosen));
            }
            if in_flight.len() == depth {
                finish(&mut state, &in_flight.pop_front().unwrap(), 9);
            }
        }
    }
}

/// Plans and finishes steps, one ahead where the depth allows, until `seq` has drawn its first token. Returns the chunks
/// of every step in between.
fn steps_to_first_token(state: &mut State, seq: u64) -> Vec<Vec<(u64, usize, usize, bool)>> {
    let mut chunks = Vec::new();
    let mut in_flight = std::collections::VecDeque::new();
    loop {
        while in_flight.len() < state.config().depth {
            let started = start(state);
            chunks.push(shape(&started.1).1);
            in_flight.push_back(started);
        }
        let oldest = in_flight.pop_front().unwrap();
        finish(state, &oldest, 9);
        if oldest.1.prefill.iter().any(|chunk| chunk.seq == SeqId(seq) && chunk.samples) {
            return chunks;
        }
    }
}

#[test]
fn a_short_prompt_waits_for_two_chunks_of_a_long_one_at_most() {
    for depth in [1, 2] {
        let mut state = state(SchedConfig {
            block_size: 64,
            max_num_batched_tokens: 1024,
            max_model_len: 8192,
            depth,
            ..config(1000)
        });
        state.add(sequence(1, 4000, 5)).unwrap();
        let first = start(&mut state);
        // It arrives while a chunk is in flight; the next step carries it.
        state.add(sequence(2, 512, 5)).unwrap();
        if depth == 1 {
            finish(&mut state, &first, 9);
        }
        let second = start(&mut state);
        assert_eq!(shape(&second.1).1, [(2, 0, 512, true), (1, 1024, 512, false)]);
        if depth == 2 {
            finish(&mut state, &first, 9);
        }
        finish(&mut state, &second, 9);
        let rest = steps_to_first_token(&mut state, 1);
        assert_eq!(rest[0], [(1, 1536, 1023, false)], "the long one takes it all again");
    }
}

#[test]
fn half_of_the_budget_is_the_most_that_may_overtake() {
    let mut state = state(config(40));
    state.add(sequence(1, 40, 3)).unwrap();
    for id in 2..=4 {
        state.add(sequence(id, [9, 5, 3][id as usize - 2], 3)).unwrap();
    }
    // 2 is too long for the half of 16 tokens; 3 and 4 fill it.
    assert_eq!(shape(&step(&mut state, 9).0).1, [(3, 0, 5, true), (4, 0, 3, true), (1, 0, 8, false)]);
    assert_eq!(shape(&step(&mut state, 9).0).1, [(1, 8, 14, false)]);
}

#[test]
fn nobody_of_another_priority_overtakes() {
    let mut state = state(config(40));
    state.add(sequence(1, 40, 3)).unwrap();
    state.add(NewSequence { priority: 1, ..sequence(2, 3, 3) }).unwrap();
    assert_eq!(shape(&step(&mut state, 9).0).1, [(1, 0, 16, false)]);
}

#[test]
fn a_long_sequence_that_is_overtaken_while_it_waits_keeps_its_seat_and_its_blocks() {
    for (num_blocks, max_num_seqs, expect) in [
        (15, 3, vec![(3, 0, 1, true), (1, 0, 15, false)]),
        (14, 3, vec![(1, 0, 16, false)]),
        (15, 2, vec![(1, 0, 16, false)]),
    ] {
        let mut state = state(SchedConfig { max_num_seqs, ..config(num_blocks) });
        state.add(sequence(1, 36, 1)).unwrap();
        state.add(sequence(2, 20, 1)).unwrap();
        state.add(sequence(3, 1, 1)).unwrap();
        assert_eq!(
            shape(&plan(&state, &state.limits())).1,
            expect,
            "{num_blocks} blocks, {max_num_seqs} seats"
        );
    }
}

#[test]
fn a_better_priority_takes_the_seat_of_the_last_of_a_worse_one() {
    let mut state = state(SchedConfig { max_num_seqs: 2, ..config(20) });
    let with = |id, priority| NewSequence { priority, ..sequence(id, 4, 9) };
    for (id, priority) in [(1, 1), (2, 2), (3, 2), (4, 1), (5, 0)] {
        state.add(with(id, priority)).unwrap();
    }
    assert_eq!(shape(&step(&mut state, 9).0), (vec![], vec![(5, 0, 4, true), (1, 0, 4, true)], vec![]));
    state.add(with(6, 0)).unwrap();
    state.add(with(7, 0)).unwrap();
    // 1 gives way to 6; 7 finds nobody of a worse priority, and nobody behind it is admitted.
    assert_eq!(shape(&step(&mut state, 9).0), (vec![5], vec![(6, 0, 4, true)], vec![1]));
    assert_eq!(shape(&step(&mut state, 9).0), (vec![5, 6], vec![], vec![]));
    let order: Vec<_> = state.waiting().map(|seq| seq.id().0).collect();
    assert_eq!(order, [7, 1, 4, 2, 3]);
}

#[test]
fn a_better_priority_takes_no_more_blocks_than_it_needs_and_none_in_vain() {
    let run = |prompt| {
        let mut state = state(config(8));
        for (id, priority) in [(1, 0), (2, 1), (3, 1)] {
            state.add(NewSequence { priority, ..sequence(id, 5, 9) }).unwrap();
        }
        step(&mut state, 9);
        state.add(sequence(4, prompt, 1)).unwrap();
        shape(&plan(&state, &state.limits()))
    };
    // Two blocks are free; 16 tokens a step, three of which decode.
    assert_eq!(run(8), (vec![1, 2, 3], vec![(4, 0, 8, true)], vec![]));
    assert_eq!(run(12), (vec![1, 2], vec![(4, 0, 12, true)], vec![3]));
    assert_eq!(run(20), (vec![1], vec![(4, 0, 15, false)], vec![3, 2]));
    assert_eq!(run(28), (vec![1, 2, 3], vec![], vec![]), "1 is of its own priority");
}

#[test]
fn a_victim_in_flight_is_left_out_and_gives_way_in_the_next_step() {
    let mut state = state(SchedConfig { max_num_seqs: 2, depth: 2, ..config(20) });
    state.add(NewSequence { priority: 1, ..sequence(1, 4, 9) }).unwrap();
    state.add(NewSequence { priority: 1, ..sequence(2, 4, 9) }).unwrap();
    let first = start(&mut state);
    state.add(sequence(3, 4, 9)).unwrap();
    let second = start(&mut state);
    assert_eq!(shape(&second.1), (vec![1], vec![], vec![]));
    finish(&mut state, &first, 9);
    assert_eq!(shape(&plan(&state, &state.limits())), (vec![1], vec![(3, 0, 4, true)], vec![2]));
}

#[test]
fn what_a_better_priority_leaves_is_not_for_those_behind_its_victim() {
    let mut state = state(config(8));
    state.add(NewSequence { priority: 1, ..sequence(1, 24, 9) }).unwrap();
    step(&mut state, 9);
    step(&mut state, 9);
    state.add(sequence(2, 12, 9)).unwrap();
    state.add(NewSequence { priority: 1, ..sequence(3, 1, 9) }).unwrap();
    // 1 waits before 3 now, and does not fit.
    assert_eq!(shape(&step(&mut state, 9).0), (vec![], vec![(2, 0, 12, true)], vec![1]));
    assert_eq!(shape(&step(&mut state, 9).0), (vec![2], vec![], vec![]));
}

#[test]
fn who_may_not_run_ahead_waits_for_its_token_and_gets_no_drafts() {
    let mut state = state(SchedConfig { depth: 2, ..config(20) });
    state.add(NewSequence { run_ahead: false, ..sequence(1, 20, 9) }).unwrap();
    state.add(sequence(2, 4, 9)).unwrap();
    let limits = Limits { num_drafts: 2, ..state.limits() };
    let first = start_with(&mut state, &limits);
    let second = start_with(&mut state, &limits);
    assert_eq!(shape(&first.1).1, [(2, 0, 4, true), (1, 0, 12, false)]);
    assert_eq!(shape(&second.1), (vec![2], vec![(1, 12, 8, true)], vec![]), "its prompt is known");
    finish(&mut state, &first, 9);
    let third = start_with(&mut state, &limits);
    assert_eq!(shape(&third.1).0, [2], "its first token is in flight");
    finish(&mut state, &second, 9);
    let fourth = start_with(&mut state, &limits);
    let drafts: Vec<_> = fourth.1.decode.iter().map(|row| (row.seq.0, row.num_drafts)).collect();
    assert_eq!(drafts, [(1, 0), (2, 2)]);
}

#[test]
fn a_prompt_whose_logits_are_wanted_takes_as_many_tokens_as_there_are_rows() {
    // 4 rows beyond one per sequence.
    let mut state = state(SchedConfig { prefix_cache: Some(KEY), ..config(16) });
    let wanted = |id, len| NewSequence { prompt_logits: true, ..sequence(id, len, 4) };
    state.add(wanted(1, 12)).unwrap();
    state.add(wanted(2, 12)).unwrap();
    state.add(sequence(3, 6, 4)).unwrap();
    // The second has its own row, and the third has what tokens are left.
    assert_eq!(shape(&step(&mut state, 9).0).1, [(1, 0, 5, false), (2, 0, 1, false), (3, 0, 6, true)]);
    let (plan, _) = step(&mut state, 9);
    assert_eq!(shape(&plan).1, [(1, 5, 5, false), (2, 1, 1, false)]);
    let seq = state.sequence(SeqId(1)).unwrap();
    assert_eq!(seq.prompt_logits(5, 5), 5..10);
    assert_eq!(seq.prompt_logits(10, 2), 10..11, "the last row draws");
    assert_eq!(shape(&step(&mut state, 9).0).1, [(1, 10, 2, true), (2, 2, 4, false)]);
    // What the first has left in the cache is for those that want no logits.
    let mut again = wanted(4, 12);
    again.prompt.fill(TokenId(1001));
    state.add(again.clone()).unwrap();
    let (plan, _) = step(&mut state, 9);
    assert_eq!(shape(&plan).1, [(2, 6, 5, false), (4, 0, 1, false)]);
    state.abort(SeqId(4)).unwrap();
    state.add(NewSequence { prompt_logits: false, ..again }).unwrap();
    assert_eq!(shape(&step(&mut state, 9).0).1, [(2, 11, 1, true), (4, 8, 4, true)]);
}
