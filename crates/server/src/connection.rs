//! One client's connection: how long it may idle, trickle its headers or leave a reply unread, and how it is closed so
//! that the last reply arrives. Must not know any endpoint.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tower::ServiceExt;

use crate::error::ApiError;

/// More headers than these are answered by hyper's own, empty 431. Ours names the limit of bytes.
const MAX_HEADERS: usize = 1024;
/// For HTTP/2; twice what `access` lets through, so that it is the one to answer.
const MAX_HTTP2_HEADER_BYTES: u32 = 64 << 10;
/// A client that still writes when its reply is out is read until it pauses for this long,
const LINGER_PAUSE: Duration = Duration::from_secs(1);
/// and no longer than this. Closed earlier, its kernel would throw the reply away.
const LINGER: Duration = Duration::from_secs(10);
/// How long a connection that was told to close gets for it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a client may keep a connection waiting.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// Without a request.
    pub(crate) idle: Duration,
    /// From the first byte of a request to the end of its headers.
    pub(crate) header: Duration,
    /// Without taking a byte of what is to be sent.
    pub(crate) write: Duration,
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
    stream: TcpStream,
    /// Requests whose replies are not handed over yet.
    requests: usize,
    /// Since when there is none.
    idle_since: Instant,
    /// When the first byte of a request came whose headers are not complete.
    head_since: Option<Instant>,
    /// Since when the client takes no bytes.
    unread_since: Option<Instant>,
    /// Nothing was read so far.
    fresh: bool,
    /// On HTTP/2 bytes between requests are frames, not headers.
    http2: bool,
    /// The client has sent its last byte.
    ended: bool,
}

impl Socket {
    fn deadline(&self, patience: Patience) -> Option<(Instant, Over)> {
        let unread = self.unread_since.map(|since| (since + patience.write, Over::Unread));
        let quiet = (self.requests == 0).then(|| match self.head_since {
            Some(since) => (since + patience.header, Over::SlowHeaders),
            None => (self.idle_since + patience.idle, Over::Idle),
        });
        unread.into_iter().chain(quiet).min_by_key(|(at, _)| *at)
    }

    fn note_read(&mut self, bytes: &[u8]) {
        if std::mem::take(&mut self.fresh) {
            self.http2 = bytes.starts_with(b"PRI");
        }
        self.ended = bytes.is_empty();
        if self.requests == 0 && !self.http2 && !self.ended {
            self.head_since.get_or_insert_with(Instant::now);
        }
    }

    fn note_write<T>(&mut self, written: &Poll<T>) {
        match written {
            Poll::Ready(_) => self.unread_since = None,
            Poll::Pending => _ = self.unread_since.get_or_insert_with(Instant::now),
        }
    }
}

/// The socket, shared by the protocol, its requests and whoever watches over them. Only one of them acts at a time.
#[derive(Clone)]
struct Shared(Arc<Mutex<Socket>>);

impl Shared {
    fn new(stream: TcpStream) -> Self {
        Self(Arc::new(Mutex::new(Socket {
            stream,
            requests: 0,
            idle_since: Instant::now(),
            head_since: None,
            unread_since: None,
            fresh: true,
            http2: false,
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
        Running(self.clone())
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
        let mut socket = self.lock();
        let written = Pin::new(&mut socket.stream).poll_write(cx, buf);
        socket.note_write(&written);
        written
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut socket = self.lock();
        let written = Pin::new(&mut socket.stream).poll_write_vectored(cx, bufs);
        socket.note_write(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.lock().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.lock().stream).poll_shutdown(cx)
    }
}

/// A request on a connection, from its headers to the last byte of its reply.
struct Running(Shared);

impl Drop for Running {
    fn drop(&mut self) {
        let mut socket = self.0.lock();
        socket.requests -= 1;
        socket.idle_since = Instant::now();
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
    router: Router,
    patience: Patience,
    mut stopping: watch::Receiver<Stopping>,
) {
    // Events are small and each is awaited.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
    let socket = Shared::new(stream);
    let over = run(&socket, router, patience, &mut stopping).await;
    match over {
        None => {}
        Some(Over::Idle) => return,
        Some(Over::Unread) => {
            tracing::warn!(
                unread_s = patience.write.as_secs(),
                "a connection is closed: its client does not read"
            );
            return;
        }
        Some(Over::SlowHeaders) => {
            tracing::warn!(
                waited_s = patience.header.as_secs(),
                "a connection is closed: its request's headers did not end"
            );
            // What the socket does not take at once is not worth waiting for.
            let _ = socket.lock().stream.try_write(&slow_headers_reply(patience.header));
        }
    }
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
    let service = service_fn(|request: hyper::Request<hyper::body::Incoming>| {
        let running = socket.begin_request();
        let answering = router.clone().oneshot(request.map(Body::new));
        async move { answering.await.map(|response| response.map(|body| Keeping::body(body, running))) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    // One that comes while the server is stopping is told so before it closes.
    let born = if *stopping.borrow() == Stopping::No { Stopping::No } else { Stopping::Draining };
    let mut stops = false;
    builder.http1().max_headers(MAX_HEADERS).header_read_timeout(None).keep_alive(born == Stopping::No);
    builder.http2().max_header_list_size(MAX_HTTP2_HEADER_BYTES);
    let mut protocol = pin!(builder.serve_connection(TokioIo::new(socket.clone()), service));
    let mut alarm = pin!(sleep(patience.idle));
    let mut told = None;
    loop {
        let step = poll_fn(|cx| {
            if let Poll::Ready(ended) = protocol.as_mut().poll(cx) {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection ended");
                }
                return Poll::Ready(None);
            }
            // Only the protocol's own progress, just made, moves the deadline.
            let Some((at, over)) = told.or_else(|| socket.lock().deadline(patience)) else {
                return Poll::Pending;
            };
            if alarm.deadline() != at {
                alarm.as_mut().reset(at);
            }
            alarm.as_mut().poll(cx).map(|()| Some(over))
        });
        tokio::select! {
            biased;
            step = step => match step {
                None => return None,
                Some(Over::Idle) if told.is_none() => {
                    protocol.as_mut().graceful_shutdown();
                    told = Some((Instant::now() + CLOSE_TIMEOUT, Over::Idle));
                }
                over => return over,
            },
            _ = stopping.wait_for(|stopping| *stopping > born), if !stops => {
                stops = true;
                protocol.as_mut().graceful_shutdown();
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
fn slow_headers_reply(limit: Duration) -> Vec<u8> {
    let body = ApiError::header_timeout(limit).to_json();
    let head = "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close";
    format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}
