//! What every request handler shares. Must not know any endpoint.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use r1_engine::{Handle, Status};
use serde_json::{Map, Value};

use crate::access::random_u64;
use crate::config::{ServedModel, ServerConfig};
use crate::counting::Counting;
use crate::drain::Drain;
use crate::error::ApiError;
use crate::health;
use crate::metrics::Metrics;
use crate::responses::Store;

pub(crate) struct App {
    pub(crate) config: ServerConfig,
    pub(crate) model: ServedModel,
    pub(crate) engine: Handle,
    pub(crate) metrics: Metrics,
    pub(crate) drain: Drain,
    /// Bounds what counts tokens without a reply.
    pub(crate) counting: Counting,
    /// Responses that can be read again and continued.
    pub(crate) responses: Store,
    /// Seeds given out to requests that bring none.
    num_seeds: AtomicU64,
    /// When the server started, in Unix seconds: the models' `created`.
    pub(crate) started_unix_s: u64,
}

impl App {
    /// # Panics
    /// When the model has no name.
    pub(crate) fn new(config: ServerConfig, model: ServedModel, engine: Handle) -> Self {
        let name = model.names.first().expect("a served model has at least one name");
        Self {
            metrics: Metrics::new(name),
            drain: Drain::new(),
            counting: Counting::new(),
            responses: Store::new(config.max_stored_responses),
            num_seeds: AtomicU64::new(0),
            started_unix_s: unix_s(),
            config,
            model,
            engine,
        }
    }

    /// The name that a reply carries: the requested one where it is served, else the first.
    pub(crate) fn reply_name(&self, requested: Option<&str>) -> Result<String, ApiError> {
        let served = &self.model.names;
        match requested {
            Some(name) if served.iter().any(|s| s == name) => Ok(name.to_owned()),
            Some(name) if self.config.strict_model_name => Err(ApiError::unknown_model(name, served)),
            _ => Ok(served[0].clone()),
        }
    }

    /// Variables for the chat template: a request's own, over the configured ones.
    pub(crate) fn template_kwargs(&self, asked: Map<String, Value>) -> Map<String, Value> {
        let mut kwargs = self.config.default_template_kwargs.clone();
        kwargs.extend(asked);
        kwargs
    }

    /// A seed for a request that brings none: the next one from the configured seed on, else a random one.
    pub(crate) fn next_seed(&self) -> u64 {
        match self.config.seed {
            Some(seed) => seed.wrapping_add(self.num_seeds.fetch_add(1, Ordering::Relaxed)),
            None => random_u64(),
        }
    }

    /// Refuses requests while the model loads or after the engine died, before their prompts are tokenized.
    pub(crate) fn require_ready(&self) -> Result<(), ApiError> {
        match self.engine.status() {
            Status::Ready => Ok(()),
            Status::Loading { progress, elapsed } => {
                let message = format!("the model is still loading ({:.0}%)", progress * 100.0);
                Err(ApiError::unavailable("loading", message, health::loading_retry_after(progress, elapsed)))
            }
            Status::Failed(why) => Err(r1_engine::SubmitError::NotRunning(why).into()),
            Status::Stopped => Err(r1_engine::SubmitError::NotRunning("it was asked to stop".into()).into()),
        }
    }
}

pub(crate) fn unix_s() -> u64 {
    // A clock before 1970 is not worth failing a reply for.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
