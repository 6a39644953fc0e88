//! The bundled model end to end: template, tokenizer, engine and model give what transformers gives.
#![forbid(unsafe_code)]

use std::fs;
use std::sync::Arc;

use r1_core::{DType, FinishReason, SamplingParams, TokenId};
use r1_engine::{Event, Handle, Request};
use r1_model::Fp8Compute;
use r1_reference::Reference;
use r1_tests::{Tiny, goldens_dir, tiny_dir};
use r1_text::{ChatInput, ChatTemplate, Tokenizer};

const MAX_NEW_TOKENS: u32 = 260;

#[derive(Clone)]
struct Expected {
    question: String,
    prompt: Vec<TokenId>,
    output: Vec<TokenId>,
    /// How far the likeliest token was ahead of the next one, at the closest place.
    min_margin: f64,
}

fn expected() -> Vec<Expected> {
    let golden = fs::read(goldens_dir().join("tiny_r1.json")).expect("the golden");
    let golden: serde_json::Value = serde_json::from_slice(&golden).expect("JSON");
    let ids = |value: &serde_json::Value| {
        let ids = value.as_array().expect("ids").iter();
        ids.map(|id| TokenId(id.as_u64().expect("an id") as u32)).collect()
    };
    let replies = golden["replies"].as_array().expect("replies").iter();
    replies
        .map(|reply| Expected {
            question: reply["prompt_text"].as_str().expect("a question").to_owned(),
            prompt: ids(&reply["prompt_ids"]),
            output: ids(&reply["output_ids"]),
            min_margin: reply["min_margin"].as_f64().expect("a margin"),
        })
        .collect()
}

fn answers_like_transformers(handle: &Handle) {
    let expected = expected();
    assert_eq!(expected.len(), 50);
    answers(handle, &expected);
}

fn answers(handle: &Handle, expected: &[Expected]) {
    let eos = TokenId(1);
    let running: Vec<_> = (expected.iter())
        .map(|expected| {
            let params = SamplingParams {
                temperature: 0.0,
                max_tokens: MAX_NEW_TOKENS,
                stop_token_ids: vec![eos],
                ..SamplingParams::default()
            };
            handle.submit(Request::new(expected.prompt.clone(), params)).expect("the engine takes it")
        })
        .collect();
    for (expected, mut generation) in expected.iter().zip(running) {
        let mut tokens = Vec::new();
        let reason = loop {
            match generation.next_blocking().expect("an end") {
                Event::Scheduled { .. } | Event::PromptLogprobs(_) => {}
                Event::Token { token, .. } => tokens.push(token),
                Event::Finished(reason) => break reason,
                Event::Failed(error) => panic!("{}: {error}", expected.question),
            }
        };
        assert_eq!(tokens, expected.output, "{}", expected.question);
        let ended = if tokens.last() == Some(&eos) { FinishReason::Stop(eos) } else { FinishReason::Length };
        assert_eq!(reason, ended, "{}", expected.question);
    }
    let stats = handle.stats();
    assert_eq!((stats.waiting, stats.failed_steps_total), (0, 0));
    handle.stop();
}

#[test]
fn cpu_answers_like_transformers() {
    for ranks in [1, 2, 4] {
        answers_like_transformers(&Tiny { ranks, max_num_seqs: 16, ..Tiny::default() }.start());
    }
}

/// On the emulated GPU, a step ahead of it, each decode step a captured one.
#[test]
fn emu_answers_like_transformers() {
    for ranks in [1, 2] {
        let tiny = Tiny { ranks, depth: 2, max_num_seqs: 16, ..Tiny::default() };
        answers_like_transformers(&tiny.start_emulated());
    }
}

/// What a GPU runs by default, BF16 between W8A8 linears: where no token is a near miss, and eagerly as well.
#[test]
fn emu_in_bf16_w8a8_answers_like_transformers() {
    let clear: Vec<_> = expected().into_iter().filter(|expected| expected.min_margin > 2.0).collect();
    assert!(clear.len() > 30);
    let fp8 = Fp8Compute::WeightsAndActivations;
    for max_captured_seqs in [usize::MAX, 0] {
        let tiny = Tiny {
            dtype: DType::BF16,
            fp8,
            max_captured_seqs,
            depth: 2,
            max_num_seqs: 16,
            ..Tiny::default()
        };
        let every = if max_captured_seqs == 0 { 4 } else { 1 };
        let asked: Vec<_> = clear.iter().step_by(every).cloned().collect();
        answers(&tiny.start_emulated(), &asked);
    }
}

/// Tokens drawn, and the log-probabilities of each and of its rivals, as bits.
type Trace = Vec<(TokenId, u32, Vec<(TokenId, u32)>)>;

/// All prompts side by side, every other one drawn at random.
fn traces(handle: &Handle) -> Vec<Trace> {
    let request = |(i, expected): (usize, Expected)| {
        let params = SamplingParams {
            temperature: if i % 2 == 0 { 0.0 } else { 1.5 },
            seed: i as u64,
            max_tokens: 10 + 2 * i as u32,
            logprobs: Some(5),
            ..SamplingParams::default()
        };
        let prompt = expected.prompt;
        handle.submit(Request::new(prompt, params))
    };
    let running: Vec<_> = expected().into_iter().enumerate().map(request).collect();
    let read = |running: Result<r1_engine::Generation, _>| {
        let mut generation = running.expect("the engine takes it");
        let mut trace = Trace::new();
        loop {
            match generation.next_blocking().expect("an end") {
                Event::Scheduled { .. } | Event::PromptLogprobs(_) => {}
                Event::Token { token, logprobs } => {
                    let logprobs = logprobs.expect("they were asked for");
                    let top = logprobs.top.iter().map(|(token, logprob)| (*token, logprob.to_bits()));
                    trace.push((token, logprobs.logprob.to_bits(), top.collect()));
                }
                Event::Finished(_) => return trace,
                Event::Failed(error) => panic!("{error}"),
            }
        }
    };
    let traces = running.into_iter().map(read).collect();
    handle.stop();
    traces
}

/// Decode steps that are padded to the sizes of captured ones give the same, bit for bit.
#[test]
fn padding_changes_nothing() {
    for (ranks, depth) in [(1, 1), (1, 2), (2, 2)] {
        let plain = Tiny { ranks, depth, deterministic: true, max_num_seqs: 13, ..Tiny::default() };
        // Steps of up to 11 sequences are padded, larger ones are not.
        let padded = Tiny { pad_decodes: true, max_captured_seqs: 11, ..plain.clone() };
        let (plain, padded) = (traces(&plain.start()), traces(&padded.start()));
        assert_eq!(plain.len(), 50);
        for (i, (plain, padded)) in plain.iter().zip(&padded).enumerate() {
            assert_eq!(plain.len(), 10 + 2 * i, "prompt {i}");
            let differs = plain.iter().zip(padded).position(|(a, b)| a != b);
            assert!(plain == padded, "prompt {i}, {ranks} ranks, depth {depth}: token {differs:?} differs");
        }
    }
}

#[test]
fn reference_answers_like_transformers() {
    let tiny = Tiny { max_num_seqs: 50, ..Tiny::default() };
    answers_like_transformers(&tiny.start_on(vec![Arc::new(Reference::new())]));
}

#[test]
fn the_template_and_the_tokenizer_give_the_same_prompt() {
    let tokenizer = Tokenizer::from_dir(&tiny_dir()).expect("a tokenizer");
    let source = fs::read_to_string(tiny_dir().join("chat_template.jinja")).expect("a template");
    let control = tokenizer.control_tokens().clone();
    let template = ChatTemplate::new(&source, tokenizer.bos_text(), tokenizer.eos_text(), control)
        .expect("a sound template");
    for expected in expected() {
        let messages = serde_json::json!([{"role": "user", "content": expected.question}]);
        let input = ChatInput {
            messages: messages.as_array().expect("a list").clone(),
            add_generation_prompt: true,
            ..ChatInput::default()
        };
        let prompt = template.render(&input).expect("it renders");
        assert_eq!(
            tokenizer.encode_prompt(&prompt, 512).expect("it fits"),
            expected.prompt,
            "{}",
            expected.question
        );
    }
}
