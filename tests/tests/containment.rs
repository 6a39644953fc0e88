//! What breaks inside a step stays there: its requests fail, the next one is served, whatever rank it broke on.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use r1_backend::{Backend, CommError, Communicator};
use r1_core::{DType, Rank, SamplingParams, TokenId};
use r1_cpu::{Cpu, CpuOptions};
use r1_engine::{EngineError, Event, Generation, Handle, LocalRanks, RankLoader, Request, Status};
use r1_gpu::Gpu;
use r1_model::{DeepSeek, ModelError};
use r1_tests::{Faulty, Fuse, Tiny};

/// Ranks of which one has fuses.
struct FaultyRanks<B: Backend> {
    ranks: LocalRanks<B>,
    faulty: usize,
    fuse: Fuse,
    checks: Fuse,
}

impl<B: Backend> RankLoader<B> for FaultyRanks<B> {
    fn connect(&self) -> Result<Vec<Arc<dyn Communicator<B>>>, CommError> {
        let wrap = |(rank, inner): (usize, Arc<dyn Communicator<B>>)| -> Arc<dyn Communicator<B>> {
            let (fuse, checks) = (self.fuse.clone(), self.checks.clone());
            if rank == self.faulty { Arc::new(Faulty { inner, fuse, checks }) } else { inner }
        };
        Ok(self.ranks.connect()?.into_iter().enumerate().map(wrap).collect())
    }

    fn load(
        &self,
        rank: Rank,
        comm: Arc<dyn Communicator<B>>,
        progress: &mut dyn FnMut(f32),
    ) -> Result<DeepSeek<B>, ModelError> {
        self.ranks.load(rank, comm, progress)
    }
}

fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new(CpuOptions { threads: Some(1), isa: None }).expect("a CPU"))
}

fn request(start: u32) -> Request {
    let prompt = (0..100).map(|i| TokenId(60 + (start + i * 7) % 400)).collect();
    let params = SamplingParams { temperature: 0.0, max_tokens: 24, ..SamplingParams::default() };
    Request::new(prompt, params)
}

fn read(mut generation: Generation) -> (Vec<TokenId>, Result<(), EngineError>) {
    let mut tokens = Vec::new();
    loop {
        match generation.next_blocking().expect("an end") {
            Event::Scheduled { .. } | Event::PromptLogprobs(_) => {}
            Event::Token { token, .. } => tokens.push(token),
            Event::Finished(_) => return (tokens, Ok(())),
            Event::Failed(error) => return (tokens, Err(error)),
        }
    }
}

fn run(engine: &Handle, start: u32) -> Vec<TokenId> {
    let (tokens, ended) = read(engine.submit(request(start)).expect("accepted"));
    assert_eq!(ended, Ok(()));
    tokens
}

fn frees_its_blocks(engine: &Handle, case: &str) {
    let since = Instant::now();
    while engine.stats().kv_blocks_used > 0 {
        assert!(since.elapsed() < Duration::from_secs(5), "{case}: {:?}", engine.stats());
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_panic_on_any_rank_fails_the_steps_in_flight_and_nothing_else() {
    for (world, faulty) in [(1, 0), (2, 0), (2, 1)] {
        for depth in [1, 2] {
            let tiny = Tiny { depth, deterministic: true, ..Tiny::default() };
            let fuse = Fuse::default();
            let ranks = tiny.ranks_on((0..world).map(|_| cpu()).collect());
            let faulty_ranks = FaultyRanks { ranks, faulty, fuse: fuse.clone(), checks: Fuse::default() };
            let engine = tiny.start_ranks(Arc::new(faulty_ranks));
            let case = format!("rank {faulty} of {world}, depth {depth}");
            // The second prompt is not cached before it fails: half-written blocks must not be found afterwards.
            let (first, second) = (run(&engine, 1), run(&Tiny { ranks: world, ..tiny.clone() }.start(), 2));
            // In the middle of a prefill, right after it, and while decoding.
            for collectives in [3, 20, 60] {
                fuse.store(collectives, Ordering::Relaxed);
                let running = [1, 2].map(|start| engine.submit(request(start)).expect("accepted"));
                let ended = running.map(read);
                assert!(
                    ended.iter().any(|(_, ended)| *ended == Err(EngineError::Step("injected".into()))),
                    "{case}, after {collectives}: {ended:?}"
                );
                fuse.store(0, Ordering::Relaxed);
                assert_eq!(run(&engine, 2), second, "{case}, after {collectives}");
                assert_eq!(run(&engine, 1), first, "{case}, after {collectives}");
            }
            let failed = engine.stats().failed_steps_total;
            assert!((3..=3 * depth as u64).contains(&failed), "{case}: {failed} steps failed");
            frees_its_blocks(&engine, &case);
        }
    }
}

/// A short prompt, no block of which is full.
fn short(start: u32) -> Request {
    let long = request(start);
    let params = SamplingParams { max_tokens: 8, ..long.params };
    Request { prompt: long.prompt[..12].to_vec(), params, ..long }
}

fn run_short(engine: &Handle, start: u32) -> Vec<TokenId> {
    let (tokens, ended) = read(engine.submit(short(start)).expect("accepted"));
    assert_eq!((tokens.len(), ended), (8, Ok(())));
    tokens
}

/// More calls than a test makes: what has burnt of such a fuse is how many there were.
const FAR: usize = 1 << 20;

/// Emulated GPUs whose decode steps are captured: a rank that fails in a prefill or in the replay of a captured step is put into
/// a fresh group with the others, in which decode steps are captured again.
#[test]
fn emulated_ranks_that_fail_are_put_together_again() {
    for (ranks, faulty) in [(1, 0), (2, 0), (2, 1)] {
        let tiny = Tiny { ranks, depth: 2, max_num_seqs: 3, deterministic: true, ..Tiny::default() };
        let (fuse, checks) = (Fuse::default(), Fuse::default());
        let engine = tiny.start_ranks(Arc::new(FaultyRanks {
            ranks: tiny.emulated_ranks(),
            faulty,
            fuse: fuse.clone(),
            checks: checks.clone(),
        }));
        let expected = [1, 2].map(|start| run_short(&engine, start));
        // In the prefill; in its end; in a decode step.
        for (before, (sums, waits)) in (0..).zip([(3, 0), (0, 1), (0, 4)]) {
            let case = format!("rank {faulty} of {ranks}, after {sums} sums or {waits} steps");
            fuse.store(sums, Ordering::Relaxed);
            checks.store(waits, Ordering::Relaxed);
            let (tokens, ended) = read(engine.submit(short(1)).expect("accepted"));
            assert_eq!(ended, Err(EngineError::Step("injected".into())), "{case}");
            assert_eq!(tokens, expected[0][..waits.saturating_sub(1)], "{case}");
            checks.store(0, Ordering::Relaxed);
            for start in [2, 1] {
                fuse.store(FAR, Ordering::Relaxed);
                assert_eq!(run_short(&engine, start), expected[start as usize - 1], "{case}");
                // The embedding and two halves of four layers, whose attention sums nothing where there is one rank: the host
                // called for the sums of the prefill, and no others.
                let sums = if ranks == 1 { 5 } else { 9 };
                assert_eq!(FAR - fuse.swap(0, Ordering::Relaxed), sums, "{case}: decode steps are replayed");
            }
            let (failed, failures) = (engine.stats().failed_steps_total, before + 1);
            assert!((failures..=2 * failures).contains(&failed), "{case}: {failed} steps failed");
        }
        frees_its_blocks(&engine, &format!("rank {faulty} of {ranks}"));
    }
}

#[test]
fn emulated_ranks_that_cannot_capture_again_end_the_engine() {
    let tiny = Tiny { ranks: 2, depth: 2, max_num_seqs: 2, ..Tiny::default() };
    let mut ranks = tiny.emulated_ranks();
    let (connect, connected) = (ranks.connect.clone(), AtomicUsize::new(0));
    let fuse = Fuse::default();
    let of_first = fuse.clone();
    ranks.connect = Arc::new(move |devices, elements| {
        // In the fresh group nine sums are run eagerly first; the second rank breaks in what is captured behind them.
        let again = connected.fetch_add(1, Ordering::Relaxed) > 0;
        let fuse = if again { Fuse::new(AtomicUsize::new(15)) } else { of_first.clone() };
        let wrap = |(rank, inner): (usize, Arc<dyn Communicator<Gpu>>)| -> Arc<dyn Communicator<Gpu>> {
            let fuse = if rank == 1 { fuse.clone() } else { Fuse::default() };
            Arc::new(Faulty { inner, fuse, checks: Fuse::default() })
        };
        Ok(connect(devices, elements)?.into_iter().enumerate().map(wrap).collect())
    });
    let engine = tiny.start_ranks(Arc::new(ranks));
    run_short(&engine, 1);
    fuse.store(3, Ordering::Relaxed);
    let (_, ended) = read(engine.submit(short(2)).expect("accepted"));
    assert_eq!(ended, Err(EngineError::Step("injected".into())));
    assert_eq!(why_failed(&engine), "rank 1 cannot capture its decode steps again: injected");
}

/// A failure of the device itself, in the words of its driver: it needs memory in a step and has none.
#[test]
fn an_emulated_gpu_that_fails_a_step_serves_the_next_one() {
    let tiny = Tiny { depth: 2, max_num_seqs: 3, ..Tiny::default() };
    let gpu = Arc::new(Gpu::emulated(2, 160 << 20).expect("an emulated device"));
    let engine = tiny.start_on(vec![gpu.clone()]);
    let expected = run_short(&engine, 1);
    // More biases than the device keeps room for: it takes more memory when it first sees them.
    let biased = || {
        let mut request = short(1);
        request.params.logit_bias = vec![(TokenId(300), 0.0); 200_000];
        request
    };
    let mut hog = Vec::new();
    while let Some(free @ 0x1_0000..) = gpu.free_bytes() {
        hog.push(gpu.alloc(&[free], DType::F8E4M3).expect("what is free"));
    }
    let (tokens, ended) = read(engine.submit(biased()).expect("accepted"));
    let Err(EngineError::Step(why)) = ended else { panic!("{ended:?}") };
    assert!(why.contains("sample") && why.contains("no room for 2097152 bytes"), "{why}");
    assert_eq!(tokens, []);
    assert_eq!(run_short(&engine, 1), expected);
    drop(hog);
    assert_eq!(read(engine.submit(biased()).expect("accepted")), (expected, Ok(())));
    assert_eq!(engine.status(), Status::Ready);
}

#[test]
fn a_request_that_waits_outlives_a_step_that_fails() {
    let tiny = Tiny { max_num_seqs: 1, ..Tiny::default() };
    let fuse = Fuse::default();
    let ranks = tiny.ranks_on(vec![cpu()]);
    let faulty_ranks = FaultyRanks { ranks, faulty: 0, fuse: fuse.clone(), checks: Fuse::default() };
    let engine = tiny.start_ranks(Arc::new(faulty_ranks));
    let expected = run(&engine, 2);
    fuse.store(30, Ordering::Relaxed);
    let [fails, waits] = [1, 2].map(|start| engine.submit(request(start)).expect("accepted"));
    assert_eq!(read(fails).1, Err(EngineError::Step("injected".into())));
    assert_eq!(read(waits), (expected, Ok(())));
}

#[test]
fn a_rank_that_cannot_load_is_the_reason_that_is_given() {
    struct Broken(LocalRanks<Cpu>);

    impl RankLoader<Cpu> for Broken {
        fn connect(&self) -> Result<Vec<Arc<dyn Communicator<Cpu>>>, CommError> {
            self.0.connect()
        }

        fn load(
            &self,
            rank: Rank,
            comm: Arc<dyn Communicator<Cpu>>,
            progress: &mut dyn FnMut(f32),
        ) -> Result<DeepSeek<Cpu>, ModelError> {
            assert!(rank.0 == 0, "injected");
            self.0.load(rank, comm, progress)
        }
    }

    let tiny = Tiny::default();
    let (handle, inbox) = Tiny::channel(&tiny);
    let broken = Broken(tiny.ranks_on(vec![cpu(), cpu()]));
    r1_engine::spawn(inbox, tiny.engine(), Arc::new(broken)).join().expect("no panic leaves the thread");
    let Status::Failed(why) = handle.status() else { panic!("{:?}", handle.status()) };
    assert_eq!(why, "rank 1 panicked while it loaded: injected");
}

/// Ranks whose transport works so many times.
fn connects(times: usize) -> (Tiny, LocalRanks<Cpu>, Fuse) {
    let tiny = Tiny::default();
    let fuse = Fuse::default();
    let mut ranks = tiny.ranks_on(vec![cpu(), cpu()]);
    let (in_host_memory, of_rank) = (ranks.connect.clone(), fuse.clone());
    let connected = AtomicUsize::new(0);
    ranks.connect = Arc::new(move |devices, elements| {
        if connected.fetch_add(1, Ordering::Relaxed) >= times {
            return Err(CommError::Connect { transport: "wire", why: "it is cut".into() });
        }
        let wrap = |inner| -> Arc<dyn Communicator<Cpu>> {
            Arc::new(Faulty { inner, fuse: of_rank.clone(), checks: Fuse::default() })
        };
        Ok(in_host_memory(devices, elements)?.into_iter().map(wrap).collect())
    });
    (tiny, ranks, fuse)
}

#[test]
fn ranks_that_do_not_reach_each_other_are_refused_at_the_start() {
    let (tiny, ranks, _) = connects(0);
    let (handle, inbox) = tiny.channel();
    r1_engine::spawn(inbox, tiny.engine(), Arc::new(ranks)).join().expect("no panic leaves the thread");
    let why = "wire: the ranks cannot be connected: it is cut";
    assert_eq!(handle.status(), Status::Failed(why.into()));
}

#[test]
fn ranks_that_lose_each_other_end_the_engine() {
    let (tiny, ranks, fuse) = connects(1);
    let engine = tiny.start_ranks(Arc::new(ranks));
    run(&engine, 1);
    fuse.store(20, Ordering::Relaxed);
    let ended = [1, 2].map(|start| engine.submit(request(start)).expect("accepted")).map(read);
    assert!(ended.iter().all(|(_, ended)| ended.is_err()), "{ended:?}");
    assert_eq!(why_failed(&engine), "wire: the ranks cannot be connected: it is cut");
}

/// Why the engine ended, which it does soon.
fn why_failed(engine: &Handle) -> String {
    let since = Instant::now();
    loop {
        match engine.status() {
            Status::Failed(why) => return why,
            status => assert!(since.elapsed() < Duration::from_secs(5), "{status:?}"),
        }
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_reader_that_does_not_read_loses_its_generation_only() {
    let engine = Tiny { max_unread_tokens: 8, ..Tiny::default() }.start();
    let slow = engine.submit(request(1)).expect("accepted");
    let (_, quick) = read(engine.submit(request(2)).expect("accepted"));
    assert_eq!(quick, Ok(()));
    let (tokens, ended) = read(slow);
    assert_eq!((tokens.len(), ended), (8, Err(EngineError::SlowReader { max_unread: 8 })));
    let since = Instant::now();
    while engine.stats().running > 0 {
        assert!(since.elapsed() < Duration::from_secs(5), "{:?}", engine.stats());
        thread::sleep(Duration::from_millis(2));
    }
}
