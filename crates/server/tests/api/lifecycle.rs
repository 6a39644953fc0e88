//! Time: connections that idle, headers and bodies that trickle, requests that last, replies that nobody reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use r1_core::TokenId;
use r1_engine::{Command, EngineInfo, Event, Handle, Sent, Status};
use r1_server::ServerConfig;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

use crate::socket::{Client, Server, streamed};
use crate::support::{Engine, Script, eventually, info};

const SOON: Duration = Duration::from_millis(150);
/// Far beyond what these tests wait for.
const NEVER: Duration = Duration::from_hours(1);

pub(crate) fn unhurried() -> ServerConfig {
    ServerConfig {
        idle_timeout: NEVER,
        header_timeout: NEVER,
        body_timeout: NEVER,
        write_timeout: NEVER,
        ..ServerConfig::default()
    }
}

const HEALTH: &str = "GET /health HTTP/1.1\r\nhost: here\r\n\r\n";

#[tokio::test]
async fn connections_without_a_request_are_closed_and_those_with_one_are_not() {
    const IDLE: Duration = Duration::from_secs(2);
    let engine = Engine::new(vec![Script::endless("word ")]);
    let server = Server::start(&engine, ServerConfig { idle_timeout: IDLE, ..unhurried() }).await;
    let mut silent = server.connect().await;
    let mut kept = server.connect().await;
    let mut busy = server.post(&json!({"prompt": "hi"})).await;
    // Longer in all than it may idle.
    for _ in 0..5 {
        kept.read.clear();
        kept.write(HEALTH).await;
        kept.until("ready").await;
        tokio::time::sleep(IDLE / 4).await;
    }
    silent.until_closed().await;
    assert_eq!(silent.read, "");
    kept.until_closed().await;
    assert!(engine.aborted().is_empty());
    engine.release();
    busy.until("\"finish_reason\":\"length\"").await;
}

#[tokio::test]
async fn headers_that_trickle_are_408() {
    let engine = Engine::saying("ok");
    let server = Server::start(&engine, ServerConfig { header_timeout: SOON, ..unhurried() }).await;
    let mut fresh = server.connect().await;
    fresh.write("POST /v1/completions HTT").await;
    let mut kept = server.connect().await;
    kept.write(HEALTH).await;
    kept.until("ready").await;
    tokio::time::sleep(SOON * 2).await;
    kept.write("GET /health HTTP/1.1\r\nhost: he").await;
    for client in [&mut fresh, &mut kept] {
        client.until("request_timeout").await;
        client.until_closed().await;
        let reply = &client.read[client.read.find("HTTP/1.1 408").expect("a 408")..];
        let (head, body) = reply.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}", body.len())), "{reply}");
        let error: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(error["error"]["type"], "invalid_request_error");
    }
}

#[tokio::test]
async fn bodies_that_trickle_are_408() {
    let engine = Engine::saying("ok");
    let server = Server::start(&engine, ServerConfig { body_timeout: SOON, ..unhurried() }).await;
    let mut client = server.connect().await;
    client.write("POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: 20\r\n\r\n{\"pro").await;
    client.until("body did not arrive").await;
    assert!(client.read.starts_with("HTTP/1.1 408"), "{}", client.read);
}

#[tokio::test]
async fn requests_that_last_too_long_are_408_and_aborted() {
    let engine = Engine::new(vec![Script::endless("word ")]);
    let config = ServerConfig { request_timeout: Some(SOON), ..unhurried() };
    let server = Server::start(&engine, config).await;
    let mut whole = server.post(&json!({"prompt": "hi"})).await;
    let mut streaming = server.post(&streamed()).await;
    whole.until("--request-timeout").await;
    assert!(whole.read.starts_with("HTTP/1.1 408"), "{}", whole.read);
    streaming.until("[DONE]").await;
    assert!(streaming.read.starts_with("HTTP/1.1 200"), "{}", streaming.read);
    let error = streaming.read.find("data: {\"error\":").expect("an error event");
    assert!(streaming.read[error..].contains("request_timeout"), "{}", streaming.read);
    eventually("both are aborted", || engine.aborted().len() == 2).await;
    let mut unread = server.connect().await;
    unread.write("POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: 9\r\n\r\n{").await;
    unread.until("--request-timeout").await;
    // Only what is left of a body makes a connection useless.
    assert!(!whole.read.contains("connection: close"), "{}", whole.read);
    assert!(unread.read.contains("connection: close"), "{}", unread.read);
}

#[tokio::test]
async fn a_client_that_still_writes_reads_its_413() {
    let engine = Engine::saying("ok");
    let server = Server::start(&engine, ServerConfig { max_body_bytes: 1000, ..unhurried() }).await;
    // More than all sockets' buffers hold, so that a closed connection would break the writing.
    let body = vec![b'x'; 32 << 20];
    for framing in ["content-length: 33554432", "transfer-encoding: chunked"] {
        let mut client = server.connect().await;
        client.write(&format!("POST /v1/completions HTTP/1.1\r\nhost: here\r\n{framing}\r\n\r\n")).await;
        if framing.starts_with("transfer") {
            client.write("2000000\r\n").await;
        }
        client.socket.write_all(&body).await.expect("the server reads on");
        client.until("request_too_large").await;
        assert!(client.read.starts_with("HTTP/1.1 413"), "{}", client.read);
        assert!(client.read.contains("connection: close"), "{}", client.read);
        client.until_closed().await;
    }
    assert!(engine.asked().is_empty());
}

#[tokio::test]
async fn http2_is_spoken_too() {
    let engine = Engine::saying("ok");
    let server = Server::start(&engine, ServerConfig { header_timeout: SOON, ..unhurried() }).await;
    let mut client = server.connect().await;
    // The preface, however it is cut, and a frame of no settings.
    client.write("PR").await;
    tokio::time::sleep(SOON / 3).await;
    client.write("I * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\u{4}\0\0\0\0\0").await;
    let mut frame = [0; 9];
    client.socket.read_exact(&mut frame).await.unwrap();
    assert_eq!(frame[3], 4, "a frame of settings: {frame:?}");
    tokio::time::sleep(SOON * 2).await;
    // A ping, which is no header that trickles.
    client.write("\0\0\u{8}\u{6}\0\0\0\0\0pingping").await;
    client.until("pingping").await;
}

pub(crate) const RUNNING: u8 = 0;
const OVERFLOWED: u8 = 1;
pub(crate) const ABANDONED: u8 = 2;

/// An engine that writes without end until it is told that nobody reads.
pub(crate) fn tireless(max_unread_tokens: usize) -> (Handle, Arc<AtomicU8>) {
    let (handle, inbox) = Handle::channel(EngineInfo { max_unread_tokens, ..info() });
    inbox.set_status(Status::Ready);
    let outcome = Arc::new(AtomicU8::new(RUNNING));
    let told = outcome.clone();
    thread::spawn(move || {
        while let Some(command) = inbox.wait() {
            let Command::Submit { events, .. } = command else { continue };
            events.send(Event::Scheduled { cached_tokens: 0 });
            let outcome = loop {
                match events.send(Event::Token { token: TokenId(40), logprobs: None }) {
                    Sent::Delivered => thread::sleep(Duration::from_micros(50)),
                    Sent::Overflowed => break OVERFLOWED,
                    Sent::Abandoned => break ABANDONED,
                }
            };
            inbox.ended(1);
            told.store(outcome, Ordering::Relaxed);
        }
    });
    (handle, outcome)
}

/// A client whose socket holds little.
async fn reluctant(server: &Server) -> Client {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut client = Client { socket: socket.connect(server.address).await.unwrap(), read: String::new() };
    client.post(&streamed()).await;
    client
}

#[tokio::test]
async fn a_reader_that_falls_behind_is_told_that_its_reply_was_given_up() {
    let (handle, outcome) = tireless(256);
    let server = Server::start_handle(handle.clone(), unhurried()).await;
    let mut client = reluctant(&server).await;
    client.until("HTTP/1.1 200").await;
    let since = Instant::now();
    while outcome.load(Ordering::Relaxed) == RUNNING {
        assert!(since.elapsed() < Duration::from_mins(1), "the engine's queue never fills up");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(outcome.load(Ordering::Relaxed), OVERFLOWED);
    client.until("[DONE]").await;
    let error = client.read.find("data: {\"error\":").expect("an error event");
    assert!(client.read[error..].contains("slow_reader"), "{}", &client.read[error..]);
    assert_eq!(handle.stats().waiting, 0);
}

#[tokio::test]
async fn a_reply_that_nobody_reads_is_broken_off() {
    let (handle, outcome) = tireless(1 << 30);
    let config = ServerConfig { write_timeout: SOON * 4, ..unhurried() };
    let server = Server::start_handle(handle.clone(), config).await;
    let mut client = reluctant(&server).await;
    client.until("HTTP/1.1 200").await;
    let since = Instant::now();
    while outcome.load(Ordering::Relaxed) == RUNNING {
        assert!(since.elapsed() < Duration::from_mins(1), "the generation is never given up");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(outcome.load(Ordering::Relaxed), ABANDONED);
    assert_eq!(handle.stats().waiting, 0);
    tokio::time::sleep(SOON * 4).await;
    client.until_closed().await;
    assert!(!client.read.contains("[DONE]"));
    // Chunked framing lacks its end too, so that no client takes this for a whole reply.
    assert!(!client.read.ends_with("0\r\n\r\n"));
}

#[tokio::test]
async fn kept_connections_are_closed_when_the_server_stops() {
    let engine = Engine::saying("ok");
    let mut server = Server::start(&engine, unhurried()).await;
    let mut kept = server.connect().await;
    kept.write(HEALTH).await;
    kept.until("ready").await;
    let mut silent = server.connect().await;
    server.stop();
    kept.until_closed().await;
    silent.until_closed().await;
    server.has_ended().await;
}

#[tokio::test]
async fn a_connection_whose_reply_is_still_being_written_is_not_idle() {
    const IDLE: Duration = Duration::from_millis(500);
    let engine = Engine::saying(&"word ".repeat(2000));
    let server = Server::start(&engine, ServerConfig { idle_timeout: IDLE, ..unhurried() }).await;
    let message = json!({"role": "user", "content": "hi"});
    // More than all sockets' buffers hold.
    let body = json!({"messages": [message], "logprobs": true, "top_logprobs": 20, "n": 8}).to_string();
    let mut client = server.connect().await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json";
    client.write(&format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())).await;
    client.until("\r\n\r\n").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    client.until_closed().await;
    let (head, body) = client.read.split_once("\r\n\r\n").unwrap();
    let len: usize = head.split_once("content-length: ").unwrap().1.lines().next().unwrap().parse().unwrap();
    assert!(len > 16 << 20, "{len} bytes could fit into the buffers");
    assert_eq!(body.len(), len, "the reply is whole");
}

#[tokio::test]
async fn what_is_left_of_a_body_is_no_header_that_trickles() {
    let engine = Engine::saying("ok");
    let config = ServerConfig { header_timeout: SOON, idle_timeout: Duration::from_secs(2), ..unhurried() };
    let server = Server::start(&engine, config).await;
    let mut early = server.connect().await;
    early.write("POST /nowhere HTTP/1.1\r\nhost: here\r\ncontent-length: 20\r\n\r\n0123456789").await;
    early.until("unknown_url").await;
    // A connection that is closed by now has taken it for no header either.
    let _ = early.socket.write_all(b"0123456789").await;
    let mut blank = server.post(&json!({"prompt": "hi"})).await;
    blank.until("\"text\"").await;
    blank.write("\r\n").await;
    for client in [&mut early, &mut blank] {
        client.until_closed().await;
        assert!(!client.read.contains("HTTP/1.1 408"), "{}", client.read);
    }
}

#[tokio::test]
async fn a_busy_stream_ends_with_its_request_timeout() {
    let (handle, outcome) = tireless(1 << 30);
    let config = ServerConfig { request_timeout: Some(Duration::from_secs(1)), ..unhurried() };
    let server = Server::start_handle(handle, config).await;
    let mut reading = server.post(&streamed()).await;
    reading.until("[DONE]").await;
    eventually("the generation is given up", || outcome.load(Ordering::Relaxed) == ABANDONED).await;
    let error = reading.read.find("data: {\"error\":").expect("an error event");
    assert!(reading.read[error..].contains("request_timeout"), "{}", &reading.read[error..]);
}

#[tokio::test]
async fn a_stream_that_nobody_reads_has_its_request_timeout_told_all_the_same() {
    let (handle, outcome) = tireless(1 << 30);
    let config = ServerConfig { request_timeout: Some(Duration::from_secs(2)), ..unhurried() };
    let server = Server::start_handle(handle, config).await;
    let mut client = reluctant(&server).await;
    eventually("the generation is given up", || outcome.load(Ordering::Relaxed) == ABANDONED).await;
    client.until("[DONE]").await;
    let error = client.read.find("data: {\"error\":").expect("an error event");
    assert!(client.read[error..].contains("request_timeout"), "{}", &client.read[error..]);
}

#[tokio::test]
async fn a_stopping_server_does_not_wait_for_uploads() {
    let engine = Engine::saying("ok");
    let mut server = Server::start(&engine, unhurried()).await;
    let mut uploading = server.connect().await;
    uploading.write("POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: 99\r\n\r\n{").await;
    let mut after = server.connect().await;
    after.write(HEALTH).await;
    after.until("ready").await;
    server.stop();
    // Far sooner than the body's or the shutdown's timeout.
    server.has_ended().await;
}

/// A client that speaks as much HTTP/2 as it takes to ask.
struct Http2 {
    socket: tokio::net::TcpStream,
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GO_AWAY: u8 = 7;

impl Http2 {
    /// Connects; each stream begins with a window of so many bytes.
    async fn connect(server: &Server, window: u32) -> Self {
        let mut client = Self { socket: server.connect().await.socket };
        client.socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        client.send(SETTINGS, 0, 0, &[&[0, 4], &window.to_be_bytes()[..]].concat()).await;
        client
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let frame = [&len[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat();
        self.socket.write_all(&frame).await.unwrap();
    }

    /// Asks on stream 1; an empty body is none.
    async fn ask(&mut self, path: &str, body: &[u8]) {
        const END_STREAM: u8 = 1;
        const END_HEADERS: u8 = 4;
        // Entries of HPACK's static table: the methods, `http`, and the names `:path` and `:authority`.
        let method = if body.is_empty() { 0x82 } else { 0x83 };
        let len = u8::try_from(path.len()).unwrap();
        let headers = [&[method, 0x86, 0x04, len], path.as_bytes(), b"\x01\x04here"].concat();
        let flags = if body.is_empty() { END_HEADERS | END_STREAM } else { END_HEADERS };
        self.send(HEADERS, flags, 1, &headers).await;
        if !body.is_empty() {
            self.send(DATA, END_STREAM, 1, body).await;
        }
    }

    /// The next frame's kind and payload; `None` once the connection is closed.
    async fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let reading = async {
            let mut head = [0; 9];
            self.socket.read_exact(&mut head).await.ok()?;
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            self.socket.read_exact(&mut payload).await.ok()?;
            Some((head[3], payload))
        };
        tokio::time::timeout(Duration::from_secs(10), reading).await.expect("a frame, or the end")
    }

    /// Reads on to a frame of this kind.
    async fn until(&mut self, kind: u8) -> Vec<u8> {
        loop {
            let (this, payload) = self.frame().await.expect("the connection is open");
            if this == kind {
                return payload;
            }
        }
    }
}

#[tokio::test]
async fn requests_are_answered_over_http2() {
    let engine = Engine::saying("ok");
    let server = Server::start(&engine, unhurried()).await;
    let mut client = Http2::connect(&server, 65_535).await;
    client.ask("/v1/completions", br#"{"prompt": "hi"}"#).await;
    assert_eq!(client.until(HEADERS).await[0], 0x88, "status 200");
    let reply: serde_json::Value = serde_json::from_slice(&client.until(DATA).await).unwrap();
    assert_eq!(reply["choices"][0]["text"], "ok");
}

#[tokio::test]
async fn a_request_sent_before_the_notice_of_idling_came_is_served() {
    let engine = Engine::new(vec![Script::endless("word ")]);
    let config = ServerConfig { idle_timeout: Duration::from_secs(1), ..unhurried() };
    let server = Server::start(&engine, config).await;
    let mut client = Http2::connect(&server, 65_535).await;
    client.until(GO_AWAY).await;
    client.ask("/v1/completions", streamed().to_string().as_bytes()).await;
    client.until(DATA).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(engine.aborted().is_empty());
    engine.release();
    while !String::from_utf8_lossy(&client.until(DATA).await).contains("[DONE]") {}
}

#[tokio::test]
async fn an_http2_window_that_stays_shut_is_a_reply_that_nobody_reads() {
    let engine = Engine::new(vec![Script::endless("word ")]);
    let config = ServerConfig {
        write_timeout: Duration::from_secs(1),
        ping_interval: Duration::from_secs(1),
        ..unhurried()
    };
    let server = Server::start(&engine, config).await;
    let mut client = Http2::connect(&server, 0).await;
    client.ask("/v1/completions", streamed().to_string().as_bytes()).await;
    client.until(HEADERS).await;
    while client.frame().await.is_some() {}
    eventually("the generation is given up", || engine.aborted().len() == 1).await;
}
