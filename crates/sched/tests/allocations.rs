//! Steady decode allocates nothing in the scheduler: counted by the global allocator of this test binary, which is why
//! it is a binary of its own with a single test. Knows the scheduler from outside only.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use r1_core::{SeqId, TokenId};
use r1_sched::{NewSequence, Outcome, Plan, PrefixKey, SchedConfig, State, StepId, begin, commit, plan_into};

thread_local! {
    /// Allocations of this thread. `const` and without a destructor, so that reading it allocates nothing.
    static NUM_ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting.
struct Counting;

fn count() {
    NUM_ALLOCATIONS.with(|num| num.set(num.get() + 1));
}

// SAFETY: every call is passed on to `System` as it came, and `count` neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`, which is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: as above; `ptr` came from `System`, since every allocation does.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above; `ptr` came from `System`, since every allocation does.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const NUM_SEQS: usize = 16;

/// Commits a step with one token per sequence, as long as there is a row for it.
fn finish(state: &mut State, step: StepId, num_rows: usize, token: &mut u32) {
    *token += 1;
    let tokens = [TokenId(*token)];
    let outcomes = (0..num_rows).map(|id| Outcome { seq: SeqId(id as u64), tokens: &tokens, finish: None });
    assert!(commit(state, step, outcomes).is_empty());
}

/// Allocations in 100 steps of 16 decoding sequences, and how many blocks the sequences held before and after.
fn decode_steps(depth: usize) -> (u64, usize, usize) {
    let config = SchedConfig {
        block_size: 4,
        num_blocks: 1000,
        max_model_len: 200,
        max_num_seqs: NUM_SEQS,
        depth,
        prefix_cache: Some(PrefixKey::new([3, 4])),
        ..SchedConfig::default()
    };
    let mut state = State::new(config).unwrap();
    for id in 0..NUM_SEQS {
        let new = NewSequence {
            id: SeqId(id as u64),
            prompt: (0..10).map(|at| TokenId((at * id) as u32)).collect(),
            max_new_tokens: 190,
            priority: 0,
            cache_salt: None,
            run_ahead: true,
            prompt_logits: false,
        };
        state.add(new).unwrap();
    }
    let limits = state.limits();
    let mut plan = Plan::default();
    let mut in_flight = [StepId(0); 2];
    let mut token = 1000;
    let (mut num_begun, mut num_committed) = (0, 0);
    let (mut before, mut blocks_before) = (0, 0);
    // The first steps prefill, and give every list its size.
    for step in 0..110 {
        if step == 10 {
            before = NUM_ALLOCATIONS.get();
            blocks_before = state.stats().blocks_used;
        }
        plan_into(&state, &limits, &mut plan);
        assert_eq!(plan.num_seqs(), NUM_SEQS);
        in_flight[num_begun % depth] = begin(&mut state, &plan);
        num_begun += 1;
        if num_begun - num_committed == depth {
            finish(&mut state, in_flight[num_committed % depth], NUM_SEQS, &mut token);
            num_committed += 1;
        }
    }
    let allocations = NUM_ALLOCATIONS.get() - before;
    state.audit();
    (allocations, blocks_before, state.stats().blocks_used)
}

#[test]
fn a_hundred_decode_steps_allocate_nothing() {
    let counted = NUM_ALLOCATIONS.get();
    drop(std::hint::black_box(vec![0_u8; 100]));
    assert_eq!(NUM_ALLOCATIONS.get() - counted, 1, "the counter counts");
    for depth in [1, 2] {
        let (allocations, before, after) = decode_steps(depth);
        assert_eq!(allocations, 0, "depth {depth}");
        assert_eq!(
            after - before,
            NUM_SEQS * 100 / 4,
            "depth {depth}: blocks were filled and taken meanwhile"
        );
    }
}
