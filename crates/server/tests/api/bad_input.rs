//! What a hostile or broken client may send, byte for byte over a socket: each is answered, named and quick, and the next
//! client is served. `cargo test -- --nocapture` prints how long each took.

use std::fmt::Write;
use std::time::{Duration, Instant};

use r1_server::ServerConfig;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::socket::Server;
use crate::support::Engine;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const TEN_MB: usize = 10 << 20;

/// Bytes to send and how they must be answered.
struct Case {
    name: String,
    bytes: Vec<u8>,
    /// One status per expected reply.
    statuses: Vec<u16>,
    /// `error.param` of the first reply.
    param: Option<&'static str>,
    /// How soon in a release build.
    within: Duration,
}

const AT_ONCE: Duration = Duration::from_millis(100);

fn raw(name: &str, bytes: impl Into<Vec<u8>>, statuses: &[u16]) -> Case {
    Case { name: name.into(), bytes: bytes.into(), statuses: statuses.into(), param: None, within: AT_ONCE }
}

fn post(name: &str, path: &str, body: impl AsRef<[u8]>, status: u16) -> Case {
    raw(name, message("POST", path, "content-type: application/json\r\n", body.as_ref()), &[status])
}

fn names(case: Case, param: &'static str) -> Case {
    Case { param: Some(param), ..case }
}

/// A case whose cost is its count of pieces rather than of bytes.
fn within(case: Case, within: Duration) -> Case {
    Case { within, ..case }
}

/// A request with these headers and a length.
fn message(method: &str, path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head =
        format!("{method} {path} HTTP/1.1\r\nhost: here\r\n{headers}content-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

fn nested(open: &str, close: &str) -> String {
    format!("{{\"prompt\": {}1{}}}", open.repeat(10_000), close.repeat(10_000))
}

fn headers(count: usize, value_len: usize) -> String {
    let mut text = String::new();
    for i in 0..count {
        write!(text, "x-{i}: {}\r\n", "v".repeat(value_len)).unwrap();
    }
    text
}

fn messages(messages: &Value) -> String {
    json!({"messages": messages}).to_string()
}

fn big_bodies() -> Vec<Case> {
    let text = "lorem ipsum ".repeat(TEN_MB / 12);
    let unbroken = "x".repeat(TEN_MB);
    let mut chunked =
        b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for byte in json!({"prompt": "hi", "user": "u".repeat(3 << 20)}).to_string().bytes() {
        chunked.extend_from_slice(&[b'1', b'\r', b'\n', byte, b'\r', b'\n']);
    }
    chunked.extend_from_slice(b"0\r\n\r\n");
    vec![
        names(post("10 MB prompt of words", COMPLETIONS, json!({"prompt": text}).to_string(), 400), "prompt"),
        names(
            post("10 MB prompt without a space", COMPLETIONS, json!({"prompt": unbroken}).to_string(), 400),
            "prompt",
        ),
        names(
            post("10 MB message of words", CHAT, messages(&json!([{"role": "user", "content": text}])), 400),
            "messages",
        ),
        names(
            post(
                "10 MB message without a space",
                CHAT,
                messages(&json!([{"role": "user", "content": unbroken}])),
                400,
            ),
            "messages",
        ),
        // 100,000 objects are made before the template is asked whether they fit.
        within(
            names(
                post(
                    "100,000 messages",
                    CHAT,
                    messages(&json!(vec![json!({"role": "user", "content": "hi"}); 100_000])),
                    400,
                ),
                "messages",
            ),
            Duration::from_secs(2),
        ),
        names(
            post("10 MB of one string without end", COMPLETIONS, format!("{{\"prompt\": \"{unbroken}"), 400),
            "prompt",
        ),
        // A JSON value is made of each of the 2.6 million.
        within(
            names(
                post(
                    "5 MB of token ids",
                    COMPLETIONS,
                    json!({"prompt": vec![5; TEN_MB / 4]}).to_string(),
                    400,
                ),
                "prompt",
            ),
            Duration::from_secs(1),
        ),
        // Three million chunks, each of which hyper takes apart and hands over.
        within(raw("3 MB in chunks of a byte", chunked, &[200]), Duration::from_secs(5)),
        post("17 MB", COMPLETIONS, vec![b' '; 17 << 20], 413),
        names(post("10,000 nested lists", COMPLETIONS, nested("[", "]"), 400), "prompt"),
        names(post("10,000 nested objects", COMPLETIONS, nested("{\"a\":", "}"), 400), "prompt"),
    ]
}

fn texts() -> Vec<Case> {
    let user = |content: Value| messages(&json!([{"role": "user", "content": content}]));
    let image = json!([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]);
    vec![
        names(post("no messages", CHAT, messages(&json!([])), 400), "messages"),
        names(post("messages that are no list", CHAT, messages(&json!({"role": "user"})), 400), "messages"),
        names(
            post("an unknown role", CHAT, messages(&json!([{"role": "king", "content": "x"}])), 400),
            "messages[0].role",
        ),
        names(post("content of a wrong type", CHAT, user(json!(7)), 400), "messages[0].content"),
        names(post("an image", CHAT, user(image), 400), "messages[0].content[0]"),
        post("invalid UTF-8", COMPLETIONS, b"{\"prompt\": \"\xff\xfe\"}", 400),
        post("a byte order mark", COMPLETIONS, "\u{feff}{\"prompt\": \"hi\"}", 400),
        names(post("a lone surrogate", COMPLETIONS, r#"{"prompt": "\ud800"}"#, 400), "prompt"),
        names(post("a lone trailing surrogate", COMPLETIONS, r#"{"prompt": "\udc00 x"}"#, 400), "prompt"),
        post("a key twice: the last counts", COMPLETIONS, r#"{"prompt": 7, "prompt": "hi"}"#, 200),
        post("an empty body", CHAT, "", 400),
        post("a body of NULs", CHAT, [0; 64], 400),
        raw(
            "an unknown content type",
            message("POST", COMPLETIONS, "content-type: a/b\r\n", b"{\"prompt\": \"hi\"}"),
            &[200],
        ),
    ]
}

fn framing() -> Vec<Case> {
    let hi = b"{\"prompt\": \"hi\"}";
    let chunked = |rest: &str| {
        format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: here\r\ntransfer-encoding: chunked\r\n\r\n{rest}")
    };
    let length = |lengths: &str| {
        format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: here\r\n{lengths}\r\n\r\n{{\"prompt\": \"hi\"}}")
    };
    let one = message("POST", COMPLETIONS, "", hi);
    let long_path = |len: usize| message("GET", &format!("/{}", "a".repeat(len)), "", b"");
    vec![
        raw("headers: 900 small ones", message("POST", COMPLETIONS, &headers(900, 1), hi), &[200]),
        raw("headers: one of 40 kB", message("POST", COMPLETIONS, &headers(1, 40_000), hi), &[431]),
        raw("headers: 1,000 of 100 bytes", message("POST", COMPLETIONS, &headers(1000, 100), hi), &[431]),
        raw("headers: 10,000", message("POST", COMPLETIONS, &headers(10_000, 1), hi), &[431]),
        raw("headers: one of 2 MB", message("POST", COMPLETIONS, &headers(1, 2 << 20), hi), &[431]),
        raw("chunk size that is no number", chunked("zz\r\nhi\r\n0\r\n\r\n"), &[400]),
        raw("chunk longer than its size", chunked("2\r\n{}{}\r\n0\r\n\r\n"), &[400]),
        raw("chunk size of 17 digits", chunked("ffffffffffffffff1\r\nhi"), &[400]),
        raw("content-length shorter than the body", length("content-length: 3"), &[400, 400]),
        raw("content-length that is no number", length("content-length: many"), &[400]),
        raw("content-length below zero", length("content-length: -1"), &[400]),
        raw("two content-lengths", length("content-length: 16\r\ncontent-length: 3"), &[400]),
        raw("three requests at once", [&one[..], &one, &one].concat(), &[200, 200, 200]),
        raw("HEAD /health", "HEAD /health HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n", &[200]),
        raw(
            "HEAD of a POST",
            format!("HEAD {CHAT} HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n"),
            &[405],
        ),
        raw("OPTIONS", message("OPTIONS", CHAT, "", b""), &[200]),
        raw("DELETE", message("DELETE", CHAT, "", b""), &[405]),
        raw("an unknown method", message("BREW", "/health", "", b""), &[405]),
        raw("a method that is none", message("G@T", "/health", "", b""), &[400]),
        raw("a path of 60 kB", long_path(60_000), &[404]),
        raw("a path of 100 kB", long_path(100_000), &[414]),
        raw("a path of escapes", message("GET", "/%00%ff/..%2f..//health?%zz", "", b""), &[404]),
        raw("a path that is none", message("GET", "health", "", b""), &[404]),
        raw(
            "a request line of noise",
            "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\u{fc}\u{3}\u{3} hello\r\n\r\n",
            &[400],
        ),
        raw("HTTP/9.9", "GET /health HTTP/9.9\r\nhost: here\r\n\r\n", &[400]),
    ]
}

/// One reply from what the connection has said so far: its status and its body.
fn reply(said: &mut Vec<u8>, head_only: bool) -> Option<(u16, String)> {
    let end = said.windows(4).position(|at| at == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&said[..end]).to_ascii_lowercase();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let len = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    let len = if head_only { 0 } else { len.unwrap_or(0_usize) };
    if said.len() < end + len {
        return None;
    }
    let body = String::from_utf8_lossy(&said[end..end + len]).into_owned();
    said.drain(..end + len);
    Some((status, body))
}

/// Sends the bytes; gives the replies and the time from the last byte written to the last one read.
async fn exchange(server: &Server, case: &Case) -> (Vec<(u16, String)>, Duration) {
    let stream = TcpStream::connect(server.address).await.unwrap();
    let (mut reader, mut writer) = stream.into_split();
    let head_only = case.bytes.starts_with(b"HEAD");
    // Replies may come while there is still something to write.
    let writing = async {
        writer
            .write_all(&case.bytes)
            .await
            .unwrap_or_else(|e| panic!("{}: the server stopped reading: {e}", case.name));
        Instant::now()
    };
    let reading = async {
        let (mut said, mut replies) = (Vec::new(), Vec::new());
        let mut buffer = vec![0; 64 << 10];
        while replies.len() < case.statuses.len() {
            match reader.read(&mut buffer).await {
                Ok(0) => panic!("{}: closed after {} replies", case.name, replies.len()),
                Ok(len) => said.extend_from_slice(&buffer[..len]),
                Err(error) => panic!("{}: {error} after {} replies", case.name, replies.len()),
            }
            while let Some(reply) = reply(&mut said, head_only) {
                replies.push(reply);
            }
        }
        (replies, Instant::now())
    };
    let both = timeout(Duration::from_secs(30), async { tokio::join!(writing, reading) }).await;
    let (written, (replies, read)) = both.unwrap_or_else(|_| panic!("{}: no whole answer", case.name));
    (replies, read.saturating_duration_since(written))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_bad_input_is_answered_at_once_and_the_next_request_is_served() {
    let engine = Engine::saying("ok");
    let server = Server::start(&engine, ServerConfig::default()).await;
    let normal = || post("a normal request", COMPLETIONS, "{\"prompt\": \"hi\"}", 200);
    let mut slow = Vec::new();
    for case in big_bodies().into_iter().chain(texts()).chain(framing()) {
        let (mut replies, mut took) = exchange(&server, &case).await;
        // The machine may have had something else to do.
        for _ in 0..2 {
            if took > case.within {
                let again = exchange(&server, &case).await;
                replies = again.0;
                took = took.min(again.1);
            }
        }
        let statuses: Vec<u16> = replies.iter().map(|(status, _)| *status).collect();
        assert_eq!(statuses, case.statuses, "{}: {replies:?}", case.name);
        if let Some(param) = case.param {
            let error: Value = serde_json::from_str(&replies[0].1).unwrap();
            assert_eq!(error["error"]["param"], param, "{}: {error}", case.name);
        }
        println!("{:>8.1} ms  {statuses:?}  {}", took.as_secs_f64() * 1e3, case.name);
        let (served, _) = exchange(&server, &normal()).await;
        assert_eq!(served[0].0, 200, "after {}: {}", case.name, served[0].1);
        if took > case.within && !cfg!(debug_assertions) {
            slow.push(format!("{}: {took:?}, not {:?}", case.name, case.within));
        }
    }
    assert!(slow.is_empty(), "{slow:#?}");
}

/// A body that ends before its length, its client still listening.
#[tokio::test]
async fn a_body_shorter_than_its_length_is_no_request() {
    let engine = Engine::saying("ok");
    let server = Server::start(&engine, ServerConfig::default()).await;
    let mut client = server.connect().await;
    client
        .write(
            "POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: 99\r\n\r\n{\"prompt\": \"hi\"}",
        )
        .await;
    client.socket.shutdown().await.unwrap();
    client.until_closed().await;
    assert!(client.read.is_empty() || client.read.starts_with("HTTP/1.1 400"), "{}", client.read);
    assert!(engine.asked().is_empty());
}
