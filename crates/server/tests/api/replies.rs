//! What replies say, and that a stream says the same as a whole reply.

use std::collections::HashMap;

use axum::http::Method;
use r1_core::{FinishReason, TokenId};
use r1_engine::{EngineError, Event};
use r1_server::{ReasoningParser, ServerConfig, router};
use serde_json::{Value, json};

use crate::support::{EOS, Engine, Script, chat, complete, model, request, send, tokenizer, with};

fn hi() -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}]})
}

/// Cuts `text` into tokens in one of very many ways: any token whose bytes stand there may be taken. Control tokens are
/// sometimes taken whole and sometimes spelled out.
pub(crate) fn cut(text: &str, random: &mut u64) -> Vec<TokenId> {
    let tokenizer = tokenizer();
    let mut by_bytes: HashMap<&[u8], TokenId> = HashMap::new();
    for id in (0..tokenizer.vocab_size() as u32).map(TokenId) {
        by_bytes.insert(tokenizer.token_bytes(id), id);
    }
    let bytes = text.as_bytes();
    let mut at = 0;
    let mut tokens = Vec::new();
    while at < bytes.len() {
        let fits: Vec<usize> = (1..=30.min(bytes.len() - at))
            .filter(|len| by_bytes.contains_key(&bytes[at..at + len]))
            .collect();
        *random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let len = fits[(*random >> 33) as usize % fits.len()];
        tokens.push(by_bytes[&bytes[at..at + len]]);
        at += len;
    }
    tokens
}

fn join(field: &mut Value, more: &Value) {
    match (&mut *field, more) {
        (_, Value::Null) => {}
        (Value::Null, more) => *field = more.clone(),
        (Value::String(text), Value::String(more)) => text.push_str(more),
        (Value::Array(list), Value::Array(more)) => list.extend(more.iter().cloned()),
        (Value::Object(map), Value::Object(more)) => {
            for (name, value) in more {
                join(map.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
        (field, more) => *field = more.clone(),
    }
}

/// The reply that a stream adds up to, in the form of a whole reply.
fn add_up(events: &[Value]) -> Value {
    let mut choices: Vec<Value> = Vec::new();
    let mut usage = Value::Null;
    for event in events {
        join(&mut usage, &event["usage"]);
        for gained in event["choices"].as_array().unwrap() {
            let index = gained["index"].as_u64().unwrap() as usize;
            while choices.len() <= index {
                choices.push(Value::Null);
            }
            for (name, value) in gained.as_object().unwrap() {
                let name = if name == "delta" { "message" } else { name };
                let mut one = serde_json::Map::new();
                one.insert(name.to_owned(), value.clone());
                join(&mut choices[index], &Value::Object(one));
            }
        }
    }
    json!({"choices": choices, "usage": usage})
}

/// Drops nulls: a stream is silent where a whole reply says null.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            map.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), without_nulls(v))).collect()
        }
        Value::Array(list) => list.iter().map(without_nulls).collect(),
        other => other.clone(),
    }
}

#[tokio::test]
async fn the_stream_adds_up_to_the_whole_reply_for_any_split() {
    let texts = [
        "Let me think: é, 🍓 and <b>.\n</think>\n\nStrawberry 🍓 has three r's.",
        "only thinking, cut off 🍓",
        "</think>answer at once",
        "a < b </thin and </thinking</think>\n\n\nend STOP here",
        "",
    ];
    let ways = [
        json!({}),
        json!({"stop": ["STOP", "three r"]}),
        json!({"stop": "three r", "include_stop_str_in_output": true}),
        json!({"stop": ["think: é", "answer"]}),
        json!({"logprobs": true, "top_logprobs": 2}),
        json!({"separate_reasoning": false}),
        json!({"skip_special_tokens": false}),
        json!({"n": 2, "logprobs": true}),
    ];
    let mut random = 7;
    for text in texts {
        for way in &ways {
            let mut message = None;
            for _ in 0..6 {
                let tokens = cut(text, &mut random);
                let other = cut(text, &mut random);
                let ends = |tokens: &[TokenId]| Script::tokens(tokens, FinishReason::Stop(EOS));
                let scripts = if way["n"] == 2 {
                    vec![ends(&tokens), ends(&other), ends(&tokens), ends(&other)]
                } else {
                    vec![ends(&tokens)]
                };
                let router = Engine::new(scripts).router(ServerConfig::default());
                let body = with(&hi(), way);
                let whole = chat(&router, &body).await.json();
                let streaming =
                    with(&body, &json!({"stream": true, "stream_options": {"include_usage": true}}));
                let streamed = add_up(&chat(&router, &streaming).await.events());
                let said = whole["choices"][0]["message"].clone();
                assert_eq!(
                    *message.get_or_insert_with(|| said.clone()),
                    said,
                    "{text:?} as {tokens:?} with {way}"
                );
                for part in ["choices", "usage"] {
                    let (whole, streamed) = (without_nulls(&whole[part]), without_nulls(&streamed[part]));
                    assert_eq!(streamed, whole, "{part} of {text:?} as {tokens:?} with {way}");
                }
            }
        }
    }
}

#[tokio::test]
async fn text_completions_add_up_too() {
    let mut random = 11;
    for way in [
        json!({}),
        json!({"stop": ["STOP"], "logprobs": 2}),
        json!({"echo": true}),
        json!({"logprobs": 0, "return_tokens_as_token_ids": true}),
    ] {
        for _ in 0..10 {
            let tokens = cut("<think>no 🍓 parser</think> here STOP there", &mut random);
            let router = Engine::new(vec![Script::tokens(&tokens, FinishReason::Length)])
                .router(ServerConfig::default());
            let body = with(&json!({"prompt": ["hi", "ho"]}), &way);
            let whole = complete(&router, &body).await.json();
            let streaming = with(&body, &json!({"stream": true, "stream_options": {"include_usage": true}}));
            let streamed = add_up(&complete(&router, &streaming).await.events());
            assert_eq!(
                without_nulls(&streamed["choices"]),
                without_nulls(&whole["choices"]),
                "{tokens:?} {way}"
            );
            assert_eq!(streamed["usage"], whole["usage"]);
        }
    }
}

#[tokio::test]
async fn a_chat_reply_holds_what_clients_read() {
    let router = Engine::saying("why\n</think>\n\nbecause").router(ServerConfig::default());
    let reply = chat(&router, &hi()).await.json();
    assert!(reply["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(reply["object"], "chat.completion");
    assert!(reply["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(reply["model"], "tiny-r1");
    assert_eq!(reply["system_fingerprint"], Value::Null);
    let expected = json!({
        "index": 0,
        "message": {"role": "assistant", "content": "because", "reasoning_content": "why", "reasoning": "why"},
        "logprobs": null, "finish_reason": "stop", "stop_reason": null, "matched_stop": 1,
    });
    assert_eq!(reply["choices"], json!([expected]));
}

#[tokio::test]
async fn a_stream_begins_with_the_role_and_ends_with_the_reason_usage_and_done() {
    let engine = Engine::saying("why</think>because");
    let router = engine.router(ServerConfig::default());
    let plain = chat(&router, &with(&hi(), &json!({"stream": true}))).await;
    assert_eq!(plain.headers["cache-control"], "no-cache");
    assert_eq!(plain.headers["x-accel-buffering"], "no");
    let events = plain.events();
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(
        events.iter().all(|event| event.get("usage").is_none() && event["object"] == "chat.completion.chunk")
    );
    assert!(events.iter().all(|event| event["id"] == events[0]["id"]));
    let last = &events[events.len() - 1]["choices"][0];
    assert_eq!(
        (&last["delta"], &last["finish_reason"], &last["matched_stop"]),
        (&json!({}), &json!("stop"), &json!(1))
    );
    for event in &events[1..events.len() - 1] {
        let delta = event["choices"][0]["delta"].as_object().unwrap();
        assert_eq!(event["choices"][0]["finish_reason"], Value::Null);
        assert_eq!(delta.get("reasoning"), delta.get("reasoning_content"));
        assert!(delta.contains_key("content") != delta.contains_key("reasoning"), "{delta:?}");
    }

    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let events = chat(&router, &with(&hi(), &options)).await.events();
    let (usage, rest) = events.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert!(usage["usage"]["total_tokens"].is_u64());
    assert!(rest.iter().all(|event| event.get("usage") == Some(&Value::Null)));
}

#[tokio::test]
async fn usage_counts_what_was_read_and_written() {
    let tokens = tokenizer().encode("why</think>because").unwrap();
    let close = tokenizer().token_to_id("</think>").unwrap();
    let thinking = tokens.iter().position(|token| *token == close).unwrap() + 1;
    let engine = Engine::saying("why</think>because");
    let router = engine.router(ServerConfig::default());
    let usage = chat(&router, &with(&hi(), &json!({"n": 2}))).await.json()["usage"].clone();
    let prompt = engine.asked()[0].prompt.len();
    let completion = 2 * (tokens.len() + 1);
    let expected = json!({
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 2 * thinking},
        "prompt_cache_hit_tokens": 3, "prompt_cache_miss_tokens": prompt - 3,
    });
    assert_eq!(without_nulls(&usage), without_nulls(&expected));
}

#[tokio::test]
async fn stop_strings_end_the_text_the_count_and_the_generation() {
    let text = "one two STOP three four";
    let tokens = tokenizer().encode(text).unwrap();
    let script = Script { hold: true, ..Script::endless(text) };
    let engine = Engine::new(vec![script]);
    let router = engine.router(ServerConfig::default());
    let reply = complete(&router, &json!({"prompt": "hi", "stop": ["none", "STOP"]})).await.json();
    let choice = &reply["choices"][0];
    assert_eq!(choice["text"], "one two ");
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!((&choice["stop_reason"], &choice["matched_stop"]), (&json!("STOP"), &json!("STOP")));
    let mut read = String::new();
    let counted = tokens.iter().take_while(|token| {
        let more = !read.contains("STOP");
        read.push_str(&String::from_utf8_lossy(tokenizer().token_bytes(**token)));
        more
    });
    assert_eq!(reply["usage"]["completion_tokens"], counted.count());
    crate::support::eventually("the generation is aborted", || engine.aborted() == [engine.asked()[0].id])
        .await;

    let kept = json!({"prompt": "hi", "stop": "STOP", "include_stop_str_in_output": true});
    assert_eq!(complete(&router, &kept).await.json()["choices"][0]["text"], "one two STOP");
}

#[tokio::test]
async fn reasons_to_end_are_told_apart() {
    let tokens = tokenizer().encode("word").unwrap();
    let stop = tokenizer().encode("!").unwrap()[0];
    let cases = [
        (json!({}), FinishReason::Stop(EOS), json!("stop"), json!(null), json!(1), "word"),
        (
            json!({"stop_token_ids": [stop.0]}),
            FinishReason::Stop(stop),
            json!("stop"),
            json!(stop.0),
            json!(stop.0),
            "word",
        ),
        (
            json!({"stop_token_ids": [stop.0], "include_stop_str_in_output": true}),
            FinishReason::Stop(stop),
            json!("stop"),
            json!(stop.0),
            json!(stop.0),
            "word!",
        ),
        (
            json!({"ignore_eos": true, "stop_token_ids": [1]}),
            FinishReason::Stop(EOS),
            json!("stop"),
            json!(1),
            json!(1),
            "word",
        ),
        (json!({}), FinishReason::Length, json!("length"), json!(null), json!(null), "word"),
        (json!({}), FinishReason::Abort, json!("abort"), json!(null), json!(null), "word"),
    ];
    for (fields, ends, finish_reason, stop_reason, matched_stop, text) in cases {
        let router = Engine::new(vec![Script::tokens(&tokens, ends)]).router(ServerConfig::default());
        let reply = complete(&router, &with(&json!({"prompt": "hi"}), &fields)).await.json();
        let choice = &reply["choices"][0];
        assert_eq!(choice["finish_reason"], finish_reason, "{fields} {ends:?}");
        assert_eq!(
            (&choice["stop_reason"], &choice["matched_stop"]),
            (&stop_reason, &matched_stop),
            "{fields}"
        );
        assert_eq!(choice["text"], text, "{fields} {ends:?}");
    }
}

#[tokio::test]
async fn several_choices_keep_their_order_and_seeds() {
    let engine = Engine::new(["zero", "one", "two", "three"].map(Script::text).to_vec());
    let router = engine.router(ServerConfig::default());
    let body = json!({"prompt": ["a", "b"], "n": 2, "seed": 40, "echo": true});
    let reply = complete(&router, &body).await.json();
    let texts: Vec<&str> =
        reply["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["azero", "aone", "btwo", "bthree"]);
    let seeds: Vec<u64> = engine.asked().iter().map(|asked| asked.params.seed).collect();
    assert_eq!(seeds, [40, 41, 40, 41], "a prompt draws the same alone and in a list");
    let prompt_tokens = engine.asked()[0].prompt.len() + engine.asked()[2].prompt.len();
    assert_eq!(reply["usage"]["prompt_tokens"], prompt_tokens, "each prompt once");
}

#[tokio::test]
async fn token_ids_are_echoed_as_text() {
    let router = Engine::saying("!").router(ServerConfig::default());
    let ids: Vec<u32> = tokenizer().encode("so what").unwrap().iter().map(|token| token.0).collect();
    let reply = complete(&router, &json!({"prompt": ids, "echo": true})).await.json();
    assert_eq!(reply["choices"][0]["text"], "so what!");
}

#[tokio::test]
async fn logprobs_have_openais_shapes() {
    let tokens = cut("é🍓a", &mut 3);
    let router =
        Engine::new(vec![Script::tokens(&tokens, FinishReason::Length)]).router(ServerConfig::default());
    let closed = json!({"thinking": {"type": "disabled"}, "logprobs": true, "top_logprobs": 2});
    let reply = chat(&router, &with(&hi(), &closed)).await.json();
    let content = reply["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), tokens.len());
    let bytes: Vec<u8> = content
        .iter()
        .flat_map(|entry| entry["bytes"].as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8))
        .collect();
    assert_eq!(bytes, "é🍓a".as_bytes());
    let top = content[0]["top_logprobs"].as_array().unwrap();
    assert_eq!((content[0]["logprob"].as_f64(), top.len()), (Some(-0.25), 2));
    assert_eq!((&top[0]["token"], &top[0]["bytes"]), (&content[0]["token"], &content[0]["bytes"]));
    assert_eq!(top[1]["logprob"], -1.25);
    let without = chat(&router, &hi()).await.json();
    assert_eq!(without["choices"][0]["logprobs"], Value::Null);

    let named = json!({"prompt": "hi", "logprobs": 1, "return_tokens_as_token_ids": true});
    let reply = complete(&router, &named).await.json();
    let logprobs = &reply["choices"][0]["logprobs"];
    let names: Vec<String> = tokens.iter().map(|token| format!("token_id:{token}")).collect();
    assert_eq!(logprobs["tokens"], json!(names));
    assert_eq!(logprobs["token_logprobs"], json!(vec![-0.25; tokens.len()]));
    assert_eq!(logprobs["top_logprobs"][0], json!({(&*names[0]): -0.25}));
    let mut bytes = Vec::new();
    let mut offsets = Vec::new();
    for token in &tokens {
        offsets.push(bytes.iter().filter(|byte: &&u8| **byte & 0xC0 != 0x80).count());
        bytes.extend_from_slice(tokenizer().token_bytes(*token));
    }
    assert_eq!(logprobs["text_offset"], json!(offsets));
}

#[tokio::test]
async fn without_a_reasoning_parser_the_tags_stay() {
    let engine = Engine::saying("why\n</think>\n\nbecause");
    let mut model = model();
    model.reasoning_parser = ReasoningParser::None;
    let router = router(ServerConfig::default(), model, engine.handle.clone());
    let message = chat(&router, &hi()).await.json()["choices"][0]["message"].clone();
    assert_eq!(message["content"], "<think>\nwhy\n</think>\n\nbecause");
    assert_eq!((&message["reasoning"], &message["reasoning_content"]), (&Value::Null, &Value::Null));
}

#[tokio::test]
async fn an_unseparated_reply_begins_with_the_prompts_tag_which_is_no_token() {
    let engine = Engine::saying("why\n</think>\n\nbecause");
    let router = engine.router(ServerConfig::default());
    let body = with(&hi(), &json!({"separate_reasoning": false, "logprobs": true}));
    let whole = chat(&router, &body).await.json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["content"], "<think>\nwhy\n</think>\n\nbecause");
    let num_tokens = tokenizer().encode("why\n</think>\n\nbecause").unwrap().len() + 1;
    assert_eq!(choice["logprobs"]["content"].as_array().unwrap().len(), num_tokens);
    assert_eq!(whole["usage"]["completion_tokens"], num_tokens);
    let streamed = chat(&router, &with(&body, &json!({"stream": true}))).await.events();
    assert_eq!(streamed[1]["choices"][0]["delta"], json!({"content": "<think>\n"}));
    assert_eq!(add_up(&streamed)["choices"][0]["message"]["content"], choice["message"]["content"]);

    let closed = with(&body, &json!({"thinking": {"type": "disabled"}}));
    let reply = chat(&router, &closed).await.json();
    assert_eq!(reply["choices"][0]["message"]["content"], "why\n</think>\n\nbecause");
}

#[tokio::test]
async fn a_failing_step_is_a_500_or_an_error_event_and_the_next_request_is_served() {
    let mut failing = Script::endless("so far");
    failing.hold = false;
    failing.events.push(Event::Failed(EngineError::Step("boom".into())));
    let engine = Engine::new(vec![failing.clone(), failing, Script::text("fine")]);
    let router = engine.router(ServerConfig::default());
    let error = chat(&router, &hi()).await.refused(500);
    assert_eq!(error["code"], "engine_error");
    assert!(error["message"].as_str().unwrap().contains("boom"));

    let body = with(&hi(), &json!({"stream": true})).to_string();
    let answer = send(&router, request(Method::POST, "/v1/chat/completions", &body)).await;
    assert_eq!(answer.status, 200);
    let events = answer.events();
    assert_eq!(events[events.len() - 1]["error"]["code"], "engine_error");
    assert_eq!(chat(&router, &hi()).await.status, 200);
}
