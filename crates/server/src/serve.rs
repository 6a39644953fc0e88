//! Runs the server until it is asked to stop, then lets running requests finish. Must not know any endpoint.

use std::future::{Future, IntoFuture};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use r1_engine::Handle;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use crate::app::App;
use crate::config::{ServedModel, ServerConfig};
use crate::routes;

/// How often recorded samples are folded into their histograms.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);
/// How long connections may take beyond the shutdown timeout to hand over what was written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Serves on `listener` until `shutdown` resolves.
///
/// Then `/health` answers 503, new requests are refused with 503, and running ones may finish within
/// `config.shutdown_timeout`; whatever still runs after that ends with an error event. The engine is left running.
///
/// # Errors
/// When the listener fails.
///
/// # Panics
/// When `model` has no name.
pub async fn serve(
    listener: TcpListener,
    config: ServerConfig,
    model: ServedModel,
    engine: Handle,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let shutdown_timeout = config.shutdown_timeout;
    let app = Arc::new(App::new(config, model, engine));
    let (close, closed) = oneshot::channel::<()>();
    let server = axum::serve(listener, routes::build(app.clone())).with_graceful_shutdown(async move {
        let _ = closed.await;
    });
    let mut server = pin!(server.into_future());
    let mut shutdown = pin!(shutdown);
    let mut upkeep = interval(METRICS_UPKEEP);
    upkeep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            ended = &mut server => return ended,
            () = &mut shutdown => break,
            _ = upkeep.tick() => app.metrics.upkeep(),
        }
    }

    tracing::info!(timeout_s = shutdown_timeout.as_secs(), "shutting down: waiting for running requests");
    app.drain.begin();
    let deadline = Instant::now() + shutdown_timeout;
    tokio::select! {
        ended = &mut server => return ended,
        drained = timeout_at(deadline, app.drain.idle()) => if drained.is_err() {
            tracing::warn!("running requests are cut off: the shutdown timeout is over");
            app.drain.cut();
        }
    }
    drop(close);
    // Connections that do not take their last bytes are dropped with the runtime.
    timeout_at(deadline + FLUSH_TIMEOUT, server).await.unwrap_or(Ok(()))
}
