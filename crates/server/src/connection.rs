//! One client's connection: how long it may idle, trickle its headers or leave a reply unread, and how it is closed so
//! that the last reply arrives. Must not know any endpoint.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use futures_util::FutureExt;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tower::ServiceExt;

use crate::error::ApiError;
use crate::tls::{Accepted, Stream, Tls};

/// More headers than these are answered by hyper's own, empty 431. Ours names the limit of bytes.
const MAX_HEADERS: usize = 1024;
/// For HTTP/2; twice what `access` lets through, so that it is the one to answer.
const MAX_HTTP2_HEADER_BYTES: u32 = 64 << 10;
/// A client that still writes when its reply is out is read until it pauses for this long,
const LINGER_PAUSE: Duration = Duration::from_secs(1);
/// and no longer than this. Closed earlier, its kernel would throw the reply away.
const LINGER: Duration = Duration::from_secs(10);
/// What an HTTP/2 client sends first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long a connection that was told to close gets for it, once no request runs.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a client may keep a connection waiting.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// For a TLS handshake.
    pub(crate) handshake: Duration,
    /// Without a request and without a byte of a reply being taken.
    pub(crate) idle: Duration,
    /// From the first byte of a request to the end of its headers.
    pub(crate) header: Duration,
    /// Without taking a byte of what is to be sent.
    pub(crate) write: Duration,
    /// After which a reply has something to send at the latest.
    pub(crate) ping_interval: Duration,
}

/// How far the server is with stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(crate) enum Stopping {
    No,
    /// Connections close when they are idle; new ones are told so.
    Draining,
    /// No request is waited for.
    Closing,
}

/// Why a connection's time is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    Idle,
    SlowHeaders,
    Unread,
}

/// The stream and what its reads and writes tell about the client.
struct Socket {
    stream: Stream,
    /// Requests whose replies the protocol has not taken whole.
    requests: usize,
    /// Bodies of replies that the protocol has not taken whole, and when it asked each for more.
    replies: HashMap<u64, Instant>,
    num_replies: u64,
    /// Since when there is no request.
    idle_since: Instant,
    /// When the first byte of a request came whose headers are not complete.
    head_since: Option<Instant>,
    /// The last request was answered before its body was read, so what comes next may be the rest of it.
    body_left: bool,
    /// How much of HTTP/2's preface has come; `None` on HTTP/1.
    preface: Option<usize>,
    /// The client has sent its last byte.
    ended: bool,
}

impl Socket {
    /// When the client's time is over unless something happens.
    fn deadline(&self, patience: Patience) -> Option<(Instant, Over)> {
        let unread = self.stream.unread_since().map(|since| (since + patience.write, Over::Unread));
        // HTTP/2's client can also leave the window of its stream shut, and the socket knows nothing of that.
        let shut = self.replies.values().filter(|_| self.is_http2()).min();
        let shut = shut.map(|since| (*since + patience.write + patience.ping_interval, Over::Unread));
        // A reply that is still being written is no idling, whoever holds it.
        let quiet =
            (self.requests == 0 && self.stream.unread_since().is_none()).then(|| match self.head_since {
                Some(since) => (since + patience.header, Over::SlowHeaders),
                None => (self.idle_since.max(self.stream.taken_at()) + patience.idle, Over::Idle),
            });
        unread.into_iter().chain(shut).chain(quiet).min_by_key(|(at, _)| *at)
    }

    /// Whether nothing runs but requests that are still coming.
    fn has_nothing_to_say(&self) -> bool {
        self.replies.is_empty() && self.stream.unread_since().is_none()
    }

    fn is_http2(&self) -> bool {
        self.preface == Some(PREFACE.len())
    }

    fn note_read(&mut self, bytes: &[u8]) {
        if let Some(have) = self.preface {
            let expected = &PREFACE[have..];
            let len = expected.len().min(bytes.len());
            self.preface = (bytes[..len] == expected[..len]).then_some(have + len);
        }
        self.ended = bytes.is_empty();
        if self.is_http2() {
            // Bytes between requests are frames, not headers.
            self.head_since = None;
            return;
        }
        // Empty lines may stand before a request.
        let blank = bytes.iter().all(|byte| matches!(byte, b'\r' | b'\n'));
        if self.requests == 0 && !blank && !self.body_left {
            self.head_since.get_or_insert_with(Instant::now);
        }
    }
}

/// The socket, shared by the protocol, its requests and whoever watches over them. Only one of them acts at a time.
#[derive(Clone)]
struct Shared(Arc<Mutex<Socket>>);

impl Shared {
    fn new(stream: Stream) -> Self {
        Self(Arc::new(Mutex::new(Socket {
            stream,
            requests: 0,
            replies: HashMap::new(),
            num_replies: 0,
            idle_since: Instant::now(),
            head_since: None,
            body_left: false,
            preface: Some(0),
            ended: false,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Socket> {
        // A holder that panics leaves times and counts as they were.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_request(&self) -> Running {
        let mut socket = self.lock();
        socket.requests += 1;
        socket.head_since = None;
        socket.body_left = false;
        Running { socket: self.clone(), reply: None }
    }
}

impl AsyncRead for Shared {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut socket = self.lock();
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut socket.stream).poll_read(cx, buf));
        socket.note_read(&buf.filled()[before..]);
        Poll::Ready(read)
    }
}

impl AsyncWrite for Shared {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.lock().stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.lock().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.lock().stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.lock().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.lock().stream).poll_shutdown(cx)
    }
}

/// A request on a connection, until the protocol has taken the last frame of its reply.
struct Running {
    socket: Shared,
    /// Its reply, once there is one.
    reply: Option<u64>,
}

impl Running {
    /// The request's body, which tells whether it was read.
    fn incoming(&self, body: Incoming) -> Body {
        Body::new(Upload { read: body.is_end_stream(), body, socket: self.socket.clone() })
    }

    /// The reply's body, watched.
    fn outgoing(mut self, body: Body) -> Download {
        {
            let mut socket = self.socket.lock();
            socket.num_replies += 1;
            let number = socket.num_replies;
            socket.replies.insert(number, Instant::now());
            self.reply = Some(number);
        }
        Download { body, running: self }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut socket = self.socket.lock();
        socket.requests -= 1;
        socket.idle_since = Instant::now();
        if let Some(number) = self.reply {
            socket.replies.remove(&number);
        }
    }
}

/// A request's body.
struct Upload {
    body: Incoming,
    read: bool,
    socket: Shared,
}

impl HttpBody for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.read = frame.is_none() || self.body.is_end_stream();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.read {
            self.socket.lock().body_left = true;
        }
    }
}

/// A reply's body.
struct Download {
    body: Body,
    running: Running,
}

impl HttpBody for Download {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Some(number) = self.running.reply {
            self.running.socket.lock().replies.insert(number, Instant::now());
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A body that keeps something until its last frame is handed over or its client is gone.
pub(crate) struct Keeping<T> {
    body: Body,
    _kept: T,
}

impl<T: Send + Unpin + 'static> Keeping<T> {
    /// `body`, keeping `kept`.
    pub(crate) fn body(body: Body, kept: T) -> Body {
        Body::new(Self { body, _kept: kept })
    }
}

impl<T: Unpin> HttpBody for Keeping<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Serves one connection until either side closes it or the server stops.
pub(crate) async fn serve(
    stream: TcpStream,
    tls: Option<Tls>,
    router: Router,
    patience: Patience,
    mut stopping: watch::Receiver<Stopping>,
) {
    // Events are small and each is awaited.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
    let accepted = match tls {
        None => Some(Accepted::Secure(Stream::plain(stream))),
        Some(tls) => tokio::select! {
            accepted = tls.accept(stream, patience.handshake) => accepted,
            _ = stopping.wait_for(|stopping| *stopping == Stopping::Closing) => None,
        },
    };
    let socket = match accepted {
        None => return,
        Some(Accepted::Secure(stream)) => Shared::new(stream),
        Some(Accepted::PlainHttp(stream)) => {
            let socket = Shared::new(stream);
            let _ = socket.clone().write_all(&refusal(&ApiError::plain_http())).now_or_never();
            return close(socket, &mut stopping).await;
        }
    };
    let over = run(&socket, router, patience, &mut stopping).await;
    match over {
        None => {}
        Some(Over::Idle) => return,
        Some(Over::Unread) => {
            tracing::warn!(
                unread_s = patience.write.as_secs_f64(),
                "a connection is closed: its client does not read"
            );
            return;
        }
        Some(Over::SlowHeaders) => {
            tracing::warn!(
                waited_s = patience.header.as_secs_f64(),
                "a connection is closed: its request's headers did not end"
            );
            // What the socket does not take at once is not worth waiting for.
            let reply = refusal(&ApiError::header_timeout(patience.header));
            let _ = socket.clone().write_all(&reply).now_or_never();
        }
    }
    close(socket, &mut stopping).await;
}

/// Closes a connection so that what was written arrives, as long as its client and the server have time for that.
async fn close(socket: Shared, stopping: &mut watch::Receiver<Stopping>) {
    if !socket.lock().ended {
        tokio::select! {
            () = linger(socket) => {}
            () = sleep(LINGER) => {}
            _ = stopping.wait_for(|stopping| *stopping == Stopping::Closing) => {}
        }
    }
}

/// Runs the protocol; gives why it was broken off.
async fn run(
    socket: &Shared,
    router: Router,
    patience: Patience,
    stopping: &mut watch::Receiver<Stopping>,
) -> Option<Over> {
    let service = service_fn(|request: hyper::Request<Incoming>| {
        let running = socket.begin_request();
        let answering = router.clone().oneshot(request.map(|body| running.incoming(body)));
        async move { answering.await.map(|response| response.map(|body| running.outgoing(body))) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    // One that comes while the server is stopping is told so before it closes.
    let born = if *stopping.borrow() == Stopping::No { Stopping::No } else { Stopping::Draining };
    let mut seen = born;
    builder.http1().max_headers(MAX_HEADERS).header_read_timeout(None).keep_alive(born == Stopping::No);
    builder.http2().max_header_list_size(MAX_HTTP2_HEADER_BYTES);
    let mut protocol = pin!(builder.serve_connection(TokioIo::new(socket.clone()), service));
    let mut alarm = pin!(sleep(patience.idle));
    // When it has to be closed: because it was told that it idles, because the server closes.
    let (mut told, mut closing) = (None, None);
    loop {
        let step = poll_fn(|cx| {
            if let Poll::Ready(ended) = protocol.as_mut().poll(cx) {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection ended");
                }
                return Poll::Ready(None);
            }
            // Only the protocol's own progress, just made, moves the deadline.
            let deadline = {
                let socket = socket.lock();
                if told.is_some() && socket.requests > 0 {
                    // A request that was under way when the client was told is served like any other.
                    told = Some(Instant::now() + CLOSE_TIMEOUT);
                }
                let told = told.filter(|_| socket.requests == 0 && socket.stream.unread_since().is_none());
                let closing = closing.filter(|_| socket.has_nothing_to_say());
                let must = [told, closing].into_iter().flatten().map(|at| (at, Over::Idle));
                let may = socket.deadline(patience).filter(|(_, over)| told.is_none() || *over != Over::Idle);
                must.chain(may).min_by_key(|(at, _)| *at)
            };
            let Some((at, over)) = deadline else { return Poll::Pending };
            if alarm.deadline() != at {
                alarm.as_mut().reset(at);
            }
            alarm.as_mut().poll(cx).map(|()| Some(over))
        });
        tokio::select! {
            biased;
            step = step => match step {
                None => return None,
                Some(Over::Idle) if told.is_none() && closing.is_none() => {
                    protocol.as_mut().graceful_shutdown();
                    told = Some(Instant::now() + CLOSE_TIMEOUT);
                }
                over => return over,
            },
            stage = stopping.wait_for(|stopping| *stopping > seen), if seen != Stopping::Closing => {
                // Without a sender the server is gone.
                seen = stage.map_or(Stopping::Closing, |stage| *stage);
                protocol.as_mut().graceful_shutdown();
                if seen == Stopping::Closing {
                    closing = Some(Instant::now() + CLOSE_TIMEOUT);
                }
            }
        }
    }
}

/// Says that nothing follows and reads what the client still sends.
async fn linger(mut socket: Shared) {
    // A peer that is gone already has nothing to be told.
    let _ = socket.shutdown().await;
    let mut discarded = vec![0; 64 << 10];
    while let Ok(Ok(1..)) = timeout(LINGER_PAUSE, socket.read(&mut discarded)).await {}
}

/// The reply to a request that never became one, as the protocol would have written it.
fn refusal(error: &ApiError) -> Vec<u8> {
    let body = error.to_json();
    let head = format!("HTTP/1.1 {}\r\ncontent-type: application/json\r\nconnection: close", error.status);
    format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}
