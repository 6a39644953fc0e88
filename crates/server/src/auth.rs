//! API keys: compared in constant time, so that a wrong key's answer does not tell how much of it was right.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use subtle::{Choice, ConstantTimeEq};

use crate::app::App;
use crate::error::ApiError;

/// Lets a request through that carries one of the keys, or any request where none is configured.
pub(crate) async fn require_key(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if !allowed(&app.config.api_keys, request.headers()) {
        return Err(ApiError::unauthorized());
    }
    Ok(next.run(request).await)
}

fn allowed(keys: &[String], headers: &HeaderMap) -> bool {
    if keys.is_empty() {
        return true;
    }
    let Some(given) = bearer(headers) else { return false };
    // Every key is compared, whichever matches.
    let mut matched = Choice::from(0);
    for key in keys {
        matched |= key.as_bytes().ct_eq(given);
    }
    matched.into()
}

/// Which of the keys a request that was let through carries, by its place; `None` where no key is asked for.
pub(crate) fn holder(keys: &[String], headers: &HeaderMap) -> Option<usize> {
    let given = bearer(headers)?;
    keys.iter().position(|key| key.as_bytes().ct_eq(given).into())
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_configured_key_opens_and_nothing_else_does() {
        let keys = ["first".to_owned(), "second".to_owned()];
        let with = |value: &str| HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
        assert!(allowed(&[], &HeaderMap::new()));
        for good in ["Bearer first", "Bearer second", "bearer second"] {
            assert!(allowed(&keys, &with(good)), "{good}");
        }
        for bad in ["Bearer third", "Bearer firs", "Bearer firstt", "Bearer ", "Basic first", "first", ""] {
            assert!(!allowed(&keys, &with(bad)), "{bad}");
        }
        assert!(!allowed(&keys, &HeaderMap::new()));
    }
}
