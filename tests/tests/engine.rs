//! The engine over the bundled model: what a request asks of the sampler is what it gets, and nothing outlives a request.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use r1_core::{Allowed, ConstraintError, FinishReason, SamplingParams, TokenConstraint, TokenId};
use r1_engine::{EngineError, Event, Handle, Request, Status, SubmitError};
use r1_tests::{Reply, Tiny, collect};

const EOS: TokenId = TokenId(1);

fn engine() -> Handle {
    Tiny::default().start()
}

/// "<BOS><User>hello<Assistant><think>\n"
fn prompt() -> Vec<TokenId> {
    [0, 3, 277, 325, 94, 4, 5, 214].map(TokenId).to_vec()
}

fn request(params: SamplingParams) -> Request {
    Request::new(prompt(), params)
}

fn run(engine: &Handle, params: SamplingParams) -> Reply {
    collect(engine.submit(request(params)).expect("accepted"))
}

#[test]
fn the_same_seed_draws_the_same_alone_and_in_a_batch() {
    let engine = engine();
    let params =
        |seed| SamplingParams { seed, max_tokens: 40, temperature: 2.0, ..SamplingParams::default() };
    let alone: Vec<_> = (0..8).map(|seed| run(&engine, params(seed)).0).collect();
    let batch: Vec<_> = (0..8).map(|seed| engine.submit(request(params(seed))).expect("accepted")).collect();
    let batch: Vec<_> = batch.into_iter().map(|generation| collect(generation).0).collect();
    assert_eq!(alone, batch);
    assert!(alone.windows(2).all(|pair| pair[0] != pair[1]), "seeds differ, so do the draws");
}

#[test]
fn limits_and_stop_tokens_end_a_reply() {
    let engine = engine();
    let greedy = SamplingParams { temperature: 0.0, max_tokens: 100, ..SamplingParams::default() };
    let (tokens, _, reason) = run(&engine, SamplingParams { max_tokens: 3, ..greedy.clone() });
    assert_eq!((tokens.len(), reason), (3, Ok(FinishReason::Length)));

    let (whole, _, reason) = run(&engine, SamplingParams { stop_token_ids: vec![EOS], ..greedy.clone() });
    assert_eq!((whole.last(), reason), (Some(&EOS), Ok(FinishReason::Stop(EOS))));

    let stop = whole[5];
    let first = whole.iter().position(|&token| token == stop).expect("it is there");
    let (tokens, _, reason) = run(&engine, SamplingParams { stop_token_ids: vec![stop], ..greedy.clone() });
    assert_eq!((tokens.as_slice(), reason), (&whole[..=first], Ok(FinishReason::Stop(stop))));

    let patient = SamplingParams { stop_token_ids: vec![stop], min_tokens: first as u32 + 5, ..greedy };
    let (tokens, ..) = run(&engine, patient);
    assert!(tokens.len() > first + 5 && !tokens[..first + 5].contains(&stop), "{tokens:?}");
}

#[test]
fn a_bias_forbids_and_forces() {
    let engine = engine();
    let greedy = SamplingParams { temperature: 0.0, max_tokens: 5, ..SamplingParams::default() };
    let (plain, ..) = run(&engine, greedy.clone());
    let (forced, ..) =
        run(&engine, SamplingParams { logit_bias: vec![(TokenId(50), 100.0)], ..greedy.clone() });
    assert_eq!(forced, [TokenId(50); 5]);
    let (without, ..) = run(&engine, SamplingParams { logit_bias: vec![(plain[0], -100.0)], ..greedy });
    assert!(!without.contains(&plain[0]), "{without:?}");
}

#[test]
fn logprobs_are_of_the_models_own_distribution() {
    let engine = engine();
    let params = SamplingParams {
        temperature: 0.0,
        max_tokens: 6,
        logprobs: Some(20),
        // The bias must not show in the log-probabilities.
        logit_bias: vec![(TokenId(50), 100.0)],
        ..SamplingParams::default()
    };
    let (tokens, logprobs, _) = run(&engine, params.clone());
    assert_eq!(tokens, [TokenId(50); 6]);
    for of_token in logprobs {
        let of_token = of_token.expect("they were asked for");
        assert_eq!(of_token.top.len(), 20);
        assert!(of_token.top.windows(2).all(|pair| pair[0].1 >= pair[1].1), "best first");
        assert!(of_token.logprob <= of_token.top[0].1);
        let sum: f32 = of_token.top.iter().map(|(_, logprob)| logprob.exp()).sum();
        assert!(sum > 0.5 && sum < 1.0001, "20 of 512 tokens hold {sum}");
    }
    let (_, none, _) = run(&engine, SamplingParams { logprobs: None, ..params });
    assert!(none.iter().all(Option::is_none));
}

/// Waits until nothing runs; then no block may be held.
fn idle(engine: &Handle) {
    let since = Instant::now();
    loop {
        let stats = engine.stats();
        if stats.running + stats.waiting == 0 && stats.kv_blocks_used == 0 {
            return;
        }
        assert!(since.elapsed() < Duration::from_secs(5), "{stats:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_dropped_generation_frees_its_blocks_and_its_place_in_the_queue() {
    let engine = engine();
    let long = SamplingParams { max_tokens: 500, temperature: 2.0, ..SamplingParams::default() };
    for round in 0..10 {
        let mut running: Vec<_> =
            (0..20).map(|_| engine.submit(request(long.clone())).expect("accepted")).collect();
        for _ in 0..round {
            running[0].next_blocking();
        }
    }
    idle(&engine);
    let (tokens, ..) = run(&engine, SamplingParams { max_tokens: 3, ..SamplingParams::default() });
    assert_eq!(tokens.len(), 3);
}

#[test]
fn the_queue_is_bounded_and_stopping_fails_what_runs() {
    let engine = engine();
    let long = SamplingParams { max_tokens: 500, temperature: 2.0, ..SamplingParams::default() };
    let mut running = Vec::new();
    let full = loop {
        match engine.submit(request(long.clone())) {
            Ok(generation) => running.push(generation),
            Err(error) => break error,
        }
        assert!(running.len() < 1000, "the queue has no end");
    };
    assert_eq!(full, SubmitError::QueueFull { max_queued: 64 });
    assert!(running.len() >= 8 + 64, "8 run and 64 wait, {} were accepted", running.len());
    engine.stop();
    for generation in running {
        let (_, _, reason) = collect(generation);
        assert!(matches!(reason, Err(EngineError::Stopped) | Ok(_)), "{reason:?}");
    }
    assert!(matches!(engine.submit(request(long)), Err(SubmitError::NotRunning(_))));
}

#[test]
fn a_flush_empties_the_prefix_cache_and_takes_nothing_from_those_that_run() {
    let engine = engine();
    let params = |max_tokens| SamplingParams { temperature: 0.0, max_tokens, ..SamplingParams::default() };
    let long: Vec<_> = (0..100).map(|i| TokenId(60 + i * 3)).collect();
    let cached = |prompt: &[TokenId]| {
        let request = Request::new(prompt.to_vec(), params(8));
        let mut generation = engine.submit(request).expect("accepted");
        let Some(Event::Scheduled { cached_tokens }) = generation.next_blocking() else { panic!("no start") };
        (cached_tokens, collect(generation).0)
    };
    let first = cached(&long);
    assert_eq!(first.0, 0);
    assert_eq!(cached(&long), (96, first.1.clone()));
    idle(&engine);
    let held = engine.stats().kv_blocks_cached;
    assert!(held >= 6, "{held} blocks are cached");
    assert_eq!(engine.flush_prefix_cache(), Ok(held));
    assert_eq!(engine.stats().kv_blocks_cached, 0);
    assert_eq!(cached(&long), (0, first.1.clone()), "nothing is found");
    assert_eq!(cached(&long).0, 96, "and everything again");
    // While something runs.
    let whole = collect(engine.submit(Request::new(long.clone(), params(200))).expect("accepted")).0;
    let mut running = engine.submit(Request::new(long.clone(), params(200))).expect("accepted");
    assert!(matches!(running.next_blocking(), Some(Event::Scheduled { cached_tokens: 96 })));
    engine.flush_prefix_cache().expect("it runs");
    assert_eq!(collect(running).0, whole);
    idle(&engine);
    engine.stop();
    let since = Instant::now();
    while engine.status() == Status::Ready {
        assert!(since.elapsed() < Duration::from_secs(5), "it does not stop");
        thread::sleep(Duration::from_millis(1));
    }
    assert!(matches!(engine.flush_prefix_cache(), Err(SubmitError::NotRunning(_))));
}

/// Allows every token, and notes how many steps had ended when the first one was drawn.
struct Probe {
    engine: Handle,
    steps: Arc<AtomicU64>,
}

impl TokenConstraint for Probe {
    fn accept(&mut self, _: TokenId) -> Result<(), ConstraintError> {
        let steps = self.engine.stats().steps_total;
        let _ = self.steps.compare_exchange(u64::MAX, steps, Ordering::Relaxed, Ordering::Relaxed);
        Ok(())
    }

    fn fill_mask(&mut self, _: &mut [u32]) -> Result<Allowed, ConstraintError> {
        Ok(Allowed::Any)
    }
}

/// A short prompt does not wait for the rest of a long one.
#[test]
fn a_short_prompt_passes_a_long_prefill() {
    let tiny = Tiny { max_model_len: 4096, max_num_batched_tokens: 256, ..Tiny::default() };
    let engine = tiny.start();
    let params = SamplingParams { temperature: 0.0, max_tokens: 2, ..SamplingParams::default() };
    let firsts = [(); 2].map(|()| Arc::new(AtomicU64::new(u64::MAX)));
    let probed = |prompt, steps: &Arc<AtomicU64>| Request {
        prompt,
        constraint: Some(Box::new(Probe { engine: engine.clone(), steps: steps.clone() })),
        ..request(params.clone())
    };
    let requests = vec![probed(vec![TokenId(300); 4000], &firsts[0]), probed(prompt(), &firsts[1])];
    for generation in engine.submit_all(requests).expect("accepted") {
        assert_eq!(collect(generation).2, Ok(FinishReason::Length));
    }
    let [long, short] = firsts.map(|steps| steps.load(Ordering::Relaxed));
    assert!(short <= 1, "the short prompt's first token came after {short} steps");
    assert!(long >= 15, "the long prompt's after {long}, of 4,000 tokens in steps of 256");
}
