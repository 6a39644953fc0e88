//! Which web pages may call the API, as headers. Must not know any endpoint.

use axum::http::header;
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

use crate::access;
use crate::config::{Cors, ServerConfig};
use crate::messages;

/// What answers preflights and marks replies; `None` where no page may call.
pub(crate) fn layer(config: &ServerConfig) -> Option<CorsLayer> {
    let (origins, credentials) = match &config.cors {
        Cors::Off => return None,
        Cors::AnyOrigin => (AllowOrigin::any(), false),
        Cors::Origins { origins, credentials } => {
            (AllowOrigin::list(origins.iter().map(|origin| origin.0.clone())), *credentials)
        }
    };
    let requests = &config.cors_requests;
    let methods = if requests.methods.is_empty() {
        AllowMethods::mirror_request()
    } else {
        AllowMethods::list(requests.methods.iter().cloned())
    };
    // `Authorization` is not covered by `*`, so the headers that a page asks for are mirrored.
    let headers = if requests.headers.is_empty() {
        AllowHeaders::mirror_request()
    } else {
        AllowHeaders::list(requests.headers.iter().cloned())
    };
    Some(
        CorsLayer::new()
            .allow_origin(origins)
            .allow_credentials(credentials)
            .allow_methods(methods)
            .allow_headers(headers)
            .expose_headers([access::REQUEST_ID, messages::ANTHROPIC_REQUEST_ID, header::RETRY_AFTER]),
    )
}
