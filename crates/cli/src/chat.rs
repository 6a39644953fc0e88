//! `r1-serve chat`: a conversation with a server in the terminal, over the same API that every client uses.

use std::io::{self, BufRead, BufReader, IsTerminal, Write};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

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
        if !base.starts_with("http://") {
            bail!(
                "--url {} is not supported: only http:// is; put a TLS proxy in front to reach https servers",
                args.url
            );
        }
        // Errors come as a body with a message, so a status is not an error here.
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
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

    fn first_model(&self) -> Result<String> {
        let mut response = self
            .agent
            .get(format!("{}/v1/models", self.base))
            .header("Authorization", self.key())
            .call()
            .with_context(|| format!("no server answers at {}; start one with `r1-serve`", self.base))?;
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
            .with_context(|| format!("no server answers at {}", self.base))?;
        if response.status() != 200 {
            let reply: Value = response.body_mut().read_json().context("the server's reply is not JSON")?;
            fail_on_error(&reply)?;
            bail!("the server answered {}", response.status());
        }
        let mut printer =
            Printer { colour: self.colour, reasoning: false, content: String::new(), cut: false };
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

/// Prints deltas: reasoning dimmed, then the answer.
struct Printer {
    colour: bool,
    reasoning: bool,
    content: String,
    /// The reply was cut off by a limit.
    cut: bool,
}

impl Printer {
    fn print(&mut self, delta: &Value) -> Result<()> {
        let mut out = io::stdout().lock();
        if let Some(text) = delta["reasoning_content"].as_str().filter(|text| !text.is_empty()) {
            if !self.reasoning && self.colour {
                write!(out, "{DIM}")?;
            }
            self.reasoning = true;
            write!(out, "{text}")?;
        }
        if let Some(text) = delta["content"].as_str().filter(|text| !text.is_empty()) {
            if std::mem::take(&mut self.reasoning) {
                write!(out, "{}\n\n", if self.colour { RESET } else { "" })?;
            }
            self.content += text;
            write!(out, "{text}")?;
        }
        Ok(out.flush()?)
    }

    fn finish(mut self) -> String {
        println!("{}", if self.cut { " […]" } else { "" });
        std::mem::take(&mut self.content)
    }
}

impl Drop for Printer {
    /// A reply that breaks off while it reasons must not leave the terminal dim.
    fn drop(&mut self) {
        if self.reasoning && self.colour {
            print!("{RESET}");
        }
    }
}
