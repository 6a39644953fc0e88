//! Request ids, the span that every log line of a request stands in, and the access log: one line per request, written
//! when the last byte of its reply is handed over or its client is gone. Must not see prompts or replies, unless it was asked
//! for them.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use axum::body::HttpBody;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use r1_core::TokenId;
use r1_text::{ControlText, Tokenizer};
use tracing::field::Empty;
use tracing::{Instrument, Span};

use crate::app::App;
use crate::connection::Keeping;
use crate::error::ApiError;

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// W3C Trace Context: the client's span.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const MAX_REQUEST_ID_LEN: usize = 128;
/// Largest request headers, names and values together.
const MAX_HEADER_BYTES: usize = 32 << 10;
/// A longer path is cut in the log.
const MAX_LOGGED_PATH_BYTES: usize = 256;
/// Ends a text that was cut in the log.
const CUT: char = '…';
/// What nginx logs for a client that left before its reply was whole.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// What handlers tell the log about their request.
#[derive(Debug)]
pub(crate) struct RequestLog {
    /// The client's `x-request-id`, or one made here.
    pub(crate) id: String,
    /// Holds its id, method, path and model; lives until the reply is handed over.
    pub(crate) span: Span,
    /// When its headers were read.
    pub(crate) received: Instant,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) completion_tokens: AtomicU64,
    /// The name that the reply carries, once it is known.
    pub(crate) model: OnceLock<String>,
    /// The server ended the reply before it was whole, not its client.
    pub(crate) broken_off: AtomicBool,
    /// Set by a stream that has handed over its last event.
    pub(crate) stream_ended: AtomicBool,
    /// Where prompts and replies are logged.
    texts: Option<Texts>,
}

/// What is logged of a request's texts.
#[derive(Debug)]
struct Texts {
    /// Of each text, in characters.
    max_len: usize,
    /// The first bytes of each choice's reply, as the model writes it.
    replies: Mutex<BTreeMap<usize, Vec<u8>>>,
}

impl RequestLog {
    /// Logs the prompts as the model reads them, where that was asked for. `choices` are each one's prompt, by its number and
    /// by its tokens; those of one prompt follow each other.
    pub(crate) fn note_prompts<'p>(
        &self,
        tokenizer: &Tokenizer,
        choices: impl Iterator<Item = (usize, &'p [TokenId])>,
    ) {
        let Some(texts) = &self.texts else { return };
        let mut last = None;
        for (index, tokens) in choices {
            if last.replace(index) != Some(index) {
                // A character takes four tokens at most, so no more of them can be shown.
                let read = &tokens[..tokens.len().min(texts.max_bytes())];
                let mut prompt = texts.cut(tokenizer.decode(read, ControlText::Show));
                if read.len() < tokens.len() && !prompt.ends_with(CUT) {
                    prompt.push(CUT);
                }
                tracing::info!(parent: &self.span, index, prompt, "prompt");
            }
        }
    }

    /// Keeps a token of a choice's reply for the log, where that was asked for.
    pub(crate) fn note_token(&self, choice: usize, bytes: &[u8]) {
        let Some(texts) = &self.texts else { return };
        let mut replies = texts.replies.lock().unwrap_or_else(PoisonError::into_inner);
        let reply = replies.entry(choice).or_default();
        if reply.len() <= texts.max_bytes() {
            reply.extend_from_slice(bytes);
        }
    }

    fn log_replies(&self) {
        let Some(texts) = &self.texts else { return };
        let replies = std::mem::take(&mut *texts.replies.lock().unwrap_or_else(PoisonError::into_inner));
        for (index, reply) in replies {
            let reply = texts.cut(String::from_utf8_lossy(&reply).into_owned());
            tracing::info!(parent: &self.span, index, reply, "reply");
        }
    }
}

impl Texts {
    /// So many bytes hold the characters that are logged, whatever they are.
    fn max_bytes(&self) -> usize {
        self.max_len.saturating_mul(4)
    }

    fn cut(&self, mut text: String) -> String {
        if let Some((at, _)) = text.char_indices().nth(self.max_len) {
            text.truncate(at);
            text.push(CUT);
        }
        text
    }
}

/// Writes the line when dropped.
struct Line {
    log: Arc<RequestLog>,
    method: Method,
    path: String,
    /// What the client was told; `None` while there is no reply.
    status: Option<StatusCode>,
    /// The reply is a stream, whole once `RequestLog::stream_ended` is set.
    stream: bool,
    /// Whether it is written.
    shown: bool,
}

impl Drop for Line {
    fn drop(&mut self) {
        let whole = !self.stream || self.log.stream_ended.load(Ordering::Relaxed);
        let status = self.status.filter(|_| whole).map_or(CLIENT_CLOSED_REQUEST, |status| status.as_u16());
        let prompt_tokens = self.log.prompt_tokens.load(Ordering::Relaxed);
        let completion_tokens = self.log.completion_tokens.load(Ordering::Relaxed);
        self.log.log_replies();
        if self.shown {
            // The line says all that the span says, so it stands outside.
            tracing::info!(
                parent: None,
                request_id = %self.log.id,
                method = %self.method,
                path = %self.path,
                status,
                ms = self.log.received.elapsed().as_millis() as u64,
                model = self.log.model.get(),
                prompt_tokens,
                completion_tokens,
                "request"
            );
        }
        let span = &self.log.span;
        span.record("http.response.status_code", status);
        span.record("prompt_tokens", prompt_tokens);
        span.record("completion_tokens", completion_tokens);
    }
}

/// Gives the request its id and its span, refuses oversized headers, and logs how it ended.
pub(crate) async fn log_request(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let method = request.method().clone();
    let path = request.uri().path();
    let path = path[..path.floor_char_boundary(MAX_LOGGED_PATH_BYTES)].to_owned();
    let log = Arc::new(RequestLog {
        span: span(&app, &id, &method, &path, request.headers()),
        id,
        received: Instant::now(),
        prompt_tokens: AtomicU64::new(0),
        completion_tokens: AtomicU64::new(0),
        model: OnceLock::new(),
        broken_off: AtomicBool::new(false),
        stream_ended: AtomicBool::new(false),
        texts: app.config.log_texts.map(|max_len| Texts { max_len, replies: Mutex::default() }),
    });
    // A client that leaves drops this future, and the line with it.
    let shown = app.config.request_log;
    let mut line = Line { log: log.clone(), method, path, status: None, stream: false, shown };
    let header_bytes: usize =
        request.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    let mut response = if header_bytes > MAX_HEADER_BYTES {
        ApiError::headers_too_large(MAX_HEADER_BYTES).into_response()
    } else {
        request.extensions_mut().insert(log.clone());
        next.run(request).instrument(log.span.clone()).await
    };
    if let Ok(id) = HeaderValue::from_str(&log.id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    line.status = Some(response.status());
    line.stream = response.body().size_hint().exact().is_none();
    response.map(|body| Keeping::body(body, line))
}

fn span(app: &App, id: &str, method: &Method, path: &str, headers: &HeaderMap) -> Span {
    // At this level every log line shows it, whatever lines are asked for.
    let span = tracing::error_span!(
        "request",
        request_id = %id,
        %method,
        path,
        model = Empty,
        otel.kind = Empty,
        http.response.status_code = Empty,
        prompt_tokens = Empty,
        completion_tokens = Empty,
    );
    if let Some(adopt) = app.config.adopt_trace {
        span.record("otel.kind", "server");
        if let Some(parent) = headers.get(TRACEPARENT).and_then(|parent| parent.to_str().ok()) {
            adopt(&span, parent);
        }
    }
    span
}

/// The client's id where it is fit to be logged and sent back, a fresh one otherwise.
fn request_id(headers: &HeaderMap) -> String {
    headers
        .get(REQUEST_ID)
        .and_then(|id| id.to_str().ok())
        .filter(|id| (1..=MAX_REQUEST_ID_LEN).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic()))
        .map_or_else(|| format!("{:016x}{:016x}", random_u64(), random_u64()), str::to_owned)
}

/// Entropy for ids and seeds; not for secrets.
pub(crate) fn random_u64() -> u64 {
    // A thread's first state is keyed from the system's randomness and every further one differently, so the hash
    // of nothing is a fresh random number.
    RandomState::new().build_hasher().finish()
}
