//! What only a connection shows: clients that leave, pings, and a server that stops.

use std::time::Duration;

use r1_engine::Handle;
use r1_server::{ServerConfig, serve};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::support::{Engine, Script, eventually, model};

pub(crate) struct Server {
    pub(crate) address: std::net::SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    ended: JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start(engine: &Engine, config: ServerConfig) -> Self {
        Self::start_handle(engine.handle.clone(), config).await
    }

    pub(crate) async fn start_handle(engine: Handle, config: ServerConfig) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let ended = tokio::spawn(serve(listener, config, model(), engine, async {
            let _ = stopped.await;
        }));
        Self { address, stop: Some(stop), ended }
    }

    pub(crate) fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    pub(crate) async fn has_ended(self) {
        timeout(Duration::from_secs(10), self.ended).await.expect("the server ends").unwrap();
    }

    pub(crate) async fn connect(&self) -> Client {
        Client { socket: TcpStream::connect(self.address).await.unwrap(), read: String::new() }
    }

    pub(crate) async fn post(&self, body: &Value) -> Client {
        let mut client = self.connect().await;
        client.post(body).await;
        client
    }
}

pub(crate) struct Client {
    pub(crate) socket: TcpStream,
    pub(crate) read: String,
}

impl Client {
    pub(crate) async fn write(&mut self, text: &str) {
        self.socket.write_all(text.as_bytes()).await.unwrap();
    }

    pub(crate) async fn post(&mut self, body: &Value) {
        let body = body.to_string();
        let head = "POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json";
        self.write(&format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())).await;
    }

    /// Reads on until the connection has said `text`.
    pub(crate) async fn until(&mut self, text: &str) {
        let reading = async {
            while !self.read.contains(text) {
                let mut buffer = [0; 4096];
                let len = self.socket.read(&mut buffer).await.unwrap();
                assert!(len > 0, "the connection ended without {text:?}: {}", self.read);
                self.read.push_str(&String::from_utf8_lossy(&buffer[..len]));
            }
        };
        timeout(Duration::from_secs(10), reading).await.unwrap_or_else(|_| panic!("never said {text:?}"));
    }

    /// Reads on until the server closes the connection.
    pub(crate) async fn until_closed(&mut self) {
        let mut rest = Vec::new();
        let reading = timeout(Duration::from_secs(10), self.socket.read_to_end(&mut rest)).await;
        // A reset is an end too.
        let _ = reading.expect("the connection ends");
        self.read.push_str(&String::from_utf8_lossy(&rest));
    }
}

pub(crate) fn streamed() -> Value {
    json!({"prompt": "hi", "stream": true})
}

#[tokio::test]
async fn clients_that_leave_abort_their_generations() {
    let engine = Engine::new(vec![Script::endless("word ")]);
    let server = Server::start(&engine, ServerConfig::default()).await;
    let mut streaming = server.post(&streamed()).await;
    streaming.until("\"text\"").await;
    let waiting = server.post(&json!({"prompt": "hi", "n": 2})).await;
    eventually("all are submitted", || engine.asked().len() == 3).await;
    assert!(engine.aborted().is_empty());
    drop(streaming);
    eventually("the stream is aborted", || engine.aborted().len() == 1).await;
    drop(waiting);
    eventually("the plain request is aborted", || engine.aborted().len() == 3).await;
    let mut asked: Vec<_> = engine.asked().iter().map(|asked| asked.id).collect();
    let mut aborted = engine.aborted();
    asked.sort_unstable();
    aborted.sort_unstable();
    assert_eq!(asked, aborted);
}

#[tokio::test]
async fn silent_streams_are_pinged() {
    let engine = Engine::new(vec![Script::endless("word ")]);
    let config = ServerConfig { ping_interval: Duration::from_millis(30), ..ServerConfig::default() };
    let server = Server::start(&engine, config).await;
    let mut client = server.post(&streamed()).await;
    client.until("\n: ping\n\n").await;
    engine.release();
    client.until("[DONE]").await;
}

#[tokio::test]
async fn a_stopping_server_refuses_new_requests_and_finishes_the_running_ones() {
    let engine = Engine::new(vec![Script::endless("word ")]);
    let mut server = Server::start(&engine, ServerConfig::default()).await;
    let mut running = server.post(&streamed()).await;
    running.until("\"text\"").await;
    let mut health = server.connect().await;
    health.write("GET /health HTTP/1.1\r\nhost: here\r\n\r\n").await;
    health.until("ready").await;
    server.stop();
    let mut draining = false;
    for _ in 0..200 {
        let mut client = server.connect().await;
        client.write("GET /health HTTP/1.1\r\nhost: here\r\n\r\n").await;
        client.until("}").await;
        draining = client.read.contains("503") && client.read.contains("draining");
        if draining {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(draining);
    let mut refused = server.post(&streamed()).await;
    refused.until("\"code\":\"draining\"").await;
    assert!(refused.read.starts_with("HTTP/1.1 503"), "{}", refused.read);
    assert_eq!(engine.asked().len(), 1);

    engine.release();
    running.until("[DONE]").await;
    server.has_ended().await;
    assert!(engine.aborted().is_empty());
}

#[tokio::test]
async fn requests_that_outlive_the_shutdown_timeout_are_told_and_aborted() {
    let engine = Engine::new(vec![Script::endless("word ")]);
    let config = ServerConfig { shutdown_timeout: Duration::from_millis(50), ..ServerConfig::default() };
    let mut server = Server::start(&engine, config).await;
    let mut streaming = server.post(&streamed()).await;
    streaming.until("\"text\"").await;
    let mut waiting = server.post(&json!({"prompt": "hi"})).await;
    eventually("both are submitted", || engine.asked().len() == 2).await;
    server.stop();
    streaming.until("data: {\"error\":").await;
    waiting.until("\"code\":\"draining\"").await;
    assert!(waiting.read.starts_with("HTTP/1.1 503"), "{}", waiting.read);
    eventually("both are aborted", || engine.aborted().len() == 2).await;
    server.has_ended().await;
}

#[tokio::test]
async fn an_idle_server_stops_at_once() {
    let engine = Engine::saying("ok");
    let mut server = Server::start(&engine, ServerConfig::default()).await;
    let mut client = server.post(&json!({"prompt": "hi"})).await;
    client.until("\"text\":\"ok\"").await;
    server.stop();
    server.has_ended().await;
}
