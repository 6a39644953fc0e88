//! What the command line decides about the HTTP side, and what is served. Holds values only.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderValue;
use r1_core::TokenId;
use r1_text::{ChatTemplate, Grammars, Tokenizer, ToolSyntax};

/// How the server behaves.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Path prefix under which every route answers too, as `/proxy/models/main`; empty for none.
    pub root_path: String,
    /// Any of these opens the API; empty means that no key is asked for.
    pub api_keys: Vec<String>,
    /// Which web pages may call the API.
    pub cors: Cors,
    /// Largest accepted body in bytes.
    pub max_body_bytes: usize,
    /// Refuse model names that are not served; otherwise any name means the one model.
    pub strict_model_name: bool,
    /// Seed of the first choice that brings none; each further one gets the next, in the order they are read. `None`:
    /// random ones.
    pub seed: Option<u64>,
    /// Most choices of one request: prompts times `n`.
    pub max_choices: usize,
    /// Most responses of `/v1/responses` that are kept to be read again and continued; 0 keeps none.
    pub max_stored_responses: usize,
    /// How long running requests may go on after the server was asked to stop.
    pub shutdown_timeout: Duration,
    /// How long a request's body may take to arrive.
    pub body_timeout: Duration,
    /// A stream that is silent for this long gets a comment, so that proxies keep it open.
    pub ping_interval: Duration,
    /// The engine counts as stuck when it has work and ends no step for this long.
    pub watchdog_timeout: Duration,
    /// How long a generating request may take, from its headers until its reply is handed to the connection; `None` for as
    /// long as it takes.
    pub request_timeout: Option<Duration>,
    /// How long a connection may stay open without a request and without a byte of a reply being taken.
    pub idle_timeout: Duration,
    /// How long a request's headers may take to arrive.
    pub header_timeout: Duration,
    /// How long a client may leave a reply unread before it counts as gone.
    pub write_timeout: Duration,
    /// Makes a request's span a child of the client's, whose `traceparent` header it is given.
    pub adopt_trace: Option<fn(&tracing::Span, &str)>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            root_path: String::new(),
            api_keys: Vec::new(),
            cors: Cors::AnyOrigin,
            max_body_bytes: 16 << 20,
            strict_model_name: false,
            seed: None,
            max_choices: 128,
            max_stored_responses: 1000,
            shutdown_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_mins(1),
            ping_interval: Duration::from_secs(15),
            watchdog_timeout: Duration::from_mins(2),
            request_timeout: None,
            idle_timeout: Duration::from_secs(75),
            header_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_mins(1),
            adopt_trace: None,
        }
    }
}

/// Which web pages may call the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cors {
    /// All of them; keys travel in a header that pages must know, never in cookies.
    AnyOrigin,
    /// Those of these origins.
    Origins(Vec<Origin>),
    /// None: no CORS headers are sent.
    Off,
}

/// Where a web page comes from, as `https://chat.example.com`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin(pub(crate) HeaderValue);

/// Text that is no origin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no origin; one is a scheme and a host without a path, as https://chat.example.com")]
pub struct InvalidOrigin(pub String);

impl FromStr for Origin {
    type Err = InvalidOrigin;

    fn from_str(text: &str) -> Result<Self, InvalidOrigin> {
        let invalid = || InvalidOrigin(text.to_owned());
        let (scheme, host) = text.split_once("://").ok_or_else(invalid)?;
        let printable = text.bytes().all(|byte| byte.is_ascii_graphic());
        if scheme.is_empty() || host.is_empty() || host.contains(['/', '*', ',']) || !printable {
            return Err(invalid());
        }
        HeaderValue::from_str(text).map(Self).map_err(|_| invalid())
    }
}

/// The model, its text side.
#[derive(Clone)]
pub struct ServedModel {
    /// Names it answers to, at least one; replies to unknown names carry the first.
    pub names: Vec<String>,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Absent for base models: chat is then refused.
    pub template: Option<Arc<ChatTemplate>>,
    /// What a silent request gets.
    pub defaults: SamplingDefaults,
    /// Tokens that end a reply.
    pub eos_token_ids: Vec<TokenId>,
    /// How thinking is told from the answer.
    pub reasoning_parser: ReasoningParser,
    /// Forms that replies can be held to, over this tokenizer.
    pub grammars: Arc<Grammars>,
    /// How the model writes calls of tools; `None`: it does not, or nobody knows.
    pub tool_syntax: Option<ToolSyntax>,
    /// What `reasoning_effort` means.
    pub thinking_budgets: ThinkingBudgets,
}

/// Most tokens of thinking per `reasoning_effort`; `None` for as many as it takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThinkingBudgets {
    /// `minimal`.
    pub minimal: Option<u32>,
    /// `low`.
    pub low: Option<u32>,
    /// `medium`.
    pub medium: Option<u32>,
    /// `high` and above.
    pub high: Option<u32>,
}

/// Sampling where the request is silent, from generation_config.json; `None` leaves OpenAI's default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingDefaults {
    /// See [`r1_core::SamplingParams::temperature`].
    pub temperature: Option<f32>,
    /// See [`r1_core::SamplingParams::top_p`].
    pub top_p: Option<f32>,
    /// See [`r1_core::SamplingParams::top_k`]; 0 keeps all.
    pub top_k: Option<u32>,
    /// See [`r1_core::SamplingParams::min_p`].
    pub min_p: Option<f32>,
    /// See [`r1_core::SamplingParams::repetition_penalty`].
    pub repetition_penalty: Option<f32>,
    /// Most tokens of a reply; what is left of the context bounds it further.
    pub max_tokens: Option<u32>,
}

/// How thinking is told from the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasoningParser {
    /// Thinking ends at `</think>` and is given as `reasoning_content` and `reasoning`.
    DeepSeekR1,
    /// `<think>` and `</think>` stay in the content.
    None,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_have_no_path() {
        for good in ["https://chat.example.com", "http://localhost:8080"] {
            assert!(good.parse::<Origin>().is_ok(), "{good}");
        }
        for bad in
            ["", "*", "chat.example.com", "https://", "https://a/b", "https://a, https://b", "https://a\n"]
        {
            assert_eq!(bad.parse::<Origin>(), Err(InvalidOrigin(bad.to_owned())));
        }
    }
}
