//! Anthropic's Messages: what requests become, what replies and errors look like, and that a stream says what a whole message
//! says, block by block.

use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request};
use r1_core::FinishReason;
use r1_engine::{EngineError, Event, Handle};
use r1_server::{ServerConfig, router};
use r1_text::ControlText;
use serde_json::{Value, json};

use crate::replies::cut;
use crate::support::{
    Answer, EOS, Engine, MAX_MODEL_LEN, Script, chat, get, info, model, post, request, send, tokenizer, with,
};

const CALLS: &str = "<｜tool▁calls▁begin｜>";
const CALLS_END: &str = "<｜tool▁calls▁end｜>";

fn call(name: &str, arguments: &str) -> String {
    format!("<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>")
}

fn hi() -> Value {
    json!({"model": "any", "max_tokens": 32, "messages": [{"role": "user", "content": "hi"}]})
}

fn tools() -> Value {
    json!([{"name": "get_time", "input_schema": {"type": "object"}}, {"name": "f", "input_schema": {}}])
}

async fn message(router: &axum::Router, body: &Value) -> Answer {
    post(router, "/v1/messages", body).await
}

/// The refusal's message; its form and its class are checked.
fn refused(answer: &Answer, status: u16, kind: &str) -> String {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text);
    let body = answer.json();
    let keys: Vec<&String> = body.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["type", "error", "request_id"], "{body}");
    assert_eq!((&body["type"], &body["error"]["type"]), (&json!("error"), &json!(kind)), "{body}");
    assert_eq!(body["error"].as_object().unwrap().len(), 2, "{body}");
    for header in ["request-id", "x-request-id"] {
        assert_eq!(answer.headers[header], body["request_id"].as_str().unwrap());
    }
    body["error"]["message"].as_str().unwrap().to_owned()
}

/// A stream's events; their names are checked.
fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.headers["content-type"], "text/event-stream", "{}", answer.text);
    let frames = answer.text.strip_suffix("\n\n").unwrap().split("\n\n").map(|frame| {
        let (name, data) = frame.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: ").unwrap(), data["type"]);
        data
    });
    frames.collect()
}

/// The message that a stream adds up to; the order of its events is checked.
fn add_up(events: &[Value]) -> Value {
    let [start, ping, middle @ .., delta, stop] = events else { panic!("too few events: {events:?}") };
    assert_eq!((&start["type"], &ping["type"]), (&json!("message_start"), &json!("ping")));
    assert_eq!((&delta["type"], &stop["type"]), (&json!("message_delta"), &json!("message_stop")));
    let mut message = start["message"].clone();
    assert_eq!((&message["content"], &message["stop_reason"]), (&json!([]), &Value::Null));
    let mut open: Option<Value> = None;
    let mut json = String::new();
    for event in middle {
        assert_eq!(event["index"], message["content"].as_array().unwrap().len(), "{event}");
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                assert!(open.is_none(), "a block begins inside another: {event}");
                open = Some(event["content_block"].clone());
                json.clear();
            }
            "content_block_delta" => {
                let block = open.as_mut().unwrap();
                let (kind, field) = match event["delta"]["type"].as_str().unwrap() {
                    "thinking_delta" => ("thinking", "thinking"),
                    "signature_delta" => ("thinking", "signature"),
                    "text_delta" => ("text", "text"),
                    "input_json_delta" => {
                        assert_eq!(block["type"], "tool_use");
                        json.push_str(event["delta"]["partial_json"].as_str().unwrap());
                        continue;
                    }
                    other => panic!("{other}"),
                };
                assert_eq!(block["type"], kind);
                let text =
                    format!("{}{}", block[field].as_str().unwrap(), event["delta"][field].as_str().unwrap());
                block[field] = text.into();
            }
            "content_block_stop" => {
                let mut block = open.take().unwrap();
                if block["type"] == "tool_use" {
                    assert_eq!(block["input"], json!({}));
                    block["input"] = serde_json::from_str(&json).unwrap();
                }
                message["content"].as_array_mut().unwrap().push(block);
            }
            other => panic!("{other}"),
        }
    }
    assert!(open.is_none(), "a block never ends");
    for field in ["stop_reason", "stop_sequence"] {
        message[field] = delta["delta"][field].clone();
    }
    message["usage"] = with(&message["usage"], &delta["usage"]);
    message
}

/// Without what differs from request to request.
fn said(mut message: Value) -> Value {
    assert!(message["id"].as_str().unwrap().starts_with("msg_"));
    message["id"] = Value::Null;
    for block in message["content"].as_array_mut().unwrap() {
        if let Some(id) = block.get_mut("id") {
            assert!(id.as_str().unwrap().starts_with("toolu_"));
            *id = Value::Null;
        }
    }
    message
}

#[tokio::test]
async fn the_stream_adds_up_to_the_whole_message_for_any_split() {
    let whole_call =
        format!("why\n</think>\n\nLook:\n{CALLS}{}{CALLS_END}", call("get_time", r#"{"city": "Köln 🍓"}"#));
    let two_calls =
        format!("{CALLS}{}\n{}{CALLS_END}", call("f", "{}"), call("get_time", r#"{"a": [1, {}]}"#));
    let bad_call =
        format!("</think>{CALLS}{}\n{}{CALLS_END}and STOP", call("f", "{city: Paris}"), call("f", "{}"));
    let texts = [
        "Let me think: é, 🍓 and <b>.\n</think>\n\nStrawberry 🍓 has three r's.",
        "only thinking, cut off 🍓",
        "</think>answer at once",
        "a < b </thin and </thinking</think>\n\n\nend STOP here",
        "",
        &whole_call,
        &two_calls,
        &bad_call,
        &whole_call[..whole_call.find("Köln").unwrap()],
    ];
    let ways = [
        json!({}),
        json!({"tools": tools()}),
        json!({"tools": tools(), "stop_sequences": ["STOP", "three r", "Köln"]}),
        json!({"stop_sequences": ["think: é", "answer"]}),
        json!({"thinking": {"type": "disabled"}, "tools": tools()}),
        json!({"thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}}),
    ];
    let mut random = 7;
    for text in texts {
        for way in &ways {
            for reason in [FinishReason::Stop(EOS), FinishReason::Length, FinishReason::Abort] {
                let tokens = cut(text, &mut random);
                let router =
                    Engine::new(vec![Script::tokens(&tokens, reason)]).router(ServerConfig::default());
                let whole = said(message(&router, &with(&hi(), way)).await.json());
                let streaming = with(&with(&hi(), way), &json!({"stream": true}));
                let streamed = said(add_up(&events(&message(&router, &streaming).await)));
                assert_eq!(streamed, whole, "{text:?} as {tokens:?} with {way}");
            }
        }
    }
}

#[tokio::test]
async fn a_message_holds_what_clients_read() {
    let tokens = tokenizer().encode("why\n</think>\n\nbecause").unwrap();
    let close = tokenizer().token_to_id("</think>").unwrap();
    let thinking = tokens.iter().position(|token| *token == close).unwrap() + 1;
    let engine = Engine::saying("why\n</think>\n\nbecause");
    let router = engine.router(ServerConfig::default());
    let answer = message(&router, &hi()).await;
    let prompt = engine.asked()[0].prompt.len();
    let mut reply = answer.json();
    assert_eq!(reply["id"], format!("msg_{}", answer.headers["request-id"].to_str().unwrap()));
    reply["id"] = Value::Null;
    let expected = json!({
        "id": null, "type": "message", "role": "assistant", "model": "tiny-r1",
        "content": [
            {"type": "thinking", "thinking": "why", "signature": ""},
            {"type": "text", "text": "because"},
        ],
        "stop_reason": "end_turn", "stop_sequence": null,
        "usage": {
            "input_tokens": prompt - 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3,
            "output_tokens": tokens.len() + 1, "output_tokens_details": {"thinking_tokens": thinking},
        },
    });
    assert_eq!(reply, expected);
}

#[tokio::test]
async fn a_stream_is_anthropics_event_by_event() {
    let engine = Engine::saying("why</think>because");
    let router = engine.router(ServerConfig::default());
    let answer = message(&router, &with(&hi(), &json!({"stream": true, "model": "org/alias"}))).await;
    let events = events(&answer);
    let prompt = engine.asked()[0].prompt.len();
    assert_eq!(events[0]["message"]["model"], "org/alias");
    assert_eq!(events[0]["message"]["usage"]["input_tokens"], prompt);
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    let mut once = kinds.clone();
    once.dedup();
    let (start, delta, stop) = ("content_block_start", "content_block_delta", "content_block_stop");
    assert_eq!(
        once,
        ["message_start", "ping", start, delta, stop, start, delta, stop, "message_delta", "message_stop"]
    );
    let position = kinds.iter().position(|kind| *kind == stop).unwrap();
    let signature = json!({"type": "signature_delta", "signature": ""});
    assert_eq!(events[position - 1], json!({"type": delta, "index": 0, "delta": signature}));
    let last = &events[events.len() - 2];
    assert_eq!(last["delta"], json!({"stop_reason": "end_turn", "stop_sequence": null}));
    assert_eq!(last["usage"]["input_tokens"], prompt - 3);
}

#[tokio::test]
async fn calls_become_blocks_and_what_is_no_call_stays_text() {
    let cases = [
        (
            format!(
                "why</think>Wait.\n\n{CALLS}{}\n{}{CALLS_END}",
                call("get_time", r#" {"city": "Rome"} "#),
                call("f", "")
            ),
            FinishReason::Stop(EOS),
            json!([
                {"type": "thinking", "thinking": "why", "signature": ""},
                {"type": "text", "text": "Wait."},
                {"type": "tool_use", "id": null, "name": "get_time", "input": {"city": "Rome"}},
                {"type": "tool_use", "id": null, "name": "f", "input": {}},
            ]),
            "tool_use",
        ),
        (
            format!("</think>{CALLS}{}{CALLS_END}", call("f", "[1]")),
            FinishReason::Stop(EOS),
            json!([{"type": "text", "text": "f\n[1]"}]),
            "end_turn",
        ),
        (
            format!(
                "</think>{CALLS}{}\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{{\"a\": \"b",
                call("f", "{}")
            ),
            FinishReason::Length,
            json!([
                {"type": "tool_use", "id": null, "name": "f", "input": {}},
                {"type": "text", "text": "f\n{\"a\": \"b"},
            ]),
            "max_tokens",
        ),
        (
            format!("</think>{CALLS}{}{CALLS_END}", call("unknown", "{}")),
            FinishReason::Stop(EOS),
            json!([{"type": "text", "text": format!("{CALLS}{}{CALLS_END}", call("unknown", "{}"))}]),
            "end_turn",
        ),
    ];
    for (text, reason, content, stop_reason) in cases {
        let tokens = tokenizer().encode(&text).unwrap();
        let router = Engine::new(vec![Script::tokens(&tokens, reason)]).router(ServerConfig::default());
        let reply = said(message(&router, &with(&hi(), &json!({"tools": tools()}))).await.json());
        assert_eq!(reply["content"], content, "{text}");
        assert_eq!(reply["stop_reason"], stop_reason, "{text}");
    }
}

#[tokio::test]
async fn stop_sequences_end_a_message_and_are_named() {
    let router = Engine::saying("</think>one STOP two").router(ServerConfig::default());
    let reply = message(&router, &with(&hi(), &json!({"stop_sequences": ["none", "STOP"]}))).await.json();
    assert_eq!(reply["content"], json!([{"type": "text", "text": "one "}]));
    assert_eq!((&reply["stop_reason"], &reply["stop_sequence"]), (&json!("stop_sequence"), &json!("STOP")));
}

/// A request, and the chat request that it is.
fn twins() -> Vec<(Value, Value)> {
    let function = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}});
    let tool = |name: &str| json!({"name": name, "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}});
    let chat_call = |id: &str, city: &str| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": format!("{{\"city\": \"{city}\"}}")}});
    vec![
        (
            json!({"system": "Be brief."}),
            json!({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]}),
        ),
        (
            json!({
                "system": [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "brief."}],
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": [
                        {"type": "thinking", "thinking": "why", "signature": "x"},
                        {"type": "redacted_thinking", "data": "x"},
                        {"type": "text", "text": "d"},
                    ]},
                    {"role": "user", "content": "e"},
                ],
            }),
            json!({"messages": [
                {"role": "system", "content": "Be\nbrief."}, {"role": "user", "content": "a\nb\nc"},
                {"role": "assistant", "content": "d", "reasoning_content": "why"}, {"role": "user", "content": "e"},
            ]}),
        ),
        // Results come in the order of the calls, and before what the user says.
        (
            json!({"tools": [tool("f")], "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [
                    {"type": "tool_use", "id": "1", "name": "f", "input": {"city": "Rome"}},
                    {"type": "tool_use", "id": "2", "name": "f", "input": {"city": "Oslo"}},
                ]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "2", "content": [{"type": "text", "text": "no"}], "is_error": true},
                    {"type": "tool_result", "tool_use_id": "1", "content": "x"},
                    {"type": "text", "text": "b"},
                ]},
            ]}),
            json!({"tools": [function("f")], "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [chat_call("1", "Rome"), chat_call("2", "Oslo")]},
                {"role": "tool", "tool_call_id": "1", "content": "x"},
                {"role": "tool", "tool_call_id": "2", "content": "Error: no"},
                {"role": "user", "content": "b"},
            ]}),
        ),
        // A prefill is continued, an empty one is none.
        (
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer is ("}]}),
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer is ("}], "continue_final_message": true}),
        ),
        (
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "thinking", "thinking": "w", "signature": ""}]}]}),
            json!({"messages": [{"role": "user", "content": "a"}]}),
        ),
        (json!({"tools": [tool("f")], "tool_choice": {"type": "none"}}), json!({})),
        (
            json!({"tools": [tool("f")], "tool_choice": {"type": "any", "disable_parallel_tool_use": true}}),
            json!({"tools": [function("f")], "tool_choice": "required"}),
        ),
        (
            json!({"tools": [tool("f")], "tool_choice": {"type": "tool", "name": "f"}}),
            json!({"tools": [function("f")]}),
        ),
        (json!({"thinking": {"type": "disabled"}}), json!({"thinking": {"type": "disabled"}})),
        (json!({"thinking": {"type": "adaptive"}}), json!({})),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 0}}), json!({})),
        (
            json!({"temperature": 1, "top_p": 0.5, "top_k": 4, "seed": 9, "min_p": 0.1, "repetition_penalty": 1.5, "priority": 3, "cache_salt": "s",
                "metadata": {"user_id": "me"}, "service_tier": "auto", "frobnicate": {}, "stream": null, "n": 1, "mcp_servers": [], "container": null}),
            json!({"temperature": 1, "top_p": 0.5, "top_k": 4, "seed": 9, "min_p": 0.1, "repetition_penalty": 1.5, "priority": 3, "cache_salt": "s"}),
        ),
        (
            json!({"chat_template_kwargs": {"thinking": false}}),
            json!({"chat_template_kwargs": {"thinking": false}}),
        ),
        (json!({"output_config": {"effort": "low", "format": null}}), json!({"reasoning_effort": "low"})),
        (
            json!({"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}),
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}}),
        ),
    ]
}

#[tokio::test]
async fn a_request_is_the_chat_request_that_says_the_same() {
    let config = || ServerConfig { seed: Some(5), ..ServerConfig::default() };
    for (anthropic, openai) in twins() {
        let engine = Engine::saying("ok");
        let answer = message(&engine.router(config()), &with(&hi(), &anthropic)).await;
        assert_eq!(answer.status, 200, "{anthropic}: {}", answer.text);
        let answer = chat(&engine.router(config()), &with(&hi(), &openai)).await;
        assert_eq!(answer.status, 200, "{openai}: {}", answer.text);
        let asked = engine.asked();
        let shown = |i: usize| tokenizer().decode(&asked[i].prompt, ControlText::Show);
        assert_eq!(shown(0), shown(1), "{anthropic}");
        assert_eq!(asked[0].prompt, asked[1].prompt, "{anthropic}");
        assert_eq!(asked[0].params, asked[1].params, "{anthropic}");
        assert_eq!((asked[0].priority, &asked[0].cache_salt), (asked[1].priority, &asked[1].cache_salt));

        let count = with(&hi(), &anthropic);
        let count = post(&engine.router(config()), "/v1/messages/count_tokens", &count).await;
        assert_eq!(count.json(), json!({"input_tokens": asked[0].prompt.len()}), "{anthropic}");
    }
}

#[tokio::test]
async fn thinking_is_shown_unless_it_is_switched_off_or_omitted() {
    let text = |text: &str| json!([{"type": "text", "text": text}]);
    let thought =
        json!([{"type": "thinking", "thinking": "why", "signature": ""}, {"type": "text", "text": "so"}]);
    for (thinking, script, content) in [
        (json!(null), "why</think>so", thought.clone()),
        (
            json!({"type": "enabled", "budget_tokens": 5, "display": "summarized"}),
            "why</think>so",
            thought.clone(),
        ),
        (json!({"type": "adaptive"}), "why</think>so", thought),
        (json!({"type": "adaptive", "display": "omitted"}), "why</think>so", text("so")),
        (json!({"type": "disabled"}), "so", text("so")),
    ] {
        let router = Engine::saying(script).router(ServerConfig::default());
        let reply = message(&router, &with(&hi(), &json!({"thinking": thinking}))).await.json();
        assert_eq!(reply["content"], content, "{thinking}");
    }
}

#[tokio::test]
async fn what_is_wrong_is_named_in_anthropics_words() {
    let messages = |messages: Value| json!({"messages": messages});
    let blocks = |role: &str, blocks: Value| json!({"messages": [{"role": "user", "content": "a"}, {"role": role, "content": blocks}]});
    let used = |then: Value| {
        let uses = json!([{"type": "tool_use", "id": "1", "name": "f", "input": {}}]);
        json!({"messages": [{"role": "assistant", "content": uses}, then]})
    };
    let result = |id: &str| json!({"type": "tool_result", "tool_use_id": id});
    let image =
        json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}});
    let cases = [
        (json!({"max_tokens": null}), "max_tokens: missing"),
        (json!({"max_tokens": 0}), "max_tokens: is 0"),
        (json!({"max_tokens": "all"}), "max_tokens: must be"),
        (json!({"temperature": 3}), "temperature: is 3"),
        (json!({"top_k": "all"}), "top_k: must be"),
        (json!({"stop_sequences": "x"}), "stop_sequences: must be a list"),
        (json!({"stop_sequences": [""]}), "stop_sequences: an empty string"),
        (json!({"stop": ["x"]}), "stop: not supported yet; use `stop_sequences`"),
        (json!({"n": 2}), "n: not supported"),
        (json!({"mcp_servers": [{"url": "x"}]}), "mcp_servers: not supported"),
        (json!({"container": "x"}), "container: not supported"),
        (json!({"messages": null}), "messages: missing"),
        (messages(json!([])), "messages: empty"),
        (messages(json!([{"role": "assistant", "content": ""}])), "messages: empty"),
        (messages(json!(["hi"])), "messages.0: must be an object"),
        (messages(json!([{"role": "tool", "content": "x"}])), "messages.0.role: must be"),
        (messages(json!([{"role": "user"}])), "messages.0.content: missing"),
        (messages(json!([{"role": "user", "content": 5}])), "messages.0.content: must be"),
        (blocks("user", json!(["x"])), "messages.1.content.0: must be an object"),
        (blocks("user", json!([{"text": "x"}])), "messages.1.content.0.type: must be"),
        (blocks("user", json!([{"type": "text", "text": 5}])), "messages.1.content.0.text: must be"),
        (
            blocks("user", json!([{"type": "text", "text": "a"}, image])),
            "messages.1.content.1: blocks of type \"image\"",
        ),
        (
            blocks("user", json!([{"type": "document", "source": {}}])),
            "messages.1.content.0: blocks of type \"document\"",
        ),
        (
            blocks("user", json!([{"type": "tool_use", "id": "1", "name": "f", "input": {}}])),
            "messages.1.content.0: blocks of type",
        ),
        (
            blocks("assistant", json!([{"type": "tool_result", "tool_use_id": "1"}])),
            "messages.1.content.0: blocks of type",
        ),
        (
            blocks("assistant", json!([{"type": "tool_use", "id": "1", "name": "f", "input": "x"}])),
            "messages.1.content.0.input: must be",
        ),
        (
            blocks("assistant", json!([{"type": "tool_use", "id": "1", "name": "f", "input": {}}])),
            "messages.1.content.0: the next message",
        ),
        (used(json!({"role": "user", "content": "b"})), "messages.0.content.0: the next message"),
        (used(json!({"role": "user", "content": [result("2")]})), "messages.1.content.0.tool_use_id: \"2\""),
        (
            used(json!({"role": "user", "content": [result("1"), result("1")]})),
            "messages.1.content.1.tool_use_id: \"1\"",
        ),
        (
            used(json!({"role": "user", "content": [with(&result("1"), &json!({"content": [image]}))]})),
            "messages.1.content.0.content.0: blocks of type",
        ),
        (json!({"system": 5}), "system: must be"),
        (json!({"system": [image]}), "system.0: blocks of type"),
        (json!({"tools": [{"name": "f"}]}), "tools.0.input_schema: missing"),
        (json!({"tools": [{"input_schema": {}}]}), "tools.0.name: missing"),
        (json!({"tools": [{"name": "f", "input_schema": 5}]}), "tools.0.input_schema: must be"),
        (json!({"tools": [{"name": "a b", "input_schema": {}}]}), "tools.0.name: must be"),
        (
            json!({"tools": [tools()[0], {"type": "web_search_20250305", "name": "web_search"}]}),
            "tools.1: not supported yet; \"web_search_20250305\"",
        ),
        (json!({"tool_choice": {"type": "any"}}), "tool_choice: "),
        (json!({"tool_choice": {"type": "tool"}}), "tool_choice.name: missing"),
        (json!({"tool_choice": {"type": "function"}}), "tool_choice.type: must be"),
        (
            json!({"tools": tools(), "tool_choice": {"type": "tool", "name": "g"}}),
            "tool_choice: the function \"g\"",
        ),
        (json!({"thinking": {"type": "on"}}), "thinking.type: must be"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": -1}}), "thinking.budget_tokens: "),
        (json!({"thinking": true}), "thinking: must be an object"),
        (json!({"output_config": {"effort": "huge"}}), "output_config.effort: must be"),
        (json!({"output_config": {"format": {"type": "xml"}}}), "output_config.format.type: must be"),
        (json!({"output_format": {"type": "json_schema", "schema": 5}}), "output_format.schema: must be"),
        (
            json!({"output_format": {"type": "json_schema", "schema": {}}, "response_format": {"type": "json_object"}}),
            "output_format: contradicts",
        ),
        (json!({"max_tokens": 100_000}), "this model's"),
    ];
    let router = Engine::saying("ok").router(ServerConfig::default());
    for (fields, expected) in cases {
        let answer = message(&router, &with(&hi(), &fields)).await;
        let told = refused(&answer, 400, "invalid_request_error");
        if expected == "this model's" {
            assert!(told.contains("100000") && told.contains(&MAX_MODEL_LEN.to_string()), "{told}");
        } else {
            assert!(told.starts_with(expected), "{fields}: {told}");
        }
    }
    let answer = send(&router, request(Method::POST, "/v1/messages", "{")).await;
    assert!(refused(&answer, 400, "invalid_request_error").contains("JSON"));
}

#[tokio::test]
async fn every_error_has_anthropics_form() {
    let config = ServerConfig {
        api_keys: ["key"].iter().collect(),
        strict_model_name: true,
        max_body_bytes: 2000,
        root_path: "/proxy".into(),
        ..ServerConfig::default()
    };
    let router = Engine::saying("ok").router(config);
    let keyed = |method: Method, path: &str, body: &str| {
        let mut request = request(method, path, body);
        request.headers_mut().insert("authorization", "Bearer key".parse().unwrap());
        request
    };
    for path in ["/v1/messages", "/messages", "/proxy/v1/messages", "/v1/messages/count_tokens"] {
        refused(&post(&router, path, &hi()).await, 401, "authentication_error");
        let answer = send(&router, keyed(Method::POST, path, &hi().to_string())).await;
        assert!(refused(&answer, 404, "not_found_error").contains("tiny-r1"));
        let named = with(&hi(), &json!({"model": "tiny-r1"})).to_string();
        let answer = send(&router, keyed(Method::POST, path, &named)).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(answer.headers["request-id"], answer.headers["x-request-id"]);
        let answer = send(&router, keyed(Method::DELETE, path, "")).await;
        refused(&answer, 405, "invalid_request_error");
        assert_eq!(answer.headers["allow"], "POST");
        let answer = send(&router, keyed(Method::POST, path, &" ".repeat(2001))).await;
        refused(&answer, 413, "request_too_large");
    }
    refused(&get(&router, "/v1/messages/batches").await, 404, "not_found_error");
    let mut request = keyed(Method::POST, "/v1/messages", "{}");
    request.headers_mut().insert("x-long", "x".repeat(40_000).parse().unwrap());
    refused(&send(&router, request).await, 431, "invalid_request_error");
    // Elsewhere nothing has changed.
    let answer = get(&router, "/v1/nothing").await;
    answer.refused(404);
    assert!(!answer.headers.contains_key("request-id"));
}

#[tokio::test]
async fn overload_loading_and_time_limits_are_told_apart() {
    let mut info = info();
    (info.max_num_seqs, info.max_queued) = (1, 1);
    let (handle, inbox) = Handle::channel(info);
    let loading = router(ServerConfig::default(), model(), handle.clone());
    let answer = message(&loading, &hi()).await;
    refused(&answer, 503, "overloaded_error");
    assert!(answer.headers.contains_key("retry-after"));
    inbox.set_status(r1_engine::Status::Ready);
    let config = ServerConfig { request_timeout: Some(Duration::from_millis(50)), ..ServerConfig::default() };
    let router = router(config, model(), handle);
    // Nobody takes them out of the inbox, which holds two.
    for _ in 0..2 {
        refused(&message(&router, &hi()).await, 408, "timeout_error");
    }
    let answer = message(&router, &hi()).await;
    refused(&answer, 429, "rate_limit_error");
    assert!(answer.headers.contains_key("retry-after"));
}

#[tokio::test]
async fn a_failing_step_is_an_error_or_an_error_event() {
    let mut failing = Script::endless("so far");
    failing.hold = false;
    failing.events.push(Event::Failed(EngineError::Step("boom".into())));
    let router = Engine::new(vec![failing]).router(ServerConfig::default());
    assert!(refused(&message(&router, &hi()).await, 500, "api_error").contains("boom"));
    let answer = message(&router, &with(&hi(), &json!({"stream": true}))).await;
    assert_eq!(answer.status, 200);
    let events = events(&answer);
    let last = &events[events.len() - 1];
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("api_error")));
    assert_eq!(last["request_id"], answer.headers["request-id"].to_str().unwrap());
    assert!(!answer.text.contains("[DONE]"));
}

#[tokio::test]
async fn counting_goes_beyond_the_context_and_needs_no_max_tokens() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let count = |words: usize| {
        let body = json!({"model": "any", "messages": [{"role": "user", "content": "7 ".repeat(words)}]});
        let router = router.clone();
        async move { post(&router, "/v1/messages/count_tokens", &body).await }
    };
    let (short, long) = (count(10).await.json(), count(MAX_MODEL_LEN).await.json());
    let [short, long] = [short, long].map(|count| count["input_tokens"].as_u64().unwrap() as usize);
    assert!(long > MAX_MODEL_LEN && long - short >= MAX_MODEL_LEN - 10, "{short} {long}");
    refused(&count(1_000_000).await, 400, "invalid_request_error");
    assert!(engine.asked().is_empty(), "nothing is generated");
}

#[tokio::test]
async fn anthropics_headers_are_accepted() {
    let router = Engine::saying("ok").router(ServerConfig::default());
    let request = Request::post("/v1/messages")
        .header("content-type", "application/json")
        .header("anthropic-version", "2023-06-01")
        .header("anthropic-beta", "fine-grained-tool-streaming-2025-05-14")
        .body(Body::from(hi().to_string()));
    assert_eq!(send(&router, request.unwrap()).await.status, 200);
}
