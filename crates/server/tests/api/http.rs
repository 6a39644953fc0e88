//! Paths, statuses, headers: everything around a request.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{Method, Request, header};
use futures_util::stream;
use http_body_util::BodyExt;
use r1_engine::{Command, EngineInfo, Handle, Status};
use r1_server::{Cors, ServerConfig, router};
use serde_json::json;
use tower::ServiceExt;

use crate::support::{
    Engine, MAX_MODEL_LEN, Script, chat, complete, eventually, get, info, model, post, request, send,
};

fn engine_request() -> r1_engine::Request {
    r1_engine::Request::new(vec![r1_core::TokenId(5)], r1_core::SamplingParams::default())
}

fn hi() -> serde_json::Value {
    json!({"messages": [{"role": "user", "content": "hi"}]})
}

#[tokio::test]
async fn every_path_answers_under_its_prefixes() {
    let engine = Engine::saying("ok");
    for root_path in ["", "/proxy/models/main", "proxy/models/main/", "/v1", "/odd{id}", "/:a", "/*rest/:b"] {
        let router = engine.router(ServerConfig { root_path: root_path.into(), ..ServerConfig::default() });
        let root = root_path.trim_matches('/').replace('{', "%7B").replace('}', "%7D");
        let root = if root.is_empty() { root } else { format!("/{root}") };
        for prefix in ["", "/v1", &root, &format!("{root}/v1")] {
            for path in ["/health", "/ping", "/metrics", "/version", "/models", "/models/tiny-r1"] {
                let answer = get(&router, &format!("{prefix}{path}")).await;
                assert_eq!(answer.status, 200, "{prefix}{path}: {}", answer.text);
            }
            let chat = post(&router, &format!("{prefix}/chat/completions"), &hi()).await;
            assert_eq!(chat.status, 200, "{prefix}: {}", chat.text);
            let completion = post(&router, &format!("{prefix}/completions"), &json!({"prompt": "hi"})).await;
            assert_eq!(completion.status, 200, "{prefix}: {}", completion.text);
        }
    }
}

#[tokio::test]
async fn models_are_listed_and_found_by_any_name() {
    let router = Engine::saying("ok").router(ServerConfig::default());
    let list = get(&router, "/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let ids: Vec<_> = list["data"].as_array().unwrap().iter().map(|card| card["id"].clone()).collect();
    assert_eq!(ids, ["tiny-r1", "org/alias"]);
    assert_eq!(list["data"][1]["max_model_len"], MAX_MODEL_LEN);
    assert_eq!((&list["data"][1]["object"], &list["data"][1]["root"]), (&json!("model"), &json!("tiny-r1")));
    assert_eq!(get(&router, "/v1/models/org/alias").await.json(), list["data"][1]);
    assert_eq!(get(&router, "/v1/models/org%2Falias").await.json(), list["data"][1]);
    assert_eq!(get(&router, "/v1/models/other").await.refused(404)["code"], "model_not_found");
}

#[tokio::test]
async fn unknown_paths_and_wrong_methods_are_openai_errors() {
    let router = Engine::saying("ok").router(ServerConfig::default());
    for path in ["/v1", "/v1/nothing", "/v1/chat", "/metrics/"] {
        assert_eq!(get(&router, path).await.refused(404)["code"], "unknown_url", "{path}");
    }
    let wrong = get(&router, "/v1/chat/completions").await;
    assert_eq!(wrong.refused(405)["code"], "method_not_supported");
    assert_eq!(wrong.headers[header::ALLOW], "POST");
    for path in ["/v1/models", "/health", "/metrics"] {
        post(&router, path, &json!({})).await.refused(405);
    }
}

#[tokio::test]
async fn bad_bodies_are_400_never_422() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    for body in ["", "{", "[]", "7", "\"x\"", "{\"messages\": }", "{\"temperature\": 1e999}"] {
        for path in ["/v1/chat/completions", "/v1/completions"] {
            send(&router, request(Method::POST, path, body)).await.refused(400);
        }
    }
    let no_content_type = Request::post("/v1/completions").body(Body::from(r#"{"prompt":"hi"}"#)).unwrap();
    assert_eq!(send(&router, no_content_type).await.status, 200);
}

#[tokio::test]
async fn bodies_over_the_limit_are_413_whether_or_not_they_say_so() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig { max_body_bytes: 1000, ..ServerConfig::default() });
    let long = json!({"prompt": "hi", "user": "x".repeat(1000)}).to_string();
    let error = send(&router, request(Method::POST, "/v1/completions", &long)).await.refused(413);
    assert_eq!(error["code"], "request_too_large");
    let chunks = stream::iter(long.into_bytes().chunks(64).map(Bytes::copy_from_slice).collect::<Vec<_>>());
    let chunks = futures_util::StreamExt::map(chunks, Ok::<_, std::io::Error>);
    let chunked = Request::post("/v1/completions").body(Body::from_stream(chunks)).unwrap();
    send(&router, chunked).await.refused(413);
    let short = json!({"prompt": "hi", "user": "x".repeat(900)});
    assert_eq!(complete(&router, &short).await.status, 200);
}

#[tokio::test]
async fn a_body_that_never_ends_is_408_and_huge_headers_are_431() {
    let engine = Engine::saying("ok");
    let config = ServerConfig { body_timeout: Duration::from_millis(20), ..ServerConfig::default() };
    let router = engine.router(config);
    let never = Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>());
    send(&router, Request::post("/v1/completions").body(never).unwrap()).await.refused(408);
    let huge = Request::get("/health").header("x-huge", "y".repeat(33 << 10)).body(Body::empty()).unwrap();
    assert_eq!(send(&router, huge).await.refused(431)["code"], "headers_too_large");
}

#[tokio::test]
async fn keys_guard_the_api_and_nothing_else() {
    let engine = Engine::saying("ok");
    let config = ServerConfig { api_keys: ["one", "two"].iter().collect(), ..ServerConfig::default() };
    let router = engine.router(config);
    let with_key = |key: Option<&str>| {
        let mut request = request(Method::POST, "/v1/chat/completions", &hi().to_string());
        if let Some(key) = key {
            request.headers_mut().insert(header::AUTHORIZATION, key.parse().unwrap());
        }
        request
    };
    for bad in [None, Some("Bearer three"), Some("Bearer "), Some("Basic one"), Some("one")] {
        let answer = send(&router, with_key(bad)).await;
        assert_eq!(answer.refused(401)["code"], "invalid_api_key");
        assert_eq!(answer.headers[header::WWW_AUTHENTICATE], "Bearer");
    }
    for good in ["Bearer one", "Bearer two", "bearer two"] {
        assert_eq!(send(&router, with_key(Some(good))).await.status, 200);
    }
    for guarded in ["/v1/models", "/models", "/v1/models/tiny-r1"] {
        get(&router, guarded).await.refused(401);
    }
    for open in ["/health", "/v1/health", "/ping", "/metrics", "/version"] {
        assert_eq!(get(&router, open).await.status, 200, "{open}");
    }
}

#[tokio::test]
async fn a_refused_request_runs_none_of_its_choices() {
    let (handle, inbox) = Handle::channel(EngineInfo { max_num_seqs: 1, max_queued: 1, ..info() });
    inbox.set_status(Status::Ready);
    let running = handle.submit(engine_request());
    assert!(matches!(inbox.poll(), Some(Command::Submit { .. })));
    let router = router(ServerConfig::default(), model(), handle);
    let full = complete(&router, &json!({"prompt": "hi", "n": 2})).await;
    assert_eq!(full.refused(429)["code"], "queue_full");
    assert!(full.headers.contains_key(header::RETRY_AFTER));
    let never = complete(&router, &json!({"prompt": "hi", "n": 3})).await;
    assert_eq!(never.refused(400)["param"], "n");
    assert!(inbox.poll().is_none(), "nothing was submitted");
    let metrics = get(&router, "/metrics").await.text;
    let ended = r#"vllm:request_success_total{model_name="tiny-r1",finished_reason="abort"}"#;
    assert!(!metrics.lines().any(|line| line.starts_with(ended) && !line.ends_with(" 0")), "{metrics}");
    drop(running);
}

#[tokio::test]
async fn health_follows_the_engine() {
    let (handle, inbox) = Handle::channel(info());
    let config = ServerConfig { watchdog_timeout: Duration::from_millis(50), ..ServerConfig::default() };
    let router = router(config, model(), handle.clone());
    inbox.set_status(Status::Loading { progress: 0.41, elapsed: Duration::ZERO });
    for path in ["/health", "/v1/health", "/ping"] {
        let answer = get(&router, path).await;
        assert_eq!(answer.status, 503);
        let health = answer.json();
        assert_eq!((&health["status"], &health["progress"]), (&json!("loading"), &json!(0.41)));
        assert!(health["eta_s"].is_u64());
        assert!(answer.headers.contains_key(header::RETRY_AFTER));
    }
    let refused = chat(&router, &hi()).await;
    assert_eq!(refused.refused(503)["code"], "loading");
    assert!(refused.headers.contains_key(header::RETRY_AFTER));

    inbox.set_status(Status::Ready);
    tokio::time::sleep(Duration::from_millis(80)).await;
    let ready = get(&router, "/health").await;
    assert_eq!(
        (ready.status.as_u16(), ready.text.as_str()),
        (200, r#"{"status":"ready"}"#),
        "idle, not stuck"
    );

    let submit = || handle.submit(engine_request()).unwrap();
    let _waiting = submit();
    assert_eq!(get(&router, "/health").await.status, 200, "busy, not stuck yet");
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        inbox.step_ended();
        assert_eq!(get(&router, "/health").await.status, 200, "steps end");
    }
    tokio::time::sleep(Duration::from_millis(80)).await;
    let stuck = get(&router, "/health").await;
    assert_eq!((stuck.status.as_u16(), &stuck.json()["status"]), (503, &json!("stuck")));
    let _later = submit();
    assert_eq!(
        get(&router, "/health").await.status,
        503,
        "what comes meanwhile is queued and changes nothing"
    );
    inbox.step_ended();
    assert_eq!(get(&router, "/health").await.status, 200, "it goes on");

    drop(inbox);
    let failed = get(&router, "/health").await;
    assert_eq!((failed.status.as_u16(), &failed.json()["status"]), (503, &json!("failed")));
    assert_eq!(chat(&router, &hi()).await.refused(503)["code"], "engine_failed");
}

#[tokio::test]
async fn when_the_engine_dies_everybody_who_waits_is_told() {
    let (handle, inbox) = Handle::channel(info());
    inbox.set_status(Status::Ready);
    let router = router(ServerConfig::default(), model(), handle.clone());
    let ask = |stream: bool| {
        let router = router.clone();
        let body = json!({"prompt": "hi", "stream": stream});
        tokio::spawn(async move { complete(&router, &body).await })
    };
    let (running, streaming) = (ask(false), ask(true));
    let mut held = Vec::new();
    eventually("the running ones are with the engine", || {
        held.extend(inbox.poll());
        held.len() == 2
    })
    .await;
    // These are still on their way to it.
    let (queued, queued_stream) = (ask(false), ask(true));
    eventually("all are submitted", || handle.stats().waiting == 4).await;
    let died = std::time::Instant::now();
    drop((held, inbox));
    let health = get(&router, "/health").await;
    assert_eq!((health.status.as_u16(), &health.json()["status"]), (503, &json!("failed")));
    for whole in [running, queued] {
        assert_eq!(whole.await.unwrap().refused(503)["code"], "engine_stopped");
    }
    for stream in [streaming, queued_stream] {
        let events = stream.await.unwrap().events();
        assert_eq!(events.last().unwrap()["error"]["code"], "engine_stopped");
    }
    assert!(died.elapsed() < Duration::from_secs(5));
    let refused = complete(&router, &json!({"prompt": "hi"})).await.refused(503);
    assert!(refused["message"].as_str().unwrap().contains("engine thread ended unexpectedly"), "{refused}");
}

#[tokio::test]
async fn web_pages_may_call_as_configured() {
    let engine = Engine::saying("ok");
    let preflight = || {
        Request::builder()
            .method(Method::OPTIONS)
            .uri("/v1/chat/completions")
            .header(header::ORIGIN, "https://chat.example.com")
            .header(header::ACCESS_CONTROL_REQUEST_METHOD, "POST")
            .header(header::ACCESS_CONTROL_REQUEST_HEADERS, "authorization,content-type")
            .body(Body::empty())
            .unwrap()
    };
    let with = |cors| ServerConfig { cors, api_keys: ["key"].iter().collect(), ..ServerConfig::default() };
    let origin = |origin: &str| Cors::Origins { origins: vec![origin.parse().unwrap()], credentials: false };
    for (cors, allowed) in [
        (Cors::AnyOrigin, Some("*")),
        (origin("https://chat.example.com"), Some("https://chat.example.com")),
        (origin("https://other.example.com"), None),
        (Cors::Off, None),
    ] {
        let answer = send(&engine.router(with(cors.clone())), preflight()).await;
        let header = answer.headers.get(header::ACCESS_CONTROL_ALLOW_ORIGIN).map(|v| v.to_str().unwrap());
        assert_eq!(header, allowed, "{cors:?}");
        if allowed.is_some() {
            assert_eq!(answer.status, 200, "a preflight carries no key");
            assert_eq!(answer.headers[header::ACCESS_CONTROL_ALLOW_HEADERS], "authorization,content-type");
        }
    }
}

#[tokio::test]
async fn request_ids_come_back_and_name_the_reply() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let with_id = |id: &str| {
        let mut request = request(Method::POST, "/v1/chat/completions", &hi().to_string());
        request.headers_mut().insert("x-request-id", id.parse().unwrap());
        request
    };
    let answer = send(&router, with_id("trace-7")).await;
    assert_eq!(answer.headers["x-request-id"], "trace-7");
    assert_eq!(answer.json()["id"], "chatcmpl-trace-7");
    let fresh = [send(&router, with_id(&"x".repeat(200))).await, send(&router, with_id("a b")).await];
    let ids: Vec<_> = fresh.iter().map(|answer| answer.headers["x-request-id"].clone()).collect();
    assert!(ids.iter().all(|id| id.len() == 32) && ids[0] != ids[1], "{ids:?}");
}

#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl Captured {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn the_access_log_has_one_line_per_request_and_no_words_of_it() {
    let log = Captured::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    // The other tests log here too; request ids tell the lines apart.
    tracing::subscriber::set_global_default(subscriber).unwrap();
    let reply = "secret reply";
    let engine = Engine::new(vec![Script::text(reply), Script::text(reply), Script::endless(reply)]);
    let router = engine.router(ServerConfig::default());
    let named = |id: &str, stream: bool| {
        let body = json!({"messages": [{"role": "user", "content": "secret prompt"}], "stream": stream});
        let mut request = request(Method::POST, "/v1/chat/completions", &body.to_string());
        request.headers_mut().insert("x-request-id", id.parse().unwrap());
        request
    };

    let whole = send(&router, named("logged-whole", false)).await.json();
    send(&router, named("logged-stream", true)).await.events();
    let mut left = router.clone().oneshot(named("logged-left", true)).await.unwrap().into_body();
    left.frame().await.unwrap().unwrap();
    drop(left);
    eventually("the abandoned request is aborted", || !engine.aborted().is_empty()).await;

    let text = log.text();
    assert!(!text.contains("secret"), "{text}");
    let usage = &whole["usage"];
    let tokens =
        format!("prompt_tokens={} completion_tokens={}", usage["prompt_tokens"], usage["completion_tokens"]);
    for (id, status) in [("logged-whole", 200), ("logged-stream", 200), ("logged-left", 499)] {
        let lines: Vec<&str> =
            text.lines().filter(|line| line.contains(&format!("request_id={id}"))).collect();
        let what = format!("method=POST path=/v1/chat/completions status={status} ms=");
        assert!(lines.len() == 1 && lines[0].contains("INFO") && lines[0].contains(&what), "{lines:#?}");
        assert!(lines[0].contains(" model=\"tiny-r1\" "), "{lines:#?}");
        assert!(status == 499 || lines[0].ends_with(&tokens), "{lines:#?}");
    }
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let engine = Engine::new(vec![Script::text("ok"), Script::endless("ok")]);
    let router = engine.router(ServerConfig::default());
    let usage = complete(&router, &json!({"prompt": "hi"})).await.json()["usage"].clone();
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 3);
    let endless = request(Method::POST, "/v1/completions", r#"{"prompt":"hi","stream":true}"#);
    drop(router.clone().oneshot(endless).await.unwrap());
    eventually("the second request is aborted", || !engine.aborted().is_empty()).await;
    let answer = get(&router, "/metrics").await;
    assert!(answer.headers[header::CONTENT_TYPE].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    for line in [
        r#"vllm:request_success_total{model_name="tiny-r1",finished_reason="stop"} 1"#.to_owned(),
        r#"vllm:request_success_total{model_name="tiny-r1",finished_reason="abort"} 1"#.to_owned(),
        r#"vllm:time_to_first_token_seconds_count{model_name="tiny-r1"} 1"#.to_owned(),
        r#"sglang:e2e_request_latency_seconds_count{model_name="tiny-r1"} 1"#.to_owned(),
        r#"vllm:request_queue_time_seconds_count{model_name="tiny-r1"} 1"#.to_owned(),
    ] {
        assert!(answer.text.lines().any(|l| l == line), "no line {line} in\n{}", answer.text);
    }
}
