//! What administrators may change: the prefix cache. Must not be reachable without an administrator's key.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::app::App;
use crate::error::ApiError;

/// The engine looks between two steps; one that takes longer is stuck.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Answers `/flush_cache`.
pub(crate) async fn flush_cache(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let (answer, flushed) = oneshot::channel();
    let engine = app.engine.clone();
    // A thread of its own: those that read prompts are few, and an engine that is stuck would hold them.
    std::thread::spawn(move || {
        // Whoever asked may have left.
        let _ = answer.send(engine.flush_prefix_cache());
    });
    match timeout(TIMEOUT, flushed).await {
        Ok(Ok(freed)) => {
            let freed_blocks = freed?;
            tracing::info!(freed_blocks, "the prefix cache was flushed");
            Ok(Json(json!({ "freed_blocks": freed_blocks })))
        }
        Ok(Err(_)) => Err(ApiError::internal("flushing the prefix cache failed")),
        Err(_) => {
            let message =
                format!("no step ended within {} s; the cache is flushed after it", TIMEOUT.as_secs());
            Err(ApiError::unavailable("engine_busy", message, TIMEOUT))
        }
    }
}
