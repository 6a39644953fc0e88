//! The engine thread allocates nothing while it decodes for requests that want neither log-probabilities nor penalties:
//! planning, inputs, the forward pass, sampling, events and statistics all use memory that they have.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use r1_backend::{CommError, Communicator};
use r1_core::{Rank, SamplingParams, TokenId};
use r1_cpu::{Cpu, CpuOptions};
use r1_engine::{LocalRanks, RankLoader, Request};
use r1_model::{DeepSeek, ModelError};
use r1_tests::Tiny;

struct Counting;

/// Allocations of the threads that are watched.
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if WATCHED.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the same contract.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Loads on the threads that will run the steps, and so gets to mark them.
struct Watched(LocalRanks<Cpu>);

impl RankLoader<Cpu> for Watched {
    fn connect(&self) -> Result<Vec<Arc<dyn Communicator<Cpu>>>, CommError> {
        self.0.connect()
    }

    fn load(
        &self,
        rank: Rank,
        comm: Arc<dyn Communicator<Cpu>>,
        progress: &mut dyn FnMut(f32),
    ) -> Result<DeepSeek<Cpu>, ModelError> {
        WATCHED.set(true);
        self.0.load(rank, comm, progress)
    }
}

#[test]
fn decode_steps_allocate_nothing() {
    const SEQUENCES: usize = 8;
    let cases = [(1, 1, false), (1, 2, false), (2, 1, false), (2, 2, false), (1, 2, true), (2, 2, true)];
    for (ranks, depth, pad_decodes) in cases {
        // One more seat than sequences, so that there is a row to pad.
        let max_num_seqs = SEQUENCES + usize::from(pad_decodes);
        let tiny = Tiny { depth, max_num_seqs, max_num_batched_tokens: 256, pad_decodes, ..Tiny::default() };
        // One thread each: with more, which of them needs its scratch first is up to the system.
        let cpu = || Arc::new(Cpu::new(CpuOptions { threads: Some(1), isa: None }).expect("a CPU"));
        let loader = Watched(tiny.ranks_on((0..ranks).map(|_| cpu()).collect()));
        let engine = tiny.start_ranks(Arc::new(loader));
        // Nobody reads before the end, so the queues of events hold all tokens; 240 fit their first room.
        let generations: Vec<_> = (0..SEQUENCES as u32)
            .map(|i| {
                let params = SamplingParams {
                    temperature: 0.8,
                    top_p: 0.9,
                    seed: u64::from(i),
                    max_tokens: 240,
                    ..SamplingParams::default()
                };
                let prompt = (0..20).map(|j| TokenId(60 + i * 40 + j)).collect();
                engine.submit(Request::new(prompt, params))
            })
            .collect::<Result<_, _>>()
            .expect("accepted");
        let drawn = |at_least: u64| {
            while engine.stats().generation_tokens_total < at_least * SEQUENCES as u64 {
                thread::sleep(Duration::from_micros(200));
            }
            (ALLOCATIONS.load(Ordering::Relaxed), engine.stats().steps_total)
        };
        let (before, first) = drawn(40);
        let (after, last) = drawn(190);
        assert!(last - first >= 100, "only {} steps", last - first);
        assert!(before > 0, "the threads are not watched");
        assert_eq!(
            after - before,
            0,
            "{ranks} ranks, depth {depth}: allocations in {} decode steps",
            last - first
        );
        drop(generations);
        engine.stop();
    }
}
