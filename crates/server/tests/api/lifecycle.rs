//! Time: connections that idle, headers and bodies that trickle, requests that last, replies that nobody reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use r1_core::TokenId;
use r1_engine::{Command, EngineInfo, Event, Handle, Sent, Status};
use r1_server::ServerConfig;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

use crate::socket::{Client, Server, streamed};
use crate::support::{Engine, Script, eventually, info};

const SOON: Duration = Duration::from_millis(150);
/// Far beyond what these tests wait for.
const NEVER: Duration = Duration::from_hours(1);

fn unhurried() -> ServerConfig {
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
    let engine = Engine::new(vec![Script::endless("word ")]);
    let server = Server::start(&engine, ServerConfig { idle_timeout: SOON, ..unhurried() }).await;
    let mut silent = server.connect().await;
    let mut kept = server.connect().await;
    let mut busy = server.post(&json!({"prompt": "hi"})).await;
    for _ in 0..2 {
        kept.read.clear();
        kept.write(HEALTH).await;
        kept.until("ready").await;
        tokio::time::sleep(SOON / 2).await;
    }
    silent.until_closed().await;
    assert_eq!(silent.read, "");
    kept.until_closed().await;
    tokio::time::sleep(SOON * 2).await;
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
    // The preface, and a frame of no settings.
    client.write("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\u{4}\0\0\0\0\0").await;
    let mut frame = [0; 9];
    tokio::io::AsyncReadExt::read_exact(&mut client.socket, &mut frame).await.unwrap();
    assert_eq!(frame[3], 4, "a frame of settings: {frame:?}");
    tokio::time::sleep(SOON * 2).await;
    // A ping, which is no header that trickles.
    client.write("\0\0\u{8}\u{6}\0\0\0\0\0pingping").await;
    client.until("pingping").await;
}

const RUNNING: u8 = 0;
const OVERFLOWED: u8 = 1;
const ABANDONED: u8 = 2;

/// An engine that writes without end until it is told that nobody reads.
fn tireless(max_unread_tokens: usize) -> (Handle, Arc<AtomicU8>) {
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
