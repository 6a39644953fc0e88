//! The API's description against the router and against what requests are refused for.
use std::collections::{BTreeMap, BTreeSet};

use axum::body::Body;
use axum::http::{Method, Request, header};
use r1_server::{Cors, ServerConfig};
use serde_json::{Value, json};

use crate::support::{Engine, get, post, request, send, with};

fn with_admin() -> ServerConfig {
    ServerConfig { admin_keys: ["admin-key"].into_iter().collect(), ..ServerConfig::default() }
}

async fn document(router: &axum::Router) -> Value {
    let answer = get(router, "/openapi.json").await;
    assert_eq!(answer.headers[header::CONTENT_TYPE], "application/json");
    answer.json()
}

/// Every path that the router knows, without prefix, with its methods.
async fn served(router: &axum::Router) -> BTreeMap<String, BTreeSet<String>> {
    // The router tells its paths in its debug form only.
    let debug = format!("{router:?}");
    let paths =
        debug.split("RouteId(").skip(1).filter_map(|after| after.split_once("): \"")?.1.split('"').next());
    let mut served = BTreeMap::new();
    for path in paths.filter(|path| !path.contains("__private__")) {
        let asked = path.replace("{*id}", "tiny-r1").replace("{id}", "resp_1");
        let wrong = Request::builder().method(Method::TRACE).uri(asked).body(Body::empty()).unwrap();
        let refused = send(router, wrong).await;
        if path == "/" && refused.status == 404 {
            // Where the fallback stands.
            continue;
        }
        assert_eq!(refused.status, 405, "{path}");
        let allowed = refused.headers[header::ALLOW].to_str().unwrap();
        let methods = allowed.split(',').filter(|method| *method != "HEAD").map(str::to_lowercase);
        let bare = path.strip_prefix("/v1").unwrap_or(path).replace("{*id}", "{id}");
        served.entry(bare).or_insert_with(BTreeSet::new).extend(methods);
    }
    served
}

#[tokio::test]
async fn it_names_every_route_and_no_other() {
    let router = Engine::saying("ok").router(ServerConfig { cors: Cors::Off, ..with_admin() });
    let document = document(&router).await;
    let mut described = BTreeMap::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let bare = path.strip_prefix("/v1").unwrap_or(path).to_owned();
        let methods: BTreeSet<String> = methods.as_object().unwrap().keys().cloned().collect();
        described.insert(bare, methods);
    }
    let served = served(&router).await;
    assert!(served.len() > 10, "the router tells its paths: {served:?}");
    assert_eq!(described, served);
}

#[tokio::test]
async fn its_references_lead_somewhere_and_nothing_is_left_over() {
    let router = Engine::saying("ok").router(with_admin());
    let document = document(&router).await;
    let text = document.to_string();
    let schemas: BTreeSet<&str> =
        document["components"]["schemas"].as_object().unwrap().keys().map(String::as_str).collect();
    let named = text.split("#/components/schemas/").skip(1).map(|after| after.split('"').next().unwrap());
    let mut named: BTreeSet<&str> = named.collect();
    // Events are named in words.
    named.extend(["ChatChunk", "MessagesEvent", "ResponsesEvent"]);
    assert_eq!(named, schemas);
}

#[tokio::test]
async fn its_examples_are_answered() {
    let router = Engine::saying("ok").router(ServerConfig::default());
    let document = document(&router).await;
    let mut tried = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let Some(example) = methods["post"].pointer("/requestBody/content/application~1json/example") else {
            continue;
        };
        let answer = post(&router, path, example).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text);
        tried += 1;
    }
    assert!(tried >= 7);
}

/// Values of each JSON type.
fn samples() -> [(&'static str, Value); 5] {
    [
        ("boolean", json!(true)),
        ("string", json!("no such value")),
        ("array", json!([[{}]])),
        ("object", json!({"no_such_field": [[]]})),
        ("number", json!(-3.5e9)),
    ]
}

/// The JSON types that a schema takes; all where it says nothing.
fn types(document: &Value, schema: &Value) -> BTreeSet<String> {
    if let Some(name) = schema["$ref"].as_str() {
        return types(document, document.pointer(&name[1..]).unwrap());
    }
    if let Some(options) = schema["anyOf"].as_array() {
        return options.iter().flat_map(|option| types(document, option)).collect();
    }
    let one = |kind: &Value| kind.as_str().unwrap().replace("integer", "number");
    match &schema["type"] {
        Value::Null => samples().iter().map(|(kind, _)| (*kind).to_owned()).collect(),
        Value::Array(kinds) => kinds.iter().map(one).collect(),
        kind => BTreeSet::from([one(kind)]),
    }
}

/// Values that a field's schema refuses: of other types, out of its range, not in its list.
fn refused_values(document: &Value, schema: &Value) -> Vec<Value> {
    let types = types(document, schema);
    let mut values: Vec<Value> =
        samples().into_iter().filter(|(kind, _)| !types.contains(*kind)).map(|(_, value)| value).collect();
    let number = |name: &str| schema[name].as_f64().filter(|bound| bound.abs() < 1e9);
    values.extend(number("minimum").map(|low| json!(low - 1.0)));
    values.extend(number("exclusiveMinimum").map(|low| json!(low)));
    values.extend(number("maximum").map(|high| json!(high + 1.0)));
    if schema["anyOf"].as_array().is_some_and(|options| options.iter().any(|o| o.get("enum").is_some())) {
        values.push(json!("no such value"));
    }
    values
}

/// Fields without which there is no request, and what others need beside them.
fn base(path: &str) -> Value {
    match path {
        "/tokenize" | "/v1/completions" => json!({"prompt": "hi"}),
        "/detokenize" => json!({"tokens": [5]}),
        "/v1/chat/completions" => json!({"messages": [{"role": "user", "content": "hi"}], "logprobs": true}),
        "/v1/messages" => json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}),
        "/v1/messages/count_tokens" => json!({"messages": [{"role": "user", "content": "hi"}]}),
        "/v1/responses" => json!({"input": "hi", "include": ["message.output_text.logprobs"]}),
        other => panic!("say what a request to {other} needs"),
    }
}

#[tokio::test]
async fn what_it_excludes_is_refused_by_name() {
    let router = Engine::saying("ok").router(ServerConfig::default());
    let document = document(&router).await;
    let mut tried = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let Some(schema) = methods["post"].pointer("/requestBody/content/application~1json/schema") else {
            continue;
        };
        let name = schema["$ref"].as_str().unwrap();
        let properties = document.pointer(&name[1..]).unwrap()["properties"].as_object().unwrap();
        for (field, schema) in properties {
            let mut base = base(path);
            // Of a conversation, which stands instead of the text.
            let conversational = [
                "messages",
                "tools",
                "add_generation_prompt",
                "continue_final_message",
                "chat_template_kwargs",
            ];
            if path == "/tokenize" && conversational.contains(&field.as_str()) {
                base = json!({"messages": [{"role": "user", "content": "hi"}]});
            }
            if path == "/tokenize" && ["content", "messages"].contains(&field.as_str()) {
                base = json!({});
            }
            for value in refused_values(&document, schema) {
                let body = with(&base, &json!({field.as_str(): value}));
                let answer = post(&router, path, &body).await;
                assert_eq!(answer.status, 400, "{path} {field}: {value}: {}", answer.text);
                let root = blamed(&answer.json());
                assert!(root == *field || field == "max_tokens", "{path} {field}: {value}: {}", answer.text);
                tried += 1;
            }
        }
    }
    assert!(tried > 700, "{tried}");
}

/// The request's field that an error names.
fn blamed(error: &Value) -> String {
    // Anthropic's error has no place for it: its message begins with it.
    let place = if error["type"] == "error" { &error["error"]["message"] } else { &error["error"]["param"] };
    place.as_str().unwrap_or_default().split(['.', '[', ':']).next().unwrap().to_owned()
}

#[tokio::test]
async fn what_it_excludes_behind_a_path_is_refused_by_name() {
    let router = Engine::saying("ok").router(ServerConfig::default());
    let document = document(&router).await;
    let stored = post(&router, "/v1/responses", &json!({"input": "hi"})).await.json()["id"].clone();
    let mut tried = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let Some(parameters) = methods["get"]["parameters"].as_array() else { continue };
        for parameter in parameters.iter().filter(|parameter| parameter["in"] == "query") {
            let name = parameter["name"].as_str().unwrap();
            let schema = &parameter["schema"];
            let mut values: Vec<String> = Vec::new();
            values.extend(schema["minimum"].as_i64().map(|low| (low - 1).to_string()));
            values.extend(schema["maximum"].as_i64().map(|high| (high + 1).to_string()));
            if schema["type"] != "string" || schema.get("enum").is_some() {
                values.extend(["", "no-such-value", "true", "%00"].map(str::to_owned));
            }
            for value in values {
                let asked = path.replace("{id}", stored.as_str().unwrap());
                let answer = get(&router, &format!("{asked}?{name}={value}")).await;
                assert_eq!(answer.status, 400, "{path} {name}={value}: {}", answer.text);
                assert_eq!(blamed(&answer.json()), name, "{path} {name}={value}: {}", answer.text);
                tried += 1;
            }
        }
    }
    assert!(tried >= 10, "{tried}");
}

/// Names in a list of string literals, up to its end.
fn listed(source: &str) -> Vec<String> {
    let list = source.split(']').next().unwrap_or_default();
    list.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Fields of requests that the sources of a folder take, whether one by one or in loops over lists of names.
fn taken(folder: &str) -> BTreeSet<String> {
    let mut read = BTreeSet::new();
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(folder);
    for entry in std::fs::read_dir(folder).unwrap() {
        let mut source = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        source.retain(|c| !c.is_whitespace());
        for call in source.split("fields.").skip(1) {
            let Some((method, rest)) = call.split_once('(') else { continue };
            let method = method.split("::").next().unwrap();
            let name = rest.strip_prefix('"').and_then(|rest| rest.split('"').next());
            if ["take", "require"].contains(&method) {
                read.extend(name.map(str::to_owned));
            }
        }
        for (at, _) in source.match_indices("in[\"") {
            let (list, block) = source[at..].split_once("]{").unwrap();
            if !list.contains(';') && block.split('}').next().unwrap().contains("fields.take") {
                read.extend(listed(list));
            }
        }
        if let Some((_, list)) = source.split_once("constSHARED:&[&str]=&[") {
            assert!(source.contains("fornameinSHARED{ifletSome(value)=fields.take"), "they are read");
            read.extend(listed(list));
        }
    }
    read
}

/// Every field that the sources take stands in the request's schema.
#[tokio::test]
async fn it_names_every_field_that_is_read() {
    let router = Engine::saying("ok").router(ServerConfig::default());
    let document = document(&router).await;
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let all = ["Chat", "Completion", "Tokenize", "Detokenize"];
    let sources = [
        ("types", &all[..2], "temperature"),
        ("ops", &all[2..], "tokens"),
        ("responses", &["Responses"][..], "min_p"),
        ("messages", &["Messages"][..], "stop_sequences"),
    ];
    for (folder, requests, known) in sources {
        let described: BTreeSet<&str> = requests
            .iter()
            .flat_map(|name| schemas[&format!("{name}Request")]["properties"].as_object().unwrap().keys())
            .map(String::as_str)
            .collect();
        let mut read = taken(folder);
        assert!(read.len() > 5 && read.contains(known), "{folder}: {read:?}");
        // llama-server's spelling of `add_special_tokens`.
        read.remove("add_special");
        let missing: Vec<&String> = read.iter().filter(|name| !described.contains(name.as_str())).collect();
        assert!(missing.is_empty(), "{folder}: not described: {missing:?}");
    }
}

#[tokio::test]
async fn it_says_whether_a_key_is_needed_and_where_the_server_is() {
    let engine = Engine::saying("ok");
    let open = document(&engine.router(ServerConfig::default())).await;
    let config = ServerConfig {
        api_keys: ["secret-key".to_owned()].into_iter().collect(),
        root_path: "/proxy/models/main/".into(),
        ..ServerConfig::default()
    };
    let locked = document(&engine.router(config)).await;
    let chat = |document: &Value| document["paths"]["/v1/chat/completions"]["post"].clone();
    assert_eq!((&chat(&open)["security"], &chat(&locked)["security"]), (&json!([]), &json!([{"key": []}])));
    assert!(chat(&locked)["responses"].get("401").is_some() && chat(&open)["responses"].get("401").is_none());
    assert_eq!(locked["paths"]["/health"]["get"]["security"], json!([]));
    assert_eq!(locked["servers"][0]["url"], "/proxy/models/main");
    assert_eq!(open["servers"][0]["url"], "/");
    assert!(!locked.to_string().contains("secret-key"));
}

#[tokio::test]
async fn the_page_needs_nothing_from_elsewhere() {
    let router = Engine::saying("ok").router(ServerConfig::default());
    let page = get(&router, "/v1/docs").await;
    assert_eq!(page.headers[header::CONTENT_TYPE], "text/html; charset=utf-8");
    let policy = page.headers[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none'") && policy.contains("connect-src 'self'"), "{policy}");
    assert!(!policy.contains("unsafe") && policy.matches("'sha256-").count() == 2, "{policy}");
    for outside in ["http://", "https://", "//cdn", "@import", "url("] {
        assert!(!page.text.contains(outside), "{outside}");
    }
    assert!(page.text.contains("fetch(\"openapi.json\")"));
    send(&router, request(Method::POST, "/docs", "")).await.refused(405);
}

#[tokio::test]
async fn it_can_be_left_out() {
    let router = Engine::saying("ok").router(ServerConfig { docs: false, ..ServerConfig::default() });
    for path in ["/openapi.json", "/docs", "/v1/docs"] {
        get(&router, path).await.refused(404);
    }
    assert_eq!(get(&router, "/version").await.status, 200);
}
