//! What a client is told when a request fails: one error type, one JSON shape, the right status. Knows the engine's
//! refusals only to give each its status; must not hold prompts or replies.

use std::borrow::Cow;
use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use r1_engine::{EngineError, SubmitError};
use serde::Serialize;
use tokio::task::JoinError;

/// Most characters of a client's value that an error repeats.
const MAX_SHOWN_CHARS: usize = 64;

/// A client's value as errors repeat it: a long one is cut off.
pub(crate) fn shown(value: &str) -> Cow<'_, str> {
    match value.char_indices().nth(MAX_SHOWN_CHARS) {
        None => value.into(),
        Some((end, _)) => format!("{}…", &value[..end]).into(),
    }
}

/// A failed request, as OpenAI's clients expect it: `{"error":{"message","type","param","code"}}`.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// What is wrong and the way out.
    pub message: String,
    /// OpenAI's class of error.
    pub kind: &'static str,
    /// The request's field that is wrong.
    pub param: Option<String>,
    /// A machine-readable name.
    pub code: Option<&'static str>,
    /// When to come back, sent as `Retry-After`.
    pub retry_after: Option<Duration>,
    /// The request's body was not read to its end, so nothing that follows on its connection could be understood.
    pub(crate) body_left: bool,
}

/// The JSON of an error, in a body or in a stream's event.
#[derive(Serialize)]
pub(crate) struct ErrorBody<'a> {
    error: ErrorFields<'a>,
}

#[derive(Serialize)]
struct ErrorFields<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    param: Option<&'a str>,
    code: Option<&'a str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> Self {
        Self { status, message, kind, param: None, code, retry_after: None, body_left: false }
    }

    /// 400 for the whole request.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message.into())
    }

    /// 400 that names the field.
    pub(crate) fn bad_field(param: impl Into<Cow<'static, str>>, problem: impl std::fmt::Display) -> Self {
        let param = param.into();
        let mut error = Self::bad_request(format!("{param}: {problem}"));
        error.param = Some(param.into_owned());
        error
    }

    /// 400 for a known field whose feature does not exist here yet.
    pub(crate) fn not_supported(param: impl Into<Cow<'static, str>>, way_out: &str) -> Self {
        let mut error = Self::bad_field(param, format_args!("not supported yet; {way_out}"));
        error.code = Some("unsupported_parameter");
        error
    }

    /// 400 for a prompt that leaves no room; both numbers are in the message.
    pub(crate) fn context_length(param: &'static str, message: String) -> Self {
        let mut error = Self::bad_request(message);
        error.param = Some(param.into());
        error.code = Some("context_length_exceeded");
        error
    }

    pub(crate) fn unauthorized() -> Self {
        let message =
            "missing or wrong API key; send it as `Authorization: Bearer <key>` or `x-api-key: <key>`";
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", Some("invalid_api_key"), message.into())
    }

    pub(crate) fn unknown_path(method: &str, path: &str) -> Self {
        let message = format!("unknown request URL: {method} {path}");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("unknown_url"), message)
    }

    pub(crate) fn wrong_method(method: &str, path: &str) -> Self {
        let message = format!("{path} does not answer {method}; the Allow header names what it answers");
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            Some("method_not_supported"),
            message,
        )
    }

    pub(crate) fn unknown_model(model: &str, served: &[String]) -> Self {
        let message = format!("the model `{}` is not served here; {} is", shown(model), served.join(", "));
        let mut error =
            Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("model_not_found"), message);
        error.param = Some("model".into());
        error
    }

    fn timeout(message: String) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", Some("request_timeout"), message)
    }

    pub(crate) fn header_timeout(limit: Duration) -> Self {
        Self::timeout(format!("the request's headers did not arrive within {} s", limit.as_secs_f64()))
    }

    /// 400 for a client that does not speak TLS where it is asked for.
    pub(crate) fn plain_http() -> Self {
        let mut error = Self::bad_request("this port speaks TLS; use https:// in the URL");
        error.code = Some("tls_required");
        error
    }

    pub(crate) fn body_timeout(limit: Duration) -> Self {
        let limit = limit.as_secs_f64();
        let mut error = Self::timeout(format!("the request's body did not arrive within {limit} s"));
        error.body_left = true;
        error
    }

    /// 408 for a request that was begun and is now aborted.
    pub(crate) fn request_timeout(limit: Duration) -> Self {
        let limit = limit.as_secs_f64();
        Self::timeout(format!("the request took longer than {limit} s (--request-timeout) and was aborted"))
    }

    pub(crate) fn body_too_large(max_bytes: usize) -> Self {
        let message = format!("the request's body is over {max_bytes} bytes (--max-body-bytes)");
        let status = StatusCode::PAYLOAD_TOO_LARGE;
        let mut error = Self::new(status, "invalid_request_error", Some("request_too_large"), message);
        error.body_left = true;
        error
    }

    pub(crate) fn headers_too_large(max_bytes: usize) -> Self {
        let message = format!("the request's headers are over {max_bytes} bytes");
        let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        Self::new(status, "invalid_request_error", Some("headers_too_large"), message)
    }

    /// 503 with `Retry-After`.
    pub(crate) fn unavailable(code: &'static str, message: impl Into<String>, retry_after: Duration) -> Self {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        let mut error = Self::new(status, "service_unavailable_error", Some(code), message.into());
        error.retry_after = Some(retry_after);
        error
    }

    /// 503 for a server that is going away.
    pub(crate) fn draining() -> Self {
        Self::unavailable("draining", "the server is shutting down", Duration::from_secs(1))
    }

    /// 500 for a broken invariant of ours.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", Some("internal_error"), message.into())
    }

    /// 500 for work on a request that did not come to its end. What a panic says may hold text of the request, so neither
    /// the client nor the log is told.
    pub(crate) fn unread(error: &JoinError) -> Self {
        tracing::error!(is_panic = error.is_panic(), "reading a request failed");
        Self::internal("reading the request failed")
    }

    /// 429 for one more request where as many as may already wait.
    pub(crate) fn too_many_waiting(message: impl Into<String>) -> Self {
        let status = StatusCode::TOO_MANY_REQUESTS;
        let mut error = Self::new(status, "rate_limit_error", Some("queue_full"), message.into());
        error.retry_after = Some(Duration::from_secs(1));
        error
    }

    /// The body as text.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(&self.body()).expect("strings serialize")
    }

    /// The JSON to send.
    pub(crate) fn body(&self) -> ErrorBody<'_> {
        ErrorBody {
            error: ErrorFields {
                message: &self.message,
                kind: self.kind,
                param: self.param.as_deref(),
                code: self.code,
            },
        }
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::Step(_) | EngineError::Refused(_) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", Some("engine_error"), message)
            }
            EngineError::Constraint(_) => Self::new(
                StatusCode::BAD_REQUEST,
                "invalid_request_error",
                Some("constraint_failed"),
                message,
            ),
            EngineError::SlowReader { .. } => {
                Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", Some("slow_reader"), message)
            }
            EngineError::Stopped => Self::unavailable("engine_stopped", message, Duration::from_secs(1)),
        }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::Loading => Self::unavailable("loading", message, Duration::from_secs(5)),
            SubmitError::NotRunning(_) => {
                Self::unavailable("engine_failed", message, Duration::from_secs(30))
            }
            SubmitError::QueueFull { .. } => Self::too_many_waiting(message),
            SubmitError::TooManyChoices { .. } => {
                let mut error = Self::bad_request(message);
                error.param = Some("n".into());
                error
            }
            SubmitError::TooLong { .. } => Self::context_length("max_tokens", message),
            SubmitError::EmptyPrompt | SubmitError::UnknownToken { .. } => {
                let mut error = Self::bad_request(message);
                error.param = Some("prompt".into());
                error
            }
            SubmitError::Sampling(invalid) => {
                let mut error = Self::bad_request(message);
                error.param = Some(invalid.param.into());
                error
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(after) = self.retry_after {
            let seconds = after.as_secs_f64().ceil().max(1.0) as u64;
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.body_left {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // For APIs that tell it in other words.
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_values_are_cut_between_characters() {
        let whole = "é".repeat(64);
        assert_eq!(shown(&whole), whole);
        assert_eq!(shown(&(whole.clone() + "more")), whole + "…");
        assert_eq!(shown(""), "");
    }

    #[tokio::test]
    async fn what_a_panic_says_is_not_told() {
        let failed = tokio::spawn(async { panic!("the prompt was: secret") }).await.unwrap_err();
        let error = ApiError::unread(&failed);
        assert_eq!((error.status.as_u16(), &*error.message), (500, "reading the request failed"));
    }
}
