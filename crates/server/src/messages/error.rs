//! Errors as Anthropic's clients expect them. Errors are made by whoever finds them, in OpenAI's form; what leaves through
//! this API's paths is put into the other form at the door, so that none is missed. Must not know what an error is about.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use serde::Serialize;

use crate::access::REQUEST_ID;
use crate::error::ApiError;

/// Anthropic's name for `x-request-id`.
pub(crate) const ANTHROPIC_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// `{"type":"error","error":{"type","message"},"request_id"}`.
#[derive(Serialize)]
pub(super) struct ErrorBody<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    error: ErrorFields<'a>,
    request_id: Option<&'a str>,
}

#[derive(Serialize)]
struct ErrorFields<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    message: &'a str,
}

impl<'a> ErrorBody<'a> {
    pub(super) fn new(error: &'a ApiError, request_id: Option<&'a str>) -> Self {
        let error = ErrorFields { kind: kind(error.status), message: &error.message };
        Self { kind: "error", error, request_id }
    }
}

/// Anthropic's class of error.
fn kind(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => "timeout_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        other if other.is_server_error() => "api_error",
        _ => "invalid_request_error",
    }
}

/// Where this API answers: these paths and everything below them.
#[derive(Clone)]
pub(crate) struct AnthropicPaths(Arc<[String]>);

impl AnthropicPaths {
    pub(crate) fn new(prefixes: &BTreeSet<String>) -> Self {
        Self(prefixes.iter().map(|at| format!("{at}/messages")).collect())
    }

    fn hold(&self, path: &str) -> bool {
        let below = |at: &String| {
            path.strip_prefix(&**at).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.0.iter().any(below)
    }
}

/// Rewrites the errors of this API's paths, whoever made them, and names the request as Anthropic does.
pub(crate) async fn reword(State(paths): State<AnthropicPaths>, request: Request, next: Next) -> Response {
    if !paths.hold(request.uri().path()) {
        return next.run(request).await;
    }
    let mut response = next.run(request).await;
    let id = response.headers().get(REQUEST_ID).cloned();
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        let id = id.as_ref().and_then(|id| id.to_str().ok());
        let body = serde_json::to_string(&ErrorBody::new(&error, id)).expect("strings serialize");
        response.headers_mut().remove(header::CONTENT_LENGTH);
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        *response.body_mut() = Body::from(body);
    }
    if let Some(id) = id {
        response.headers_mut().insert(ANTHROPIC_REQUEST_ID, id);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_hold_what_is_below_them_and_nothing_beside() {
        let paths =
            AnthropicPaths::new(&BTreeSet::from([String::new(), "/v1".to_owned(), "/a/v1".to_owned()]));
        for ours in
            ["/messages", "/v1/messages", "/v1/messages/count_tokens", "/a/v1/messages/", "/messages/batches"]
        {
            assert!(paths.hold(ours), "{ours}");
        }
        for other in
            ["/", "/v1", "/v1/messagesx", "/v1/chat/completions", "/a/messages", "/v1/threads/messages"]
        {
            assert!(!paths.hold(other), "{other}");
        }
    }
}
