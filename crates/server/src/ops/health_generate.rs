//! `/health_generate`: whether a token comes out of the engine now. Must not know the other endpoints.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use r1_core::{SamplingParams, TokenId};
use r1_engine::{Event, Generation, Handle, Request, SubmitError};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout_at};

use crate::app::App;
use crate::health::{self, Health};

/// Without a token for this long the answer is no. A prefill that is under way on a slow device takes seconds.
const TIMEOUT: Duration = Duration::from_secs(20);
/// How often the tokens of others are looked at.
const LOOK: Duration = Duration::from_millis(50);

/// The latest probe. One runs at a time and serves all who asked before it began, so that an endpoint without a key
/// cannot fill the queue.
#[derive(Default)]
pub(crate) struct Probe {
    latest: Mutex<Option<(Instant, Result<(), String>)>>,
}

impl Probe {
    /// Waits for one token, the probe's own or, on an engine that is busy with others, one of theirs.
    async fn run(&self, engine: &Handle, token: TokenId, timeout: Duration) -> Result<(), String> {
        let asked = Instant::now();
        let silent = || format!("no token came within {} s", timeout.as_secs_f64());
        let work = async {
            let mut latest = self.latest.lock().await;
            match &*latest {
                Some((began, outcome)) if *began >= asked => outcome.clone(),
                _ => {
                    let began = Instant::now();
                    let token = timeout_at(began + timeout, any_token(engine, token)).await;
                    let outcome = token.unwrap_or_else(|_| Err(silent()));
                    *latest = Some((began, outcome.clone()));
                    outcome
                }
            }
        };
        // The one before may take as long again.
        timeout_at(asked + timeout * 2, work).await.unwrap_or_else(|_| Err(silent()))
    }
}

async fn any_token(engine: &Handle, token: TokenId) -> Result<(), String> {
    let before = engine.stats().generation_tokens_total;
    let params = SamplingParams { temperature: 0.0, max_tokens: 1, ..SamplingParams::default() };
    let request = Request::new(vec![token], params);
    let own = match engine.submit(request) {
        Ok(generation) => Some(generation),
        Err(SubmitError::QueueFull { .. }) => None,
        Err(error) => return Err(error.to_string()),
    };
    let others = async {
        while engine.stats().generation_tokens_total == before {
            sleep(LOOK).await;
        }
    };
    tokio::select! {
        biased;
        outcome = own_token(own) => outcome,
        () = others => Ok(()),
    }
}

async fn own_token(own: Option<Generation>) -> Result<(), String> {
    let Some(mut own) = own else { return std::future::pending().await };
    loop {
        match own.next().await {
            Some(Event::Scheduled { .. } | Event::PromptLogprobs(_)) => {}
            Some(Event::Token { .. } | Event::Finished(_)) => return Ok(()),
            Some(Event::Failed(error)) => return Err(error.to_string()),
            None => return Err("the engine gave no token".to_owned()),
        }
    }
}

/// Answers `/health_generate`.
pub(crate) async fn get(State(app): State<Arc<App>>, Extension(probe): Extension<Arc<Probe>>) -> Response {
    let status = health::of(&app.engine, app.drain.is_draining(), app.config.watchdog_timeout);
    if !matches!(status, Health::Ready) {
        return status.into_response();
    }
    let token = app.model.tokenizer.bos().unwrap_or(TokenId(0));
    match probe.run(&app.engine, token, TIMEOUT).await {
        Ok(()) => Health::Ready.into_response(),
        Err(error) => Health::Failed { error }.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use r1_core::FinishReason;
    use r1_engine::{Command, EngineInfo, Inbox, Stats, Status};

    use super::*;

    const SHORT: Duration = Duration::from_millis(200);

    fn engine(max_queued: usize) -> (Handle, Inbox) {
        let (handle, inbox) = Handle::channel(EngineInfo {
            max_model_len: 64,
            vocab_size: 8,
            max_num_seqs: 1,
            max_queued,
            max_unread_tokens: 8,
        });
        inbox.set_status(Status::Ready);
        (handle, inbox)
    }

    #[tokio::test]
    async fn a_token_is_health_and_silence_is_not() {
        let (handle, _inbox) = engine(8);
        let silent = Probe::default().run(&handle, TokenId(1), SHORT).await.unwrap_err();
        assert!(silent.contains("0.2 s"), "{silent}");
        let (handle, inbox) = engine(8);
        std::thread::spawn(move || {
            while let Some(command) = inbox.wait() {
                if let Command::Submit { events, .. } = command {
                    events.send(Event::Token { token: TokenId(2), logprobs: None });
                    events.end(Event::Finished(FinishReason::Length));
                    inbox.ended(1);
                }
            }
        });
        let probe = Probe::default();
        let asking = (0..50).map(|_| probe.run(&handle, TokenId(1), TIMEOUT));
        let outcomes = futures_util::future::join_all(asking).await;
        assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    }

    #[tokio::test]
    async fn a_crowd_costs_two_probes_and_others_tokens_count() {
        let (handle, inbox) = engine(0);
        let _running = handle.submit(Request::new(vec![TokenId(1)], SamplingParams::default()));
        let probe = Probe::default();
        let silent = probe.run(&handle, TokenId(1), SHORT).await.unwrap_err();
        assert!(silent.contains("no token came"), "a full queue that does not move: {silent}");
        let moving = async {
            sleep(Duration::from_millis(20)).await;
            inbox.set_stats(Stats { generation_tokens_total: 1, ..Stats::default() });
        };
        let (outcome, ()) = tokio::join!(probe.run(&handle, TokenId(1), TIMEOUT), moving);
        assert_eq!(outcome, Ok(()), "others get tokens");

        let (handle, inbox) = engine(64);
        let probe = Probe::default();
        let asking = (0..50).map(|_| probe.run(&handle, TokenId(1), SHORT));
        let outcomes = futures_util::future::join_all(asking).await;
        assert!(outcomes.iter().all(Result::is_err));
        let submitted = std::iter::from_fn(|| inbox.poll()).filter(|c| matches!(c, Command::Submit { .. }));
        assert_eq!(submitted.count(), 2);
    }
}
