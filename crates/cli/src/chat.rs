//! `r1-serve chat`: a conversation with a server in the terminal, over the same API that every client uses.

use std::fs;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use crate::args::ChatArgs;

const DIM: &str = "\x1b[2m";
const RESET: &str = "\x1b[0m";

/// One question, or a conversation until end of input.
pub(crate) fn run(args: &ChatArgs) -> Result<()> {
    let mut chat = Chat::connect(args)?;
    if let Some(prompt) = &args.prompt {
        return chat.ask(prompt);
    }
    let terminal = io::stdin().is_terminal();
    if terminal {
        println!("Talking to {} at {}. /clear begins anew, /quit or Ctrl-D ends.", chat.model, chat.base);
    }
    let mut lines = io::stdin().lock().lines();
    let mut failed = None;
    loop {
        if terminal {
            print!("> ");
            io::stdout().flush()?;
        }
        let Some(line) = lines.next() else {
            if terminal {
                println!();
            }
            return failed.map_or(Ok(()), Err);
        };
        match line?.trim() {
            "" => {}
            "/quit" | "/exit" => return Ok(()),
            "/clear" => chat.clear(),
            // One failed question does not end the conversation; a script learns of it from the exit code.
            question => match chat.ask(question) {
                Err(error) if terminal => eprintln!("error: {error:#}"),
                Err(error) => failed = Some(error),
                Ok(()) => {}
            },
        }
    }
}

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

struct Chat<'a> {
    agent: ureq::Agent,
    base: String,
    model: String,
    messages: Vec<Value>,
    args: &'a ChatArgs,
    /// Reasoning is shown dimmed on a terminal.
    colour: bool,
}

impl<'a> Chat<'a> {
    fn connect(args: &'a ChatArgs) -> Result<Self> {
        let base = args.url.trim_end_matches('/').trim_end_matches("/v1");
        let base = if base.contains("://") { base.to_owned() } else { format!("http://{base}") };
        // Errors come as a body with a message, so a status is not an error here.
        let agent = ureq::Agent::config_builder().http_status_as_error(false);
        let agent = match base.split_once("://") {
            Some(("http", _)) => agent,
            Some(("https", _)) => agent.tls_config(tls(args.cacert.as_deref())?),
            _ => bail!("--url {} is not supported: http:// and https:// are", args.url),
        };
        let agent = agent.build().into();
        let mut chat = Self {
            agent,
            base,
            model: args.model.clone().unwrap_or_default(),
            messages: Vec::new(),
            args,
            colour: io::stdout().is_terminal(),
        };
        if chat.model.is_empty() {
            chat.model = chat.first_model()?;
        }
        chat.clear();
        Ok(chat)
    }

    fn key(&self) -> String {
        format!("Bearer {}", self.args.api_key.as_deref().unwrap_or("none"))
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

    fn first_model(&self) -> Result<String> {
        let mut response = self
            .agent
            .get(format!("{}/v1/models", self.base))
            .header("Authorization", self.key())
            .call()
            .map_err(|error| self.unanswered(error))?;
        let reply: Value = response.body_mut().read_json().context("the server's reply is not JSON")?;
        fail_on_error(&reply)?;
        reply["data"][0]["id"].as_str().map(str::to_owned).ok_or_else(|| anyhow!("the server lists no model"))
    }

    /// Forgets the conversation, not the system message.
    fn clear(&mut self) {
        self.messages.clear();
        self.messages.extend(self.args.system.iter().map(|text| json!({"role": "system", "content": text})));
    }

    /// Asks, prints the reply as it comes, and remembers both.
    fn ask(&mut self, question: &str) -> Result<()> {
        self.messages.push(json!({"role": "user", "content": question}));
        match self.stream() {
            Ok(content) => {
                self.messages.push(json!({"role": "assistant", "content": content}));
                Ok(())
            }
            Err(error) => {
                self.messages.pop();
                Err(error)
            }
        }
    }

    fn stream(&self) -> Result<String> {
        let mut body = json!({"model": self.model, "messages": self.messages, "stream": true});
        if let Some(temperature) = self.args.temperature {
            body["temperature"] = json!(temperature);
        }
        if let Some(max_tokens) = self.args.max_tokens {
            body["max_tokens"] = json!(max_tokens);
        }
        let mut response = self
            .agent
            .post(format!("{}/v1/chat/completions", self.base))
            .header("Authorization", self.key())
            .send_json(&body)
            .map_err(|error| self.unanswered(error))?;
        if response.status() != 200 {
            let reply: Value = response.body_mut().read_json().context("the server's reply is not JSON")?;
            fail_on_error(&reply)?;
            bail!("the server answered {}", response.status());
        }
        let mut printer =
            Printer { colour: self.colour, part: Part::Nothing, content: String::new(), cut: false };
        for line in BufReader::new(response.body_mut().as_reader()).lines() {
            let line = line.context("the server broke off")?;
            // Blank lines part events, and a colon begins a comment.
            let Some(data) = line.strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                return Ok(printer.finish());
            }
            let event: Value = serde_json::from_str(data).context("the server sent a malformed event")?;
            fail_on_error(&event)?;
            printer.print(&event["choices"][0]["delta"])?;
            if event["choices"][0]["finish_reason"] == "length" {
                printer.cut = true;
            }
        }
        bail!("the server broke off before the end of its reply")
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

/// What is being printed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Nothing,
    Reasoning,
    Content,
    Call,
}

/// Prints deltas: reasoning dimmed, then the answer, each call of a tool on a line of its own.
struct Printer {
    colour: bool,
    part: Part,
    content: String,
    /// The reply was cut off by a limit.
    cut: bool,
}

impl Printer {
    fn print(&mut self, delta: &Value) -> Result<()> {
        let mut out = io::stdout().lock();
        if let Some(text) = delta["reasoning_content"].as_str().filter(|text| !text.is_empty()) {
            if self.part != Part::Reasoning {
                self.begin(Part::Reasoning, &mut out)?;
            }
            write!(out, "{text}")?;
        }
        if let Some(text) = delta["content"].as_str().filter(|text| !text.is_empty()) {
            if self.part != Part::Content {
                self.begin(Part::Content, &mut out)?;
            }
            self.content += text;
            write!(out, "{text}")?;
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let call = &call["function"];
            if let Some(name) = call["name"].as_str() {
                self.begin(Part::Call, &mut out)?;
                write!(out, "[calls {name}(")?;
            }
            write!(out, "{}", call["arguments"].as_str().unwrap_or_default())?;
        }
        Ok(out.flush()?)
    }

    /// Ends one part and begins the next.
    fn begin(&mut self, part: Part, out: &mut impl Write) -> io::Result<()> {
        let (dim, reset) = if self.colour { (DIM, RESET) } else { ("", "") };
        match std::mem::replace(&mut self.part, part) {
            Part::Nothing => {}
            Part::Reasoning => write!(out, "{reset}\n\n")?,
            Part::Content => writeln!(out)?,
            Part::Call => writeln!(out, ")]")?,
        }
        if part == Part::Reasoning { write!(out, "{dim}") } else { Ok(()) }
    }

    fn finish(mut self) -> String {
        let end = if self.part == Part::Call { ")]" } else { "" };
        println!("{end}{}", if self.cut { " […]" } else { "" });
        std::mem::take(&mut self.content)
    }
}

impl Drop for Printer {
    /// A reply that breaks off while it reasons must not leave the terminal dim.
    fn drop(&mut self) {
        if self.part == Part::Reasoning && self.colour {
            print!("{RESET}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_set_apart() {
        let printed = |parts: &[Part], colour| {
            let mut out = Vec::new();
            let mut printer = Printer { colour, part: Part::Nothing, content: String::new(), cut: false };
            for &part in parts {
                printer.begin(part, &mut out).unwrap();
            }
            printer.part = Part::Nothing;
            String::from_utf8(out).unwrap()
        };
        let parts = [Part::Reasoning, Part::Content, Part::Call, Part::Call, Part::Nothing];
        assert_eq!(printed(&parts, false), "\n\n\n)]\n)]\n");
        assert_eq!(printed(&parts, true), format!("{DIM}{RESET}\n\n\n)]\n)]\n"));
    }
}
