//! The bundled model end to end: template, tokenizer, engine and model give what transformers gives.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use r1_backend::Backend;
use r1_core::{DType, FinishReason, SamplingParams, TokenId};
use r1_cpu::{Cpu, CpuOptions};
use r1_engine::{EngineConfig, EngineInfo, Event, Handle, Request, Status};
use r1_model::{DeepSeek, MlaForm, ModelOptions, WeightFormat};
use r1_reference::Reference;
use r1_tests::goldens_dir;
use r1_text::{ChatInput, ChatTemplate, Tokenizer};
use r1_weights::{Checkpoint, ModelConfig};

const MAX_NEW_TOKENS: u32 = 260;

fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cli/model")
}

struct Expected {
    question: String,
    prompt: Vec<TokenId>,
    output: Vec<TokenId>,
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
        })
        .collect()
}

/// An engine over the bundled weights, small enough that prompts are chunked and sequences wait for each other.
fn start<B: Backend>(backend: Arc<B>, dtype: DType, max_num_seqs: usize) -> Handle {
    let config = ModelConfig::open(&model_dir()).expect("config.json");
    let max_model_len = 512;
    let options = ModelOptions {
        activation_dtype: dtype,
        weights: if dtype == DType::BF16 { WeightFormat::WidenToBf16 } else { WeightFormat::AsStored },
        fp8: r1_model::Fp8Compute::WeightOnly,
        mla_form: MlaForm::Auto,
        max_batched_tokens: 64,
        max_logit_rows: max_num_seqs,
        max_model_len,
        max_expanded_tokens: 64,
        layers: None,
        rank: r1_core::Rank(0),
        world_size: 1,
    };
    let engine = EngineConfig {
        block_size: 16,
        max_num_seqs,
        max_num_batched_tokens: 64,
        max_model_len,
        kv_memory_fraction: 0.5,
        log_every_steps: 1000,
    };
    let (handle, inbox) =
        Handle::channel(EngineInfo { max_model_len, vocab_size: config.vocab_size, max_queued: 64 });
    r1_engine::spawn(inbox, engine, move |progress| {
        let checkpoint = Checkpoint::open(&model_dir())?;
        DeepSeek::load(backend, Arc::new(r1_comm::Local::single()), &checkpoint, &config, options, progress)
    });
    loop {
        match handle.status() {
            Status::Ready => return handle,
            Status::Loading { .. } => thread::sleep(Duration::from_millis(5)),
            status => panic!("{status:?}"),
        }
    }
}

fn answers_like_transformers(handle: &Handle) {
    let expected = expected();
    assert_eq!(expected.len(), 50);
    let eos = TokenId(1);
    let running: Vec<_> = (expected.iter())
        .map(|expected| {
            let params = SamplingParams {
                temperature: 0.0,
                max_tokens: MAX_NEW_TOKENS,
                stop_token_ids: vec![eos],
                ..SamplingParams::default()
            };
            let request = Request { prompt: expected.prompt.clone(), params, priority: 0, constraint: None };
            handle.submit(request).expect("the engine takes it")
        })
        .collect();
    for (expected, mut generation) in expected.iter().zip(running) {
        let mut tokens = Vec::new();
        let reason = loop {
            match generation.next_blocking().expect("an end") {
                Event::Scheduled { .. } => {}
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
    let backend = Cpu::new(CpuOptions { threads: Some(2), isa: None }).expect("a CPU");
    answers_like_transformers(&start(Arc::new(backend), DType::F32, 16));
}

#[test]
fn reference_answers_like_transformers() {
    answers_like_transformers(&start(Arc::new(Reference::new()), DType::F32, 50));
}

#[test]
fn the_template_and_the_tokenizer_give_the_same_prompt() {
    let tokenizer = Tokenizer::from_dir(&model_dir()).expect("a tokenizer");
    let source = fs::read_to_string(model_dir().join("chat_template.jinja")).expect("a template");
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
