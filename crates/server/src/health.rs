//! Whether requests can be served: the engine's status, whether its steps still end, whether the server is stopping.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use r1_engine::{Handle, Status};
use serde::Serialize;
use tokio::time::{MissedTickBehavior, interval};

/// The watch looks this often at most and at least.
const WATCH_OFTEN: Duration = Duration::from_millis(10);
const WATCH_SELDOM: Duration = Duration::from_secs(1);

/// What `/health` says.
#[derive(Serialize)]
#[serde(tag = "status", rename_all = "lowercase")]
pub(crate) enum Health {
    Ready,
    Loading { progress: f32, eta_s: Option<u64> },
    Draining,
    Stuck { no_step_for_s: u64 },
    Failed { error: String },
    Stopped,
}

/// For how long the engine has had work without ending a step, once that is too long.
fn stuck_for(engine: &Handle, watchdog_timeout: Duration) -> Option<Duration> {
    engine.silent_for().filter(|silent| *silent >= watchdog_timeout)
}

/// Logs when the engine gets stuck and when it goes on, whether or not anybody asks for `/health`. Never ends.
pub(crate) async fn watch(engine: &Handle, watchdog_timeout: Duration) -> Infallible {
    let mut stuck = false;
    let mut looks = interval((watchdog_timeout / 4).clamp(WATCH_OFTEN, WATCH_SELDOM));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let silent = stuck_for(engine, watchdog_timeout);
        if silent.is_some() == stuck {
            continue;
        }
        stuck = silent.is_some();
        match silent {
            Some(silent) => tracing::error!(
                no_step_for_s = silent.as_secs_f64(),
                "the engine is stuck: work waits and no step ends; /health is 503"
            ),
            None if matches!(engine.status(), Status::Ready) => {
                tracing::info!("the engine is no longer stuck");
            }
            None => tracing::error!("the stuck engine has ended"),
        }
    }
}

/// Answers `/health`.
pub(crate) fn answer(engine: &Handle, draining: bool, watchdog_timeout: Duration) -> Response {
    of(engine, draining, watchdog_timeout).into_response()
}

/// Whether requests can be served now.
pub(crate) fn of(engine: &Handle, draining: bool, watchdog_timeout: Duration) -> Health {
    match engine.status() {
        Status::Failed(error) => Health::Failed { error },
        Status::Stopped => Health::Stopped,
        _ if draining => Health::Draining,
        Status::Loading { progress, elapsed } => {
            Health::Loading { progress, eta_s: eta_s(progress, elapsed) }
        }
        Status::Ready => match stuck_for(engine, watchdog_timeout) {
            Some(silent) => Health::Stuck { no_step_for_s: silent.as_secs() },
            None => Health::Ready,
        },
    }
}

impl IntoResponse for Health {
    fn into_response(self) -> Response {
        let status =
            if matches!(self, Self::Ready) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let mut response = (status, Json(&self)).into_response();
        if let Self::Loading { eta_s, .. } = self {
            response.headers_mut().insert(header::RETRY_AFTER, retry_after(eta_s));
        }
        response
    }
}

/// When to come back while the model loads.
pub(crate) fn loading_retry_after(progress: f32, elapsed: Duration) -> Duration {
    Duration::from_secs(eta_s(progress, elapsed).unwrap_or(5).clamp(1, 60))
}

fn retry_after(eta_s: Option<u64>) -> HeaderValue {
    HeaderValue::from(eta_s.unwrap_or(5).clamp(1, 60))
}

/// Assumes that the rest loads as fast as what is loaded did.
fn eta_s(progress: f32, elapsed: Duration) -> Option<u64> {
    let progress = f64::from(progress);
    (progress > 0.0).then(|| (elapsed.as_secs_f64() * (1.0 - progress).max(0.0) / progress).ceil() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eta_follows_progress() {
        assert_eq!(eta_s(0.0, Duration::from_secs(9)), None);
        assert_eq!(eta_s(0.25, Duration::from_secs(10)), Some(30));
        assert_eq!(loading_retry_after(0.001, Duration::from_secs(10)), Duration::from_mins(1));
    }

    /// Lines of the log, levels first.
    #[derive(Clone, Default)]
    struct Lines(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

    impl Lines {
        fn count(&self) -> usize {
            self.0.lock().unwrap().split_inclusive(|byte| *byte == b'\n').count()
        }
    }

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn the_watch_says_once_that_the_engine_is_stuck_and_once_that_it_goes_on() {
        let info = r1_engine::EngineInfo {
            max_model_len: 64,
            vocab_size: 8,
            max_num_seqs: 1,
            max_queued: 1,
            max_unread_tokens: 8,
        };
        let (engine, inbox) = Handle::channel(info);
        inbox.set_status(Status::Ready);
        let request = r1_engine::Request::new(vec![r1_core::TokenId(1)], r1_core::SamplingParams::default());
        let lines = Lines::default();
        let writer = lines.clone();
        let log =
            tracing_subscriber::fmt().with_ansi(false).without_time().with_writer(move || writer.clone());
        let _log = tracing::subscriber::set_default(log.finish());
        let _waiting = engine.submit(request).unwrap();
        let happen = async {
            while lines.count() < 1 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            while lines.count() < 2 {
                inbox.step_ended();
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            never = watch(&engine, Duration::from_secs(1)) => match never {},
            () = happen => {}
            () = tokio::time::sleep(Duration::from_mins(1)) => panic!("{} lines", lines.count()),
        }
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let said: Vec<&str> = text.lines().collect();
        assert!(said.len() == 2, "{text}");
        let levels = said.iter().map(|line| line.split_whitespace().next());
        assert!(levels.eq([Some("ERROR"), Some("INFO")]), "{text}");
        assert!(said[0].contains("the engine is stuck") && said[1].contains("no longer stuck"), "{text}");
    }
}
