//! Paths and their handlers. Must not know how a reply is made.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, Method, Uri, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use http_body_util::BodyExt;
use r1_engine::Handle;
use serde_json::json;
use tokio::time::{Instant, timeout, timeout_at};

use crate::access::{self, RequestLog};
use crate::app::App;
use crate::auth;
use crate::config::{ServedModel, ServerConfig};
use crate::convert;
use crate::cors;
use crate::error::ApiError;
use crate::health;
use crate::messages;
use crate::ops;
use crate::page;
use crate::reply::{self, Reply};
use crate::responses;
use crate::sse::{self, StreamLimits};
use crate::types::models::{ModelCard, ModelList};

/// The routes without a listener, for tests and for embedding. See [`serve`](crate::serve()) for the server.
///
/// # Panics
/// When `model` has no name.
pub fn router(config: ServerConfig, model: ServedModel, engine: Handle) -> Router {
    build(Arc::new(App::new(config, model, engine)))
}

pub(crate) fn build(app: Arc<App>) -> Router {
    // Without the checks a root path such as `/:a` is taken as it stands.
    let mut open = Router::new().without_v07_checks();
    let mut keyed = Router::new().without_v07_checks();
    for at in prefixes(&app.config.root_path) {
        open = open
            .route(&format!("{at}/health"), get(get_health))
            .route(&format!("{at}/ping"), get(get_health).post(get_health))
            .route(&format!("{at}/metrics"), get(get_metrics))
            .route(&format!("{at}/version"), get(get_version));
        keyed = keyed
            .route(&format!("{at}/chat/completions"), post(post_chat))
            .route(&format!("{at}/completions"), post(post_completion))
            .route(&format!("{at}/messages"), post(post_messages))
            .route(&format!("{at}/messages/count_tokens"), post(messages::count_tokens))
            .route(&format!("{at}/models"), get(get_models))
            .route(&format!("{at}/models/{{*id}}"), get(get_model));
        keyed = responses::routes(keyed, &at);
    }
    let keyed = keyed.route_layer(middleware::from_fn_with_state(app.clone(), auth::require_key));
    let cors = cors::layer(&app.config);
    let mut router = open
        .merge(keyed)
        .merge(ops::routes(&app, &prefixes(&app.config.root_path)))
        .fallback_service(
            page::routes(&root(&app.config.root_path))
                .fallback(unknown_path)
                .method_not_allowed_fallback(wrong_method),
        )
        .method_not_allowed_fallback(wrong_method)
        .with_state(app.clone());
    if let Some(cors) = cors {
        router = router.layer(cors);
    }
    let anthropic = messages::AnthropicPaths::new(&prefixes(&app.config.root_path));
    router
        .layer(middleware::from_fn_with_state(app, access::log_request))
        .layer(middleware::from_fn_with_state(anthropic, messages::reword))
}

/// Where every route answers. Proxies strip the root path or leave it; clients know the API with `/v1` or without.
fn prefixes(root_path: &str) -> BTreeSet<String> {
    let root = root(root_path);
    BTreeSet::from([String::new(), "/v1".to_owned(), root.clone(), format!("{root}/v1")])
}

/// The root path as routes begin with it.
fn root(root_path: &str) -> String {
    // Braces are parameters to axum; in a URL's path they travel encoded, and paths are matched as they travel.
    let trimmed = root_path.trim_matches('/').replace('{', "%7B").replace('}', "%7D");
    if trimmed.is_empty() { trimmed } else { format!("/{trimmed}") }
}

async fn unknown_path(method: Method, uri: Uri) -> ApiError {
    ApiError::unknown_path(method.as_str(), uri.path())
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::wrong_method(method.as_str(), uri.path())
}

async fn get_health(State(app): State<Arc<App>>) -> Response {
    health::answer(&app.engine, app.drain.is_draining(), app.config.watchdog_timeout)
}

async fn get_metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    const TEXT_FORMAT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, TEXT_FORMAT)], app.metrics.render(&app.engine.stats()))
}

async fn get_version() -> impl IntoResponse {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

fn card<'a>(app: &'a App, id: &'a str) -> ModelCard<'a> {
    ModelCard {
        id,
        object: "model",
        created: app.started_unix_s,
        owned_by: "r1-serve",
        root: &app.model.names[0],
        parent: None,
        max_model_len: app.engine.info().max_model_len,
    }
}

async fn get_models(State(app): State<Arc<App>>) -> Response {
    let data = app.model.names.iter().map(|name| card(&app, name)).collect();
    Json(ModelList { object: "list", data }).into_response()
}

async fn get_model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    match app.model.names.iter().find(|name| **name == id) {
        Some(name) => Ok(Json(card(&app, name)).into_response()),
        None => Err(ApiError::unknown_model(&id, &app.model.names)),
    }
}

async fn post_chat(
    State(app): State<Arc<App>>,
    Extension(log): Extension<Arc<RequestLog>>,
    request: Request,
) -> Result<Response, ApiError> {
    generate(app, log, request, convert::chat).await
}

async fn post_completion(
    State(app): State<Arc<App>>,
    Extension(log): Extension<Arc<RequestLog>>,
    request: Request,
) -> Result<Response, ApiError> {
    generate(app, log, request, convert::completion).await
}

async fn post_messages(
    State(app): State<Arc<App>>,
    Extension(log): Extension<Arc<RequestLog>>,
    request: Request,
) -> Result<Response, ApiError> {
    generate(app, log, request, messages::convert).await
}

/// The way of every generating request: read, convert and constrain off the async threads, submit, then stream or collect. `convert` is
/// given the request's id and its body.
pub(crate) async fn generate(
    app: Arc<App>,
    log: Arc<RequestLog>,
    request: Request,
    convert: impl FnOnce(&Arc<App>, &str, &[u8]) -> Result<convert::Job, ApiError> + Send + 'static,
) -> Result<Response, ApiError> {
    let limit = app.config.request_timeout;
    let deadline = limit.map(|limit| (Instant::from_std(log.received) + limit, limit));
    let body_read = AtomicBool::new(false);
    let answering = answer(app, log.clone(), request, &body_read, convert, deadline);
    let Some((deadline, limit)) = deadline else { return answering.await };
    let mut answering = pin!(answering);
    if let Ok(answer) = timeout_at(deadline, &mut answering).await {
        return answer;
    }
    tracing::warn!("a request is aborted: the request timeout is over");
    // What was begun is dropped with this function, which aborts it.
    log.broken_off.store(true, Ordering::Relaxed);
    let mut error = ApiError::request_timeout(limit);
    error.body_left = !body_read.load(Ordering::Relaxed);
    Err(error)
}

async fn answer(
    app: Arc<App>,
    log: Arc<RequestLog>,
    request: Request,
    body_read: &AtomicBool,
    convert: impl FnOnce(&Arc<App>, &str, &[u8]) -> Result<convert::Job, ApiError> + Send + 'static,
    deadline: Option<(Instant, Duration)>,
) -> Result<Response, ApiError> {
    let body = read_body(&app.config, request).await?;
    body_read.store(true, Ordering::Relaxed);
    let active = app.drain.enter().ok_or_else(ApiError::draining)?;
    app.require_ready()?;
    // Before the work of reading the prompt, which under overload is what those who are served would wait for.
    app.engine.check_room()?;
    let converting = {
        let (app, log) = (app.clone(), log.clone());
        tokio::task::spawn_blocking(move || {
            tracing::debug_span!(parent: &log.span, "tokenize").in_scope(|| convert(&app, &log.id, &body))
        })
    };
    let job = converting.await.map_err(|error| ApiError::unread(&error))??;
    let convert::Job { run, render, model, stream } = job;
    let run = constrain(&app, &log, run).await?;
    log.span.record("model", &model);
    log.model.get_or_init(|| model);
    let ServerConfig { ping_interval, write_timeout, .. } = app.config;
    let reply = Reply::start(&app, log, run, active)?;
    if stream {
        Ok(sse::stream(reply, render, StreamLimits { ping_interval, write_timeout, deadline }))
    } else {
        reply::collect(reply, render).await
    }
}

/// Compiles the rules of a request that has any. Soon after the start that waits until the tables of the grammars are there, and
/// keeps no thread from other requests meanwhile.
async fn constrain(
    app: &App,
    log: &Arc<RequestLog>,
    mut run: convert::Run,
) -> Result<convert::Run, ApiError> {
    let Some(rules) = run.rules.take() else { return Ok(run) };
    let grammars = app.model.grammars.get().await.map_err(|why| {
        ApiError::internal(format!("the grammars of this model could not be prepared: {why}"))
    })?;
    let log = log.clone();
    let compiling = tokio::task::spawn_blocking(move || {
        tracing::debug_span!(parent: &log.span, "constrain").in_scope(|| rules.constraint(&grammars))
    });
    if let Some(constraint) = compiling.await.map_err(|error| ApiError::unread(&error))?? {
        run.constrain(&constraint);
    }
    Ok(run)
}

pub(crate) async fn read_body(config: &ServerConfig, request: Request) -> Result<Vec<u8>, ApiError> {
    let max = config.max_body_bytes;
    let body = request.into_body();
    if body.size_hint().lower() > max as u64 {
        return Err(ApiError::body_too_large(max));
    }
    let read = timeout(config.body_timeout, gather(body, max)).await;
    read.unwrap_or_else(|_| Err(ApiError::body_timeout(config.body_timeout)))
}

/// Copies as it reads: chunks may hold a byte each, and kept they would cost far more than that.
async fn gather(mut body: Body, max: usize) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::with_capacity(body.size_hint().lower() as usize);
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|e| ApiError::bad_request(format!("the request's body could not be read: {e}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if data.len() > max - bytes.len() {
            return Err(ApiError::body_too_large(max));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}
