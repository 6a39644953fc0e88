//! The chat page among the API's routes: it takes none of their paths and asks for no key.

use axum::http::header;
use r1_server::ServerConfig;
use serde_json::json;

use crate::support::{Engine, get, post};

#[tokio::test]
async fn the_page_needs_no_key_and_leaves_all_else_as_it_is() {
    let config = ServerConfig { api_keys: ["key"].iter().collect(), ..ServerConfig::default() };
    let router = Engine::saying("ok").router(config);
    let page = get(&router, "/").await;
    assert_eq!(page.status, 200);
    assert!(page.text.starts_with("<!doctype html>"));
    assert!(page.headers.contains_key(header::CONTENT_SECURITY_POLICY));
    assert!(page.headers.contains_key("x-request-id"), "it is logged as every request is");
    get(&router, "/v1/models").await.refused(401);
    get(&router, "/index.html").await.refused(404);
    post(&router, "/", &json!({})).await.refused(405);
}

#[tokio::test]
async fn a_root_path_that_is_a_route_stays_that_route() {
    for (root_path, path) in [("/health", "/health"), ("/v1/models", "/v1/models")] {
        let config = ServerConfig { root_path: root_path.into(), ..ServerConfig::default() };
        let router = Engine::saying("ok").router(config);
        let answer = get(&router, path).await;
        assert_eq!((answer.status.as_u16(), answer.text.starts_with('{')), (200, true), "{path}");
        assert_eq!(get(&router, &format!("{root_path}/health")).await.status, 200);
    }
    let config = ServerConfig { root_path: "/odd{id}/:a/*b".into(), ..ServerConfig::default() };
    let router = Engine::saying("ok").router(config);
    for path in ["/odd%7Bid%7D/:a/*b", "/odd%7Bid%7D/:a/*b/"] {
        assert!(get(&router, path).await.text.starts_with("<!doctype html>"), "{path}");
    }
}
