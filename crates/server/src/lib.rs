//! OpenAI-compatible HTTP over an engine's handle: types, routes, SSE, auth, errors, health, metrics, drain.
//!
//! A request's way: `routes` reads it, `convert` makes the engine's request of it and holds it to its rules, `reply` runs its choices, `decode` makes
//! text of their tokens, `render` makes OpenAI's JSON of the text, `sse` streams it or `reply::collect` gathers it.
//! Knows nothing of tensors and devices.
#![forbid(unsafe_code)]

mod access;
mod app;
mod auth;
mod config;
mod connection;
mod convert;
mod cors;
mod counting;
mod decode;
mod drain;
mod error;
mod fields;
mod grammars;
mod health;
mod messages;
mod metrics;
mod openapi;
mod ops;
mod page;
mod render;
mod reply;
mod responses;
mod routes;
mod serve;
mod sse;
mod tls;
mod types;

pub use auth::ApiKeys;
pub use config::{
    ConfigError, Cors, CorsRequests, Origin, ReasoningParser, SamplingDefaults, ServedModel, ServerConfig,
    ThinkingBudgets,
};
pub use error::ApiError;
pub use grammars::ServedGrammars;
pub use routes::router;
pub use serve::serve;
#[doc(hidden)]
pub use sse::frames;
pub use tls::Tls;
