//! The prefix cache seen from outside: which blocks are found, by whom, and for how long. Tests only; knows plans, block
//! tables and counts, not how they come about.

use r1_core::{BlockId, SeqId, TokenId};

use crate::fixture::{KEY, config, drawn, finish, sequence, shape, start, start_with, state, step};
use crate::{Limits, NewSequence, SchedConfig, State, commit, fail};

/// Blocks of 4 tokens, with the cache on.
fn caching(num_blocks: usize) -> SchedConfig {
    SchedConfig { prefix_cache: Some(KEY), ..config(num_blocks) }
}

/// A sequence whose prompt counts up from `first`.
fn counting(id: u64, first: u32, len: usize, max_new_tokens: u32) -> NewSequence {
    let prompt = (first..).take(len).map(TokenId).collect();
    NewSequence { prompt, ..sequence(id, len, max_new_tokens) }
}

/// Steps until nothing is left.
fn drain(state: &mut State, token: u32) {
    while !state.is_idle() {
        step(state, token);
    }
}

fn table(state: &State, seq: u64) -> Vec<u32> {
    state.block_table(SeqId(seq)).iter().map(|&BlockId(block)| block).collect()
}

#[test]
fn the_same_prompt_is_found_again_but_for_its_last_token() {
    // Of 12 tokens only two blocks of 4 are shared, so that the last token is run and the next one drawn.
    for (len, found) in [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)] {
        let mut state = state(caching(10));
        state.add(counting(1, 0, len, 1)).unwrap();
        drain(&mut state, 9);
        let stats = state.stats();
        assert_eq!((stats.blocks_used, stats.blocks_cached), (0, len / 4));
        state.add(counting(2, 0, len, 2)).unwrap();
        let (chosen, _) = step(&mut state, 9);
        assert_eq!(shape(&chosen).1, [(2, found, len - found, true)], "{len} tokens");
        assert_eq!(state.sequence(SeqId(2)).unwrap().cached_tokens(), found);
        let stats = state.stats();
        assert_eq!((stats.prefix_queries_tokens, stats.prefix_hits_tokens), (2 * len as u64, found as u64));
    }
}

#[test]
fn without_a_key_nothing_is_found() {
    let mut state = state(config(10));
    for id in 1..=2 {
        state.add(counting(id, 0, 9, 1)).unwrap();
        assert_eq!(shape(&step(&mut state, 9).0).1, [(id, 0, 9, true)]);
    }
    let stats = state.stats();
    assert_eq!((stats.blocks_cached, stats.prefix_queries_tokens, stats.prefix_hits_tokens), (0, 0, 0));
}

#[test]
fn sequences_share_what_they_have_in_common_and_diverge_in_blocks_of_their_own() {
    let mut state = state(caching(20));
    state.add(counting(1, 0, 13, 5)).unwrap();
    step(&mut state, 9);
    let mut other = counting(2, 0, 13, 5);
    other.prompt[6] = TokenId(99);
    state.add(other).unwrap();
    assert_eq!(shape(&step(&mut state, 9).0).1, [(2, 4, 9, true)]);
    assert_eq!((table(&state, 1), table(&state, 2)), (vec![0, 1, 2, 3], vec![0, 4, 5, 6]));
    assert_eq!(state.stats().blocks_used, 7);
    state.abort(SeqId(1)).unwrap();
    assert_eq!(state.stats().blocks_used, 4, "block 0 is held by 2");
    state.audit();
}

#[test]
fn two_requests_with_one_prompt_in_one_step_share_it() {
    let mut state = state(caching(20));
    for id in 1..=3 {
        state.add(counting(id, 0, 9, 5)).unwrap();
    }
    let (chosen, _) = step(&mut state, 9);
    assert_eq!(shape(&chosen).1, [(1, 0, 9, true), (2, 8, 1, true), (3, 8, 1, true)]);
    assert_eq!(
        (table(&state, 1), table(&state, 2), table(&state, 3)),
        (vec![0, 1, 2], vec![0, 1, 3], vec![0, 1, 4])
    );
    assert_eq!(state.stats().prefix_hits_tokens, 16);
}

#[test]
fn a_chunk_shares_what_it_fills_and_no_more() {
    let mut state = state(caching(20));
    state.add(counting(1, 0, 13, 5)).unwrap();
    state.add(counting(2, 0, 13, 5)).unwrap();
    let limits = Limits { max_num_batched_tokens: 10, ..state.limits() };
    let first = start_with(&mut state, &limits);
    assert_eq!(shape(&first.1).1, [(1, 0, 10, false)]);
    finish(&mut state, &first, 9);
    // The chunk from 10 on fills the third block, which began before it.
    assert_eq!(shape(&step(&mut state, 9).0).1, [(1, 10, 3, true), (2, 12, 1, true)]);
}

#[test]
fn salts_keep_sequences_apart() {
    let mut state = state(caching(20));
    let salts: [Option<&[u8]>; 4] = [None, Some(b""), Some(b"a"), Some(b"b")];
    for (id, salt) in salts.iter().enumerate() {
        let new = NewSequence { cache_salt: salt.map(Box::from), ..counting(id as u64, 0, 5, 1) };
        state.add(new.clone()).unwrap();
        assert_eq!(shape(&step(&mut state, 9).0).1, [(id as u64, 0, 5, true)], "{salt:?}");
        state.add(NewSequence { id: SeqId(9), ..new }).unwrap();
        assert_eq!(shape(&step(&mut state, 9).0).1, [(9, 4, 1, true)], "{salt:?}");
    }
}

#[test]
fn what_decode_fills_is_found_by_the_next_turn() {
    for depth in [1, 2] {
        let mut state = state(SchedConfig { depth, ..caching(20) });
        state.add(counting(1, 0, 6, 8)).unwrap();
        let mut in_flight = std::collections::VecDeque::new();
        for token in 6..14 {
            while in_flight.len() < depth
                && state.running().next().is_none_or(|seq| seq.len_upper_bound() < 14)
            {
                in_flight.push_back(start(&mut state));
            }
            finish(&mut state, &in_flight.pop_front().unwrap(), token);
        }
        assert!(state.is_idle());
        // 13 of its 14 tokens were run: three full blocks.
        assert_eq!(state.stats().blocks_cached, 3, "depth {depth}");
        state.add(counting(2, 0, 20, 1)).unwrap();
        assert_eq!(shape(&step(&mut state, 9).0).1, [(2, 12, 8, true)], "depth {depth}");
    }
}

#[test]
fn drafts_that_were_rejected_are_never_found() {
    let mut state = state(SchedConfig { depth: 2, ..caching(20) });
    state.add(counting(1, 0, 6, 20)).unwrap();
    step(&mut state, 6);
    let limits = Limits { num_drafts: 3, ..state.limits() };
    let first = start_with(&mut state, &limits);
    let second = start_with(&mut state, &limits);
    assert_eq!((first.1.decode[0].start, second.1.decode[0].start), (6, 10));
    // The slots up to 13 are written, but of the tokens only the one at 6, and the next one, are right.
    commit(&mut state, first.0, [drawn(SeqId(1), &[TokenId(7)])]);
    state.audit();
    state.add(counting(2, 0, 13, 1)).unwrap();
    let third = start_with(&mut state, &Limits { num_drafts: 0, ..limits });
    // The second step, in flight, runs the token at 7, which completes the second block; the third is all guesses.
    assert_eq!(shape(&third.1), (vec![1], vec![(2, 8, 5, true)], vec![]));
}

#[test]
fn a_preempted_sequence_finds_its_own_blocks_again_which_is_no_query() {
    let mut state = state(caching(5));
    state.add(counting(1, 0, 8, 9)).unwrap();
    state.add(counting(2, 100, 9, 3)).unwrap();
    step(&mut state, 9);
    assert_eq!(shape(&step(&mut state, 9).0), (vec![1], vec![], vec![2]));
    while state.sequence(SeqId(1)).is_some() {
        step(&mut state, 9);
    }
    // 1 took the last two of its blocks: one that was not full, and then the deepest that was.
    assert_eq!(shape(&step(&mut state, 9).0).1, [(2, 4, 5, true)]);
    let stats = state.stats();
    assert_eq!((stats.prefix_queries_tokens, stats.prefix_hits_tokens), (17, 0));
    assert_eq!(state.sequence(SeqId(2)).unwrap().cached_tokens(), 0);
}

#[test]
fn a_prefix_outlives_its_extensions() {
    let mut state = state(caching(4));
    state.add(counting(1, 0, 13, 1)).unwrap();
    drain(&mut state, 9);
    assert_eq!((state.stats().blocks_cached, state.stats().blocks_free), (3, 1));
    state.add(counting(2, 100, 8, 1)).unwrap();
    drain(&mut state, 9);
    state.add(counting(3, 0, 13, 1)).unwrap();
    assert_eq!(shape(&step(&mut state, 9).0).1, [(3, 8, 5, true)], "only the deepest block is lost");
}

#[test]
fn blocks_that_an_admission_hits_are_not_evicted_for_it() {
    let mut state = state(caching(4));
    state.add(counting(1, 0, 9, 1)).unwrap();
    drain(&mut state, 9);
    // Two blocks are cached and two free: 2 takes all four, two of them by hits.
    state.add(counting(2, 0, 16, 1)).unwrap();
    let started = start(&mut state);
    assert_eq!(shape(&started.1).1, [(2, 8, 8, true)]);
    let stats = state.stats();
    assert_eq!((stats.blocks_used, stats.blocks_free, stats.blocks_cached), (4, 0, 0));
}

#[test]
fn a_victim_frees_only_what_nobody_else_holds() {
    let mut state = state(SchedConfig { max_num_batched_tokens: 64, ..caching(6) });
    state.add(counting(1, 0, 12, 12)).unwrap();
    state.add(counting(2, 0, 12, 12)).unwrap();
    state.add(counting(3, 0, 12, 12)).unwrap();
    step(&mut state, 9);
    assert_eq!(state.stats().blocks_used, 5);
    // Each lacks a block, and one is free. 3 holds a single block of its own, 2 too.
    let (chosen, _) = step(&mut state, 9);
    assert_eq!(shape(&chosen), (vec![1, 2], vec![], vec![3]));
    state.audit();
}

#[test]
fn a_block_that_a_failed_step_was_to_write_is_never_hit() {
    for depth in [1, 2] {
        let mut state = state(SchedConfig { depth, ..caching(20) });
        // Good: eight tokens' worth. Bad: what comes after them.
        state.add(counting(1, 0, 9, 1)).unwrap();
        drain(&mut state, 9);
        state.add(counting(2, 0, 24, 5)).unwrap();
        state.add(counting(3, 0, 24, 5)).unwrap();
        let first = start(&mut state);
        assert_eq!(shape(&first.1).1, [(2, 8, 16, true)]);
        if depth == 2 {
            assert_eq!(shape(&start(&mut state).1).1, [(3, 20, 4, true)], "shares what is in flight");
        }
        let ended = fail(&mut state, first.0);
        assert_eq!(ended.len(), depth);
        state.audit();
        assert_eq!(state.stats().blocks_cached, 2, "what was good stays");
        for id in state.waiting().map(crate::Sequence::id).collect::<Vec<_>>() {
            state.abort(id).unwrap();
        }
        state.add(counting(4, 0, 24, 1)).unwrap();
        assert_eq!(shape(&step(&mut state, 9).0).1, [(4, 8, 16, true)]);
    }
}

#[test]
fn a_block_that_decode_was_filling_is_not_hit_after_a_failure() {
    let mut state = state(SchedConfig { depth: 2, ..caching(20) });
    state.add(counting(1, 0, 7, 9)).unwrap();
    step(&mut state, 7);
    let first = start(&mut state);
    // Position 7 completes the second block, and its token is known.
    state.add(counting(2, 0, 12, 9)).unwrap();
    let second = start(&mut state);
    assert_eq!(shape(&second.1).1, [(2, 8, 4, true)]);
    assert_eq!(fail(&mut state, first.0).len(), 2);
    state.add(counting(3, 0, 12, 9)).unwrap();
    assert_eq!(shape(&step(&mut state, 9).0).1, [(3, 4, 8, true)], "the first block was written before");
}

#[test]
fn flushing_forgets_what_is_cached_and_what_is_in_use() {
    let mut state = state(caching(20));
    state.add(counting(1, 0, 9, 1)).unwrap();
    drain(&mut state, 9);
    state.add(counting(2, 50, 9, 5)).unwrap();
    step(&mut state, 9);
    state.flush_prefix_cache();
    state.audit();
    assert_eq!((state.stats().blocks_cached, state.stats().blocks_used), (0, 3));
    state.add(counting(3, 0, 9, 1)).unwrap();
    state.add(counting(4, 50, 9, 1)).unwrap();
    assert_eq!(shape(&step(&mut state, 9).0).1, [(3, 0, 9, true), (4, 0, 6, false)]);
}
