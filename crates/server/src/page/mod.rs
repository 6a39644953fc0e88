//! The chat page at `/`: one self-contained HTML file, put together from this folder, under a content security policy that
//! lets nothing else run. A client of the API like any other: must not know the engine or the handlers.

use std::sync::LazyLock;

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio_rustls::rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;

const HTML: &str = include_str!("index.html");
const STYLE: &str = include_str!("page.css");
/// One module: the chat uses what the renderer declares.
const SCRIPT: &str = concat!(include_str!("markdown.js"), include_str!("chat.js"));

/// Where `HTML` takes them.
const STYLE_SLOT: &str = "<style></style>";
const SCRIPT_SLOT: &str = r#"<script type="module"></script>"#;

/// The page as it is sent.
struct Page {
    html: Bytes,
    policy: HeaderValue,
    etag: String,
    etag_header: HeaderValue,
}

static PAGE: LazyLock<Page> = LazyLock::new(|| {
    let html = HTML
        .replace(STYLE_SLOT, &format!("<style>{STYLE}</style>"))
        .replace(SCRIPT_SLOT, &format!(r#"<script type="module">{SCRIPT}</script>"#));
    let etag = format!("\"{}\"", sha256_base64(html.as_bytes()));
    Page {
        policy: HeaderValue::try_from(policy()).expect("the policy is ASCII"),
        etag_header: HeaderValue::try_from(&etag).expect("base64 is ASCII"),
        etag,
        html: html.into(),
    }
});

/// The page under `root`, which is empty or begins with a slash and ends without one. The page finds the API beside
/// itself, whether or not its own address ends with a slash and whatever a proxy put before it.
pub(crate) fn routes(root: &str) -> Router {
    let mut router = Router::new().without_v07_checks().route("/", get(answer));
    if !root.is_empty() {
        router = router.route(root, get(answer)).route(&format!("{root}/"), get(answer));
    }
    router
}

async fn answer(request: HeaderMap) -> Response {
    let page = &*PAGE;
    let seen = request.get_all(header::IF_NONE_MATCH).iter();
    let unchanged = seen.filter_map(|tags| tags.to_str().ok()).any(|tags| tags.contains(&page.etag));
    let headers = [
        (header::CONTENT_SECURITY_POLICY, page.policy.clone()),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        // Browsers that do not know `frame-ancestors`.
        (header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
        (HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("same-origin")),
        // Kept, but asked about each time: another version of the server may stand behind the same address.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::ETAG, page.etag_header.clone()),
    ];
    if unchanged {
        return (StatusCode::NOT_MODIFIED, headers).into_response();
    }
    let content_type = HeaderValue::from_static("text/html; charset=utf-8");
    (headers, [(header::CONTENT_TYPE, content_type)], page.html.clone()).into_response()
}

/// Nothing but the page's own style and script, requests to this server, and the icon in the page itself. Trusted types
/// without a policy: no text can become HTML or script.
fn policy() -> String {
    let (style, script) = (sha256_base64(STYLE.as_bytes()), sha256_base64(SCRIPT.as_bytes()));
    format!(
        "default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; \
         img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; \
         require-trusted-types-for 'script'; trusted-types 'none'"
    )
}

/// SHA-256 by way of the TLS library, which is here anyway.
pub(crate) fn sha256_base64(data: &[u8]) -> String {
    let suite = TLS13_AES_128_GCM_SHA256.tls13().expect("a suite of TLS 1.3");
    base64(suite.common.hash_provider.hash(data).as_ref())
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let bits =
            three.iter().zip([16, 8, 0]).fold(0, |bits, (byte, shift)| bits | (u32::from(*byte) << shift));
        for digit in 0..4 {
            let padding = digit > three.len();
            let value = (bits >> (18 - 6 * digit)) & 63;
            text.push(if padding { '=' } else { char::from(DIGITS[value as usize]) });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request;
    use http_body_util::BodyExt as _;
    use tower::ServiceExt as _;

    use super::*;

    async fn fetch(root: &str, path: &str, etag: Option<&str>) -> (StatusCode, HeaderMap, String) {
        let mut request = Request::get(path);
        if let Some(etag) = etag {
            request = request.header(header::IF_NONE_MATCH, etag);
        }
        let response = routes(root).oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (parts.status, parts.headers, String::from_utf8(body.to_vec()).unwrap())
    }

    /// What stands between the only `<tag …>` and the only `</tag>`.
    fn only<'a>(html: &'a str, tag: &str) -> &'a str {
        let (open, close) = (format!("<{tag}"), format!("</{tag}>"));
        assert_eq!((html.matches(&open).count(), html.matches(&close).count()), (1, 1), "{tag}");
        let (_, rest) = html.split_once(&open).unwrap();
        let (_, rest) = rest.split_once('>').unwrap();
        rest.split_once(&close).unwrap().0
    }

    #[test]
    fn hashes_are_sha256_in_base64() {
        // FIPS 180-4's example, and RFC 4648's.
        assert_eq!(sha256_base64(b"abc"), "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=");
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[tokio::test]
    async fn the_policy_allows_what_is_in_the_page_and_nothing_else() {
        let (status, headers, html) = fetch("", "/", None).await;
        assert_eq!(status, 200);
        let policy = headers[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        let directives: Vec<&str> = policy.split("; ").collect();
        for (kind, tag) in [("script-src", "script"), ("style-src", "style")] {
            let text = only(&html, tag);
            assert!(text.len() > 1000, "{tag} is in the page");
            let allowed = format!("{kind} 'sha256-{}'", sha256_base64(text.as_bytes()));
            assert!(directives.contains(&allowed.as_str()), "{policy}");
        }
        for directive in [
            "default-src 'none'",
            "connect-src 'self'",
            "img-src data:",
            "frame-ancestors 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
        ] {
            assert!(directives.contains(&directive), "{policy}");
        }
        assert!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");
        for (name, value) in [
            ("content-type", "text/html; charset=utf-8"),
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
            ("cache-control", "no-cache"),
        ] {
            assert_eq!(headers[name], value);
        }
    }

    #[tokio::test]
    async fn the_page_holds_all_it_needs_and_what_the_policy_would_forbid_is_not_there() {
        let (_, _, html) = fetch("", "/", None).await;
        let markup = html.replace(only(&html, "script"), "").replace(only(&html, "style"), "");
        for forbidden in
            [" src=", " style=", " onclick=", " onload=", "javascript:", "<iframe", "<base", "@import"]
        {
            assert!(!markup.contains(forbidden), "{forbidden}");
        }
        // Model output becomes text, never markup.
        for sink in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("] {
            assert!(!html.contains(sink), "{sink}");
        }
        for kept in ["localStorage", "sessionStorage", "indexedDB", ".cookie"] {
            assert!(!html.contains(kept), "{kept}");
        }
    }

    #[tokio::test]
    async fn an_unchanged_page_is_not_sent_again() {
        let (_, headers, html) = fetch("", "/", None).await;
        let etag = headers[header::ETAG].to_str().unwrap();
        for tags in [etag.to_owned(), format!("\"other\", W/{etag}")] {
            let (status, headers, body) = fetch("", "/", Some(&tags)).await;
            assert_eq!((status, body.as_str()), (StatusCode::NOT_MODIFIED, ""));
            assert_eq!(headers[header::ETAG], etag);
            assert!(headers.contains_key(header::CONTENT_SECURITY_POLICY));
        }
        let (status, _, body) = fetch("", "/", Some("\"other\"")).await;
        assert_eq!((status, body), (StatusCode::OK, html));
    }

    #[tokio::test]
    async fn it_answers_under_the_root_path_with_and_without_a_slash() {
        for (path, status) in
            [("/", 200), ("/proxy/models/main", 200), ("/proxy/models/main/", 200), ("/proxy/models", 404)]
        {
            assert_eq!(fetch("/proxy/models/main", path, None).await.0, status, "{path}");
        }
    }
}
