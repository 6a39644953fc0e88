//! `--deterministic`: a request's tokens and log-probabilities are the same bit for bit, whatever else runs and however its
//! prompt is cut. Without the flag nothing of the kind is promised.
#![forbid(unsafe_code)]

use r1_core::{DType, SamplingParams, TokenId};
use r1_engine::{Event, Generation, Handle, Request};
use r1_model::{Fp8Compute, KvCacheFormat};
use r1_tests::Tiny;

const BLOCK_SIZE: usize = 16;

/// Tokens drawn, and the log-probabilities of each and of its rivals, as bits.
type Trace = Vec<(TokenId, u32, Vec<(TokenId, u32)>)>;

/// Arbitrary tokens of the bundled vocabulary, none of them special.
fn prompt(seed: u32, len: usize) -> Vec<TokenId> {
    let spread = |i: usize| (seed.wrapping_mul(2_654_435_761).wrapping_add(i as u32 * 40_503) >> 7) % 450;
    (0..len).map(|i| TokenId(60 + spread(i))).collect()
}

fn request(prompt: Vec<TokenId>, max_tokens: u32) -> Request {
    let params = SamplingParams {
        temperature: 0.9,
        seed: 7,
        max_tokens,
        logprobs: Some(5),
        ..SamplingParams::default()
    };
    Request::new(prompt, params)
}

struct Traced {
    trace: Trace,
    cached_tokens: u32,
}

fn read(mut generation: Generation) -> Traced {
    let mut traced = Traced { trace: Vec::new(), cached_tokens: 0 };
    loop {
        match generation.next_blocking().expect("an end") {
            Event::Scheduled { cached_tokens } => traced.cached_tokens = cached_tokens,
            Event::PromptLogprobs(_) => {}
            Event::Token { token, logprobs } => {
                let logprobs = logprobs.expect("they were asked for");
                let top = logprobs.top.iter().map(|(token, logprob)| (*token, logprob.to_bits())).collect();
                traced.trace.push((token, logprobs.logprob.to_bits(), top));
            }
            Event::Finished(_) => return traced,
            Event::Failed(error) => panic!("{error}"),
        }
    }
}

fn run(engine: &Handle, request: Request) -> Traced {
    read(engine.submit(request).expect("accepted"))
}

fn tiny() -> Tiny {
    Tiny {
        deterministic: true,
        prefix_cache: false,
        max_num_seqs: 16,
        max_num_batched_tokens: 256,
        ..Tiny::default()
    }
}

/// A prompt that is longer than any chunk below, and the run that all others must equal.
fn alone(ranks: usize) -> (Vec<TokenId>, Trace) {
    let prompt = prompt(1, 150);
    let engine = Tiny { ranks, ..tiny() }.start();
    let trace = run(&engine, request(prompt.clone(), 60)).trace;
    assert_eq!(trace.len(), 60);
    (prompt, trace)
}

fn same(what: &str, found: &Trace, expected: &Trace) {
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    assert!(
        found == expected,
        "{what}: token {differs:?} differs, of {} and {}",
        found.len(),
        expected.len()
    );
}

#[test]
fn in_a_batch_of_sixteen() {
    let (prompt_, expected) = alone(1);
    let engine = tiny().start();
    let others: Vec<_> = (2..17)
        .map(|seed| {
            let len = 20 * seed as usize;
            engine.submit(request(prompt(seed, len), 100)).expect("accepted")
        })
        .collect();
    let mid = others.len() / 2;
    let mut generations = others;
    generations.insert(mid, engine.submit(request(prompt_, 60)).expect("accepted"));
    let traces: Vec<_> = generations.into_iter().map(|generation| read(generation).trace).collect();
    same("in a batch of 16", &traces[mid], &expected);
}

#[test]
fn in_chunks_of_seven() {
    let (prompt, expected) = alone(1);
    let engine = Tiny { max_num_batched_tokens: 7, max_num_seqs: 4, ..tiny() }.start();
    same("in chunks of 7", &run(&engine, request(prompt, 60)).trace, &expected);
}

#[test]
fn after_a_prefix_hit() {
    let (prompt, expected) = alone(1);
    let engine = Tiny { prefix_cache: true, ..tiny() }.start();
    let first = run(&engine, request(prompt.clone(), 60));
    assert_eq!(first.cached_tokens, 0);
    same("with a cache that is empty", &first.trace, &expected);
    let again = run(&engine, request(prompt.clone(), 60));
    assert_eq!(again.cached_tokens as usize, (prompt.len() - 1) / BLOCK_SIZE * BLOCK_SIZE);
    same("after a hit", &again.trace, &expected);
    // A prompt that goes on from the first reply hits what was decoded, too.
    let turn: Vec<_> = prompt.iter().copied().chain(expected.iter().map(|(token, ..)| *token)).collect();
    let fresh = run(&tiny().start(), request(turn.clone(), 40));
    let hit = run(&engine, request(turn.clone(), 40));
    assert_eq!(hit.cached_tokens as usize, (turn.len() - 1) / BLOCK_SIZE * BLOCK_SIZE);
    same("after a hit on decoded tokens", &hit.trace, &fresh.trace);
}

/// With an FP8 cache, which holds what it holds whoever wrote it: in a batch, in chunks, after a hit, and preempted.
#[test]
fn over_an_fp8_cache() {
    let fp8 = || Tiny { kv_cache: KvCacheFormat::Fp8, ..tiny() };
    let prompt_ = prompt(1, 150);
    let expected = run(&fp8().start(), request(prompt_.clone(), 60)).trace;
    assert_eq!(expected.len(), 60);
    assert_ne!(expected, alone(1).1, "the cache's format changes log-probabilities");

    let engine = fp8().start();
    let mut generations: Vec<_> = (2..9)
        .map(|seed| engine.submit(request(prompt(seed, 30 * seed as usize), 80)).expect("accepted"))
        .collect();
    generations.insert(4, engine.submit(request(prompt_.clone(), 60)).expect("accepted"));
    let traces: Vec<_> = generations.into_iter().map(|generation| read(generation).trace).collect();
    same("in a batch", &traces[4], &expected);

    let engine = Tiny { max_num_batched_tokens: 7, max_num_seqs: 4, prefix_cache: true, ..fp8() }.start();
    same("in chunks of 7", &run(&engine, request(prompt_.clone(), 60)).trace, &expected);
    let again = run(&engine, request(prompt_.clone(), 60));
    assert_eq!(again.cached_tokens as usize, (prompt_.len() - 1) / BLOCK_SIZE * BLOCK_SIZE);
    same("after a hit", &again.trace, &expected);

    let engine = Tiny { num_blocks: Some(512 / BLOCK_SIZE), ..fp8() }.start();
    let first = engine.submit(request(prompt(3, 150), 300)).expect("accepted");
    let second = engine.submit(request(prompt_.clone(), 200)).expect("accepted");
    let (_, second) = (read(first), read(second));
    assert!(engine.stats().preemptions_total > 0, "nothing was preempted");
    same("preempted", &second.trace[..60].to_vec(), &expected);
}

#[test]
fn beside_others_that_share_its_prompt() {
    let (prompt, expected) = alone(1);
    let engine = Tiny { prefix_cache: true, ..tiny() }.start();
    // All of one request: admitted together, so that all but the first read what the first writes in the same step.
    let choices = (0..4).map(|_| request(prompt.clone(), 60)).collect();
    let choices: Vec<_> = engine.submit_all(choices).expect("accepted").into_iter().map(read).collect();
    let cached: Vec<_> = choices.iter().map(|choice| choice.cached_tokens as usize / BLOCK_SIZE).collect();
    assert_eq!(cached, [0, 9, 9, 9]);
    for choice in &choices {
        same("beside its likes", &choice.trace, &expected);
    }
}

#[test]
fn salts_keep_apart() {
    let (prompt, expected) = alone(1);
    let engine = Tiny { prefix_cache: true, ..tiny() }.start();
    let salted = |salt: &str| Request { cache_salt: Some(salt.into()), ..request(prompt.clone(), 60) };
    let mut run_salted = |salt| {
        let traced = run(&engine, salted(salt));
        same(salt, &traced.trace, &expected);
        traced.cached_tokens > 0
    };
    let hits = ["a", "b", "a", "b", ""].map(&mut run_salted);
    assert_eq!(hits, [false, false, true, true, false]);
    assert_eq!(run(&engine, request(prompt.clone(), 1)).cached_tokens, 0, "no salt is a salt of its own");
}

#[test]
fn when_preempted() {
    for prefix_cache in [false, true] {
        let long = prompt(1, 150);
        let last = prompt(3, 150);
        let expected = run(&tiny().start(), request(last.clone(), 200)).trace;
        // Both prompts fit, both replies do not.
        let num_blocks = Some(512 / BLOCK_SIZE);
        let engine = Tiny { num_blocks, prefix_cache, ..tiny() }.start();
        let first = engine.submit(request(long, 300)).expect("accepted");
        let second = engine.submit(request(last, 200)).expect("accepted");
        let (_, second) = (read(first), read(second));
        assert!(engine.stats().preemptions_total > 0, "nothing was preempted");
        same("preempted", &second.trace, &expected);
    }
}

#[test]
fn a_step_ahead_of_the_device() {
    let (prompt_, expected) = alone(1);
    let engine = Tiny { depth: 2, ..tiny() }.start();
    let others: Vec<_> =
        (2..9).map(|seed| engine.submit(request(prompt(seed, 30), 20 * seed)).expect("accepted")).collect();
    same("ahead of the device", &run(&engine, request(prompt_, 60)).trace, &expected);
    for other in others {
        drop(read(other));
    }
}

/// What the sampler must have seen of a reply is there a step ahead, too: such a sequence waits for it.
#[test]
fn penalties_a_step_ahead_of_the_device() {
    let penalised = || {
        let mut request = request(prompt(1, 150), 60);
        request.params.repetition_penalty = 1.3;
        request.params.frequency_penalty = 0.5;
        request
    };
    let expected = run(&tiny().start(), penalised()).trace;
    let engine = Tiny { depth: 2, ..tiny() }.start();
    let plain = engine.submit(request(prompt(2, 30), 100)).expect("accepted");
    same("penalised, ahead of the device", &run(&engine, penalised()).trace, &expected);
    same("beside it", &read(plain).trace, &run(&tiny().start(), request(prompt(2, 30), 100)).trace);
    assert_ne!(expected, alone(1).1, "the penalties change what is drawn");
}

#[test]
fn on_two_ranks_as_well() {
    let (prompt_, expected) = alone(2);
    let engine =
        Tiny { ranks: 2, depth: 2, prefix_cache: true, max_num_batched_tokens: 23, ..tiny() }.start();
    let other = engine.submit(request(prompt(5, 90), 100)).expect("accepted");
    same("on two ranks, cold", &run(&engine, request(prompt_.clone(), 60)).trace, &expected);
    let hit = run(&engine, request(prompt_, 60));
    assert!(hit.cached_tokens > 0);
    same("on two ranks, after a hit", &hit.trace, &expected);
    drop(read(other));
}

/// The same on the emulated GPU in what GPUs run by default, BF16 between W8A8 linears: decode steps are captured and padded
/// there, and run a step ahead.
fn emulated(ranks: usize, kv_cache: KvCacheFormat) {
    const LEN: usize = 40;
    const NEW: u32 = 24;
    let fp8 = Fp8Compute::WeightsAndActivations;
    let emu = || Tiny { ranks, dtype: DType::BF16, fp8, kv_cache, depth: 2, ..tiny() };
    let mine = || request(prompt(1, LEN), NEW);
    let expected = run(&emu().start_emulated(), mine()).trace;
    assert_eq!(expected.len(), NEW as usize);

    let engine = Tiny { prefix_cache: true, ..emu() }.start_emulated();
    let mut generations: Vec<_> = (2..8)
        .map(|seed| engine.submit(request(prompt(seed, 9 * seed as usize), 16)).expect("accepted"))
        .collect();
    generations.insert(3, engine.submit(mine()).expect("accepted"));
    let traces: Vec<_> = generations.into_iter().map(|generation| read(generation).trace).collect();
    same("in a batch", &traces[3], &expected);
    let hit = run(&engine, mine());
    assert_eq!(hit.cached_tokens as usize, (LEN - 1) / BLOCK_SIZE * BLOCK_SIZE);
    same("after a hit", &hit.trace, &expected);

    // Both prompts fit, both replies do not; steps wait for each other and run eagerly.
    let engine = Tiny {
        max_num_batched_tokens: 7,
        max_num_seqs: 4,
        max_model_len: 128,
        num_blocks: Some(128 / BLOCK_SIZE),
        depth: 1,
        max_captured_seqs: 0,
        ..emu()
    };
    let engine = engine.start_emulated();
    let first = engine.submit(request(prompt(3, LEN), 60)).expect("accepted");
    let second = engine.submit(mine()).expect("accepted");
    let (_, second) = (read(first), read(second));
    assert!(engine.stats().preemptions_total > 0, "nothing was preempted");
    same("in chunks of 7, eagerly, and preempted", &second.trace, &expected);
}

#[test]
fn on_an_emulated_gpu() {
    emulated(1, KvCacheFormat::Activations);
}

#[test]
fn on_an_emulated_gpu_over_an_fp8_cache() {
    emulated(1, KvCacheFormat::Fp8);
}

#[test]
fn on_two_emulated_gpus() {
    emulated(2, KvCacheFormat::Activations);
}
