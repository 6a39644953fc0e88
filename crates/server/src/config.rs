//! What the command line decides about the HTTP side, and what is served. Holds values only.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Method};
use r1_core::{SamplingParams, TokenId};
use r1_text::{ChatTemplate, Tokenizer, ToolSyntax};
use serde_json::{Map, Value};

use crate::auth::ApiKeys;
use crate::grammars::ServedGrammars;
use crate::tls::Tls;

/// What cannot be served with.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Text that is no origin of web pages.
    #[error("{0:?} is no origin; one is a scheme and a host without a path, as https://chat.example.com")]
    Origin(String),
    /// Text that is no HTTP method.
    #[error("{0:?} is no HTTP method; one is GET or POST")]
    Method(String),
    /// Text that names no header.
    #[error("{0:?} is no name of a header; one is authorization")]
    Header(String),
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that must hold certificates holds none, or a broken one.
    #[error("{path} is no certificate: {reason}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that must hold a private key holds none, or one that cannot be used.
    #[error("{path} is no usable private key: {reason}")]
    PrivateKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A private key under a passphrase.
    #[error(
        "the private key in {path} is encrypted, and nobody is there to type its passphrase; decrypt it with `openssl pkey \
         -in {path} -out key.pem` and give the new file"
    )]
    EncryptedKey {
        /// The file.
        path: PathBuf,
    },
    /// Certificate and key of different pairs.
    #[error("the private key in {key} does not belong to the certificate in {certificate}")]
    KeyMismatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
}

/// How the server behaves.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Path prefix under which every route answers too, as `/proxy/models/main`; empty for none.
    pub root_path: String,
    /// Connections are encrypted with it; `None`: they are not.
    pub tls: Option<Tls>,
    /// Any of these opens the API; empty means that no key is asked for.
    pub api_keys: ApiKeys,
    /// Any of these opens the administrators' endpoints and nothing else does; empty means that there are none.
    pub admin_keys: ApiKeys,
    /// Which web pages may call the API.
    pub cors: Cors,
    /// What those pages may send.
    pub cors_requests: CorsRequests,
    /// `/docs` and `/openapi.json` are served.
    pub docs: bool,
    /// One line is logged per request.
    pub request_log: bool,
    /// Prompts and replies are logged, at most so many characters of each; `None`: never a word of them.
    pub log_texts: Option<usize>,
    /// Largest accepted body in bytes.
    pub max_body_bytes: usize,
    /// Refuse model names that are not served; otherwise any name means the one model.
    pub strict_model_name: bool,
    /// Seed of the first choice that brings none; each further one gets the next, in the order they are read. `None`:
    /// random ones.
    pub seed: Option<u64>,
    /// Most choices of one request: prompts times `n`.
    pub max_choices: usize,
    /// Most log-probabilities per token that a request may ask for; at most [`SamplingParams::MAX_LOGPROBS`] count.
    pub max_logprobs: u32,
    /// Most responses of `/v1/responses` that are kept to be read again and continued; 0 keeps none.
    pub max_stored_responses: usize,
    /// Variables of the chat template where a request's `chat_template_kwargs` are silent.
    pub default_template_kwargs: Map<String, Value>,
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
    /// How long a TLS handshake may take.
    pub handshake_timeout: Duration,
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
            tls: None,
            api_keys: ApiKeys::default(),
            admin_keys: ApiKeys::default(),
            cors: Cors::AnyOrigin,
            cors_requests: CorsRequests::default(),
            docs: true,
            request_log: true,
            log_texts: None,
            max_body_bytes: 16 << 20,
            strict_model_name: false,
            seed: None,
            max_choices: 128,
            max_logprobs: SamplingParams::MAX_LOGPROBS,
            max_stored_responses: 1000,
            default_template_kwargs: Map::new(),
            shutdown_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_mins(1),
            ping_interval: Duration::from_secs(15),
            watchdog_timeout: Duration::from_mins(2),
            request_timeout: None,
            idle_timeout: Duration::from_secs(75),
            handshake_timeout: Duration::from_secs(10),
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
    Origins {
        /// Where they come from.
        origins: Vec<Origin>,
        /// They may send cookies and other credentials that a browser adds by itself. No origin may be left open then.
        credentials: bool,
    },
    /// None: no CORS headers are sent.
    Off,
}

/// What web pages may send; empty lists leave it open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CorsRequests {
    pub(crate) methods: Vec<Method>,
    pub(crate) headers: Vec<HeaderName>,
}

impl CorsRequests {
    /// Only these methods and headers; of either an empty list or `*` leaves it open.
    pub fn new(methods: &[String], headers: &[String]) -> Result<Self, ConfigError> {
        let limits = |list: &[String]| !list.iter().any(|entry| entry == "*");
        let methods = methods.iter().filter(|_| limits(methods)).map(|method| {
            // Methods are written in capitals; a lower-case one would never match.
            Method::from_bytes(method.to_ascii_uppercase().as_bytes())
                .map_err(|_| ConfigError::Method(method.clone()))
        });
        let headers = headers.iter().filter(|_| limits(headers)).map(|header| {
            HeaderName::from_bytes(header.as_bytes()).map_err(|_| ConfigError::Header(header.clone()))
        });
        Ok(Self { methods: methods.collect::<Result<_, _>>()?, headers: headers.collect::<Result<_, _>>()? })
    }
}

/// Where a web page comes from, as `https://chat.example.com`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin(pub(crate) HeaderValue);

impl FromStr for Origin {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let invalid = || ConfigError::Origin(text.to_owned());
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
    pub template: Option<Arc<ChatTemplate<'static>>>,
    /// What a silent request gets.
    pub defaults: SamplingDefaults,
    /// Tokens that end a reply.
    pub eos_token_ids: Vec<TokenId>,
    /// How thinking is told from the answer.
    pub reasoning_parser: ReasoningParser,
    /// Forms that replies can be held to, over this tokenizer.
    pub grammars: ServedGrammars,
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
            let error = bad.parse::<Origin>().unwrap_err();
            assert!(matches!(error, ConfigError::Origin(text) if text == bad));
        }
    }

    #[test]
    fn pages_requests_are_limited_by_name() {
        let new = |methods: &[&str], headers: &[&str]| {
            let owned = |list: &[&str]| list.iter().map(|&entry| entry.to_owned()).collect::<Vec<_>>();
            CorsRequests::new(&owned(methods), &owned(headers))
        };
        assert_eq!(new(&[], &["*"]).unwrap(), CorsRequests::default());
        let some = new(&["get", "POST"], &["Authorization"]).unwrap();
        assert_eq!(some.methods, [Method::GET, Method::POST]);
        assert_eq!(some.headers, ["authorization"]);
        assert!(matches!(new(&["GET POST"], &[]), Err(ConfigError::Method(_))));
        assert!(matches!(new(&[], &["x y"]), Err(ConfigError::Header(_))));
    }
}
