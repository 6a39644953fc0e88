//! Constraints over the bundled model: what is drawn is what they allow; they hold up and break nobody but themselves, however
//! slow they are and whatever they do.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use r1_core::{Allowed, ConstraintError, FinishReason, SamplingParams, TokenConstraint, TokenId};
use r1_engine::{EngineError, Event, Handle, Request, TokenLogprobs};
use r1_tests::{Reply, Tiny, collect};

const EOS: TokenId = TokenId(1);

/// "<BOS><User>hello<Assistant><think>\n"
fn prompt() -> Vec<TokenId> {
    [0, 3, 277, 325, 94, 4, 5, 214].map(TokenId).to_vec()
}

fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, ..SamplingParams::default() }
}

fn plain(params: SamplingParams) -> Request {
    Request::new(prompt(), params)
}

fn constrained(constraint: impl TokenConstraint + 'static, params: SamplingParams) -> Request {
    Request { constraint: Some(Box::new(constraint)), ..plain(params) }
}

fn run(engine: &Handle, request: Request) -> Reply {
    collect(engine.submit(request).expect("accepted"))
}

/// Waits until something holds.
fn until(what: &str, holds: impl Fn() -> bool) {
    let since = Instant::now();
    while !holds() {
        assert!(since.elapsed() < Duration::from_secs(30), "{what}");
        thread::sleep(Duration::from_micros(500));
    }
}

/// Allows the `nth` of these sets of tokens after `nth` tokens, and any token after all sets; an empty set is any token, too.
struct Sets {
    sets: Vec<Vec<TokenId>>,
    nth: usize,
}

fn sets(sets: Vec<Vec<u32>>) -> Sets {
    Sets { sets: sets.into_iter().map(|set| set.into_iter().map(TokenId).collect()).collect(), nth: 0 }
}

impl TokenConstraint for Sets {
    fn accept(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        let set = self.sets.get(self.nth).filter(|set| !set.is_empty());
        assert!(set.is_none_or(|set| set.contains(&token)), "{token} after {} tokens", self.nth);
        self.nth += 1;
        Ok(())
    }

    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<Allowed, ConstraintError> {
        let Some(set) = self.sets.get(self.nth).filter(|set| !set.is_empty()) else {
            return Ok(Allowed::Any);
        };
        for token in set {
            mask[token.0 as usize / 32] |= 1 << (token.0 % 32);
        }
        Ok(Allowed::Masked)
    }
}

/// Waits before every mask until it is told to go on, or until nobody can tell it any more.
struct Gated<C> {
    gate: Mutex<Receiver<()>>,
    inner: C,
}

fn gated<C>(inner: C) -> (Sender<()>, Gated<C>) {
    let (open, gate) = channel();
    (open, Gated { gate: Mutex::new(gate), inner })
}

impl<C: TokenConstraint> TokenConstraint for Gated<C> {
    fn accept(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        self.inner.accept(token)
    }

    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<Allowed, ConstraintError> {
        let _ = self.gate.lock().expect("one holder").recv();
        self.inner.fill_mask(mask)
    }
}

fn engines() -> [Handle; 2] {
    [1, 2].map(|depth| Tiny { depth, ..Tiny::default() }.start())
}

#[test]
fn a_constraint_decides_what_is_drawn() {
    for engine in engines() {
        let forced = sets((50..60).map(|token| vec![token]).collect());
        let (tokens, _, reason) = run(&engine, constrained(forced, greedy(10)));
        assert_eq!(tokens, (50..60).map(TokenId).collect::<Vec<_>>());
        assert_eq!(reason, Ok(FinishReason::Length));
        // The best of those that are allowed, and the best of all where any is.
        let (free, ..) = run(&engine, plain(greedy(6)));
        let any = sets(vec![vec![], vec![], vec![free[2].0, 70], vec![71, 300]]);
        let (tokens, ..) = run(&engine, constrained(any, greedy(4)));
        assert_eq!(tokens[..3], free[..3]);
        assert!([71, 300].contains(&tokens[3].0));
    }
}

#[test]
fn the_end_of_a_constraint_wins_over_min_tokens() {
    let [engine, _] = engines();
    let params = SamplingParams { min_tokens: 5, stop_token_ids: vec![EOS], ..greedy(20) };
    let ends = sets(vec![vec![50], vec![51, 1], vec![1]]);
    let (tokens, _, reason) = run(&engine, constrained(ends, params));
    assert_eq!((tokens, reason), ([50, 51, 1].map(TokenId).to_vec(), Ok(FinishReason::Stop(EOS))));
}

/// All that sampling knows, in one batch: every row draws what it draws alone.
#[test]
fn masks_of_a_batch_do_not_mix() {
    for engine in engines() {
        let sampled = |seed| SamplingParams { temperature: 1.5, seed, max_tokens: 24, ..greedy(24) };
        let wide: Vec<Vec<u32>> = (0..24).map(|i| (100 + i..300).step_by(3).collect()).collect();
        let narrow: Vec<Vec<u32>> = (0..24).map(|i| vec![60 + i, 61 + i]).collect();
        let requests = || -> Vec<Request> {
            let mut requests: Vec<_> =
                (0..4).map(|seed| constrained(sets(wide.clone()), sampled(seed))).collect();
            let penalised = SamplingParams { frequency_penalty: 1.0, repetition_penalty: 1.3, ..sampled(4) };
            requests.push(constrained(sets(narrow.clone()), penalised.clone()));
            requests.push(plain(penalised));
            requests
                .push(constrained(sets(narrow.clone()), SamplingParams { logprobs: Some(3), ..sampled(5) }));
            requests.push(plain(SamplingParams { logprobs: Some(3), ..sampled(6) }));
            requests
        };
        let alone: Vec<_> = requests().into_iter().map(|request| run(&engine, request)).collect();
        let batch = engine.submit_all(requests()).expect("accepted").into_iter().map(collect);
        for (nth, ((tokens, logprobs, reason), alone)) in batch.zip(&alone).enumerate() {
            assert_eq!((&tokens, &reason), (&alone.0, &alone.2), "request {nth}");
            assert_eq!(reason, Ok(FinishReason::Length));
            for (found, expected) in logprobs.iter().flatten().zip(alone.1.iter().flatten()) {
                assert!((found.logprob - expected.logprob).abs() < 1e-3, "request {nth}");
            }
        }
        assert!(alone[..4].windows(2).all(|pair| pair[0].0 != pair[1].0), "seeds differ, so do the draws");
        assert!(alone[6].1.iter().all(Option::is_some) && alone[5].1.iter().all(Option::is_none));
    }
}

#[test]
fn a_slow_constraint_holds_up_nobody() {
    for engine in engines() {
        let (whole, ..) = run(&engine, plain(greedy(40)));
        let (open, slow) = gated(sets((50..56).map(|token| vec![token]).collect()));
        let slow = engine.submit(constrained(slow, greedy(6))).expect("accepted");
        // Nothing opens the gate, and the others get all of theirs.
        for _ in 0..2 {
            let beside: Vec<_> =
                (0..3).map(|_| engine.submit(plain(greedy(40))).expect("accepted")).collect();
            for generation in beside {
                assert_eq!(collect(generation).0, whole);
            }
        }
        until("it is late once", || engine.stats().late_masks_total == 1);
        // Alone it is not run again and again: the one step there may be now drew nothing.
        let steps = engine.stats().steps_total;
        thread::sleep(Duration::from_millis(150));
        assert!(engine.stats().steps_total <= steps + 1, "steps without a mask");
        // Others with constraints of their own do not wait for its worker either.
        let (tokens, ..) = run(&engine, constrained(sets(vec![vec![90], vec![91]]), greedy(2)));
        assert_eq!(tokens, [90, 91].map(TokenId));
        let mut beside = engine.submit(plain(greedy(400))).expect("accepted");
        for _ in 0..6 {
            open.send(()).expect("it waits");
            for _ in 0..20 {
                assert!(matches!(
                    beside.next_blocking(),
                    Some(Event::Token { .. } | Event::Scheduled { .. })
                ));
            }
        }
        drop(beside);
        let (tokens, _, reason) = collect(slow);
        assert_eq!(tokens, (50..56).map(TokenId).collect::<Vec<_>>());
        assert_eq!(reason, Ok(FinishReason::Length));
        assert!(engine.silent_for().is_none_or(|silence| silence < Duration::from_secs(1)));
        idle(&engine);
    }
}

/// An engine whose only sequence waits for its mask is not taken for dead, and takes what comes.
#[test]
fn an_engine_that_waits_for_a_mask_is_awake() {
    for engine in engines() {
        let (whole, ..) = run(&engine, plain(greedy(10)));
        let (open, slow) = gated(sets(vec![vec![50]]));
        let slow = engine.submit(constrained(slow, greedy(1))).expect("accepted");
        until("it is late", || engine.stats().late_masks_total == 1);
        thread::sleep(Duration::from_millis(400));
        let silence = engine.silent_for().expect("it has work");
        assert!(silence < Duration::from_millis(350), "silent for {silence:?}");
        assert_eq!(run(&engine, plain(greedy(10))).0, whole);
        drop(open);
        assert_eq!(collect(slow).0, [TokenId(50)]);
    }
}

/// Fails its `fails_at`th call of all.
struct Failing {
    calls: usize,
    fails_at: usize,
    panics: bool,
}

impl Failing {
    fn call(&mut self) -> Result<(), ConstraintError> {
        self.calls += 1;
        if self.calls <= self.fails_at {
            return Ok(());
        }
        assert!(!self.panics, "this grammar is broken");
        Err(ConstraintError("this grammar is too deep".into()))
    }
}

impl TokenConstraint for Failing {
    fn accept(&mut self, _: TokenId) -> Result<(), ConstraintError> {
        self.call()
    }

    fn fill_mask(&mut self, _: &mut [u32]) -> Result<Allowed, ConstraintError> {
        self.call().map(|()| Allowed::Any)
    }
}

#[test]
fn errors_and_panics_fail_their_own_request() {
    for engine in engines() {
        let (whole, ..) = run(&engine, plain(greedy(40)));
        // The calls are: mask, accept, mask, accept, mask, …
        for (fails_at, panics, num_tokens) in
            [(0, false, 0), (0, true, 0), (1, false, 1), (1, true, 1), (4, true, 2)]
        {
            let mut beside = engine.submit(plain(greedy(40))).expect("accepted");
            assert!(matches!(beside.next_blocking(), Some(Event::Scheduled { .. })));
            let broken = Failing { calls: 0, fails_at, panics };
            let (tokens, _, reason) = run(&engine, constrained(broken, greedy(40)));
            let why = if panics { "this grammar is broken" } else { "this grammar is too deep" };
            assert_eq!(tokens, whole[..num_tokens]);
            assert_eq!(reason, Err(EngineError::Constraint(why.into())));
            let (tokens, _, reason) = collect(beside);
            assert_eq!((tokens, reason), (whole.clone(), Ok(FinishReason::Length)), "its neighbour goes on");
        }
        let (_, _, reason) = run(&engine, constrained(sets(vec![vec![50], vec![9999]]), greedy(40)));
        assert!(matches!(reason, Err(EngineError::Constraint(_))), "no such token: {reason:?}");
        assert_eq!(engine.stats().failed_steps_total, 0);
        idle(&engine);
    }
}

/// Counts the constraints that there are.
struct Counted(Arc<AtomicUsize>, Sets);

impl Counted {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone(), sets(vec![]))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl TokenConstraint for Counted {
    fn accept(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        self.1.accept(token)
    }

    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<Allowed, ConstraintError> {
        self.1.fill_mask(mask)
    }
}

#[test]
fn whoever_leaves_takes_the_constraint_along() {
    for engine in engines() {
        let count = Arc::new(AtomicUsize::new(0));
        // While its mask is being worked out, while it waits to be, and between two draws.
        let (open, slow) = gated(Counted::new(&count));
        let slow = engine.submit(constrained(slow, greedy(6))).expect("accepted");
        until("it is late", || engine.stats().late_masks_total == 1);
        let many: Vec<_> = (0..40)
            .map(|_| engine.submit(constrained(Counted::new(&count), greedy(500))).expect("accepted"))
            .collect();
        until("they run", || engine.stats().generation_tokens_total > 100);
        drop(many);
        drop(slow);
        idle(&engine);
        drop(open);
        until("the constraints are gone", || count.load(Ordering::Relaxed) == 0);
        assert_eq!(run(&engine, plain(greedy(5))).0.len(), 5);
        engine.stop();
    }
}

/// Waits until nothing runs; then no block may be held.
fn idle(engine: &Handle) {
    until("something is left", || {
        let stats = engine.stats();
        stats.running + stats.waiting == 0 && stats.kv_blocks_used == 0
    });
}

/// A token that was drawn late is the token that is drawn in time, bit for bit, and so are those after it.
#[test]
fn being_late_changes_no_bit() {
    for depth in [1, 2] {
        let tiny = Tiny { deterministic: true, depth, max_num_batched_tokens: 32, ..Tiny::default() };
        let prompts = [16, 31, 32, 33, 50].map(|len| (0..len).map(|i| TokenId(60 + i * 7 % 400)).collect());
        let allowed: Vec<Vec<u32>> = (0..20).map(|i| (80 + i..400).step_by(5).collect()).collect();
        let params = SamplingParams { temperature: 1.0, seed: 3, logprobs: Some(4), ..greedy(20) };
        let engine = tiny.start();
        for prompt in prompts {
            let request = |constraint: Box<dyn TokenConstraint>| Request {
                constraint: Some(constraint),
                ..Request::new(Vec::clone(&prompt), params.clone())
            };
            let bits = |(tokens, logprobs, reason): Reply| {
                assert_eq!(reason, Ok(FinishReason::Length));
                let of_token = |of: &Option<TokenLogprobs>| {
                    let of = of.as_ref().expect("they were asked for");
                    let top: Vec<_> = of.top.iter().map(|(token, top)| (*token, top.to_bits())).collect();
                    (of.logprob.to_bits(), top)
                };
                (tokens, logprobs.iter().map(of_token).collect::<Vec<_>>())
            };
            let in_time = bits(run(&engine, request(Box::new(sets(allowed.clone())))));
            idle(&engine);
            let before = engine.stats();
            let (open, slow) = gated(sets(allowed.clone()));
            let slow = engine.submit(request(Box::new(slow))).expect("accepted");
            for nth in 1..=20 {
                until("it is late", || engine.stats().late_masks_total == before.late_masks_total + nth);
                open.send(()).expect("it waits");
            }
            assert_eq!(bits(collect(slow)), in_time, "{} tokens", prompt.len());
            idle(&engine);
            let tokens =
                |stats: &r1_engine::Stats| (stats.prompt_tokens_total, stats.generation_tokens_total);
            let (before, after) = (tokens(&before), tokens(&engine.stats()));
            assert_eq!((after.0 - before.0, after.1 - before.1), (prompt.len() as u64, 20), "counted once");
        }
    }
}
