//! The log-probabilities of a prompt's own tokens are those that they are generated with, one after another; however the
//! prompt is cut, whatever runs beside it, and each is reported once.
#![forbid(unsafe_code)]

use r1_core::{Allowed, ConstraintError, SamplingParams, TokenConstraint, TokenId};
use r1_engine::{Event, Generation, Handle, Request, TokenLogprobs};
use r1_tests::Tiny;

/// Of two ways to the same log-probability.
const TOLERANCE: f32 = 1e-4;
const NUM_TOP: u32 = 5;

/// Arbitrary tokens of the bundled vocabulary, none of them special.
fn prompt(seed: u32, len: usize) -> Vec<TokenId> {
    let spread = |i: usize| (seed.wrapping_mul(2_654_435_761).wrapping_add(i as u32 * 40_503) >> 7) % 450;
    (0..len).map(|i| TokenId(60 + spread(i))).collect()
}

fn params(max_tokens: u32) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, ..SamplingParams::default() }
}

/// Wants the prompt's log-probabilities, and as many tokens more.
fn scored(prompt: Vec<TokenId>, max_tokens: u32) -> Request {
    Request { prompt_logprobs: Some(NUM_TOP), ..Request::new(prompt, params(max_tokens)) }
}

#[derive(Debug)]
struct Reply {
    cached_tokens: u32,
    prompt: Option<Vec<TokenLogprobs>>,
    tokens: Vec<TokenId>,
    logprobs: Vec<TokenLogprobs>,
}

fn read(mut generation: Generation) -> Reply {
    let mut reply = Reply { cached_tokens: 0, prompt: None, tokens: Vec::new(), logprobs: Vec::new() };
    loop {
        match generation.next_blocking().expect("an end") {
            Event::Scheduled { cached_tokens } => reply.cached_tokens = cached_tokens,
            Event::PromptLogprobs(logprobs) => {
                assert!(reply.tokens.is_empty(), "they come before the first token");
                assert!(reply.prompt.replace(logprobs).is_none(), "they come once");
            }
            Event::Token { token, logprobs } => {
                reply.tokens.push(token);
                reply.logprobs.extend(logprobs);
            }
            Event::Finished(_) => return reply,
            Event::Failed(error) => panic!("{error}"),
        }
    }
}

fn run(engine: &Handle, request: Request) -> Reply {
    read(engine.submit(request).expect("accepted"))
}

/// Allows one token after another.
struct Forced(Vec<TokenId>);

impl TokenConstraint for Forced {
    fn accept(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        assert_eq!(self.0.pop(), Some(token));
        Ok(())
    }

    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<Allowed, ConstraintError> {
        let Some(next) = self.0.last() else { return Ok(Allowed::Any) };
        mask[next.0 as usize / 32] |= 1 << (next.0 % 32);
        Ok(Allowed::Masked)
    }
}

/// The oracle: all tokens but the first are generated, each with its log-probabilities.
fn generated(engine: &Handle, prompt: &[TokenId]) -> Vec<TokenLogprobs> {
    let params = SamplingParams { logprobs: Some(NUM_TOP), ..params(prompt.len() as u32 - 1) };
    let forced = Forced(prompt[1..].iter().rev().copied().collect());
    let request =
        Request { constraint: Some(Box::new(forced)), ..Request::new(prompt[..1].to_vec(), params) };
    let reply = run(engine, request);
    assert_eq!(reply.tokens, prompt[1..]);
    assert!(reply.prompt.is_none(), "nobody asked");
    reply.logprobs
}

fn same(what: &str, found: Option<&Vec<TokenLogprobs>>, expected: &[TokenLogprobs]) {
    let found = found.unwrap_or_else(|| panic!("{what}: they are not reported"));
    assert_eq!(found.len(), expected.len(), "{what}");
    for (nth, (found, expected)) in found.iter().zip(expected).enumerate() {
        let near = |a: f32, b: f32| (a - b).abs() < TOLERANCE;
        let same_top = found.top.iter().zip(&expected.top).all(|(a, b)| near(a.1, b.1));
        assert!(
            near(found.logprob, expected.logprob) && same_top && found.top.len() == NUM_TOP as usize,
            "{what}: token {}: {found:?}, but {expected:?} when it is generated",
            nth + 1
        );
        // Equally likely tokens may change places.
        let best = found.top.iter().filter(|(_, logprob)| *logprob > found.top[0].1 - TOLERANCE).count();
        assert!(best > 1 || found.top[0].0 == expected.top[0].0, "{what}: token {}", nth + 1);
    }
}

#[test]
fn they_are_those_of_generation_however_the_prompt_is_cut() {
    let prompts = [(1, 150), (2, 33), (3, 2), (4, 16)].map(|(seed, len)| prompt(seed, len));
    let engine = Tiny::default().start();
    let expected: Vec<_> = prompts.iter().map(|prompt| generated(&engine, prompt)).collect();
    let tokens: Vec<_> =
        prompts.iter().map(|p| run(&engine, Request::new(p.clone(), params(8))).tokens).collect();
    // Rows for the whole prompt, for less than a step, and one; steps for the whole prompt, and small ones.
    let cuts =
        [(300, 256, 1, 1), (16, 64, 1, 1), (16, 64, 2, 1), (5, 64, 1, 2), (0, 64, 2, 1), (300, 9, 1, 1)];
    for (prompt_logit_rows, max_num_batched_tokens, depth, ranks) in cuts {
        let what = format!(
            "{prompt_logit_rows} rows, steps of {max_num_batched_tokens}, {depth} in flight, {ranks} ranks"
        );
        let tiny = Tiny { prompt_logit_rows, max_num_batched_tokens, depth, ranks, ..Tiny::default() };
        let engine = tiny.start();
        let alone: Vec<_> = prompts.iter().map(|prompt| run(&engine, scored(prompt.clone(), 8))).collect();
        // All at once, beside others that want nothing of the kind.
        let plain = |seed| Request::new(prompt(seed, 40), params(30));
        let mut together = vec![plain(10), plain(11)];
        together.extend(prompts.iter().map(|prompt| scored(prompt.clone(), 8)));
        together.push(plain(12));
        let together: Vec<_> = engine.submit_all(together).expect("accepted").into_iter().map(read).collect();
        assert!([0, 1, 6].iter().all(|&at| together[at].prompt.is_none() && together[at].tokens.len() == 30));
        for (nth, (alone, together)) in alone.iter().zip(&together[2..]).enumerate() {
            same(&format!("{what}: alone"), alone.prompt.as_ref(), &expected[nth]);
            same(&format!("{what}: together"), together.prompt.as_ref(), &expected[nth]);
            assert_eq!((&alone.tokens, &together.tokens), (&tokens[nth], &tokens[nth]), "{what}");
        }
        engine.stop();
    }
}

#[test]
fn a_prompt_of_one_token_has_none() {
    let engine = Tiny::default().start();
    let reply = run(&engine, scored(vec![TokenId(0)], 3));
    assert_eq!((reply.prompt.map(|all| all.len()), reply.tokens.len()), (Some(0), 3));
}

#[test]
fn a_cached_prompt_is_computed_again_and_its_blocks_serve_others() {
    let engine = Tiny::default().start();
    let prompt = prompt(1, 150);
    let expected = generated(&engine, &prompt);
    engine.flush_prefix_cache().expect("it runs");
    for _ in 0..2 {
        let reply = run(&engine, scored(prompt.clone(), 2));
        assert_eq!(reply.cached_tokens, 0);
        same("cached or not", reply.prompt.as_ref(), &expected);
        assert_eq!(run(&engine, Request::new(prompt.clone(), params(2))).cached_tokens, 144);
    }
}

#[test]
fn a_preempted_prompt_reports_once_and_whole() {
    let (first, second) = (prompt(1, 300), prompt(2, 300));
    let engine = Tiny::default().start();
    let expected = [&first, &second].map(|prompt| generated(&engine, prompt));
    // The prompts fit side by side, but not with their replies; and a better priority comes while the worse one is
    // prefilled.
    let tiny = Tiny { num_blocks: Some(42), prompt_logit_rows: 4, ..Tiny::default() };
    let engine = tiny.start();
    let requests = vec![scored(first.clone(), 100), scored(second.clone(), 100)];
    let replies: Vec<_> = engine.submit_all(requests).expect("accepted").into_iter().map(read).collect();
    let grown = engine.stats().preemptions_total;
    assert!(grown > 0, "nobody grew into the other");
    for (reply, expected) in replies.iter().zip(&expected) {
        same("preempted while it decodes", reply.prompt.as_ref(), expected);
        assert_eq!(reply.tokens.len(), 100);
    }
    let mut worse = engine.submit(Request { priority: 1, ..scored(first, 4) }).expect("accepted");
    assert!(matches!(worse.next_blocking(), Some(Event::Scheduled { .. })));
    // 300 tokens in steps of 5: it is not done yet.
    let better = engine.submit(Request::new(prompt(3, 450), params(4))).expect("accepted");
    let worse = read(worse);
    read(better);
    assert!(engine.stats().preemptions_total > grown, "the better priority waited");
    same("preempted while it is prefilled", worse.prompt.as_ref(), &expected[0]);
}

#[test]
fn emulated_gpus_report_the_same() {
    let prompt = prompt(1, 40);
    let engine = Tiny { max_num_seqs: 2, ..Tiny::default() }.start_emulated();
    let expected = generated(&engine, &prompt);
    let reply = run(&engine, scored(prompt, 2));
    same("emulated", reply.prompt.as_ref(), &expected);
}
