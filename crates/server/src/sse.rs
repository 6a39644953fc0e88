//! A reply as server-sent events: role chunks, deltas, the end of each choice, usage when asked for, `[DONE]`. Must not
//! know how the text was made.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{FutureExt as _, stream};
use http_body_util::BodyExt as _;
use serde::Serialize;

use crate::access::RequestLog;
use crate::render;
use crate::reply::Reply;

/// Tells nginx not to collect the events before it passes them on.
const NO_BUFFERING: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));

/// Answers with the reply's events as they come. Dropping the body drops the reply, which aborts what still runs.
pub(crate) fn stream(reply: Reply, ping_interval: Duration) -> Response {
    let events = stream::unfold(Events::new(reply), |mut events| async move {
        let event = events.next().await?;
        Some((Ok::<_, Infallible>(event), events))
    });
    let keep_alive = KeepAlive::new().interval(ping_interval).text("ping");
    ([NO_BUFFERING], Sse::new(events).keep_alive(keep_alive)).into_response()
}

struct Events {
    /// `None` once the last event waits in `pending`.
    reply: Option<Reply>,
    log: Arc<RequestLog>,
    pending: VecDeque<Event>,
}

impl Events {
    fn new(reply: Reply) -> Self {
        let opening = render::opening_chunks(&reply.header, reply.choices());
        let pending = opening.iter().map(json_event).collect();
        Self { pending, log: reply.log.clone(), reply: Some(reply) }
    }

    async fn next(&mut self) -> Option<Event> {
        while self.pending.is_empty() {
            self.advance().await?;
        }
        if self.pending.len() == 1 && self.reply.is_none() {
            self.log.stream_ended.store(true, Ordering::Relaxed);
        }
        self.pending.pop_front()
    }

    /// Takes one update from the reply; `None` when there is none left.
    async fn advance(&mut self) -> Option<()> {
        let reply = self.reply.as_mut()?;
        match reply.next().await {
            Some(Ok((index, update))) => {
                for chunk in render::chunks(&reply.header, index, update) {
                    self.pending.push_back(json_event(&chunk));
                }
            }
            Some(Err(error)) => {
                self.pending.push_back(json_event(&error.body()));
                self.pending.push_back(done());
                self.reply = None;
            }
            None => {
                if let Some(chunk) = render::usage_chunk(&reply.header, reply.counts()) {
                    self.pending.push_back(json_event(&chunk));
                }
                self.pending.push_back(done());
                self.reply = None;
            }
        }
        Some(())
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
