//! Whether requests can be served: the engine's status, whether its steps still end, whether the server is stopping.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use r1_engine::{Handle, Stats, Status};
use serde::Serialize;

#[derive(Serialize)]
#[serde(tag = "status", rename_all = "lowercase")]
enum Health {
    Ready,
    Loading { progress: f32, eta_s: Option<u64> },
    Draining,
    Stuck { no_step_for_s: u64 },
    Failed { error: String },
    Stopped,
}

/// Notices an engine that has work and ends no step. It sees the engine only when it is asked, so it needs two
/// questions `stuck_after` apart.
pub(crate) struct StuckWatch {
    stuck_after: Duration,
    /// Steps counted when the engine was first seen busy with them, and when that was.
    busy_since: Mutex<Option<(u64, Instant)>>,
}

impl StuckWatch {
    pub(crate) fn new(stuck_after: Duration) -> Self {
        Self { stuck_after, busy_since: Mutex::new(None) }
    }

    /// For how long no step has ended, once that is too long.
    fn stuck_for(&self, stats: &Stats, now: Instant) -> Option<Duration> {
        let mut busy_since = self.busy_since.lock().unwrap_or_else(PoisonError::into_inner);
        if stats.running + stats.waiting == 0 {
            *busy_since = None;
            return None;
        }
        match *busy_since {
            Some((steps, since)) if steps == stats.steps_total => {
                Some(now.saturating_duration_since(since)).filter(|silent| *silent >= self.stuck_after)
            }
            _ => {
                *busy_since = Some((stats.steps_total, now));
                None
            }
        }
    }
}

/// Answers `/health`.
pub(crate) fn answer(engine: &Handle, draining: bool, watch: &StuckWatch) -> Response {
    let health = match engine.status() {
        Status::Failed(error) => Health::Failed { error },
        Status::Stopped => Health::Stopped,
        _ if draining => Health::Draining,
        Status::Loading { progress, elapsed } => {
            Health::Loading { progress, eta_s: eta_s(progress, elapsed) }
        }
        Status::Ready => match watch.stuck_for(&engine.stats(), Instant::now()) {
            Some(silent) => Health::Stuck { no_step_for_s: silent.as_secs() },
            None => Health::Ready,
        },
    };
    let status =
        if matches!(health, Health::Ready) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut response = (status, Json(&health)).into_response();
    if let Health::Loading { eta_s, .. } = health {
        response.headers_mut().insert(header::RETRY_AFTER, retry_after(eta_s));
    }
    response
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
    fn only_work_without_steps_counts_as_stuck() {
        let watch = StuckWatch::new(Duration::from_secs(10));
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let stats = |running, steps_total| Stats { running, steps_total, ..Stats::default() };
        assert_eq!(watch.stuck_for(&stats(0, 5), at(0)), None);
        assert_eq!(watch.stuck_for(&stats(1, 5), at(1000)), None, "just became busy");
        assert_eq!(watch.stuck_for(&stats(1, 6), at(1020)), None, "a step ended");
        assert_eq!(watch.stuck_for(&stats(1, 6), at(1029)), None);
        assert_eq!(watch.stuck_for(&stats(1, 6), at(1030)), Some(Duration::from_secs(10)));
        assert_eq!(watch.stuck_for(&stats(0, 6), at(1031)), None, "idle again");
    }

    #[test]
    fn eta_follows_progress() {
        assert_eq!(eta_s(0.0, Duration::from_secs(9)), None);
        assert_eq!(eta_s(0.25, Duration::from_secs(10)), Some(30));
        assert_eq!(loading_retry_after(0.001, Duration::from_secs(10)), Duration::from_mins(1));
    }
}
