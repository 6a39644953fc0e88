//! Connections over TLS: the same API under the same limits, and what becomes of handshakes that fail.
//!
//! `tests/tls` holds a certificate for `localhost`, valid for a hundred years, made with
//! `openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -days 36500 -subj /CN=localhost -addext
//! subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE`; its key; that key under a passphrase; and another.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use r1_server::{ConfigError, ServerConfig, Tls};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::lifecycle::{ABANDONED, RUNNING, tireless, unhurried};
use crate::socket::{Server, streamed};
use crate::support::{Engine, Script, eventually};

const SOON: Duration = Duration::from_millis(300);

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls").join(name)
}

fn secure(config: ServerConfig) -> ServerConfig {
    let tls = Tls::open(&file("certificate.pem"), &file("key.pem")).unwrap();
    ServerConfig { tls: Some(tls), ..config }
}

/// A client that trusts the certificate.
async fn shake_hands(stream: TcpStream, protocols: &[&str]) -> TlsStream<TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(file("certificate.pem")).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    let connector = TlsConnector::from(Arc::new(config));
    connector.connect("localhost".try_into().unwrap(), stream).await.unwrap()
}

async fn connect(server: &Server) -> TlsStream<TcpStream> {
    shake_hands(TcpStream::connect(server.address).await.unwrap(), &["http/1.1"]).await
}

fn post(body: &Value) -> String {
    let body = body.to_string();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json";
    format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

async fn until(stream: &mut (impl AsyncReadExt + Unpin), text: &str) -> String {
    let mut read = String::new();
    let reading = async {
        while !read.contains(text) {
            let mut buffer = [0; 4096];
            let len = stream.read(&mut buffer).await.unwrap();
            assert!(len > 0, "the connection ended without {text:?}: {read}");
            read.push_str(&String::from_utf8_lossy(&buffer[..len]));
        }
    };
    timeout(Duration::from_secs(10), reading).await.unwrap_or_else(|_| panic!("never said {text:?}"));
    read
}

async fn until_closed(stream: &mut (impl AsyncReadExt + Unpin)) -> String {
    let mut rest = Vec::new();
    let reading = timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await;
    reading.expect("the connection ends").expect("it is closed, not cut off");
    String::from_utf8_lossy(&rest).into_owned()
}

#[tokio::test]
async fn both_protocols_are_offered_and_spoken() {
    let engine = Engine::saying("hello there");
    let server = Server::start(&engine, secure(unhurried())).await;
    let mut client = connect(&server).await;
    assert_eq!(client.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    for _ in 0..2 {
        client.write_all(post(&streamed()).as_bytes()).await.unwrap();
        assert!(until(&mut client, "[DONE]").await.contains("hello"));
        until(&mut client, "0\r\n\r\n").await;
    }
    let stream = TcpStream::connect(server.address).await.unwrap();
    let mut client = shake_hands(stream, &["h2", "http/1.1"]).await;
    assert_eq!(client.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    // The preface and empty settings; the server's own settings are the answer.
    client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut head = [0; 9];
    client.read_exact(&mut head).await.unwrap();
    assert_eq!(head[3], 4, "a frame of settings");
    // Without a word about protocols it is HTTP/1.1.
    let mut client = shake_hands(TcpStream::connect(server.address).await.unwrap(), &[]).await;
    client.write_all(post(&json!({"prompt": "hi"})).as_bytes()).await.unwrap();
    until(&mut client, "hello there").await;
}

#[tokio::test]
async fn plain_requests_are_told_what_the_port_speaks() {
    let engine = Engine::saying("ok");
    let server = Server::start(&engine, secure(unhurried())).await;
    let mut client = server.connect().await;
    client.post(&json!({"prompt": "x".repeat(1 << 20)})).await;
    let answer = until_closed(&mut client.socket).await;
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("tls_required"), "{answer}");
    // What is neither is sent away by TLS.
    let mut other = server.connect().await;
    other.write("\0\0\0 no protocol at all \r\n\r\n").await;
    other.until_closed().await;
    assert!(!other.read.contains("HTTP"));
    assert!(engine.asked().is_empty());
}

#[tokio::test]
async fn handshakes_that_do_not_end_are_broken_off() {
    let engine = Engine::saying("ok");
    let config = ServerConfig { handshake_timeout: SOON, ..unhurried() };
    let mut server = Server::start(&engine, secure(config)).await;
    for begun in ["", "\x16\x03\x01"] {
        let mut client = server.connect().await;
        client.write(begun).await;
        client.until_closed().await;
        assert_eq!(client.read, "", "{begun:?}");
    }
    let _silent = server.connect().await;
    server.stop();
    server.has_ended().await;
}

#[tokio::test]
async fn a_server_that_stops_waits_for_no_handshake() {
    let engine = Engine::saying("ok");
    let config = ServerConfig { handshake_timeout: Duration::from_hours(1), ..unhurried() };
    let mut server = Server::start(&engine, secure(config)).await;
    let mut silent = server.connect().await;
    let mut kept = connect(&server).await;
    kept.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    until(&mut kept, "ready").await;
    server.stop();
    until_closed(&mut kept).await;
    silent.until_closed().await;
    server.has_ended().await;
}

#[tokio::test]
async fn headers_that_trickle_are_408() {
    let engine = Engine::saying("ok");
    let config = ServerConfig { header_timeout: SOON, ..unhurried() };
    let server = Server::start(&engine, secure(config)).await;
    let mut client = connect(&server).await;
    client.write_all(b"POST /v1/completions HTT").await.unwrap();
    let answer = until_closed(&mut client).await;
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("request_timeout"), "{answer}");
}

#[tokio::test]
async fn headers_over_the_limit_are_431_and_idle_connections_are_closed() {
    let engine = Engine::saying("ok");
    let server = Server::start(&engine, secure(ServerConfig { idle_timeout: SOON, ..unhurried() })).await;
    let mut client = connect(&server).await;
    let huge = "y".repeat(33 << 10);
    let request = format!("GET /health HTTP/1.1\r\nhost: localhost\r\nx-huge: {huge}\r\n\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    until(&mut client, "headers_too_large").await;
    until_closed(&mut client).await;
}

#[tokio::test]
async fn clients_that_leave_abort_their_generations() {
    let engine = Engine::new(vec![Script::endless("word ")]);
    let server = Server::start(&engine, secure(unhurried())).await;
    let mut client = connect(&server).await;
    client.write_all(post(&streamed()).as_bytes()).await.unwrap();
    until(&mut client, "\"text\"").await;
    drop(client);
    eventually("the stream is aborted", || engine.aborted().len() == 1).await;
}

#[tokio::test]
async fn a_reply_that_nobody_reads_is_broken_off() {
    let (handle, outcome) = tireless(1 << 30);
    let config = ServerConfig { write_timeout: SOON * 2, ..unhurried() };
    let server = Server::start_handle(handle, secure(config)).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut client = shake_hands(socket.connect(server.address).await.unwrap(), &["http/1.1"]).await;
    client.write_all(post(&streamed()).as_bytes()).await.unwrap();
    until(&mut client, "HTTP/1.1 200").await;
    let since = Instant::now();
    while outcome.load(Ordering::Relaxed) == RUNNING {
        assert!(since.elapsed() < Duration::from_mins(1), "the generation is never given up");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(outcome.load(Ordering::Relaxed), ABANDONED);
}

/// A slow reader that reads is no reader that does not: bytes that TLS holds back count when they are taken.
#[tokio::test]
async fn a_reply_that_is_read_slowly_arrives() {
    let engine = Engine::saying(&"word ".repeat(2000));
    let config = ServerConfig { write_timeout: SOON * 3, idle_timeout: SOON, ..unhurried() };
    let server = Server::start(&engine, secure(config)).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 << 10).unwrap();
    let mut client = shake_hands(socket.connect(server.address).await.unwrap(), &["http/1.1"]).await;
    // More than all sockets' buffers hold.
    let body = json!({"prompt": "hi", "logprobs": 5, "n": 8, "max_tokens": 200});
    client.write_all(post(&body).as_bytes()).await.unwrap();
    let mut read = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let len = client.read(&mut buffer).await.expect("no reset");
        if len == 0 {
            break;
        }
        read.extend_from_slice(&buffer[..len]);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let text = String::from_utf8(read).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").expect("a reply");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let reply: Value = serde_json::from_str(body).expect("a whole reply");
    assert_eq!(reply["choices"].as_array().map(Vec::len), Some(8));
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let open = |certificate: &str, key: &str| Tls::open(&file(certificate), &file(key)).unwrap_err();
    let cases = [
        (open("absent.pem", "key.pem"), "absent.pem"),
        (open("certificate.pem", "absent.pem"), "absent.pem"),
        (open("key.pem", "key.pem"), "BEGIN CERTIFICATE"),
        (open("certificate.pem", "certificate.pem"), "BEGIN PRIVATE KEY"),
        (open("certificate.pem", "encrypted_key.pem"), "openssl pkey"),
        (open("certificate.pem", "other_key.pem"), "does not belong"),
    ];
    for (error, needle) in &cases {
        assert!(error.to_string().contains(needle), "{error}");
    }
    assert!(matches!(cases[0].0, ConfigError::Read { .. }));
    assert!(matches!(cases[4].0, ConfigError::EncryptedKey { .. }));
    assert!(matches!(cases[5].0, ConfigError::KeyMismatch { .. }));
}
