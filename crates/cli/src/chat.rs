//! `r1-serve chat`: a conversation with a server in the terminal, over the same API that every client uses.

use std::io::{self, BufRead, IsTerminal, Write};

use anyhow::Result;
use serde_json::{Value, json};

use crate::args::ChatArgs;
use crate::client::{Client, Connections};

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
        println!(
            "Talking to {} at {}. /clear begins anew, /quit or Ctrl-D ends.",
            chat.model,
            chat.client.base()
        );
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
    client: Client,
    model: String,
    messages: Vec<Value>,
    args: &'a ChatArgs,
    /// Reasoning is shown dimmed on a terminal.
    colour: bool,
}

impl<'a> Chat<'a> {
    fn connect(args: &'a ChatArgs) -> Result<Self> {
        let key = args.api_key.clone();
        let client = Client::new(&args.url, args.cacert.as_deref(), key, Connections::Kept)?;
        let model = match &args.model {
            Some(model) => model.clone(),
            None => client.first_model()?,
        };
        let colour = io::stdout().is_terminal();
        let mut chat = Self { client, model, messages: Vec::new(), args, colour };
        chat.clear();
        Ok(chat)
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
        let response = self.client.post("/v1/chat/completions", &body)?;
        let mut printer =
            Printer { colour: self.colour, part: Part::Nothing, content: String::new(), cut: false };
        response.events(|event| {
            printer.print(&event["choices"][0]["delta"])?;
            printer.cut |= event["choices"][0]["finish_reason"] == "length";
            Ok(())
        })?;
        Ok(printer.finish())
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
