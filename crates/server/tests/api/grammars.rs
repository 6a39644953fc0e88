//! Grammars that are still in the making when requests come: who needs none is served, who needs one waits for it.

use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use axum::Router;
use r1_core::TokenId;
use r1_server::{ServedGrammars, ServedModel, ServerConfig, router};
use r1_text::{Grammars, TextError};
use serde_json::{Value, json};

use crate::support::{EOS, Engine, chat, complete, model, post, tokenizer, with};

/// A server whose grammars are made once the sender says so, or fail where it goes.
fn server(engine: &Engine) -> (Router, Sender<()>) {
    let (go, wait) = channel();
    let make = move || match wait.recv() {
        Ok(()) => Grammars::new(&tokenizer(), &[EOS], tokenizer().vocab_size()),
        Err(_) => Err(TextError::BadFile { file: "tokenizer.json", reason: "no room for tables".into() }),
    };
    let grammars = ServedGrammars::prepare(make).expect("a thread");
    (router(ServerConfig::default(), ServedModel { grammars, ..model() }, engine.handle.clone()), go)
}

fn ask(more: &Value) -> Value {
    with(
        &json!({"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"thinking": false}}),
        more,
    )
}

/// Whether the request's first token may be one that spells this.
fn may_begin(mask: &[u32], text: &str) -> bool {
    let tokens = tokenizer().encode_literal(text).expect("text");
    let TokenId(id) = tokens[0];
    mask[id as usize / 32] >> (id % 32) & 1 == 1
}

#[tokio::test]
async fn who_needs_a_grammar_waits_for_it_and_nobody_else() {
    let engine = Engine::saying("ok");
    let (router, go) = server(&engine);
    let form = ask(&json!({"guided_choice": ["yes", "no"]}));
    // More of them than threads that read prompts.
    let waiting: Vec<_> = (0..16)
        .map(|_| {
            let (router, form) = (router.clone(), form.clone());
            tokio::spawn(async move { chat(&router, &form).await.json() })
        })
        .collect();
    for _ in 0..3 {
        chat(&router, &ask(&json!({}))).await.json();
        complete(&router, &json!({"prompt": "hi", "max_tokens": 1})).await.json();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(engine.asked().iter().all(|asked| asked.first_mask.is_none()));
    assert_eq!(engine.asked().len(), 6);
    go.send(()).expect("the thread waits");
    for reply in waiting {
        reply.await.expect("no panic");
    }
    let masks: Vec<_> = engine.asked().into_iter().filter_map(|asked| asked.first_mask).collect();
    assert_eq!(masks.len(), 16);
    for mask in masks {
        assert!(may_begin(&mask, "y") && may_begin(&mask, "n") && !may_begin(&mask, "x"));
    }
}

#[tokio::test]
async fn grammars_that_fail_are_reported_and_others_served() {
    let engine = Engine::saying("ok");
    let (router, go) = server(&engine);
    drop(go);
    let refused =
        chat(&router, &ask(&json!({"response_format": {"type": "json_object"}}))).await.refused(500);
    let message = refused["message"].as_str().expect("a message").to_owned();
    assert!(message.contains("grammars") && message.contains("no room for tables"), "{message}");
    chat(&router, &ask(&json!({}))).await.json();
}

#[tokio::test]
async fn a_panic_in_the_making_is_a_failure_too() {
    let make = || -> Result<Grammars, TextError> { panic!("a broken invariant, for this test") };
    let grammars = ServedGrammars::prepare(make).expect("a thread");
    let why = grammars.get().await.map(|_| ()).expect_err("it panicked");
    assert!(why.contains("panicked"), "{why}");
}

/// Compiling is a stage of its own; what it refuses is named as each endpoint's clients know it.
#[tokio::test]
async fn what_does_not_compile_is_named_in_the_endpoints_words() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let schema = json!({"type": "object", "properties": {"a": {"type": "no such type"}}});
    let tools = json!([{"name": "f", "input_schema": schema}]);
    let message = json!({"max_tokens": 4, "messages": [{"role": "user", "content": "hi"}], "tools": tools,
        "tool_choice": {"type": "any"}});
    let answer = post(&router, "/v1/messages", &message).await;
    let text = &answer.text;
    assert!(answer.status == 400 && text.contains("tools.0.input_schema"), "{text}");
    let format = json!({"format": {"type": "json_schema", "name": "x", "schema": schema}});
    let error = post(&router, "/v1/responses", &json!({"input": "hi", "text": format})).await.refused(400);
    assert!(error["param"].as_str().is_some_and(|param| param.starts_with("text.format")), "{error}");
    assert!(engine.asked().is_empty());
}
