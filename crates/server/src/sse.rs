//! A reply as server-sent events: role chunks, deltas, the end of each choice, usage when asked for, `[DONE]`. Must not
//! know how the text was made.

use std::future::pending;
use std::io;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::{FutureExt as _, stream};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::{SendTimeoutError, TrySendError};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::Instrument;

use crate::error::ApiError;
use crate::render::{Frames, Render};
use crate::reply::Reply;

/// Tells nginx not to collect the events before it passes them on.
const NO_BUFFERING: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));

const EVENT_STREAM: HeaderValue = HeaderValue::from_static("text/event-stream");
const NO_CACHE: HeaderValue = HeaderValue::from_static("no-cache");
/// A comment, which keeps proxies from closing a stream that is silent.
const PING: &[u8] = b": ping\n\n";

/// Writes that wait for the client beside what the sockets hold; behind them the engine's own queue fills up.
const WAITING_WRITES: usize = 16;
/// Events that are there already are written together, up to about this much.
const MAX_FRAMES_BYTES: usize = 16 << 10;

/// How long a stream may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StreamLimits {
    /// Silence after which a comment is sent.
    pub(crate) ping_interval: Duration,
    /// For the client to take an event.
    pub(crate) write_timeout: Duration,
    /// For all of it: when, and after how long.
    pub(crate) deadline: Option<(Instant, Duration)>,
}

/// Answers with the reply's events as they come. Dropping the body drops the reply, which aborts what still runs.
pub(crate) fn stream(reply: Reply, render: Box<dyn Render>, limits: StreamLimits) -> Response {
    let log = reply.log.clone();
    let (sender, receiver) = mpsc::channel(WAITING_WRITES);
    // On a task of its own the reply ends in time even if nobody reads it.
    tokio::spawn(send_events(reply, render, sender, limits).instrument(log.span.clone()));
    let ping_interval = limits.ping_interval;
    let frames = stream::unfold((receiver, log), move |(mut receiver, log)| async move {
        if log.stream_ended.load(Ordering::Relaxed) {
            return None;
        }
        let bytes = match timeout(ping_interval, receiver.recv()).await {
            Ok(Some(Sent { bytes, last })) => {
                log.stream_ended.store(last, Ordering::Relaxed);
                Ok(bytes)
            }
            // The connection breaks, so that nobody takes what was sent for the whole reply.
            Ok(None) => Err(io::Error::other("the reply was broken off")),
            Err(_) => Ok(PING.to_vec()),
        };
        Some((bytes, (receiver, log)))
    });
    let headers = [(header::CONTENT_TYPE, EVENT_STREAM), (header::CACHE_CONTROL, NO_CACHE), NO_BUFFERING];
    (headers, Body::from_stream(frames)).into_response()
}

/// Events that are written together.
struct Sent {
    bytes: Vec<u8>,
    last: bool,
}

/// Why an event was not taken.
enum Unsent {
    /// The client is gone.
    Gone,
    /// It does not read.
    Unread,
    /// The request's time, this much, is over.
    Over(Duration),
}

/// Runs a reply to its end, its deadline, or its client's.
async fn send_events(
    reply: Reply,
    mut render: Box<dyn Render>,
    events: mpsc::Sender<Sent>,
    limits: StreamLimits,
) {
    let mut sent = forward(reply, &mut *render, &events, limits).await;
    if let Err(Unsent::Over(limit)) = sent {
        tracing::warn!("a stream is broken off: the request timeout is over");
        let mut farewell = Frames::default();
        render.failure(&ApiError::request_timeout(limit), &mut farewell);
        let farewell = Sent { bytes: farewell.take(), last: true };
        sent = hand_over(farewell, &events, limits.write_timeout).await;
    }
    if let Err(Unsent::Unread) = sent {
        let unread_s = limits.write_timeout.as_secs_f64();
        tracing::warn!(unread_s, "a stream is broken off: its client does not read");
    }
}

/// Hands over all of the reply, as far as its time goes; then nothing of it runs any longer.
async fn forward(
    mut reply: Reply,
    render: &mut dyn Render,
    events: &mpsc::Sender<Sent>,
    limits: StreamLimits,
) -> Result<(), Unsent> {
    let mut frames = Frames::default();
    render.opening(&mut frames);
    let mut last = false;
    let mut over = pin!(over(limits.deadline));
    loop {
        if !frames.is_empty() {
            let next = Sent { bytes: frames.take(), last };
            tokio::select! {
                biased;
                sent = hand_over(next, events, limits.write_timeout) => sent?,
                limit = &mut over => {
                    reply.log.broken_off.store(true, Ordering::Relaxed);
                    return Err(Unsent::Over(limit));
                }
            }
        }
        if last {
            return Ok(());
        }
        last = tokio::select! {
            biased;
            () = events.closed() => return Err(Unsent::Gone),
            // Before the reply, which may always have something to say.
            limit = &mut over => {
                reply.log.broken_off.store(true, Ordering::Relaxed);
                return Err(Unsent::Over(limit));
            }
            last = advance(&mut reply, render, &mut frames) => last,
        };
        // What is there already travels along.
        while !last && frames.len() < MAX_FRAMES_BYTES {
            match advance(&mut reply, render, &mut frames).now_or_never() {
                Some(ended) => last = ended,
                None => break,
            }
        }
    }
}

/// Gives the client up to `write_timeout` for what it is sent.
async fn hand_over(next: Sent, events: &mpsc::Sender<Sent>, write_timeout: Duration) -> Result<(), Unsent> {
    match events.try_send(next) {
        Ok(()) => Ok(()),
        Err(TrySendError::Closed(_)) => Err(Unsent::Gone),
        Err(TrySendError::Full(next)) => {
            events.send_timeout(next, write_timeout).await.map_err(|error| match error {
                SendTimeoutError::Closed(_) => Unsent::Gone,
                SendTimeoutError::Timeout(_) => Unsent::Unread,
            })
        }
    }
}

/// Waits until the request's time is over; gives how much it had.
async fn over(deadline: Option<(Instant, Duration)>) -> Duration {
    match deadline {
        Some((deadline, limit)) => {
            sleep_until(deadline).await;
            limit
        }
        None => pending().await,
    }
}

/// Writes the reply's next update; `true` when nothing follows.
async fn advance(reply: &mut Reply, render: &mut dyn Render, out: &mut Frames) -> bool {
    match reply.next().await {
        Some(Ok((index, update))) => {
            render.update(index, update, out);
            false
        }
        Some(Err(error)) => {
            render.failure(&error, out);
            true
        }
        None => {
            render.closing(reply.counts(), out);
            true
        }
    }
}

/// The bytes that a stream of `payloads` is, `[DONE]` included: for checks of the framing from outside.
#[doc(hidden)]
pub fn frames(payloads: &[serde_json::Value]) -> Vec<u8> {
    let mut frames = Frames::default();
    for payload in payloads {
        frames.data(payload);
    }
    frames.done();
    frames.take()
}

#[cfg(test)]
#[path = "../../../fuzz/bodies/sse.rs"]
mod check;
#[cfg(test)]
#[path = "../../../fuzz/bodies/replay.rs"]
mod corpus;

#[cfg(test)]
mod tests {
    /// What fuzzing found, and what covers the code.
    #[test]
    fn the_corpus_holds() {
        super::corpus::replay("sse", |data| super::check::run(data, super::frames));
    }
}
