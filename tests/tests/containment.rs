//! What breaks inside a step stays there: its requests fail, the next one is served, whatever rank it broke on.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use r1_backend::{CommError, Communicator};
use r1_core::{Rank, SamplingParams, TokenId};
use r1_cpu::{Cpu, CpuOptions};
use r1_engine::{EngineError, Event, Generation, Handle, LocalRanks, RankLoader, Request, Status};
use r1_model::{DeepSeek, ModelError};
use r1_tests::{Faulty, Fuse, Tiny};

/// Ranks of which one has a fuse.
struct FaultyRanks {
    ranks: LocalRanks<Cpu>,
    faulty: usize,
    fuse: Fuse,
}

impl RankLoader<Cpu> for FaultyRanks {
    fn connect(&self) -> Result<Vec<Arc<dyn Communicator<Cpu>>>, CommError> {
        let wrap = |(rank, inner): (usize, Arc<dyn Communicator<Cpu>>)| -> Arc<dyn Communicator<Cpu>> {
            if rank == self.faulty { Arc::new(Faulty { inner, fuse: self.fuse.clone() }) } else { inner }
        };
        Ok(self.ranks.connect()?.into_iter().enumerate().map(wrap).collect())
    }

    fn load(
        &self,
        rank: Rank,
        comm: Arc<dyn Communicator<Cpu>>,
        progress: &mut dyn FnMut(f32),
    ) -> Result<DeepSeek<Cpu>, ModelError> {
        self.ranks.load(rank, comm, progress)
    }
}

fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new(CpuOptions { threads: Some(1), isa: None }).expect("a CPU"))
}

fn request(start: u32) -> Request {
    let prompt = (0..100).map(|i| TokenId(60 + (start + i * 7) % 400)).collect();
    let params = SamplingParams { temperature: 0.0, max_tokens: 24, ..SamplingParams::default() };
    Request { prompt, params, priority: 0, constraint: None, cache_salt: None }
}

fn read(mut generation: Generation) -> (Vec<TokenId>, Result<(), EngineError>) {
    let mut tokens = Vec::new();
    loop {
        match generation.next_blocking().expect("an end") {
            Event::Scheduled { .. } => {}
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

#[test]
fn a_panic_on_any_rank_fails_the_steps_in_flight_and_nothing_else() {
    for (world, faulty) in [(1, 0), (2, 0), (2, 1)] {
        for depth in [1, 2] {
            let tiny = Tiny { depth, deterministic: true, ..Tiny::default() };
            let fuse = Fuse::default();
            let ranks = tiny.ranks_on((0..world).map(|_| cpu()).collect());
            let engine = tiny.start_ranks(Arc::new(FaultyRanks { ranks, faulty, fuse: fuse.clone() }));
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
            let since = Instant::now();
            while engine.stats().kv_blocks_used > 0 {
                assert!(since.elapsed() < Duration::from_secs(5), "{case}: {:?}", engine.stats());
                thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

#[test]
fn a_request_that_waits_outlives_a_step_that_fails() {
    let tiny = Tiny { max_num_seqs: 1, ..Tiny::default() };
    let fuse = Fuse::default();
    let ranks = tiny.ranks_on(vec![cpu()]);
    let engine = tiny.start_ranks(Arc::new(FaultyRanks { ranks, faulty: 0, fuse: fuse.clone() }));
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
        let wrap =
            |inner| -> Arc<dyn Communicator<Cpu>> { Arc::new(Faulty { inner, fuse: of_rank.clone() }) };
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
    let since = Instant::now();
    let why = loop {
        match engine.status() {
            Status::Failed(why) => break why,
            status => assert!(since.elapsed() < Duration::from_secs(5), "{status:?}"),
        }
        thread::sleep(Duration::from_millis(2));
    };
    assert_eq!(why, "wire: the ranks cannot be connected: it is cut");
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
