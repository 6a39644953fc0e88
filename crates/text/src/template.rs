//! Chat templates: a conversation rendered to a prompt by the checkpoint's own Jinja template. Knows the shape of messages,
//! not where they come from, and nothing of token ids.

use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value, json};

use crate::control::{ControlTokens, THINK_CLOSE, THINK_OPEN, unguard};
use crate::error::{Result, TextError};
use crate::jinja::{self, Raised};
use crate::meter::{Limits, Program};
use crate::python::{JsonStyle, to_json};
use crate::tools_block::ToolsBlock;

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
    /// Whether the prompt ends inside the last message, so that the reply continues it. Where that message brings
    /// reasoning (`reasoning_content`, or think tags in its content), the reply continues the reasoning if nothing stands
    /// behind it, and the content otherwise.
    pub continue_final_message: bool,
    /// Further template variables (`thinking`, …).
    pub kwargs: Map<String, Value>,
}

impl ChatInput {
    /// Whether the last message is a reply with `prefix: true`, DeepSeek's way to ask for
    /// [`continue_final_message`](Self::continue_final_message).
    pub fn ends_in_prefix(&self) -> bool {
        self.messages
            .last()
            .is_some_and(|message| message["role"] == "assistant" && message["prefix"] == true)
    }
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

/// A chat template, compiled over its source.
#[derive(Debug)]
pub struct ChatTemplate<'s> {
    env: Environment<'static>,
    program: Program<'s>,
    control: ControlTokens,
    bos: Option<String>,
    eos: Option<String>,
    arguments: Arguments,
    uses_tools: bool,
    tools_block: Option<ToolsBlock>,
    max_bytes: usize,
}

/// Longest prompt that is rendered unless [`ChatTemplate::with_max_bytes`] says otherwise.
const MAX_BYTES: usize = 64 << 20;

/// A conversation of two short messages needs far less. A template is probed some times when it is read, and one that
/// never ends must not make that long.
const PROBE_LIMITS: Limits = Limits { fuel: 200_000, max_bytes: 1 << 20, made_bytes: 4 << 20 };

/// Bytes of text and values that a template may make of each byte given to it, and beside: templates copy a message a few
/// times, and gather system messages in one string that grows with each.
const MADE_PER_GIVEN: usize = 16;
const MADE_BYTES: usize = 64 << 20;

impl<'s> ChatTemplate<'s> {
    /// Compiles a template. `bos` and `eos` are what it sees as `bos_token` and `eos_token`; `control` is the
    /// [tokenizer's](crate::Tokenizer::control_tokens).
    pub fn new(
        source: &'s str,
        bos: Option<&str>,
        eos: Option<&str>,
        control: ControlTokens,
    ) -> Result<Self> {
        let env = jinja::environment(control.clone());
        let program = Program::compile(source, jinja::syntax()).map_err(|e| template_error(&e))?;
        let [bos, eos] = [bos, eos].map(|token| token.map(str::to_owned));
        let mut template = Self {
            env,
            program,
            control,
            bos,
            eos,
            arguments: Arguments::Text,
            uses_tools: false,
            tools_block: None,
            max_bytes: MAX_BYTES,
        };
        template.arguments = template.probe_arguments();
        template.uses_tools = template.probe_tools();
        Ok(template)
    }

    /// What to write the tools into the system prompt as, should the template itself ignore them.
    #[must_use]
    pub fn with_tools_block(self, block: ToolsBlock) -> Self {
        Self { tools_block: Some(block), ..self }
    }

    /// Rendering a prompt of more than `max_bytes` is an error. 64 MiB unless it is set.
    #[must_use]
    pub fn with_max_bytes(self, max_bytes: usize) -> Self {
        Self { max_bytes, ..self }
    }

    /// Whether the template itself writes the tools.
    pub fn uses_tools(&self) -> bool {
        self.uses_tools
    }

    /// Whether a prompt shows the tools, by the template or by the block. Without either, tools are left out of the
    /// prompt.
    pub fn shows_tools(&self) -> bool {
        self.uses_tools || self.tools_block.is_some()
    }

    /// Finds out whether the template writes the tools, by rendering a conversation with one.
    fn probe_tools(&self) -> bool {
        const NAME: &str = "probe_tool";
        let parameters = json!({"type": "object", "properties": {}});
        let function = json!({"name": NAME, "description": "x", "parameters": parameters});
        let tools = Some(vec![json!({"type": "function", "function": function})]);
        let user = json!({"role": "user", "content": "x"});
        let system = json!({"role": "system", "content": "x"});
        // Some templates need a system message, some refuse one.
        [vec![user.clone()], vec![system, user]].into_iter().any(|messages| {
            let input = ChatInput { messages, tools: tools.clone(), ..ChatInput::default() };
            self.render_within(&input, PROBE_LIMITS).is_ok_and(|text| text.contains(NAME))
        })
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
                self.render_within(&input, PROBE_LIMITS).ok().filter(|text| text.contains("probe_key"))
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
        let guard_all = |tools: &Vec<Value>| tools.iter().map(|t| self.control.guard_json(t)).collect();
        let mut guarded = ChatInput {
            messages: messages.collect::<Result<_>>()?,
            tools: input.tools.as_ref().map(guard_all),
            kwargs: input.kwargs.iter().map(|(k, v)| (k.clone(), self.control.guard_json(v))).collect(),
            ..*input
        };
        let last = input.messages.len().saturating_sub(1);
        let prefix = if input.continue_final_message { Prefix::take(&mut guarded.messages)? } else { None };
        if let (Some(block), false) = (self.tools_block, self.uses_tools) {
            add_tools(&mut guarded, block)?;
        }
        let guarded = match prefix {
            None => self.render_as_given(&guarded)?,
            Some(Prefix::OfTemplate) => cut_at_continuation(&self.render_as_given(&guarded)?)?,
            Some(prefix) => {
                let prompt = self.render_as_given(&ChatInput { add_generation_prompt: true, ..guarded })?;
                let end = self.prompt_end(&prompt);
                prefix.append_to(prompt, end).ok_or(TextError::NoReasoningToContinue(last))?
            }
        };
        let end = self.prompt_end(&guarded);
        Ok(RenderedPrompt { guarded, end })
    }

    fn render_as_given(&self, input: &ChatInput) -> Result<String> {
        let given = input.messages.iter().chain(input.tools.iter().flatten()).chain(input.kwargs.values());
        let given_bytes = given.map(json_bytes).fold(0, usize::saturating_add);
        let limits = Limits {
            fuel: jinja::fuel(input.messages.len()),
            max_bytes: self.max_bytes,
            made_bytes: given_bytes.saturating_mul(MADE_PER_GIVEN).saturating_add(MADE_BYTES),
        };
        self.render_within(input, limits)
    }

    fn render_within(&self, input: &ChatInput, limits: Limits) -> Result<String> {
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
        let context = minijinja::Value::from(Serde(&context));
        self.program.render(self.env.clone(), context, limits).map_err(|e| template_error(&e))
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

/// About as many bytes as the value has.
fn json_bytes(value: &Value) -> usize {
    let inside: usize = match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(json_bytes).sum(),
        Value::Object(fields) => fields.iter().map(|(name, value)| name.len() + json_bytes(value)).sum(),
        _ => 0,
    };
    inside + 8
}

/// How the last message is continued.
enum Prefix {
    /// By the template, which writes the message; [`CONTINUE_HERE`] was put behind its content.
    OfTemplate,
    /// Templates drop the reasoning of replies. So the message was taken away, and its text goes behind the prompt that
    /// asks for a reply.
    Behind { reasoning: String, content: String },
}

impl Prefix {
    /// Looks at the last of these guarded messages and takes it away where the template cannot write it.
    fn take(messages: &mut Vec<Value>) -> Result<Option<Self>> {
        let no_text =
            || TextError::Template { message: "the last message has no text to continue".to_owned() };
        let last = messages.last_mut().ok_or_else(no_text)?;
        let text = |field: &str| last[field].as_str().unwrap_or_default().to_owned();
        let reasoning = match text("reasoning_content") {
            none if none.is_empty() => text("reasoning"),
            reasoning => reasoning,
        };
        let content = text("content");
        let tagged = content.contains(THINK_OPEN) || content.contains(THINK_CLOSE);
        if last["role"] == "assistant" && (tagged || !reasoning.is_empty()) {
            messages.pop();
            return Ok(Some(Self::Behind { reasoning, content }));
        }
        let Some(Value::String(content)) = last.get_mut("content") else { return Err(no_text()) };
        content.push_str(CONTINUE_HERE);
        Ok(Some(Self::OfTemplate))
    }

    /// `None` when there is reasoning and the prompt opens none.
    fn append_to(self, prompt: String, end: PromptEnd) -> Option<String> {
        let Self::Behind { reasoning, content } = self else { return Some(prompt) };
        if reasoning.is_empty() {
            // The content brings its own tags; those that the prompt ends with make room for an opening one.
            let bare = if content.trim_start().starts_with(THINK_OPEN) {
                without_thinking(&prompt)
            } else {
                &prompt
            };
            return Some(bare.to_owned() + &content);
        }
        if end == PromptEnd::Closed {
            return None;
        }
        let closing = match (content.is_empty(), prompt.ends_with('\n')) {
            (true, _) => String::new(),
            (false, true) => format!("\n{THINK_CLOSE}\n\n"),
            (false, false) => THINK_CLOSE.to_owned(),
        };
        Some(prompt + &reasoning + &closing + &content)
    }
}

/// The prompt without an open `<think>` or an empty pair of tags at its end.
fn without_thinking(prompt: &str) -> &str {
    let bare = prompt.trim_end();
    let bare = bare.strip_suffix(THINK_CLOSE).map_or(bare, str::trim_end);
    bare.strip_suffix(THINK_OPEN).unwrap_or(prompt)
}

/// Puts the block behind the last system message, because templates gather them all or keep the last; where there is none, one is put first.
fn add_tools(input: &mut ChatInput, block: ToolsBlock) -> Result<()> {
    let Some(tools) = input.tools.take().filter(|tools| !tools.is_empty()) else { return Ok(()) };
    let system = input.messages.iter_mut().rfind(|message| message["role"] == "system");
    if let Some(message) = system {
        let text = block.append(message["content"].as_str().unwrap_or_default(), &tools)?;
        message["content"] = Value::String(text);
    } else {
        let message = json!({"role": "system", "content": block.append("", &tools)?});
        input.messages.insert(0, message);
    }
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
