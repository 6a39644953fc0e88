//! What the server itself costs: an engine that answers at once, the real server on one runtime thread, and the CPU time of
//! that thread per streamed token and per request. The same without sockets, and what bounds it: JSON alone, copying alone, and
//! a plain axum handler on hyper that streams frames which were rendered before.
//!
//! CPU time is read per thread from Linux's accounts, so that neither the client nor other programs count; what shares a core's
//! caches with the server still slows it down. An argument that is not an option runs only what has it in its name.
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::hint::black_box;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::StatusCode;
use axum::routing::post;
use futures_util::stream;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use mimalloc::MiMalloc;
use r1_core::{FinishReason, TokenId};
use r1_engine::{Command, EngineInfo, Event, EventSender, Handle, Inbox, Sent, Status};
use r1_server::{
    ReasoningParser, SamplingDefaults, ServedModel, ServerConfig, ThinkingBudgets, router, serve,
};
use r1_text::{ChatTemplate, Grammars, Tokenizer, ToolSyntax};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tower::ServiceExt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// The command's allocator.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Tokens of a streamed reply.
const REPLY_TOKENS: u32 = 512;
/// Of each figure the median is shown.
const ROUNDS: usize = 3;
/// Rounds of the engine that gives one token to each reply at a time begin this far apart.
const STEP: Duration = Duration::from_millis(1);
/// What a stream writes at once, where there is enough.
const BLOCK_BYTES: usize = 16 << 10;
const QUESTION: &str = "How many days lie between the first of March and the end of June?";
const REASONING: &str = "Let me spell strawberry and look for r.\n1. s no\n2. t no\n3. r yes, 1\n4. a no\n5. w no\n6. b no\n7. e no\n8. r yes, 2\n9. r yes, 3\n10. y no\nSo I count 3.\n";
const CONTENT: &str = "The letter r appears **3** times in \"strawberry\".\nParis is the capital of France, and 27 + 58 = 85.\n";

const RUNTIME: &str = "fe-runtime";
const BLOCKING: &str = "fe-blocking";
const ENGINE: &str = "fe-engine";

fn main() {
    let only: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    // The command's layers, at its level; the lines go nowhere.
    let log = tracing_subscriber::fmt::layer().with_writer(io::sink).with_target(false).with_ansi(false);
    tracing_subscriber::registry().with(log.with_filter(EnvFilter::new("info"))).init();
    let bench = Bench { model: model(), runtime: runtime(), client: client(), only };
    println!("git {}; CPU time per thread, median of {ROUNDS} rounds\n", r1_benches::git_hash());
    bench.ceilings();
    bench.streams();
    bench.requests();
}

struct Bench {
    model: ServedModel,
    runtime: Runtime,
    client: Runtime,
    only: Vec<String>,
}

/// One kind of load.
#[derive(Clone, Copy)]
struct Load {
    clients: u32,
    /// Of all clients together.
    requests: u32,
    max_tokens: u32,
    stream: bool,
}

/// CPU time of a round.
#[derive(Clone, Copy, Default)]
struct Cost {
    runtime: Duration,
    blocking: Duration,
    engine: Duration,
    wall: Duration,
}

impl Cost {
    fn server(&self) -> Duration {
        self.runtime + self.blocking
    }
}

impl Bench {
    fn wanted(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part.as_str()))
    }

    /// JSON and copying, without anything around them.
    fn ceilings(&self) {
        let texts = self.pieces();
        let rate = |name: &str, mut round: Box<dyn FnMut() -> usize + '_>| {
            let mut times: Vec<f64> = (0..ROUNDS * 20)
                .map(|_| {
                    let start = Instant::now();
                    black_box(round());
                    start.elapsed().as_secs_f64() / texts.len() as f64
                })
                .collect();
            times.sort_by(f64::total_cmp);
            let per_token = times[times.len() / 2];
            println!("{name}: {:.3} us/token, {:.1} M tokens/s", per_token * 1e6, 1e-6 / per_token);
        };
        let mut bytes = Vec::new();
        if self.wanted("json") {
            rate(
                "ceiling, serde_json alone",
                Box::new(|| {
                    bytes.clear();
                    for text in &texts {
                        chunk(&mut bytes, text);
                    }
                    bytes.len()
                }),
            );
        }
        let frames = self.frames();
        let mut copied = Vec::new();
        if self.wanted("copy") {
            rate(
                "ceiling, copying rendered frames",
                Box::new(|| {
                    copied.clear();
                    for frame in &frames {
                        copied.extend_from_slice(frame);
                    }
                    copied.len()
                }),
            );
        }
        println!("{} bytes per token\n", frames.iter().map(Bytes::len).sum::<usize>() / frames.len());
    }

    fn streams(&self) {
        println!(
            "| streamed chat | us/token: runtime, blocking | engine thread | tokens/s per core | wall |"
        );
        println!("|---|---|---|---|---|");
        for (pace, at_once) in [("at once", true), ("step by step", false)] {
            for clients in [1, 16, 64] {
                let requests = if at_once { 512 } else { (2 * clients).min(64) };
                let load = Load { clients, requests, max_tokens: REPLY_TOKENS, stream: true };
                let tokens = f64::from(requests * REPLY_TOKENS);
                let show = |name: &str, round: &dyn Fn() -> Cost| {
                    let name = format!("{name}, {pace}, {clients}");
                    if self.wanted(&name) {
                        let cost = median(round);
                        let us = |time: Duration| time.as_secs_f64() * 1e6 / tokens;
                        println!(
                            "| {name} | {:.2}, {:.2} | {:.2} | {:.0} | {:.2} s |",
                            us(cost.runtime),
                            us(cost.blocking),
                            us(cost.engine),
                            tokens / cost.server().as_secs_f64(),
                            cost.wall.as_secs_f64()
                        );
                    }
                };
                let server = self.server(engine(at_once));
                show("server", &|| self.over_sockets(server, load));
                let router = self.router(engine(at_once));
                show("router without sockets", &|| self.in_process(&router, load));
                let peer = self.peer(at_once);
                show("axum, rendered before", &|| self.over_sockets(peer, load));
            }
        }
        println!();
    }

    fn requests(&self) {
        println!(
            "| plain chat | us/request: runtime, blocking | engine thread | requests/s per core | wall |"
        );
        println!("|---|---|---|---|---|");
        for max_tokens in [1, 64] {
            for clients in [1, 16, 64] {
                let load = Load { clients, requests: 2048, max_tokens, stream: false };
                let show = |name: &str, round: &dyn Fn() -> Cost| {
                    let name = format!("{name}, {max_tokens} tokens, {clients}");
                    if self.wanted(&name) {
                        let cost = median(round);
                        let requests = f64::from(load.requests);
                        let us = |time: Duration| time.as_secs_f64() * 1e6 / requests;
                        println!(
                            "| {name} | {:.1}, {:.1} | {:.1} | {:.0} | {:.2} s |",
                            us(cost.runtime),
                            us(cost.blocking),
                            us(cost.engine),
                            requests / cost.server().as_secs_f64(),
                            cost.wall.as_secs_f64()
                        );
                    }
                };
                let server = self.server(engine(true));
                show("request", &|| self.over_sockets(server, load));
                let router = self.router(engine(true));
                show("request without sockets", &|| self.in_process(&router, load));
                let peer = self.peer(true);
                show("request to axum, rendered before", &|| self.over_sockets(peer, load));
            }
        }
    }

    /// The real server on a port of its own; it runs to the end of the bench.
    fn server(&self, engine: Handle) -> SocketAddr {
        let (listener, address) = self.listen();
        let serving = serve(listener, config(), self.model.clone(), engine, std::future::pending());
        self.runtime.spawn(serving);
        address
    }

    fn router(&self, engine: Handle) -> Router {
        router(config(), self.model.clone(), engine)
    }

    fn listen(&self) -> (TcpListener, SocketAddr) {
        let listener = self.runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
        let address = listener.local_addr().expect("its address");
        (listener, address)
    }

    /// Axum without anything of ours: parses the request and answers with bytes that are there.
    fn peer(&self, at_once: bool) -> SocketAddr {
        let (listener, address) = self.listen();
        let frames = self.frames();
        let block: Vec<u8> = frames.concat();
        let block = Bytes::from(block);
        let (sender, steps) = std::sync::mpsc::channel::<mpsc::UnboundedSender<Bytes>>();
        let handler = move |body: Bytes| {
            let (block, sender) = (block.clone(), sender.clone());
            async move {
                let asked: Value = serde_json::from_slice(&body).expect("JSON");
                if asked["stream"] != true {
                    return Body::from(block.slice(..block.len().min(600)));
                }
                if at_once {
                    let blocks = (0..block.len()).step_by(BLOCK_BYTES);
                    let blocks = blocks.map(move |at| block.slice(at..block.len().min(at + BLOCK_BYTES)));
                    return Body::from_stream(stream::iter(blocks.map(Ok::<_, Infallible>)));
                }
                let (frames, receiver) = mpsc::unbounded_channel();
                sender.send(frames).expect("the thread runs as long as this");
                Body::from_stream(stream::unfold(receiver, |mut receiver| async move {
                    receiver.recv().await.map(|frame| (Ok::<_, Infallible>(frame), receiver))
                }))
            }
        };
        thread::Builder::new()
            .name(ENGINE.into())
            .spawn(move || {
                let mut running: Vec<(usize, mpsc::UnboundedSender<Bytes>)> = Vec::new();
                loop {
                    if running.is_empty() {
                        let Ok(next) = steps.recv() else { return };
                        running.push((0, next));
                    }
                    running.extend(steps.try_iter().map(|next| (0, next)));
                    running.retain_mut(|(at, to)| {
                        *at += 1;
                        to.send(frames[*at - 1].clone()).is_ok() && *at < frames.len()
                    });
                    thread::sleep(STEP);
                }
            })
            .expect("a thread");
        let router = Router::new().route("/v1/chat/completions", post(handler));
        self.runtime.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                stream.set_nodelay(true).expect("a TCP option");
                let router = router.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| router.clone().oneshot(request));
                    let connection = auto::Builder::new(TokioExecutor::new());
                    let _ = connection.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        address
    }

    /// A streamed reply's texts, token by token.
    fn pieces(&self) -> Vec<String> {
        let reply = Reply::new();
        let text =
            |i| String::from_utf8_lossy(self.model.tokenizer.token_bytes(reply.token(i, REPLY_TOKENS)));
        (0..REPLY_TOKENS).map(|i| text(i).into_owned()).collect()
    }

    fn frames(&self) -> Vec<Bytes> {
        let frame = |text: &String| {
            let mut bytes = Vec::new();
            chunk(&mut bytes, text);
            Bytes::from(bytes)
        };
        self.pieces().iter().map(frame).collect()
    }

    fn over_sockets(&self, server: SocketAddr, load: Load) -> Cost {
        measured(|| {
            self.client.block_on(async {
                let clients = (0..load.clients).map(|_| tokio::spawn(talk(server, load)));
                for client in clients.collect::<Vec<_>>() {
                    client.await.expect("a client");
                }
            });
        })
    }

    fn in_process(&self, router: &Router, load: Load) -> Cost {
        measured(|| {
            self.runtime.block_on(async {
                let clients = (0..load.clients).map(|_| tokio::spawn(call(router.clone(), load)));
                for client in clients.collect::<Vec<_>>() {
                    client.await.expect("a client");
                }
            });
        })
    }
}

fn median(round: &dyn Fn() -> Cost) -> Cost {
    round();
    let mut costs: Vec<Cost> = (0..ROUNDS).map(|_| round()).collect();
    costs.sort_by_key(Cost::server);
    costs[ROUNDS / 2]
}

/// What the run cost the server's threads.
fn measured(run: impl FnOnce()) -> Cost {
    let (before, start) = (cpu(), Instant::now());
    run();
    let wall = start.elapsed();
    // A thread's account is exact once it waits.
    thread::sleep(Duration::from_millis(50));
    let after = cpu();
    Cost {
        runtime: after.runtime.saturating_sub(before.runtime),
        blocking: after.blocking.saturating_sub(before.blocking),
        engine: after.engine.saturating_sub(before.engine),
        wall,
    }
}

/// CPU time of the threads so far, by name.
fn cpu() -> Cost {
    let mut cost = Cost::default();
    let tasks = std::fs::read_dir("/proc/self/task").expect("Linux's accounts of threads");
    for task in tasks {
        let task = task.expect("an entry").path();
        // A thread that has just ended has no files any more.
        let read = |file| std::fs::read_to_string(task.join(file));
        let (Ok(name), Ok(times)) = (read("comm"), read("schedstat")) else { continue };
        let ns = times.split(' ').next().and_then(|ns| ns.parse().ok()).expect("nanoseconds on a CPU");
        match name.trim_end() {
            RUNTIME => cost.runtime += Duration::from_nanos(ns),
            BLOCKING => cost.blocking += Duration::from_nanos(ns),
            ENGINE => cost.engine += Duration::from_nanos(ns),
            _ => {}
        }
    }
    cost
}

/// As the command's, with one thread for the network.
fn runtime() -> Runtime {
    let named = AtomicUsize::new(0);
    // Tokio starts the runtime's thread first, and threads that may block when they are needed.
    let name = move || if named.fetch_add(1, Ordering::Relaxed) == 0 { RUNTIME } else { BLOCKING }.to_owned();
    Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(2)
        // A thread that ends takes its account with it.
        .thread_keep_alive(Duration::from_hours(1))
        .thread_name_fn(name)
        .enable_all()
        .build()
        .expect("a runtime")
}

fn client() -> Runtime {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(1).thread_name("fe-client").enable_all().build().expect("a runtime")
}

fn config() -> ServerConfig {
    ServerConfig { seed: Some(1), ..ServerConfig::default() }
}

fn model() -> ServedModel {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cli/model");
    let tokenizer = Arc::new(Tokenizer::from_dir(&dir).expect("the bundled tokenizer"));
    let source = tokenizer.chat_template().expect("the bundled model's template");
    let template = ChatTemplate::new(
        source.to_owned().leak(),
        tokenizer.bos_text(),
        tokenizer.eos_text(),
        tokenizer.control_tokens().clone(),
    );
    let eos = TokenId(1);
    let grammars = Grammars::new(&tokenizer, &[eos], tokenizer.vocab_size()).expect("grammars");
    ServedModel {
        names: vec!["tiny-r1".into()],
        template: Some(Arc::new(template.expect("it compiles"))),
        defaults: SamplingDefaults::default(),
        eos_token_ids: vec![eos],
        reasoning_parser: ReasoningParser::DeepSeekR1,
        grammars: Arc::new(grammars).into(),
        tool_syntax: Some(ToolSyntax::Fenced),
        thinking_budgets: ThinkingBudgets::default(),
        tokenizer,
    }
}

/// What the engine says: reasoning for the first half, then content.
struct Reply {
    reasoning: Vec<TokenId>,
    content: Vec<TokenId>,
    close: TokenId,
}

impl Reply {
    fn new() -> Self {
        let tokenizer = model().tokenizer;
        let encode = |text| tokenizer.encode(text).expect("it encodes");
        let close = tokenizer.token_to_id("</think>").expect("a reasoning model");
        Self { reasoning: encode(REASONING), content: encode(CONTENT), close }
    }

    fn token(&self, i: u32, of: u32) -> TokenId {
        let (i, half) = (i as usize, of as usize / 2);
        match i.cmp(&half) {
            std::cmp::Ordering::Less => self.reasoning[i % self.reasoning.len()],
            std::cmp::Ordering::Equal => self.close,
            std::cmp::Ordering::Greater => self.content[i % self.content.len()],
        }
    }
}

/// A thread that answers with as many tokens as are asked for: all at once, or one for each reply per step.
fn engine(at_once: bool) -> Handle {
    let (handle, inbox) = Handle::channel(EngineInfo {
        max_model_len: 4096,
        vocab_size: model().tokenizer.vocab_size(),
        max_num_seqs: 64,
        max_queued: 64,
        max_unread_tokens: REPLY_TOKENS as usize,
    });
    inbox.set_status(Status::Ready);
    let run = move || Engine { inbox, reply: Reply::new(), running: Vec::new() }.run(at_once);
    thread::Builder::new().name(ENGINE.into()).spawn(run).expect("a thread");
    handle
}

struct Engine {
    inbox: Inbox,
    reply: Reply,
    running: Vec<Running>,
}

struct Running {
    events: Option<EventSender>,
    at: u32,
    max_tokens: u32,
}

impl Engine {
    fn run(mut self, at_once: bool) {
        loop {
            if self.running.is_empty() {
                match self.inbox.wait() {
                    None => return,
                    Some(command) => self.take(command),
                }
            }
            while let Some(command) = self.inbox.poll() {
                self.take(command);
            }
            for running in &mut self.running {
                let steps = if at_once { running.max_tokens } else { 1 };
                for _ in 0..steps {
                    let token = self.reply.token(running.at, running.max_tokens);
                    running.send(Event::Token { token, logprobs: None });
                    running.at += 1;
                }
                if running.at == running.max_tokens {
                    running.events.take().expect("it runs").end(Event::Finished(FinishReason::Length));
                }
            }
            let before = self.running.len();
            self.running.retain(|running| running.events.is_some());
            self.inbox.ended(before - self.running.len());
            if !at_once {
                thread::sleep(STEP);
            }
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit { request, events, .. } => {
                let max_tokens = request.params.max_tokens;
                let running = Running { events: Some(events), at: 0, max_tokens };
                running.send(Event::Scheduled { cached_tokens: 0 });
                self.running.push(running);
            }
            Command::Abort(_) => panic!("no client leaves"),
            Command::FlushPrefixCache(_) | Command::Stop => {}
        }
    }
}

impl Running {
    fn send(&self, event: Event) {
        let sent = self.events.as_ref().expect("it runs").send(event);
        assert_eq!(sent, Sent::Delivered, "the queue holds a reply");
    }
}

fn body(load: Load) -> String {
    let message = json!({ "role": "user", "content": QUESTION });
    json!({ "model": "tiny-r1", "messages": [message], "max_tokens": load.max_tokens, "stream": load.stream })
        .to_string()
}

/// One client's requests, one after the other on one connection.
async fn talk(server: SocketAddr, load: Load) {
    let mut socket = TcpStream::connect(server).await.expect("a connection");
    socket.set_nodelay(true).expect("a TCP option");
    let body = body(load);
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut bytes = vec![0; 64 << 10];
    for _ in 0..load.requests / load.clients {
        socket.write_all(request.as_bytes()).await.expect("it is read");
        let mut tail = Vec::new();
        let mut end = None;
        let mut read = 0;
        loop {
            let n = socket.read(&mut bytes).await.expect("a reply");
            assert!(n > 0, "the server closed the connection");
            if read == 0 {
                assert!(bytes.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&bytes[..n]));
                end = length(&bytes[..n]);
            }
            read += n;
            tail.extend_from_slice(&bytes[n.saturating_sub(8)..n]);
            tail.drain(..tail.len().saturating_sub(8));
            // JSON has no raw line breaks, so only the last chunk ends like this.
            if end.map_or(tail.ends_with(b"\n0\r\n\r\n"), |end| read == end) {
                break;
            }
        }
    }
}

/// Length of a whole reply, from its headers; a stream's is not known.
fn length(bytes: &[u8]) -> Option<usize> {
    let at = bytes.windows(4).position(|at| at == b"\r\n\r\n").expect("headers in one piece");
    let head = std::str::from_utf8(&bytes[..at]).expect("headers are text");
    let value = head.lines().find_map(|line| line.strip_prefix("content-length: "))?;
    Some(at + 4 + value.parse::<usize>().expect("a number"))
}

/// One client's requests without a connection.
async fn call(router: Router, load: Load) {
    for _ in 0..load.requests / load.clients {
        let request = Request::post("/v1/chat/completions").header("content-type", "application/json");
        let request = request.body(Body::from(body(load))).expect("a request");
        let response = router.clone().oneshot(request).await.expect("infallible");
        assert_eq!(response.status(), StatusCode::OK);
        let mut body = response.into_body();
        while let Some(frame) = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await
        {
            black_box(frame.expect("a whole reply"));
        }
    }
}

/// The chunk of a stream, with this text.
fn chunk(out: &mut Vec<u8>, text: &str) {
    #[derive(Serialize)]
    struct Chunk<'a> {
        id: &'a str,
        object: &'a str,
        created: u64,
        model: &'a str,
        choices: [Choice<'a>; 1],
        system_fingerprint: Option<&'a str>,
    }
    #[derive(Serialize)]
    struct Choice<'a> {
        index: usize,
        delta: Delta<'a>,
        logprobs: Option<u8>,
        finish_reason: Option<&'a str>,
    }
    #[derive(Serialize)]
    struct Delta<'a> {
        reasoning_content: &'a str,
        reasoning: &'a str,
    }
    out.extend_from_slice(b"data: ");
    let delta = Delta { reasoning_content: text, reasoning: text };
    let choices = [Choice { index: 0, delta, logprobs: None, finish_reason: None }];
    let id = "chatcmpl-0123456789abcdef0123456789abcdef";
    let (object, created, model) = ("chat.completion.chunk", 1_795_000_000, "tiny-r1");
    let chunk = Chunk { id, object, created, model, choices, system_fingerprint: None };
    serde_json::to_writer(&mut *out, &chunk).expect("strings and numbers");
    out.extend_from_slice(b"\n\n");
}
