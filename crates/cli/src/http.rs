//! Flags of the HTTP side, and what the server makes of them. Must not know models.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{ArgAction, Args};
use r1_server::{ApiKeys, Cors, CorsRequests, ServerConfig, Tls};

use crate::args::{at_least_one, seconds, some_seconds};

/// Where the server listens, who may call it, and how long it waits for whom.
#[derive(Args)]
#[command(next_help_heading = "HTTP")]
pub(crate) struct HttpArgs {
    /// Address or name to listen on; 0.0.0.0 is every address of the machine.
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: String,

    /// Port to listen on.
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,

    /// Path prefix under which the API answers too, as behind a proxy.
    #[arg(long, value_name = "PATH", default_value = "")]
    root_path: String,

    /// Serve https: a PEM file with the certificate, and those that vouch for it behind it.
    #[arg(long, value_name = "FILE")]
    ssl_certfile: Option<PathBuf>,

    /// A PEM file with the certificate's private key [default: it stands in --ssl-certfile].
    #[arg(long, value_name = "FILE")]
    ssl_keyfile: Option<PathBuf>,

    /// A key that clients must send; may be given more than once [env: R1_API_KEY].
    #[arg(long, value_name = "KEY", action = ArgAction::Append)]
    api_key: Vec<String>,

    /// The key of the administrators' endpoints, which are not there without one [env: R1_ADMIN_API_KEY].
    #[arg(long, value_name = "KEY")]
    admin_api_key: Option<String>,

    /// Origins of the web pages that may call the API, or a JSON list of them; `[]` for none [default: any].
    #[arg(long, value_name = "ORIGIN", num_args = 1.., action = ArgAction::Append)]
    allowed_origins: Vec<String>,

    /// Methods that those pages may use [default: any].
    #[arg(long, value_name = "METHOD", num_args = 1.., action = ArgAction::Append, hide_short_help = true)]
    allowed_methods: Vec<String>,

    /// Headers that those pages may send [default: any].
    #[arg(long, value_name = "HEADER", num_args = 1.., action = ArgAction::Append, hide_short_help = true)]
    allowed_headers: Vec<String>,

    /// Those pages may send cookies and the like; --allowed-origins must name them.
    #[arg(long, hide_short_help = true)]
    allow_credentials: bool,

    /// Serve no /docs and no /openapi.json.
    #[arg(long, alias = "disable-fastapi-docs")]
    no_docs: bool,

    /// Refuse requests for other names than the served ones.
    #[arg(long)]
    strict_model_name: bool,

    /// Most choices of one request: prompts times `n`.
    #[arg(long, value_name = "N", default_value_t = ServerConfig::default().max_choices, value_parser = at_least_one)]
    max_choices: usize,

    /// Most log-probabilities per token that a request may ask for.
    #[arg(
        long,
        value_name = "N",
        default_value_t = ServerConfig::default().max_logprobs,
        value_parser = clap::value_parser!(u32).range(0..=i64::from(ServerConfig::default().max_logprobs))
    )]
    max_logprobs: u32,

    /// Most replies of /v1/responses that are kept for later requests; the oldest goes first.
    #[arg(
        long,
        alias = "response-store-size",
        value_name = "N",
        default_value_t = ServerConfig::default().max_stored_responses
    )]
    max_stored_responses: usize,

    /// Most requests that may wait; one more gets a 429.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = at_least_one)]
    pub(crate) max_queued_requests: usize,

    /// Largest request body in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 20)]
    max_body_bytes: usize,

    /// Seconds that running replies get after SIGTERM.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    shutdown_timeout: Duration,

    /// Seconds without the end of a step, while work waits, after which /health says that the engine is stuck.
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = some_seconds)]
    pub(crate) watchdog_timeout: Duration,

    /// Seconds that a generating request may take, from its headers until its reply is handed to the connection [default:
    /// no limit].
    #[arg(long, value_name = "SECONDS", value_parser = some_seconds)]
    pub(crate) request_timeout: Option<Duration>,

    /// Seconds that a connection may stay open without a request.
    #[arg(long, value_name = "SECONDS", default_value = "75", value_parser = some_seconds)]
    pub(crate) idle_timeout: Duration,
}

impl std::fmt::Debug for HttpArgs {
    /// Without the keys.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpArgs").field("host", &self.host).field("port", &self.port).finish_non_exhaustive()
    }
}

impl HttpArgs {
    /// What the server is to do; reads the certificate's files.
    pub(crate) fn config(&self) -> Result<ServerConfig> {
        let admin_keys = keys("--admin-api-key", self.admin_api_key.as_slice(), "R1_ADMIN_API_KEY")?;
        Ok(ServerConfig {
            root_path: self.root_path.clone(),
            tls: self.tls()?,
            api_keys: keys("--api-key", &self.api_key, "R1_API_KEY")?,
            admin_keys,
            cors: self.cors()?,
            cors_requests: CorsRequests::new(
                &list("--allowed-methods", &self.allowed_methods)?,
                &list("--allowed-headers", &self.allowed_headers)?,
            )
            .context("--allowed-methods, --allowed-headers")?,
            docs: !self.no_docs,
            strict_model_name: self.strict_model_name,
            max_choices: self.max_choices,
            max_logprobs: self.max_logprobs,
            max_stored_responses: self.max_stored_responses,
            max_body_bytes: self.max_body_bytes,
            shutdown_timeout: self.shutdown_timeout,
            watchdog_timeout: self.watchdog_timeout,
            request_timeout: self.request_timeout,
            idle_timeout: self.idle_timeout,
            ..ServerConfig::default()
        })
    }

    fn tls(&self) -> Result<Option<Tls>> {
        match (&self.ssl_certfile, &self.ssl_keyfile) {
            (None, None) => Ok(None),
            (None, Some(_)) => {
                bail!("--ssl-keyfile is the key of a certificate; give that with --ssl-certfile")
            }
            (Some(certificate), key) => {
                let tls = Tls::open(certificate, key.as_ref().unwrap_or(certificate));
                Ok(Some(tls.context("--ssl-certfile, --ssl-keyfile")?))
            }
        }
    }

    fn cors(&self) -> Result<Cors> {
        let origins = list("--allowed-origins", &self.allowed_origins)?;
        let any = self.allowed_origins.is_empty() || origins.iter().any(|origin| origin == "*");
        match (any, self.allow_credentials) {
            (true, false) => Ok(Cors::AnyOrigin),
            (true, true) => bail!(
                "--allow-credentials lets web pages act as whoever looks at them; name those that may with --allowed-origins"
            ),
            (false, _) if origins.is_empty() => Ok(Cors::Off),
            (false, credentials) => {
                let origins = origins.iter().map(|origin| origin.parse()).collect::<Result<_, _>>();
                Ok(Cors::Origins { origins: origins.context("--allowed-origins")?, credentials })
            }
        }
    }
}

/// The keys of the command line, else the one of the environment; an empty variable counts as unset.
fn keys(flag: &str, given: &[String], variable: &str) -> Result<ApiKeys> {
    if given.iter().any(|key| key.trim().is_empty()) {
        bail!("{flag} is empty; no client can send an empty key");
    }
    if given.is_empty() {
        let key = std::env::var(variable).ok();
        return Ok(key.iter().map(|key| key.trim()).filter(|key| !key.is_empty()).collect());
    }
    Ok(given.iter().map(|key| key.trim()).collect())
}

/// Values as they are given, or as lists of JSON.
fn list(flag: &str, given: &[String]) -> Result<Vec<String>> {
    let mut values = Vec::new();
    for value in given {
        if value.trim_start().starts_with('[') {
            let many: Vec<String> = serde_json::from_str(value)
                .with_context(|| format!("{flag} {value} is no JSON list of strings"))?;
            values.extend(many);
        } else {
            values.push(value.clone());
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command_line::read;

    fn config(arguments: &[&str]) -> Result<ServerConfig> {
        read(["r1-serve"].iter().chain(arguments))?.serve.http.config()
    }

    fn refused(arguments: &[&str], needle: &str) {
        let error = format!("{:#}", config(arguments).unwrap_err());
        assert!(error.contains(needle), "{arguments:?}: {error}");
    }

    #[test]
    fn pages_are_named_one_by_one_or_as_a_json_list() {
        let two = ["https://a.example", "http://localhost:3000"].map(|origin| origin.parse().unwrap());
        let two = |credentials| Cors::Origins { origins: two.to_vec(), credentials };
        for arguments in [
            &["--allowed-origins", "https://a.example", "http://localhost:3000"][..],
            &["--allowed-origins", r#"["https://a.example", "http://localhost:3000"]"#],
            &["--allowed-origins=https://a.example", "--allowed-origins=http://localhost:3000"],
        ] {
            assert_eq!(config(arguments).unwrap().cors, two(false), "{arguments:?}");
            let mut open = vec!["--allow-credentials"];
            open.extend(arguments);
            assert_eq!(config(&open).unwrap().cors, two(true), "{arguments:?}");
        }
        assert_eq!(config(&[]).unwrap().cors, Cors::AnyOrigin);
        assert_eq!(config(&["--allowed-origins", r#"["*"]"#]).unwrap().cors, Cors::AnyOrigin);
        assert_eq!(config(&["--allowed-origins", "[]"]).unwrap().cors, Cors::Off);
        refused(&["--allowed-origins", "a.example"], "--allowed-origins");
        refused(&["--allowed-origins", "[1]"], "JSON list");
        refused(&["--allow-credentials"], "--allowed-origins");
        refused(&["--allowed-methods", "GET POST"], "GET POST");
        let some = config(&["--allowed-methods", "POST", "--allowed-headers", r#"["x-a"]"#]).unwrap();
        let expected = CorsRequests::new(&["POST".into()], &["x-a".into()]).unwrap();
        assert_eq!(some.cors_requests, expected);
    }

    #[test]
    fn keys_are_not_empty_and_never_shown() {
        for arguments in [["--api-key", ""], ["--admin-api-key", " "]] {
            refused(&arguments, arguments[0]);
        }
        let cli =
            read(["r1-serve", "--api-key", "geheim", "--api-key=two", "--admin-api-key", "root"]).unwrap();
        let config = cli.serve.http.config().unwrap();
        for shown in [format!("{cli:?}"), format!("{config:?}")] {
            assert!(!shown.contains("geheim") && !shown.contains("root\""), "{shown}");
        }
        assert!(!config.api_keys.is_empty() && !config.admin_keys.is_empty());
    }

    #[test]
    fn limits_reach_the_server() {
        let limits = [
            "--max-choices",
            "4",
            "--max-logprobs=5",
            "--response-store-size",
            "7",
            "--disable-fastapi-docs",
        ];
        let config = config(&limits).unwrap();
        assert_eq!((config.max_choices, config.max_logprobs), (4, 5));
        assert_eq!((config.max_stored_responses, config.docs), (7, false));
        assert!(read(["r1-serve", "--max-logprobs", "21"]).is_err());
    }

    #[test]
    fn a_key_needs_its_certificate() {
        refused(&["--ssl-keyfile", "key.pem"], "--ssl-certfile");
        refused(&["--ssl-certfile", "/nowhere/cert.pem"], "/nowhere/cert.pem");
    }
}
