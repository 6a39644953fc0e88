//! What the prefix cache saves: 64 requests that share their first 1,000 tokens, time to the first token of each, with the
//! cache and without it.
#![forbid(unsafe_code)]
#![allow(missing_docs)] // criterion's macros make public functions

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use r1_benches::bundled;
use r1_core::{SamplingParams, TokenId};
use r1_cpu::{Cpu, CpuOptions};
use r1_engine::{EngineConfig, EngineInfo, Event, Generation, Handle, LocalRanks, Request, Status};
use r1_model::MlaForm;

const REQUESTS: u32 = 64;
const SHARED_TOKENS: u32 = 1000;
const MAX_MODEL_LEN: usize = 2048;

fn start(prefix_cache: bool) -> Handle {
    let (config, checkpoint) = bundled();
    let engine = EngineConfig {
        block_size: 64,
        max_num_seqs: REQUESTS as usize,
        max_num_batched_tokens: 1024,
        max_model_len: MAX_MODEL_LEN,
        kv_memory_fraction: 0.5,
        num_blocks: None,
        prefix_cache,
        depth: None,
        max_captured_seqs: REQUESTS as usize,
        pad_decodes: false,
        log_every_steps: u64::MAX,
    };
    let (handle, inbox) = Handle::channel(EngineInfo {
        max_model_len: MAX_MODEL_LEN,
        vocab_size: config.vocab_size,
        max_num_seqs: REQUESTS as usize,
        max_queued: REQUESTS as usize,
        max_unread_tokens: 4096,
    });
    let cpu = Cpu::new(CpuOptions::default()).expect("a CPU backend");
    let options = r1_benches::options(MlaForm::Absorbed, REQUESTS as usize, MAX_MODEL_LEN);
    let ranks = LocalRanks::in_host_memory(vec![Arc::new(cpu)], checkpoint, config, options);
    r1_engine::spawn(inbox, engine, Arc::new(ranks));
    while handle.status() != Status::Ready {
        assert!(matches!(handle.status(), Status::Loading { .. }), "{:?}", handle.status());
        thread::sleep(Duration::from_millis(5));
    }
    handle
}

/// The shared prefix and a question of its own.
fn request(round: u32, i: u32) -> Request {
    let shared = (0..SHARED_TOKENS).map(|j| TokenId(60 + (round * 131 + j * 37) % 400));
    let own = (0..20).map(|j| TokenId(60 + (i * 7 + j) % 400));
    let params = SamplingParams { temperature: 0.0, max_tokens: 8, ..SamplingParams::default() };
    Request::new(shared.chain(own).collect(), params)
}

/// Time to the first token, and all tokens.
fn read(mut generation: Generation, since: Instant) -> (Duration, Vec<TokenId>) {
    let (mut first, mut tokens) = (Duration::ZERO, Vec::new());
    loop {
        match generation.next_blocking().expect("an end") {
            Event::Scheduled { .. } | Event::PromptLogprobs(_) => {}
            Event::Token { token, .. } => {
                if tokens.is_empty() {
                    first = since.elapsed();
                }
                tokens.push(token);
            }
            Event::Finished(_) => return (first, tokens),
            Event::Failed(error) => panic!("{error}"),
        }
    }
}

/// Median and longest time to the first token of 64 requests at once, and their replies.
fn together(engine: &Handle, round: u32) -> (Duration, Duration, Vec<Vec<TokenId>>) {
    let since = Instant::now();
    let readers: Vec<_> = (0..REQUESTS)
        .map(|i| {
            let generation = engine.submit(request(round, i)).expect("accepted");
            thread::spawn(move || read(generation, since))
        })
        .collect();
    let (mut first, replies): (Vec<_>, Vec<_>) =
        readers.into_iter().map(|reader| reader.join().expect("a reader")).unzip();
    first.sort_unstable();
    (first[first.len() / 2], first[first.len() - 1], replies)
}

fn prefix_cache(_: &mut Criterion) {
    let [without, with] = [false, true].map(start);
    // Warm up.
    for engine in [&without, &with] {
        read(engine.submit(request(100, 0)).expect("accepted"), Instant::now());
    }
    for round in 0..3 {
        let (median, longest, replies) = together(&without, round);
        // Nobody has sent this prefix before: the first request computes it, the others share it.
        let (cold_median, cold_longest, cold_replies) = together(&with, round);
        let (hot_median, hot_longest, hot_replies) = together(&with, round);
        assert!(replies == cold_replies && replies == hot_replies, "the replies are the same");
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let ratio = |a: Duration, b: Duration| a.as_secs_f64() / b.as_secs_f64();
        println!(
            "first token of {REQUESTS} requests, median and longest: {:.0} and {:.0} ms without the cache; {:.0} and {:.0} ms with \
             it, the prefix new ({:.1}x and {:.1}x sooner); {:.0} and {:.0} ms with the prefix known ({:.1}x and {:.1}x)",
            ms(median),
            ms(longest),
            ms(cold_median),
            ms(cold_longest),
            ratio(median, cold_median),
            ratio(longest, cold_longest),
            ms(hot_median),
            ms(hot_longest),
            ratio(median, hot_median),
            ratio(longest, hot_longest),
        );
    }
}

criterion_group!(savings, prefix_cache);
criterion_main!(savings);
