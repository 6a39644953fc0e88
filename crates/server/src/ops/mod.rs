//! Endpoints beside generation: tokens, facts about the server, the probe that generates, the API's description. Each file
//! is one family; this one says where they answer and who may call them. Must not know how replies are generated.

mod admin;
mod health_generate;
mod info;
mod tokenize;

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router, middleware};
use serde::Serialize;

use crate::access::RequestLog;
use crate::app::App;
use crate::error::ApiError;
use crate::ops::health_generate::Probe;
use crate::{auth, openapi, routes};

/// Adds nothing but these endpoints, under each of `prefixes`.
pub(crate) fn routes(app: &Arc<App>, prefixes: &BTreeSet<String>) -> Router<Arc<App>> {
    let mut open = Router::new().without_v07_checks();
    let mut keyed = Router::new().without_v07_checks();
    let probe = Arc::new(Probe::default());
    let document = openapi::document(app);
    for at in prefixes {
        open = open.route(
            &format!("{at}/health_generate"),
            get(health_generate::get).layer(Extension(probe.clone())),
        );
        if app.config.docs {
            open = open.merge(openapi::routes(&document, at));
        }
        keyed = keyed
            .route(&format!("{at}/tokenize"), post(post_tokenize))
            .route(&format!("{at}/detokenize"), post(post_detokenize))
            .route(&format!("{at}/get_model_info"), get(info::get_model))
            .route(&format!("{at}/model_info"), get(info::get_model))
            .route(&format!("{at}/get_server_info"), get(info::get_server))
            .route(&format!("{at}/server_info"), get(info::get_server));
    }
    let keyed = keyed.route_layer(middleware::from_fn_with_state(app.clone(), auth::require_key));
    let mut all = open.merge(keyed);
    // Without a key for them they are not there.
    if !app.config.admin_keys.is_empty() {
        let mut admin = Router::new().without_v07_checks();
        for at in prefixes {
            let flush = get(admin::flush_cache).post(admin::flush_cache);
            admin = admin.route(&format!("{at}/flush_cache"), flush);
        }
        all = all.merge(admin.route_layer(middleware::from_fn_with_state(app.clone(), auth::require_admin)));
    }
    all
}

async fn post_tokenize(
    State(app): State<Arc<App>>,
    Extension(log): Extension<Arc<RequestLog>>,
    request: Request,
) -> Result<Response, ApiError> {
    off_thread(app, log, request, tokenize::tokenize).await
}

async fn post_detokenize(
    State(app): State<Arc<App>>,
    Extension(log): Extension<Arc<RequestLog>>,
    request: Request,
) -> Result<Response, ApiError> {
    off_thread(app, log, request, tokenize::detokenize).await
}

/// Reads the body and answers it with what `work` makes of it, where arithmetic holds nobody up.
async fn off_thread<T: Serialize + 'static>(
    app: Arc<App>,
    log: Arc<RequestLog>,
    request: Request,
    work: fn(&App, &[u8]) -> Result<T, ApiError>,
) -> Result<Response, ApiError> {
    let body = routes::read_body(&app.config, request).await?;
    let _active = app.drain.enter().ok_or_else(ApiError::draining)?;
    let shared = app.clone();
    let working = app.counting.run(move || {
        let reply = tracing::debug_span!(parent: &log.span, "tokenize").in_scope(|| work(&shared, &body))?;
        serde_json::to_vec(&reply).map_err(|e| ApiError::internal(format!("the reply is no JSON: {e}")))
    });
    let reply = working.await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], reply).into_response())
}
