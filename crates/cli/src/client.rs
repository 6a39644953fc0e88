//! A client of OpenAI's API over HTTP, for what talks to a running server. Must not know what is asked.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

/// Where systems keep the authorities they trust.
const SYSTEM_AUTHORITIES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// How https servers are trusted: those that an authority in `authorities` vouches for, or in the system's list.
fn tls(authorities: Option<&Path>) -> Result<TlsConfig> {
    let variable = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let system = || SYSTEM_AUTHORITIES.map(PathBuf::from).into_iter().find(|path| path.is_file());
    let path = authorities.map(Path::to_owned).or(variable).or_else(system).context(
        "no list of certificate authorities was found on this system; name a PEM file with --cacert",
    )?;
    let pem = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let certificates = parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(Ok(certificate)),
        Ok(_) => None,
        Err(error) => Some(Err(error)),
    });
    let certificates: Vec<Certificate<'static>> =
        certificates.collect::<Result<_, _>>().with_context(|| path.display().to_string())?;
    if certificates.is_empty() {
        bail!("{} has no PEM block BEGIN CERTIFICATE", path.display());
    }
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&certificates))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build())
}

/// Whether a connection is kept for the next request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Connections {
    Kept,
    OnePerRequest,
}

/// A server, and the key that is shown to it.
#[derive(Clone)]
pub(crate) struct Client {
    agent: ureq::Agent,
    base: String,
    key: Option<String>,
}

impl Client {
    /// A client of the server at `url`, whatever of `/v1` stands at its end. Nothing is sent yet.
    pub(crate) fn new(
        url: &str,
        authorities: Option<&Path>,
        key: Option<String>,
        connections: Connections,
    ) -> Result<Self> {
        let base = url.trim_end_matches('/').trim_end_matches("/v1");
        let base = if base.contains("://") { base.to_owned() } else { format!("http://{base}") };
        // Errors come as a body with a message, so a status is not an error here.
        let agent = ureq::Agent::config_builder().http_status_as_error(false);
        let agent = match connections {
            Connections::Kept => agent,
            Connections::OnePerRequest => agent.max_idle_connections(0),
        };
        let agent = match base.split_once("://") {
            Some(("http", _)) => agent,
            Some(("https", _)) => agent.tls_config(tls(authorities)?),
            _ => bail!("{url} is not supported: http:// and https:// are"),
        };
        Ok(Self { agent: agent.build().into(), base, key })
    }

    /// The server's URL, without `/v1`.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    fn authorization(&self) -> String {
        format!("Bearer {}", self.key.as_deref().unwrap_or("none"))
    }

    /// Why nothing came back, and the way out.
    fn unanswered(&self, error: ureq::Error) -> anyhow::Error {
        let untrusted = match &error {
            ureq::Error::Io(io) => io.get_ref().is_some_and(|error| {
                matches!(error.downcast_ref(), Some(rustls::Error::InvalidCertificate(_)))
            }),
            _ => false,
        };
        let what = if untrusted {
            format!(
                "{} shows a certificate that is not trusted; name what vouches for it with --cacert",
                self.base
            )
        } else {
            format!("no server answers at {}; start one with `r1-serve`", self.base)
        };
        anyhow::Error::from(error).context(what)
    }

    /// The JSON at `path`; a server's error is one here.
    pub(crate) fn get(&self, path: &str) -> Result<Value> {
        let url = format!("{}{path}", self.base);
        let response = self.agent.get(url).header("Authorization", self.authorization()).call();
        Response(response.map_err(|error| self.unanswered(error))?).json()
    }

    /// Posts JSON to `path`; a server's error is one here.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Result<Response> {
        let url = format!("{}{path}", self.base);
        let response = self.agent.post(url).header("Authorization", self.authorization()).send_json(body);
        let response = Response(response.map_err(|error| self.unanswered(error))?);
        let status = response.0.status();
        if status == 200 {
            return Ok(response);
        }
        match response.json() {
            Ok(_) => bail!("the server answered {status}"),
            Err(error) => Err(error.context(format!("the server answered {status}"))),
        }
    }

    /// The first model that the server lists.
    pub(crate) fn first_model(&self) -> Result<String> {
        let reply = self.get("/v1/models")?;
        reply["data"][0]["id"].as_str().map(str::to_owned).ok_or_else(|| anyhow!("the server lists no model"))
    }
}

/// A reply whose body is still to come.
pub(crate) struct Response(ureq::http::Response<ureq::Body>);

impl Response {
    /// The whole body; an error object is an error.
    pub(crate) fn json(mut self) -> Result<Value> {
        let reply: Value = self.0.body_mut().read_json().context("the server's reply is not JSON")?;
        fail_on_error(&reply)?;
        Ok(reply)
    }

    /// Hands every event of a stream to `take` as it comes; an error object is an error, and so is a stream that breaks off.
    pub(crate) fn events(mut self, mut take: impl FnMut(Value) -> Result<()>) -> Result<()> {
        let mut lines = BufReader::new(self.0.body_mut().as_reader()).lines();
        loop {
            let Some(line) = lines.next() else {
                bail!("the server broke off before the end of its reply");
            };
            let line = line.context("the server broke off")?;
            // Blank lines part events, and a colon begins a comment.
            let Some(data) = line.strip_prefix("data:").map(str::trim_start) else { continue };
            if data == "[DONE]" {
                return Ok(());
            }
            let event: Value = serde_json::from_str(data).context("the server sent a malformed event")?;
            fail_on_error(&event)?;
            take(event)?;
        }
    }
}

/// The message of an error object, as an error.
fn fail_on_error(reply: &Value) -> Result<()> {
    match &reply["error"] {
        Value::Null => Ok(()),
        error => {
            bail!("{}", error["message"].as_str().unwrap_or("the server reported an error without a message"))
        }
    }
}
