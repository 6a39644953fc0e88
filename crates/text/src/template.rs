//! Chat templates: a conversation rendered to a prompt by the checkpoint's own Jinja template. Knows the shape of messages,
//! not where they come from, and nothing of token ids.

use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value, json};

use crate::control::{ControlTokens, THINK_OPEN, unguard};
use crate::error::{Result, TextError};
use crate::jinja::{self, Raised};
use crate::python::{JsonStyle, to_json};

const NAME: &str = "chat_template";

/// Stands behind the last message's content while a prompt that continues it is rendered; never part of a prompt.
const CONTINUE_HERE: &str = "\u{FDD1} ";

/// Variables that a client cannot set through `kwargs`.
const RESERVED: [&str; 6] =
    ["messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"];

/// A conversation to render.
#[derive(Clone, Debug, Default)]
pub struct ChatInput {
    /// Messages as OpenAI writes them, content as a string or null. Strings are the clients' words: control tokens in
    /// them stay words.
    pub messages: Vec<Value>,
    /// Tools as OpenAI writes them; `None` when the request has none.
    pub tools: Option<Vec<Value>>,
    /// Whether the prompt ends where the assistant's reply begins.
    pub add_generation_prompt: bool,
    /// Whether the prompt ends inside the last message, so that the reply continues it.
    pub continue_final_message: bool,
    /// Further template variables (`thinking`, …).
    pub kwargs: Map<String, Value>,
}

/// Where the reply to a prompt begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptEnd {
    /// The prompt left a `<think>` open: the reply begins inside the reasoning.
    OpenThink,
    /// The reply begins outside the reasoning, and may open it itself.
    Closed,
}

/// A rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderedPrompt {
    guarded: String,
    end: PromptEnd,
}

impl RenderedPrompt {
    /// The prompt as text.
    pub fn text(&self) -> String {
        unguard(&self.guarded).into_owned()
    }

    /// Where the reply begins.
    pub fn end(&self) -> PromptEnd {
        self.end
    }

    /// The prompt with the guards in it, for [`Tokenizer::encode_prompt`](crate::Tokenizer::encode_prompt).
    pub(crate) fn guarded(&self) -> &str {
        &self.guarded
    }
}

/// How a template wants the arguments of an earlier call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arguments {
    /// As the JSON text that the model wrote.
    Text,
    /// As an object.
    Object,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    control: ControlTokens,
    bos: Option<String>,
    eos: Option<String>,
    arguments: Arguments,
}

impl ChatTemplate {
    /// Compiles a template. `bos` and `eos` are what it sees as `bos_token` and `eos_token`; `control` is the
    /// [tokenizer's](crate::Tokenizer::control_tokens).
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>, control: ControlTokens) -> Result<Self> {
        let mut env = jinja::environment(control.clone());
        env.add_template_owned(NAME, source.to_owned()).map_err(|e| template_error(&e))?;
        let [bos, eos] = [bos, eos].map(|token| token.map(str::to_owned));
        let mut template = Self { env, control, bos, eos, arguments: Arguments::Text };
        template.arguments = template.probe_arguments();
        Ok(template)
    }

    /// Finds out which form of a call's arguments the template needs, by rendering one call in both. A template that
    /// writes the text as it stands gets the text, because that is what the model wrote; one that raises on it, quotes it
    /// again or takes it apart gets an object.
    fn probe_arguments(&self) -> Arguments {
        const TEXT: &str = r#"{"probe_key":"probe_value"}"#;
        let object = json!({"probe_key": "probe_value"});
        let render = |arguments: &Value| {
            // Templates differ in whether a call's message has a null content or an empty one.
            [Value::Null, json!("")].into_iter().find_map(|content| {
                let call =
                    json!({"id": "0", "type": "function", "function": {"name": "f", "arguments": arguments}});
                let messages = [
                    json!({"role": "user", "content": "x"}),
                    json!({"role": "assistant", "content": content, "tool_calls": [call]}),
                ];
                let input = ChatInput { messages: messages.to_vec(), ..ChatInput::default() };
                self.render_as_given(&input).ok().filter(|text| text.contains("probe_key"))
            })
        };
        if render(&json!(TEXT)).is_some_and(|text| text.contains(TEXT)) {
            return Arguments::Text;
        }
        match render(&object) {
            // Python's spelling of an object is never meant.
            Some(text) if !text.contains("{'probe_key'") => Arguments::Object,
            _ => Arguments::Text,
        }
    }

    /// Renders a conversation.
    ///
    /// Of a message, null fields other than `content` and empty `tool_calls` count as absent, and an empty content beside
    /// calls counts as null: clients mean the same by them, templates do not.
    pub fn render(&self, input: &ChatInput) -> Result<RenderedPrompt> {
        if let Some(name) = RESERVED.iter().find(|name| input.kwargs.contains_key(**name)) {
            return Err(TextError::ReservedKwarg((*name).to_owned()));
        }
        let messages = input.messages.iter().enumerate().map(|(i, m)| self.prepare(i, m));
        let mut messages = messages.collect::<Result<Vec<Value>>>()?;
        if input.continue_final_message {
            mark_continuation(&mut messages)?;
        }
        let guarded = self.render_as_given(&ChatInput {
            messages,
            tools: input
                .tools
                .as_ref()
                .map(|tools| tools.iter().map(|t| self.control.guard_json(t)).collect()),
            kwargs: input.kwargs.iter().map(|(k, v)| (k.clone(), self.control.guard_json(v))).collect(),
            ..*input
        })?;
        let guarded = if input.continue_final_message { cut_at_continuation(&guarded)? } else { guarded };
        let end = self.prompt_end(&guarded);
        Ok(RenderedPrompt { guarded, end })
    }

    fn render_as_given(&self, input: &ChatInput) -> Result<String> {
        let mut context = input.kwargs.clone();
        context.insert("messages".into(), Value::Array(input.messages.clone()));
        context.insert("tools".into(), input.tools.clone().map_or(Value::Null, Value::Array));
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), Value::Bool(input.add_generation_prompt));
        for (name, token) in [("bos_token", &self.bos), ("eos_token", &self.eos)] {
            if let Some(text) = token {
                context.insert(name.into(), Value::String(text.clone()));
            }
        }
        let mut env = self.env.clone();
        env.set_fuel(Some(jinja::fuel(input.messages.len())));
        let template = env.get_template(NAME).expect("added when it was compiled");
        template.render(minijinja::Value::from(Serde(&context))).map_err(|e| template_error(&e))
    }

    /// A message as the template gets it: guarded, with arguments in the form that the template needs.
    fn prepare(&self, index: usize, message: &Value) -> Result<Value> {
        let Some(fields) = message.as_object() else {
            return Err(TextError::Template { message: format!("messages[{index}] is not an object") });
        };
        let is_reply = fields.get("role").is_some_and(|role| role == "assistant");
        let mut out = Map::new();
        for (name, value) in fields {
            let value = match (name.as_str(), value) {
                ("content", Value::String(s)) if is_reply => {
                    Value::String(self.control.guard_reply(s).into_owned())
                }
                ("tool_calls", Value::Array(calls)) if calls.is_empty() => continue,
                ("tool_calls", Value::Array(calls)) => {
                    let calls = calls.iter().enumerate().map(|(i, call)| self.prepare_call(index, i, call));
                    Value::Array(calls.collect::<Result<_>>()?)
                }
                ("content", Value::Null) => Value::Null,
                (_, Value::Null) => continue,
                (_, other) => self.control.guard_json(other),
            };
            out.insert(self.control.guard(name).into_owned(), value);
        }
        if out.contains_key("tool_calls") && out.get("content").is_some_and(|content| content == "") {
            out.insert("content".into(), Value::Null);
        }
        Ok(Value::Object(out))
    }

    fn prepare_call(&self, message: usize, call: usize, value: &Value) -> Result<Value> {
        let mut guarded = self.control.guard_json(value);
        let arguments = &value["function"]["arguments"];
        let adapted = match (self.arguments, arguments) {
            (Arguments::Object, Value::String(text)) => {
                let bad = |reason: String| TextError::Arguments { message, call, reason };
                let object: Map<String, Value> =
                    serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
                self.control.guard_json(&Value::Object(object))
            }
            (Arguments::Text, Value::Object(_)) => {
                let text = to_json(&minijinja::Value::from(Serde(arguments)), &JsonStyle::default());
                let text = text.map_err(|e| template_error(&e))?;
                Value::String(self.control.guard(&text).into_owned())
            }
            _ => return Ok(guarded),
        };
        guarded["function"]["arguments"] = adapted;
        Ok(guarded)
    }

    /// A `<think>` that no other control token follows is open, whatever text was put behind it.
    fn prompt_end(&self, guarded: &str) -> PromptEnd {
        let last = self.control.matches(guarded).map(|(_, _, token)| token).last();
        if last == Some(THINK_OPEN) { PromptEnd::OpenThink } else { PromptEnd::Closed }
    }
}

fn mark_continuation(messages: &mut [Value]) -> Result<()> {
    let Some(Value::String(content)) = messages.last_mut().and_then(|m| m.get_mut("content")) else {
        return Err(TextError::Template { message: "the last message has no text to continue".to_owned() });
    };
    content.push_str(CONTINUE_HERE);
    Ok(())
}

fn cut_at_continuation(guarded: &str) -> Result<String> {
    let Some(at) = guarded.rfind(CONTINUE_HERE.trim_end()) else {
        let message = "the template drops the text of the last message, so it cannot be continued".to_owned();
        return Err(TextError::Template { message });
    };
    let kept_space = guarded[at..].starts_with(CONTINUE_HERE);
    Ok(if kept_space { &guarded[..at] } else { guarded[..at].trim_end() }.to_owned())
}

/// `raise_exception`'s words where the template raised, the engine's otherwise.
fn template_error(error: &minijinja::Error) -> TextError {
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(e) = source {
        if let Some(Raised(message)) = e.downcast_ref() {
            return TextError::Template { message: message.clone() };
        }
        source = e.source();
    }
    let message = match error.kind() {
        ErrorKind::OutOfFuel => "the template does not come to an end in reasonable time".to_owned(),
        _ => error.to_string(),
    };
    TextError::Template { message }
}
