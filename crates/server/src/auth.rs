//! API keys: held as digests and compared in constant time, so that neither a wrong key's answer nor the time it takes tells
//! how much of it was right, or how long a right one is. Must not log a key.

use std::fmt;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, header};
use axum::middleware::Next;
use axum::response::Response;
use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use subtle::{Choice, ConstantTimeEq};

use crate::app::App;
use crate::error::ApiError;

/// Where Anthropic's clients put the key.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Keys, any of which opens what they guard.
///
/// Only their SHA-256 digests are kept. A given key is digested and compared with every one of them, so the time an answer
/// takes depends on how many keys there are and how long the given one is, on nothing else.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<[u8; SHA256_OUTPUT_LEN]>);

impl ApiKeys {
    /// Nothing was configured.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a request with these headers carries one of the keys.
    fn open(&self, headers: &HeaderMap) -> bool {
        self.holder(headers).is_some()
    }

    /// Which of the keys a request with these headers carries, by its place.
    pub(crate) fn holder(&self, headers: &HeaderMap) -> Option<usize> {
        let given: Vec<_> = given(headers).map(sha256).collect();
        // Every key is compared, whichever matches.
        let matches = self.0.iter().map(|key| {
            let matched = given.iter().fold(Choice::from(0), |matched, given| matched | key.ct_eq(given));
            bool::from(matched)
        });
        let matches: Vec<bool> = matches.collect();
        matches.iter().position(|matched| *matched)
    }
}

impl<K: AsRef<str>> FromIterator<K> for ApiKeys {
    fn from_iter<I: IntoIterator<Item = K>>(keys: I) -> Self {
        Self(keys.into_iter().map(|key| sha256(key.as_ref().as_bytes())).collect())
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

fn sha256(text: &[u8]) -> [u8; SHA256_OUTPUT_LEN] {
    digest(&SHA256, text).as_ref().try_into().expect("the digest's length")
}

/// The keys that a request brings: as `Authorization: Bearer`, as `x-api-key`, or as both.
fn given(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    bearer(headers).into_iter().chain(headers.get(X_API_KEY).map(|key| key.as_bytes().trim_ascii()))
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
}

/// Lets a request through that carries one of the keys, or any request where none is configured.
pub(crate) async fn require_key(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let keys = &app.config.api_keys;
    if !keys.is_empty() && !keys.open(request.headers()) {
        return Err(ApiError::unauthorized());
    }
    Ok(next.run(request).await)
}

/// Lets a request through that carries one of the administrators' keys. Where none is configured, nothing is there.
pub(crate) async fn require_admin(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    check_admin(&app.config.admin_keys, &request)?;
    Ok(next.run(request).await)
}

fn check_admin(keys: &ApiKeys, request: &Request) -> Result<(), ApiError> {
    if keys.is_empty() {
        return Err(ApiError::unknown_path(request.method().as_str(), request.uri().path()));
    }
    if keys.open(request.headers()) { Ok(()) } else { Err(ApiError::unauthorized()) }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn with(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(HeaderName::from_static(name), value.parse().unwrap())])
    }

    #[test]
    fn any_configured_key_opens_and_nothing_else_does() {
        let keys: ApiKeys = ["first", "second"].iter().collect();
        for good in ["Bearer first", "Bearer second", "bearer second"] {
            assert!(keys.open(&with("authorization", good)), "{good}");
        }
        for bad in ["Bearer third", "Bearer firs", "Bearer firstt", "Bearer ", "Basic first", "first", ""] {
            assert!(!keys.open(&with("authorization", bad)), "{bad}");
        }
        assert!(keys.open(&with("x-api-key", "second")));
        for bad in ["third", "Bearer first", ""] {
            assert!(!keys.open(&with("x-api-key", bad)), "{bad}");
        }
        let mut both = with("authorization", "Bearer unused");
        both.extend(with("x-api-key", "first"));
        assert!(keys.open(&both));
        assert!(!keys.open(&HeaderMap::new()) && !ApiKeys::default().open(&with("x-api-key", "")));
        assert_eq!(format!("{keys:?}"), "2 keys");
    }

    #[test]
    fn administrators_endpoints_are_not_there_without_a_key() {
        let request = |key: &str| {
            let request = Request::post("/flush_cache").header("authorization", format!("Bearer {key}"));
            request.body(Body::empty()).unwrap()
        };
        let status =
            |keys: &ApiKeys, key| check_admin(keys, &request(key)).map_err(|error| error.status.as_u16());
        let keys: ApiKeys = ["root"].iter().collect();
        assert_eq!(status(&keys, "root"), Ok(()));
        assert_eq!(status(&keys, "user"), Err(401));
        for key in ["root", ""] {
            assert_eq!(status(&ApiKeys::default(), key), Err(404));
        }
    }
}
