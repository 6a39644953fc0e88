//! A reply as server-sent events: role chunks, deltas, the end of each choice, usage when asked for, `[DONE]`. Must not
//! know how the text was made.

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{FutureExt as _, stream};
use http_body_util::BodyExt as _;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::{SendTimeoutError, TrySendError};
use tokio::time::{Instant, sleep_until};
use tracing::Instrument;

use crate::error::ApiError;
use crate::render;
use crate::reply::Reply;

/// Tells nginx not to collect the events before it passes them on.
const NO_BUFFERING: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));

/// Events that wait for the client beside what the sockets hold; behind them the engine's own queue fills up.
const WAITING_EVENTS: usize = 16;

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
pub(crate) fn stream(reply: Reply, limits: StreamLimits) -> Response {
    let log = reply.log.clone();
    let (sender, receiver) = mpsc::channel(WAITING_EVENTS);
    // On a task of its own the reply ends in time even if nobody reads it.
    tokio::spawn(send_events(reply, sender, limits).instrument(log.span.clone()));
    let events = stream::unfold((receiver, log), |(mut receiver, log)| async move {
        if log.stream_ended.load(Ordering::Relaxed) {
            return None;
        }
        let event = match receiver.recv().await {
            Some(Sent { event, last }) => {
                log.stream_ended.store(last, Ordering::Relaxed);
                Ok(event)
            }
            // The connection breaks, so that nobody takes what was sent for the whole reply.
            None => Err(io::Error::other("the reply was broken off")),
        };
        Some((event, (receiver, log)))
    });
    let keep_alive = KeepAlive::new().interval(limits.ping_interval).text("ping");
    ([NO_BUFFERING], Sse::new(events).keep_alive(keep_alive)).into_response()
}

struct Sent {
    event: Event,
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
async fn send_events(reply: Reply, events: mpsc::Sender<Sent>, limits: StreamLimits) {
    let mut sent = forward(reply, &events, limits).await;
    if let Err(Unsent::Over(limit)) = sent {
        tracing::warn!("a stream is broken off: the request timeout is over");
        let farewell = Next::error(&ApiError::request_timeout(limit));
        sent = hand_over(farewell, &events, limits.write_timeout).await;
    }
    if let Err(Unsent::Unread) = sent {
        let unread_s = limits.write_timeout.as_secs_f64();
        tracing::warn!(unread_s, "a stream is broken off: its client does not read");
    }
}

/// Hands over all of the reply, as far as its time goes; then nothing of it runs any longer.
async fn forward(mut reply: Reply, events: &mpsc::Sender<Sent>, limits: StreamLimits) -> Result<(), Unsent> {
    let mut next = Next {
        events: render::opening_chunks(&reply.header, reply.choices()).iter().map(json_event).collect(),
        last: false,
    };
    let mut over = pin!(over(limits.deadline));
    loop {
        let last = next.last;
        tokio::select! {
            biased;
            sent = hand_over(next, events, limits.write_timeout) => sent?,
            limit = &mut over => {
                reply.log.broken_off.store(true, Ordering::Relaxed);
                return Err(Unsent::Over(limit));
            }
        }
        if last {
            return Ok(());
        }
        next = tokio::select! {
            biased;
            () = events.closed() => return Err(Unsent::Gone),
            // Before the reply, which may always have something to say.
            limit = &mut over => {
                reply.log.broken_off.store(true, Ordering::Relaxed);
                return Err(Unsent::Over(limit));
            }
            next = advance(&mut reply) => next,
        };
    }
}

/// Gives the client up to `write_timeout` for each event.
async fn hand_over(next: Next, events: &mpsc::Sender<Sent>, write_timeout: Duration) -> Result<(), Unsent> {
    let count = next.events.len();
    for (i, event) in next.events.into_iter().enumerate() {
        let sent = Sent { event, last: next.last && i + 1 == count };
        match events.try_send(sent) {
            Ok(()) => {}
            Err(TrySendError::Closed(_)) => return Err(Unsent::Gone),
            Err(TrySendError::Full(sent)) => {
                events.send_timeout(sent, write_timeout).await.map_err(|error| match error {
                    SendTimeoutError::Closed(_) => Unsent::Gone,
                    SendTimeoutError::Timeout(_) => Unsent::Unread,
                })?;
            }
        }
    }
    Ok(())
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

/// Events that belong together.
struct Next {
    events: Vec<Event>,
    /// Nothing follows them.
    last: bool,
}

impl Next {
    fn error(error: &ApiError) -> Self {
        Self { events: vec![json_event(&error.body()), done()], last: true }
    }
}

/// The events of the reply's next update.
async fn advance(reply: &mut Reply) -> Next {
    match reply.next().await {
        Some(Ok((index, update))) => {
            let chunks = render::chunks(&reply.header, index, update);
            Next { events: chunks.iter().map(json_event).collect(), last: false }
        }
        Some(Err(error)) => Next::error(&error),
        None => {
            let usage = render::usage_chunk(&reply.header, reply.counts());
            let events = usage.iter().map(json_event).chain([done()]).collect();
            Next { events, last: true }
        }
    }
}

/// What every stream ends with, after an error too.
fn done() -> Event {
    Event::default().data("[DONE]")
}

fn json_event(value: &impl Serialize) -> Event {
    // Reply types hold strings, numbers and lists only; none of these can fail to serialize.
    Event::default().json_data(value).expect("replies serialize")
}

/// The bytes that a stream of `payloads` is, `[DONE]` included: for checks of the framing from outside.
#[doc(hidden)]
pub fn frames(payloads: &[serde_json::Value]) -> Vec<u8> {
    let events = payloads.iter().map(json_event).chain([done()]).map(Ok::<_, Infallible>);
    let events: Vec<_> = events.collect();
    let body = Sse::new(stream::iter(events)).into_response().into_body();
    body.collect().now_or_never().expect("no event is awaited").expect("no event fails").to_bytes().to_vec()
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
