//! Every numeric field with every number that is none or out of range.

use axum::http::Method;
use r1_server::ServerConfig;

use crate::support::{Engine, request, send};

/// As they stand in a request's text, most of them no JSON.
const VALUES: [&str; 18] = [
    "NaN",
    "Infinity",
    "-Infinity",
    "-1",
    "1e999",
    "-1e999",
    "1e300",
    "9223372036854775808",
    "18446744073709551616",
    "-9223372036854775809",
    "1.5",
    "\"7\"",
    "true",
    "false",
    "null",
    "[]",
    "{}",
    "+1",
];

/// A field, how its number stands in the request, and the values above that are in its range or ask for nothing.
type Row = (&'static str, &'static str, &'static [&'static str]);

const SHARED: &[Row] = &[
    ("temperature", "@", &["1.5", "null"]),
    ("top_p", "@", &["null"]),
    ("top_k", "@", &["-1", "null"]),
    ("min_p", "@", &["null"]),
    ("repetition_penalty", "@", &["1.5", "null"]),
    ("presence_penalty", "@", &["-1", "1.5", "null"]),
    ("frequency_penalty", "@", &["-1", "1.5", "null"]),
    ("seed", "@", &["-1", "9223372036854775808", "null"]),
    ("n", "@", &["null"]),
    ("best_of", "@", &["null"]),
    ("max_tokens", "@", &["null"]),
    ("min_tokens", "@", &["null"]),
    ("priority", "@", &["-1", "null"]),
    ("stop_token_ids", "[@]", &[]),
    ("logit_bias", "{\"5\": @}", &["-1", "1.5"]),
    ("truncate_prompt_tokens", "@", &["-1", "null"]),
    ("prompt_logprobs", "@", &["null", "true", "false"]),
    ("allowed_token_ids", "[@]", &[]),
    // Refused whatever it holds, and named too.
    ("length_penalty", "@", &["null"]),
];

const CHAT: &[Row] = &[
    ("max_completion_tokens", "@", &["null"]),
    ("top_logprobs", "@", &["null"]),
    ("thinking_budget", "@", &["null"]),
];

const COMPLETIONS: &[Row] = &[
    ("logprobs", "@", &["null"]),
    // A list of one text.
    ("prompt", "[@]", &["\"7\""]),
    ("prompt", "[[@]]", &[]),
];

async fn hold(path: &str, base: &str, rows: &[Row]) {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    for (field, shape, accepted) in rows {
        for value in VALUES {
            let body = format!("{{\"{field}\": {}{base}}}", shape.replace('@', value));
            let answer = send(&router, request(Method::POST, path, &body)).await;
            if accepted.contains(&value) {
                assert_eq!(answer.status, 200, "{body}: {}", answer.text);
                continue;
            }
            assert_eq!(answer.status, 400, "{body}: {}", answer.text);
            let param = answer.refused(400)["param"].clone();
            let named = param.as_str().unwrap_or_else(|| panic!("{body}: {}", answer.text));
            let named = named.split(['.', '[']).next().unwrap();
            assert_eq!(named, *field, "{body}: {}", answer.text);
        }
    }
}

#[tokio::test]
async fn chat_names_the_field_of_every_bad_number() {
    let base = r#", "messages": [{"role": "user", "content": "hi"}], "logprobs": true"#;
    for rows in [SHARED, CHAT] {
        hold("/v1/chat/completions", base, rows).await;
    }
}

#[tokio::test]
async fn completions_name_the_field_of_every_bad_number() {
    hold("/v1/completions", r#", "prompt": "hi""#, SHARED).await;
    hold("/v1/completions", r#", "prompt": "hi""#, &COMPLETIONS[..1]).await;
    hold("/v1/completions", "", &COMPLETIONS[1..]).await;
}
