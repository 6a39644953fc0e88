//! Accepts connections until the server is asked to stop, then lets running requests finish. Must not know any endpoint.

use std::convert::Infallible;
use std::future::Future;
use std::io::ErrorKind;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use r1_engine::Handle;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout_at};

use crate::app::App;
use crate::config::{ServedModel, ServerConfig};
use crate::connection::{self, Patience, Stopping};
use crate::tls::Tls;
use crate::{health, routes};

/// How often recorded samples are folded into their histograms.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);
/// How long connections may take beyond the shutdown timeout to hand over what was written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// The system is out of something, mostly file descriptors; a while later a connection has given one back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// Serves on `listener` until `shutdown` resolves.
///
/// Then `/health` answers 503, new requests are refused with 503, and running ones may finish within
/// `config.shutdown_timeout`; whatever still runs after that ends with an error event. The engine is left running.
///
/// # Panics
/// When `model` has no name.
pub async fn serve(
    listener: TcpListener,
    config: ServerConfig,
    model: ServedModel,
    engine: Handle,
    shutdown: impl Future<Output = ()> + Send,
) {
    let shutdown_timeout = config.shutdown_timeout;
    let app = Arc::new(App::new(config, model, engine));
    let (stopping, stop) = watch::channel(Stopping::No);
    let (alive, mut closed) = mpsc::channel(1);
    let connections = Connections {
        tls: app.config.tls.clone(),
        router: routes::build(app.clone()),
        patience: patience(&app.config),
        stop,
        alive,
    };
    let mut accepting = Box::pin(accept(listener, connections));
    let mut housekeeping = pin!(housekeeping(&app));
    let mut shutdown = pin!(shutdown);
    tokio::select! {
        never = &mut accepting => match never {},
        never = &mut housekeeping => match never {},
        () = &mut shutdown => {}
    }

    tracing::info!(timeout_s = shutdown_timeout.as_secs_f64(), "shutting down: waiting for running requests");
    app.drain.begin();
    // Connections that wait for a request close now; those that come are told that the server is stopping.
    stopping.send_replace(Stopping::Draining);
    let deadline = Instant::now() + shutdown_timeout;
    tokio::select! {
        never = &mut accepting => match never {},
        never = &mut housekeeping => match never {},
        drained = timeout_at(deadline, app.drain.idle()) => if drained.is_err() {
            tracing::warn!("running requests are cut off: the shutdown timeout is over");
            app.drain.cut();
        }
    }
    drop(accepting);
    stopping.send_replace(Stopping::Closing);
    // Connections with nothing left to say end by themselves, whatever still comes in on them; those that do not take
    // their last bytes are dropped with the runtime.
    let _ = timeout_at(deadline + FLUSH_TIMEOUT, closed.recv()).await;
}

fn patience(config: &ServerConfig) -> Patience {
    Patience {
        handshake: config.handshake_timeout,
        idle: config.idle_timeout,
        header: config.header_timeout,
        write: config.write_timeout,
        ping_interval: config.ping_interval,
    }
}

/// What happens beside the requests.
async fn housekeeping(app: &App) -> Infallible {
    let upkeep = async {
        let mut upkeep = interval(METRICS_UPKEEP);
        upkeep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            upkeep.tick().await;
            app.metrics.upkeep();
        }
    };
    tokio::select! {
        never = upkeep => never,
        never = health::watch(&app.engine, app.config.watchdog_timeout) => never,
    }
}

/// What every connection gets.
struct Connections {
    tls: Option<Tls>,
    router: Router,
    patience: Patience,
    stop: watch::Receiver<Stopping>,
    /// Held by each connection, so that the last one's end is noticed.
    alive: mpsc::Sender<Infallible>,
}

async fn accept(listener: TcpListener, connections: Connections) -> Infallible {
    let Connections { tls, router, patience, stop, alive } = connections;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let serving = connection::serve(stream, tls.clone(), router.clone(), patience, stop.clone());
                let alive = alive.clone();
                tokio::spawn(async move {
                    serving.await;
                    drop(alive);
                });
            }
            // The client left while it waited.
            Err(error)
                if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset) => {}
            Err(error) => {
                tracing::error!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
