//! `/v1/responses`: replies and their streams, conversations that go on, what is stored, what is refused.

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, header};
use r1_core::FinishReason;
use r1_engine::{EngineError, Event};
use r1_server::ServerConfig;
use r1_text::ControlText;
use serde_json::{Value, json};

use crate::support::{
    Answer, Asked, Engine, MAX_MODEL_LEN, Script, get, post, request, send, tokenizer, with,
};

const CALLS: &str = "let me see</think>\n\nLooking.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n\
                     ```json\n{\"city\": \"Oslo\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n\
                     ```json\n{\"city\": \"Rome\"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";

fn hi() -> Value {
    json!({"input": "hi"})
}

fn weather() -> Value {
    json!([{
        "type": "function", "name": "get_weather", "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }])
}

async fn respond(router: &Router, body: &Value) -> Answer {
    post(router, "/v1/responses", body).await
}

async fn created(router: &Router, body: &Value) -> Value {
    let answer = respond(router, body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()
}

async fn delete(router: &Router, path: &str) -> Answer {
    send(router, request(Method::DELETE, path, "")).await
}

async fn with_key(router: &Router, method: Method, path: &str, key: &str, body: &Value) -> Answer {
    let body = if method == Method::POST { body.to_string() } else { String::new() };
    let mut request: Request<Body> = request(method, path, &body);
    request.headers_mut().insert(header::AUTHORIZATION, format!("Bearer {key}").parse().unwrap());
    send(router, request).await
}

/// What the model was given to read.
fn read(asked: &Asked) -> String {
    tokenizer().decode(&asked.prompt, ControlText::Show)
}

/// A stream's events, each named as its data says and numbered from 0.
fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.headers[header::CONTENT_TYPE], "text/event-stream");
    let mut events = Vec::new();
    for block in answer.text.split_terminator("\n\n") {
        let (name, data) = block.split_once('\n').unwrap_or_else(|| panic!("{block}"));
        let event: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: "), event["type"].as_str(), "{block}");
        assert_eq!(event["sequence_number"], events.len(), "{block}");
        events.push(event);
    }
    events
}

/// A response without what differs from one to the next: ids and times, which are checked to be there.
fn timeless(response: &Value) -> Value {
    let mut response = response.clone();
    assert!(response["id"].as_str().unwrap().starts_with("resp_"));
    assert!(response["created_at"].as_u64().unwrap() > 1_700_000_000);
    for name in ["id", "created_at", "completed_at"] {
        response.as_object_mut().unwrap().remove(name);
    }
    for item in response["output"].as_array_mut().unwrap() {
        let prefix = match item["type"].as_str().unwrap() {
            "message" => "msg_",
            "reasoning" => "rs_",
            "function_call" => {
                assert!(item["call_id"].as_str().unwrap().starts_with("call_"));
                item.as_object_mut().unwrap().remove("call_id");
                "fc_"
            }
            other => panic!("{other}"),
        };
        assert!(item["id"].as_str().unwrap().starts_with(prefix), "{item}");
        item.as_object_mut().unwrap().remove("id");
    }
    response
}

/// The output items that a stream's deltas add up to, checked against what the stream says when they are done.
fn add_up(events: &[Value]) -> Vec<Value> {
    let mut items: Vec<Value> = Vec::new();
    let mut done = 0;
    for event in events {
        let kind = event["type"].as_str().unwrap().strip_prefix("response.").unwrap();
        let index = event["output_index"].as_u64().map(|index| index as usize);
        if let (Some(index), Some(id)) = (index, event["item_id"].as_str()) {
            assert_eq!(items[index]["id"], id, "{event}");
        }
        match (kind, index) {
            ("output_item.added", Some(index)) => {
                assert_eq!((index, index), (items.len(), done), "items come one after the other");
                assert_eq!(event["item"]["status"], "in_progress");
                items.push(event["item"].clone());
            }
            ("content_part.added", Some(index)) => {
                items[index]["content"].as_array_mut().unwrap().push(event["part"].clone());
            }
            ("output_text.delta" | "reasoning_text.delta", Some(index)) => {
                let part = &mut items[index]["content"][event["content_index"].as_u64().unwrap() as usize];
                let text = part["text"].as_str().unwrap().to_owned() + event["delta"].as_str().unwrap();
                assert!(!event["delta"].as_str().unwrap().is_empty());
                part["text"] = text.into();
                if let Some(more) = event["logprobs"].as_array() {
                    part["logprobs"].as_array_mut().unwrap().extend(more.iter().cloned());
                }
            }
            ("function_call_arguments.delta", Some(index)) => {
                let arguments = items[index]["arguments"].as_str().unwrap().to_owned();
                items[index]["arguments"] = (arguments + event["delta"].as_str().unwrap()).into();
            }
            ("output_text.done" | "reasoning_text.done", Some(index)) => {
                let part = &items[index]["content"][0];
                assert_eq!(part["text"], event["text"]);
                assert_eq!(part.get("logprobs"), event.get("logprobs"));
            }
            ("function_call_arguments.done", Some(index)) => {
                assert_eq!(items[index]["arguments"], event["arguments"]);
                assert_eq!(items[index]["name"], event["name"]);
            }
            ("content_part.done", Some(index)) => assert_eq!(items[index]["content"][0], event["part"]),
            ("output_item.done", Some(index)) => {
                items[index]["status"] = event["item"]["status"].clone();
                assert_eq!(items[index], event["item"]);
                done += 1;
            }
            ("created" | "in_progress", None) => {
                assert_eq!(event["response"]["status"], "in_progress");
                assert_eq!(event["response"]["output"], json!([]));
                assert_eq!(event["response"]["usage"], Value::Null);
            }
            ("completed" | "incomplete" | "failed", None) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(done, items.len(), "every item is done");
    items
}

#[tokio::test]
async fn a_response_has_openais_shape() {
    let engine = Engine::saying("why\n</think>\n\nbecause");
    let router = engine.router(ServerConfig::default());
    let body = json!({
        "model": "tiny-r1", "input": "hi", "instructions": "be brief", "temperature": 0.7, "max_output_tokens": 50,
        "metadata": {"a": "b"}, "user": "u1", "reasoning": {"effort": "low", "summary": "auto"},
        "service_tier": "auto", "prompt_cache_key": "p", "stream_options": {"include_obfuscation": false},
    });
    let response = created(&router, &body).await;
    assert!(response["completed_at"].as_u64() >= response["created_at"].as_u64());
    let tokens = tokenizer().encode("why\n</think>\n\nbecause").unwrap();
    let close = tokenizer().token_to_id("</think>").unwrap();
    let thinking = tokens.iter().position(|token| *token == close).unwrap() + 1;
    let (prompt, written) = (engine.asked()[0].prompt.len(), tokens.len() + 1);
    let expected = json!({
        "object": "response", "status": "completed", "background": false, "error": null,
        "incomplete_details": null, "model": "tiny-r1",
        "output": [
            {"type": "reasoning", "status": "completed", "summary": [], "encrypted_content": null,
             "content": [{"type": "reasoning_text", "text": "why"}]},
            {"type": "message", "status": "completed", "role": "assistant",
             "content": [{"type": "output_text", "text": "because", "annotations": [], "logprobs": []}]},
        ],
        "instructions": "be brief", "max_output_tokens": 50, "max_tool_calls": null, "metadata": {"a": "b"},
        "parallel_tool_calls": true, "previous_response_id": null, "prompt_cache_key": "p",
        "safety_identifier": null, "user": "u1", "reasoning": {"effort": "low", "summary": "auto"},
        "service_tier": "default", "store": true,
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tool_choice": "auto", "tools": [],
        "top_logprobs": 0, "truncation": "disabled", "temperature": 0.7, "top_p": 0.95,
        "usage": {
            "input_tokens": prompt, "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": prompt - 3}, "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": thinking}, "total_tokens": prompt + written,
        },
    });
    assert_eq!(timeless(&response), expected);
    assert_eq!(engine.asked()[0].params.max_tokens, 50);
    let prompt = read(&engine.asked()[0]);
    assert!(prompt.contains("be brief") && prompt.contains("<｜User｜>hi<｜Assistant｜>"), "{prompt}");
}

#[tokio::test]
async fn the_stream_adds_up_to_the_whole_response() {
    let length = |text: &str| Script::tokens(&tokenizer().encode(text).unwrap(), FinishReason::Length);
    let scripts = [
        Script::text("Let me think: é 🍓\n</think>\n\nThree 🍓 STOP and more"),
        Script::text("</think>at once"),
        Script::text(""),
        Script::text(CALLS),
        length("only thinking, cut"),
        length("a</think>b c d"),
    ];
    let ways = [
        json!({}),
        json!({"stop": "STOP"}),
        json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
        json!({"include_reasoning": false}),
    ];
    for script in scripts {
        for way in &ways {
            let router = Engine::new(vec![script.clone()]).router(ServerConfig::default());
            let body = with(&with(&hi(), &json!({"tools": weather()})), way);
            let whole = created(&router, &body).await;
            let answer = respond(&router, &with(&body, &json!({"stream": true}))).await;
            let events = events(&answer);
            assert!(!answer.text.contains("[DONE]"));
            let last = &events[events.len() - 1];
            assert_eq!(last["type"], format!("response.{}", whole["status"].as_str().unwrap()));
            assert_eq!(timeless(&last["response"]), timeless(&whole), "{way}");
            assert_eq!(json!(add_up(&events)), last["response"]["output"], "{way}");
            // What is stored is what was sent.
            let path = format!("/v1/responses/{}", last["response"]["id"].as_str().unwrap());
            assert_eq!(get(&router, &path).await.json(), last["response"]);
        }
    }
}

#[tokio::test]
async fn events_come_in_openais_order() {
    let script = "why</think>so";
    let router = Engine::saying(script).router(ServerConfig::default());
    let events = events(&respond(&router, &with(&hi(), &json!({"stream": true}))).await);
    let mut kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    kinds.dedup();
    let expected = [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ];
    assert_eq!(kinds, expected.map(|kind| format!("response.{kind}")));
}

#[tokio::test]
async fn logprobs_are_those_of_the_text() {
    let router = Engine::saying("why\n</think>\n\nso be it").router(ServerConfig::default());
    let body = with(&hi(), &json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2}));
    let response = created(&router, &body).await;
    let logprobs = response["output"][1]["content"][0]["logprobs"].as_array().unwrap().clone();
    let text: String = logprobs.iter().map(|entry| entry["token"].as_str().unwrap()).collect();
    assert_eq!(text, "so be it");
    assert!(logprobs.iter().all(|entry| entry["top_logprobs"].as_array().unwrap().len() == 2));
    assert_eq!(logprobs[0]["logprob"], -0.25);
    assert_eq!(response["top_logprobs"], 2);

    let router = Engine::saying(CALLS).router(ServerConfig::default());
    let response = created(&router, &with(&body, &json!({"tools": weather()}))).await;
    let logprobs = response["output"][1]["content"][0]["logprobs"].as_array().unwrap().clone();
    let text: String = logprobs.iter().map(|entry| entry["token"].as_str().unwrap()).collect();
    assert_eq!(text, "Looking.");
}

#[tokio::test]
async fn a_cut_off_response_is_incomplete_in_its_last_item() {
    let tokens = tokenizer().encode("why</think>so be").unwrap();
    let router =
        Engine::new(vec![Script::tokens(&tokens, FinishReason::Length)]).router(ServerConfig::default());
    let response = created(&router, &hi()).await;
    assert_eq!(response["status"], "incomplete");
    assert_eq!(response["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(response["output"][0]["status"], "completed");
    assert_eq!(response["output"][1]["status"], "incomplete");
    assert_eq!(response["completed_at"], Value::Null);
    let path = format!("/v1/responses/{}", response["id"].as_str().unwrap());
    assert_eq!(get(&router, &path).await.json(), response);
}

#[tokio::test]
async fn a_tool_loop_goes_round() {
    for chained in [true, false] {
        let engine = Engine::new(vec![Script::text(CALLS), Script::text("Sunny.")]);
        let router = engine.router(ServerConfig::default());
        let tools = json!({"tools": weather(), "tool_choice": "required"});
        let first = created(&router, &with(&json!({"input": "weather in Oslo and Rome?"}), &tools)).await;
        let output = first["output"].as_array().unwrap();
        let kinds: Vec<&str> = output.iter().map(|item| item["type"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["reasoning", "message", "function_call", "function_call"]);
        for (call, city) in output[2..].iter().zip(["Oslo", "Rome"]) {
            assert_eq!((&call["name"], &call["status"]), (&json!("get_weather"), &json!("completed")));
            let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
            assert_eq!(arguments, json!({"city": city}));
        }
        assert_eq!(first["tool_choice"], "required");
        let shown = with(&weather()[0], &json!({"strict": false}));
        assert_eq!(first["tools"], json!([shown]));

        let answers = output[2..]
            .iter()
            .map(|call| json!({"type": "function_call_output", "call_id": call["call_id"], "output": "sun"}));
        let body = if chained {
            json!({"previous_response_id": first["id"], "input": answers.collect::<Vec<Value>>()})
        } else {
            let user = json!({"role": "user", "content": [{"type": "input_text", "text": "weather in Oslo and Rome?"}]});
            let input: Vec<Value> = std::iter::once(user).chain(output.clone()).chain(answers).collect();
            json!({"input": input})
        };
        let second = created(&router, &with(&body, &json!({"tools": weather()}))).await;
        assert_eq!(second["output"][0]["content"][0]["text"], "Sunny.");
        assert_eq!(second["previous_response_id"], body["previous_response_id"]);
        let prompt = read(&engine.asked()[1]);
        let calls = prompt.find("get_weather\n```json\n{\"city\": \"Oslo\"}");
        let output = prompt.find("<｜tool▁output▁begin｜>sun");
        assert!(calls.is_some() && calls < output, "{prompt}");
        assert_eq!(prompt.matches("<｜tool▁output▁begin｜>sun").count(), 2, "{prompt}");
    }
}

#[tokio::test]
async fn a_conversation_goes_on_without_its_instructions() {
    let engine = Engine::new(["a</think>one", "b</think>two", "c</think>three"].map(Script::text).to_vec());
    let router = engine.router(ServerConfig::default());
    let first = created(&router, &json!({"input": "first", "instructions": "be odd"})).await;
    let second = json!({"input": "second", "previous_response_id": first["id"], "stream": true});
    let streamed = events(&respond(&router, &second).await);
    let second = streamed[streamed.len() - 1]["response"].clone();
    created(&router, &json!({"input": "third", "previous_response_id": second["id"]})).await;
    let prompts: Vec<String> = engine.asked().iter().map(read).collect();
    assert!(prompts[0].contains("be odd") && !prompts[2].contains("be odd"));
    let places: Vec<Option<usize>> =
        ["first", "one", "second", "two", "third"].iter().map(|text| prompts[2].find(text)).collect();
    assert!(places.is_sorted() && places[0].is_some(), "{}", prompts[2]);

    let path = format!("/v1/responses/{}/input_items", second["id"].as_str().unwrap());
    let list = get(&router, &format!("{path}?order=asc")).await.json();
    let said: Vec<&Value> =
        list["data"].as_array().unwrap().iter().map(|item| &item["content"][0]["text"]).collect();
    assert_eq!(said, ["first", "a", "one", "second"]);
    assert_eq!((&list["object"], &list["has_more"]), (&json!("list"), &json!(false)));
    let page = get(&router, &format!("{path}?limit=2")).await.json();
    assert_eq!(page["data"][0]["content"][0]["text"], "second");
    assert_eq!(page["has_more"], true);
    assert_eq!(page["last_id"], page["data"][1]["id"]);
    let next = format!("{path}?limit=2&after={}", page["last_id"].as_str().unwrap());
    let page = get(&router, &next).await.json();
    assert_eq!(page["data"][1]["content"][0]["text"], "first");
    assert_eq!(page["has_more"], false);
    for (query, param) in
        [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=no", "after")]
    {
        assert_eq!(get(&router, &format!("{path}?{query}")).await.refused(400)["param"], param);
    }
}

#[tokio::test]
async fn items_are_referred_to() {
    let engine = Engine::new(["a</think>one", "b</think>two"].map(Script::text).to_vec());
    let router = engine.router(ServerConfig::default());
    let first = created(&router, &json!({"input": "first"})).await;
    let reference = json!({"type": "item_reference", "id": first["output"][1]["id"]});
    let body =
        json!({"input": [{"role": "user", "content": "hey"}, reference, {"role": "user", "content": "go"}]});
    created(&router, &body).await;
    let prompt = read(&engine.asked()[1]);
    assert!(prompt.contains("one") && prompt.find("hey") < prompt.find("one"), "{prompt}");
    let body = json!({"input": [{"id": "msg_none"}]});
    assert_eq!(respond(&router, &body).await.refused(400)["param"], "input[0].id");
}

#[tokio::test]
async fn what_is_stored_is_read_and_deleted() {
    let router = Engine::saying("a</think>b").router(ServerConfig::default());
    let response = created(&router, &hi()).await;
    let path = format!("/v1/responses/{}", response["id"].as_str().unwrap());
    assert_eq!(get(&router, &path).await.json(), response);
    assert_eq!(get(&router, &format!("{path}?stream=true")).await.refused(400)["param"], "stream");
    let message = send(&router, request(Method::POST, &format!("{path}/cancel"), "")).await.refused(400);
    assert!(message["message"].as_str().unwrap().starts_with("Cannot cancel a synchronous response"));
    let deleted = delete(&router, &path).await;
    assert_eq!(deleted.json(), json!({"id": response["id"], "object": "response", "deleted": true}));

    let unstored = created(&router, &with(&hi(), &json!({"store": false}))).await;
    assert_eq!(unstored["store"], false);
    let gone = [&response["id"], &unstored["id"], &json!("resp_none")];
    for id in gone.map(|id| id.as_str().unwrap()) {
        let path = format!("/v1/responses/{id}");
        get(&router, &path).await.refused(404);
        get(&router, &format!("{path}/input_items")).await.refused(404);
        delete(&router, &path).await.refused(404);
        send(&router, request(Method::POST, &format!("{path}/cancel"), "")).await.refused(404);
        let error = respond(&router, &with(&hi(), &json!({"previous_response_id": id}))).await.refused(404);
        assert_eq!(error["code"], "previous_response_not_found");
        assert_eq!(error["param"], "previous_response_id");
    }
}

#[tokio::test]
async fn the_store_is_bounded_and_can_be_off() {
    let few = ServerConfig { max_stored_responses: 2, ..ServerConfig::default() };
    let router = Engine::saying("a</think>b").router(few);
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(created(&router, &hi()).await["id"].as_str().unwrap().to_owned());
    }
    let statuses = [404, 200, 200];
    for (id, status) in ids.iter().zip(statuses) {
        assert_eq!(get(&router, &format!("/v1/responses/{id}")).await.status, status);
    }

    let none = ServerConfig { max_stored_responses: 0, ..ServerConfig::default() };
    let router = Engine::saying("a</think>b").router(none);
    let response = created(&router, &hi()).await;
    assert_eq!(response["store"], false);
    let error =
        respond(&router, &with(&hi(), &json!({"previous_response_id": response["id"]}))).await.refused(404);
    assert!(error["message"].as_str().unwrap().contains("--max-stored-responses"), "{error}");
    assert_eq!(respond(&router, &with(&hi(), &json!({"store": true}))).await.refused(400)["param"], "store");
}

#[tokio::test]
async fn another_keys_responses_do_not_exist() {
    let keys = ServerConfig { api_keys: ["one", "two"].iter().collect(), ..ServerConfig::default() };
    let router = Engine::saying("a</think>b").router(keys);
    let response = with_key(&router, Method::POST, "/v1/responses", "one", &hi()).await.json();
    let path = format!("/v1/responses/{}", response["id"].as_str().unwrap());
    with_key(&router, Method::GET, &path, "two", &Value::Null).await.refused(404);
    with_key(&router, Method::DELETE, &path, "two", &Value::Null).await.refused(404);
    let goes_on = with(&hi(), &json!({"previous_response_id": response["id"]}));
    with_key(&router, Method::POST, "/v1/responses", "two", &goes_on).await.refused(404);
    let refers = json!({"input": [{"type": "item_reference", "id": response["output"][1]["id"]}]});
    with_key(&router, Method::POST, "/v1/responses", "two", &refers).await.refused(400);
    assert_eq!(with_key(&router, Method::POST, "/v1/responses", "one", &goes_on).await.status, 200);
    assert_eq!(with_key(&router, Method::GET, &path, "one", &Value::Null).await.json(), response);
    get(&router, &path).await.refused(401);
}

#[tokio::test]
async fn a_failing_step_is_a_500_or_a_failed_response_that_is_not_stored() {
    let mut failing = Script::endless("so far");
    failing.hold = false;
    failing.events.push(Event::Failed(EngineError::Step("boom".into())));
    let aborted = Script::tokens(&tokenizer().encode("so").unwrap(), FinishReason::Abort);
    let router = Engine::new(vec![failing.clone(), failing, aborted]).router(ServerConfig::default());
    assert_eq!(respond(&router, &hi()).await.refused(500)["code"], "engine_error");

    let streaming = with(&hi(), &json!({"stream": true}));
    let all = events(&respond(&router, &streaming).await);
    let [.., error, failed] = &all[..] else { panic!("{all:?}") };
    assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!("engine_error")));
    assert!(error["message"].as_str().unwrap().contains("boom") && error.get("param").is_some());
    assert_eq!(failed["type"], "response.failed");
    let response = &failed["response"];
    assert_eq!((&response["status"], &response["error"]["code"]), (&json!("failed"), &json!("server_error")));
    assert_eq!(response["output"][0]["status"], "incomplete");
    get(&router, &format!("/v1/responses/{}", response["id"].as_str().unwrap())).await.refused(404);

    let response = created(&router, &hi()).await;
    assert_eq!(response["status"], "failed");
    get(&router, &format!("/v1/responses/{}", response["id"].as_str().unwrap())).await.refused(404);
}

#[tokio::test]
async fn fields_reach_the_engine() {
    let engine = Engine::saying("a</think>b");
    let router = engine.router(ServerConfig::default());
    let body = json!({
        "input": [{"type": "message", "role": "developer", "content": "be odd"}, {"role": "user", "content": "hi"}],
        "top_k": 5, "min_p": 0.1, "seed": 7, "priority": -2, "cache_salt": "salt", "top_p": 0.5,
        "repetition_penalty": 1.5, "include": null, "unknown": {"x": 1}, "tools": [], "background": false,
        "truncation": "disabled", "parallel_tool_calls": false, "include_reasoning": null,
    });
    let response = created(&router, &body).await;
    assert_eq!((&response["top_p"], &response["parallel_tool_calls"]), (&json!(0.5), &json!(false)));
    let asked = &engine.asked()[0];
    assert_eq!((asked.params.top_k, asked.params.min_p, asked.params.seed), (Some(5), 0.1, 7));
    assert_eq!((asked.priority, asked.cache_salt.as_deref()), (-2, Some("salt")));
    assert!(read(asked).contains("be odd"));
    let thoughtless = created(&router, &with(&hi(), &json!({"reasoning": {"effort": "none"}}))).await;
    assert_eq!(thoughtless["reasoning"]["effort"], "none");

    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    let format = json!({"type": "json_schema", "name": "thing", "schema": schema, "strict": true});
    let response =
        created(&router, &with(&hi(), &json!({"text": {"format": format, "verbosity": "low"}}))).await;
    let shown = with(&format, &json!({"description": null}));
    assert_eq!(response["text"], json!({"format": shown, "verbosity": "low"}));
}

#[tokio::test]
async fn bad_fields_are_named_as_they_are_called_here() {
    let router = Engine::saying("never").router(ServerConfig::default());
    let user = |content: Value| json!({"input": [{"role": "user", "content": "a"}, {"role": "user", "content": content}]});
    let with_tool = |tool: Value| with(&hi(), &json!({"tools": [tool]}));
    let items = |item: Value| json!({"input": [item]});
    let cases = [
        (json!({}), "input"),
        (json!({"input": 5}), "input"),
        (json!({"input": []}), "input"),
        (user(json!(5)), "input[1].content"),
        (user(json!([{"type": "input_image", "image_url": "x"}])), "input[1].content[0]"),
        (user(json!([{"type": "input_text"}])), "input[1].content[0].text"),
        (items(json!(1)), "input[0]"),
        (items(json!({})), "input[0].type"),
        (items(json!({"type": "web_search_call", "id": "x"})), "input[0].type"),
        (items(json!({"type": "message", "content": "x"})), "input[0].role"),
        (items(json!({"role": "tool", "content": "x"})), "input[0].role"),
        (items(json!({"role": "user"})), "input[0].content"),
        (items(json!({"role": "user", "content": "x", "id": 1})), "input[0].id"),
        (items(json!({"type": "function_call", "call_id": "c", "name": ""})), "input[0].name"),
        (items(json!({"type": "function_call", "call_id": "c", "name": "f"})), "input[0].arguments"),
        (items(json!({"type": "function_call_output", "call_id": "c", "output": "x"})), "input[0].call_id"),
        (items(json!({"type": "reasoning", "encrypted_content": "x"})), "input[0].encrypted_content"),
        (json!({"input": "x".repeat(10_000)}), "input"),
        (with(&hi(), &json!({"instructions": 1})), "instructions"),
        (with(&hi(), &json!({"max_output_tokens": "many"})), "max_output_tokens"),
        (with(&hi(), &json!({"max_output_tokens": 0})), "max_output_tokens"),
        (with(&hi(), &json!({"max_output_tokens": 1_000_000})), "max_output_tokens"),
        (with(&hi(), &json!({"max_tokens": 5})), "max_tokens"),
        (with(&hi(), &json!({"messages": [{"role": "user", "content": "x"}]})), "messages"),
        (with(&hi(), &json!({"response_format": {"type": "json_object"}})), "response_format"),
        (with(&hi(), &json!({"n": 2})), "n"),
        (with(&hi(), &json!({"background": true})), "background"),
        (with(&hi(), &json!({"conversation": "conv_1"})), "conversation"),
        (with(&hi(), &json!({"prompt": {"id": "p"}})), "prompt"),
        (with(&hi(), &json!({"truncation": "auto"})), "truncation"),
        (with(&hi(), &json!({"temperature": 9})), "temperature"),
        (with(&hi(), &json!({"metadata": {"a": 1}})), "metadata.a"),
        (with(&hi(), &json!({"metadata": {"a": "x".repeat(600)}})), "metadata.a"),
        (with(&hi(), &json!({"include": ["file_search_call.results"]})), "include[0]"),
        (with(&hi(), &json!({"top_logprobs": 3})), "top_logprobs"),
        (
            with(&hi(), &json!({"top_logprobs": 21, "include": ["message.output_text.logprobs"]})),
            "top_logprobs",
        ),
        (with(&hi(), &json!({"reasoning": {"effort": "much"}})), "reasoning.effort"),
        (with(&hi(), &json!({"reasoning": {"summary": "long"}})), "reasoning.summary"),
        (with(&hi(), &json!({"text": {"verbosity": "loud"}})), "text.verbosity"),
        (with(&hi(), &json!({"text": {"format": {"type": "xml"}}})), "text.format.type"),
        (
            with(&hi(), &json!({"text": {"format": {"type": "json_schema", "schema": {}}}})),
            "text.format.name",
        ),
        (
            with(&hi(), &json!({"text": {"format": {"type": "json_schema", "name": "a"}}})),
            "text.format.schema",
        ),
        (with_tool(json!({"type": "web_search"})), "tools[0].type"),
        (with_tool(json!({"type": "mcp", "server_url": "x"})), "tools[0].type"),
        (with_tool(json!({"type": "function"})), "tools[0].name"),
        (with_tool(json!({"type": "function", "name": "a b"})), "tools[0].name"),
        (with_tool(json!({"type": "function", "name": "a", "parameters": 5})), "tools[0].parameters"),
        (with(&hi(), &json!({"tool_choice": "required"})), "tool_choice"),
        (with(&hi(), &json!({"tool_choice": {"type": "file_search"}})), "tool_choice.type"),
        (with(&hi(), &json!({"tool_choice": {"type": "function"}})), "tool_choice.name"),
        (
            with(&hi(), &json!({"tools": weather(), "tool_choice": {"type": "function", "name": "x"}})),
            "tool_choice",
        ),
        (with(&hi(), &json!({"previous_response_id": 5})), "previous_response_id"),
        (with(&hi(), &json!({"store": "yes"})), "store"),
        (with(&hi(), &json!({"stop_regex": "a"})), "stop_regex"),
    ];
    for (body, param) in cases {
        let error = respond(&router, &body).await.refused(400);
        assert_eq!(error["param"], param, "{body}: {error}");
    }
    let strict = ServerConfig { strict_model_name: true, ..ServerConfig::default() };
    let router = Engine::saying("never").router(strict);
    respond(&router, &with(&hi(), &json!({"model": "other"}))).await.refused(404);
}

#[tokio::test]
async fn a_client_that_leaves_frees_the_engine() {
    let engine = Engine::new(vec![Script::endless("so far")]);
    let router = engine.router(ServerConfig::default());
    let body = with(&hi(), &json!({"stream": true})).to_string();
    let response = tower::ServiceExt::oneshot(router.clone(), request(Method::POST, "/v1/responses", &body))
        .await
        .unwrap();
    drop(response);
    let aborted = || engine.asked().first().is_some_and(|asked| engine.aborted() == [asked.id]);
    crate::support::eventually("the generation is aborted", aborted).await;
}

#[tokio::test]
async fn a_conversation_that_is_too_large_is_not_continued() {
    let engine = Engine::new(vec![Script::text("ok")]);
    let router = engine.router(ServerConfig { max_body_bytes: 2000, ..ServerConfig::default() });
    let mut previous = created(&router, &hi()).await["id"].clone();
    let refused = loop {
        let answer = respond(&router, &json!({"input": "more", "previous_response_id": previous})).await;
        if answer.status != 200 {
            break answer;
        }
        previous = answer.json()["id"].clone();
        assert!(engine.asked().len() < 50, "the conversation grows without bound");
    };
    let error = refused.refused(400);
    assert_eq!(error["param"], "previous_response_id");
    assert!(error["message"].as_str().unwrap().contains("2000"), "{error}");
}

#[tokio::test]
async fn more_items_than_the_context_has_tokens_are_refused() {
    let router = Engine::saying("ok").router(ServerConfig::default());
    let item = json!({"role": "user", "content": ""});
    let items = |count: usize| Value::from(vec![item.clone(); count]);
    let error = respond(&router, &json!({"input": items(MAX_MODEL_LEN + 1)})).await.refused(400);
    assert_eq!(error["param"], "input");
    assert!(error["message"].as_str().unwrap().contains("257 items cannot fit"), "{error}");
    // The question and its answer count.
    let first = created(&router, &hi()).await;
    let body = json!({"input": items(MAX_MODEL_LEN - 1), "previous_response_id": first["id"]});
    let error = respond(&router, &body).await.refused(400);
    assert!(error["message"].as_str().unwrap().contains("255 items behind 2 earlier ones"), "{error}");
}

#[tokio::test]
async fn a_call_that_a_stop_cuts_off_is_incomplete() {
    for (stop, status) in [("Oslo", "incomplete"), ("\n```<｜tool▁call▁end｜>", "completed")] {
        let router = Engine::saying(CALLS).router(ServerConfig::default());
        let body = json!({"input": "weather?", "tools": weather(), "stop": [stop]});
        let response = created(&router, &body).await;
        let call = response["output"].as_array().unwrap().last().unwrap();
        assert_eq!((&call["type"], &call["status"]), (&json!("function_call"), &json!(status)), "{response}");
        assert_eq!(response["status"], "completed");
    }
}

#[tokio::test]
async fn long_values_are_not_repeated() {
    let router = Engine::saying("ok").router(ServerConfig::default());
    let long = "x".repeat(10_000);
    for body in [
        json!({"input": [{"role": long, "content": "hi"}]}),
        json!({"input": [{"type": long}]}),
        json!({"input": [{"role": "user", "content": [{"type": long}]}]}),
        json!({"input": [{"type": "function_call_output", "call_id": long, "output": ""}]}),
        json!({"input": "hi", "tools": [{"type": long}]}),
        json!({"input": "hi", "include": [long]}),
    ] {
        let error = respond(&router, &body).await.refused(400);
        let message = error["message"].as_str().unwrap();
        assert!(message.len() < 300 && message.contains("xxx…"), "{message}");
    }
    let body = json!({"input": "hi", "previous_response_id": long});
    assert!(respond(&router, &body).await.refused(404)["message"].as_str().unwrap().len() < 300);
}
