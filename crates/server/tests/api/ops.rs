//! Endpoints beside generation: tokens, facts, the probe that generates.
use axum::http::header;
use r1_engine::{Handle, Status};
use r1_server::{ServerConfig, router};
use serde_json::{Value, json};

use crate::support::{Engine, MAX_MODEL_LEN, get, info, model, post, request, send, tokenizer};

fn ids(text: &str) -> Vec<u32> {
    tokenizer().encode(text).unwrap().iter().map(|token| token.0).collect()
}

#[tokio::test]
async fn they_answer_under_every_prefix() {
    let engine = Engine::saying("ok");
    for root_path in ["", "/proxy/models/main", "/v1", "/odd{id}", "/:a"] {
        let router = engine.router(ServerConfig { root_path: root_path.into(), ..ServerConfig::default() });
        let root = root_path.replace('{', "%7B").replace('}', "%7D");
        for prefix in ["", "/v1", &root, &format!("{root}/v1")] {
            for path in ["/health_generate", "/get_model_info", "/get_server_info", "/openapi.json", "/docs"]
            {
                let answer = get(&router, &format!("{prefix}{path}")).await;
                assert_eq!(answer.status, 200, "{prefix}{path}: {}", answer.text);
            }
            let tokens = post(&router, &format!("{prefix}/tokenize"), &json!({"prompt": "hi"})).await.json();
            let body = json!({"tokens": tokens["tokens"]});
            assert_eq!(post(&router, &format!("{prefix}/detokenize"), &body).await.status, 200, "{prefix}");
        }
    }
}

#[tokio::test]
async fn keys_guard_what_costs_or_tells_something() {
    let config =
        ServerConfig { api_keys: ["secret-key".to_owned()].into_iter().collect(), ..ServerConfig::default() };
    let router = Engine::saying("ok").router(config);
    for path in ["/get_model_info", "/model_info", "/get_server_info", "/server_info"] {
        get(&router, path).await.refused(401);
    }
    for path in ["/tokenize", "/detokenize"] {
        post(&router, path, &json!({})).await.refused(401);
    }
    for path in ["/health_generate", "/openapi.json", "/docs"] {
        assert_eq!(get(&router, path).await.status, 200, "{path}");
    }
    let mut asking = request(axum::http::Method::GET, "/get_server_info", "");
    asking.headers_mut().insert(header::AUTHORIZATION, "Bearer secret-key".parse().unwrap());
    let answer = send(&router, asking).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["api_key_required"]), (200, &json!(true)));
    assert!(!answer.text.contains("secret-key"));
}

#[tokio::test]
async fn a_text_becomes_the_tokens_that_a_completion_reads() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    for text in ["hi there", "", "naïve 🙂", "<｜User｜>hi", "a\n\n b"] {
        let reply = post(&router, "/tokenize", &json!({"prompt": text})).await.json();
        let tokens = reply["tokens"].as_array().unwrap();
        assert_eq!((&reply["count"], &reply["max_model_len"]), (&json!(tokens.len()), &json!(MAX_MODEL_LEN)));
        assert_eq!(reply["token_strs"], Value::Null);
        let bare =
            post(&router, "/tokenize", &json!({"prompt": text, "add_special_tokens": false})).await.json();
        assert_eq!(bare["tokens"], json!(ids(text)), "{text}");
        if !text.is_empty() {
            post(&router, "/v1/completions", &json!({"prompt": text})).await;
            let asked: Vec<u32> = engine.asked().last().unwrap().prompt.iter().map(|token| token.0).collect();
            assert_eq!(reply["tokens"], json!(asked), "{text}");
        }
        let back = post(&router, "/detokenize", &json!({"tokens": bare["tokens"]})).await.json();
        assert_eq!(back, json!({"prompt": text, "text": text, "content": text}));
    }
    let llama = post(&router, "/tokenize", &json!({"content": "hi"})).await.json();
    assert_eq!(llama["tokens"], json!(ids("hi")));
}

#[tokio::test]
async fn a_conversation_becomes_the_tokens_that_a_chat_reads() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    for body in [
        json!({"messages": [message("user", "hi")]}),
        json!({"messages": [message("system", "be brief"), message("user", "hi <｜Assistant｜>")]}),
        json!({"messages": [message("user", "hi")], "add_generation_prompt": false}),
        json!({"messages": [message("user", "hi")], "chat_template_kwargs": {"thinking": false}}),
    ] {
        let reply = post(&router, "/tokenize", &body).await.json();
        assert_eq!(post(&router, "/v1/chat/completions", &body).await.status, 200);
        let asked: Vec<u32> = engine.asked().last().unwrap().prompt.iter().map(|token| token.0).collect();
        assert_eq!(reply["tokens"], json!(asked), "{body}");
        assert_eq!(reply["count"], asked.len());
    }
}

#[tokio::test]
async fn lists_give_lists_and_spellings_are_the_files() {
    let router = Engine::saying("ok").router(ServerConfig::default());
    let body = json!({"prompt": ["hi 7", "", "é"], "add_special_tokens": false, "return_token_strs": true});
    let reply = post(&router, "/tokenize", &body).await.json();
    assert_eq!(reply["tokens"], json!([ids("hi 7"), [], ids("é")]));
    assert_eq!(reply["count"], json!([ids("hi 7").len(), 0, ids("é").len()]));
    let strings: Vec<Vec<String>> = serde_json::from_value(reply["token_strs"].clone()).unwrap();
    assert_eq!(strings[0].concat(), "hiĠ7");
    assert_eq!(strings[2].concat(), "Ã©");
    for (token, spelling) in ids("hi 7").iter().zip(&strings[0]) {
        assert_eq!(tokenizer().token_to_id(spelling).unwrap().0, *token, "{spelling}");
    }
    let special =
        post(&router, "/tokenize", &json!({"prompt": "<｜User｜>", "return_token_strs": true})).await;
    assert_eq!(special.json()["token_strs"].as_array().unwrap().last().unwrap(), "<｜User｜>");

    let back = post(&router, "/detokenize", &json!({"tokens": reply["tokens"]})).await.json();
    assert_eq!(back["text"], json!(["hi 7", "", "é"]));
    let eos = json!({"tokens": [1, ids("a")[0]]});
    assert_eq!(post(&router, "/detokenize", &eos).await.json()["text"], "<｜end▁of▁sentence｜>a");
    let hidden = json!({"tokens": [1, ids("a")[0]], "skip_special_tokens": true});
    assert_eq!(post(&router, "/detokenize", &hidden).await.json()["text"], "a");
}

#[tokio::test]
async fn what_cannot_be_read_is_named() {
    let config = ServerConfig { strict_model_name: true, ..ServerConfig::default() };
    let router = Engine::saying("ok").router(config);
    for (body, param) in [
        (json!({}), json!("prompt")),
        (json!({"prompt": 5}), json!("prompt")),
        (json!({"prompt": ["a", 5]}), json!("prompt")),
        (json!({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}), Value::Null),
        (json!({"prompt": "a", "content": "a"}), Value::Null),
        (json!({"messages": []}), json!("messages")),
        (json!({"messages": [{"role": "king", "content": "a"}]}), json!("messages[0].role")),
        (json!({"prompt": "a", "add_special_tokens": 1}), json!("add_special_tokens")),
        (json!({"prompt": "a", "return_token_strs": "x"}), json!("return_token_strs")),
    ] {
        assert_eq!(post(&router, "/tokenize", &body).await.refused(400)["param"], param, "{body}");
    }
    let past = tokenizer().vocab_size();
    for (body, word) in [
        (json!({}), "missing"),
        (json!({"tokens": "5"}), "list of token ids"),
        (json!({"tokens": [5, past]}), &past.to_string()[..]),
        (json!({"tokens": [[5], [past]]}), &past.to_string()),
        (json!({"tokens": [-1]}), "-1"),
        (json!({"tokens": [1.5]}), "1.5"),
    ] {
        let error = post(&router, "/detokenize", &body).await.refused(400);
        assert_eq!(error["param"], "tokens", "{body}");
        assert!(error["message"].as_str().unwrap().contains(word), "{body}: {error}");
    }
    for path in ["/tokenize", "/detokenize"] {
        let unknown = json!({"prompt": "a", "tokens": [5], "model": "other"});
        assert_eq!(post(&router, path, &unknown).await.refused(404)["code"], "model_not_found");
        send(&router, request(axum::http::Method::POST, path, "[1]")).await.refused(400);
    }
}

#[tokio::test]
async fn the_context_does_not_bound_a_count_and_a_documented_number_does() {
    let router = Engine::saying("ok").router(ServerConfig::default());
    let long = post(&router, "/tokenize", &json!({"prompt": "a b ".repeat(MAX_MODEL_LEN)})).await.json();
    assert!(long["count"].as_u64().unwrap() > MAX_MODEL_LEN as u64, "{}", long["count"]);
    let documented = get(&router, "/openapi.json").await.json();
    let doc = documented["paths"]["/tokenize"]["post"]["description"].as_str().unwrap().to_owned();
    assert!(doc.contains("262,144"), "{doc}");
    // Four bytes of a token at most hold in this vocabulary, so the sizes alone tell.
    for prompt in [json!("ab".repeat(5 << 20)), json!(vec!["1"; 262_145]), json!(vec![""; 262_145])] {
        let started = std::time::Instant::now();
        let error = post(&router, "/tokenize", &json!({"prompt": prompt})).await.refused(400);
        assert_eq!(error["param"], "prompt");
        assert!(error["message"].as_str().unwrap().contains("262144"), "{error}");
        assert!(started.elapsed() < std::time::Duration::from_secs(20));
    }
    let error = post(&router, "/detokenize", &json!({"tokens": vec![5; 262_145]})).await.refused(400);
    assert!(error["message"].as_str().unwrap().contains("262145"), "{error}");
}

#[tokio::test]
async fn facts_are_told_while_the_model_loads() {
    let (handle, inbox) = Handle::channel(info());
    inbox.set_status(Status::Loading { progress: 0.5, elapsed: std::time::Duration::ZERO });
    let router = router(ServerConfig::default(), model(), handle);
    let server = get(&router, "/get_server_info").await.json();
    assert_eq!(server["status"]["status"], "loading");
    assert_eq!(server["max_model_len"], MAX_MODEL_LEN);
    assert_eq!(server["reasoning_parser"], "deepseek-r1");
    let model = get(&router, "/get_model_info").await.json();
    assert_eq!((&model["model_path"], &model["is_generation"]), (&json!("tiny-r1"), &json!(true)));
    assert_eq!(model["eos_token_ids"], json!([1]));
    assert_eq!(post(&router, "/tokenize", &json!({"prompt": "hi"})).await.status, 200);
    let health = get(&router, "/health_generate").await;
    assert_eq!((health.status.as_u16(), &health.json()["status"]), (503, &json!("loading")));
    drop(inbox);
    let health = get(&router, "/health_generate").await;
    assert_eq!((health.status.as_u16(), &health.json()["status"]), (503, &json!("failed")));
}

#[tokio::test]
async fn the_probe_asks_for_one_token() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let health = get(&router, "/health_generate").await;
    assert_eq!((health.status.as_u16(), health.text.as_str()), (200, r#"{"status":"ready"}"#));
    let asked = engine.asked();
    assert_eq!((asked.len(), asked[0].params.max_tokens, asked[0].prompt.len()), (1, 1, 1));
}

#[tokio::test]
async fn the_cache_is_flushed_for_administrators_only() {
    let asked = |method: axum::http::Method, key: &'static str| {
        let mut asking = request(method, "/flush_cache", "");
        asking.headers_mut().insert(header::AUTHORIZATION, format!("Bearer {key}").parse().unwrap());
        asking
    };
    let (get, post) = (axum::http::Method::GET, axum::http::Method::POST);
    let keys = |key: &str| [key.to_owned()].into_iter().collect();
    let engine = Engine::saying("ok");
    for api_keys in [ServerConfig::default().api_keys, keys("user")] {
        let closed = engine.router(ServerConfig { api_keys, ..ServerConfig::default() });
        for key in ["user", "admin", ""] {
            send(&closed, asked(post.clone(), key)).await.refused(404);
        }
    }
    let config =
        ServerConfig { api_keys: keys("user"), admin_keys: keys("admin"), ..ServerConfig::default() };
    let router = engine.router(config);
    for method in [get, post] {
        for key in ["user", "", "adminn"] {
            send(&router, asked(method.clone(), key)).await.refused(401);
        }
        assert_eq!(send(&router, asked(method, "admin")).await.json(), json!({"freed_blocks": 7}));
    }
}
