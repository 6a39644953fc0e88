//! `/v1/chat/completions`: its request and its replies. Must not know the engine or the tokenizer.

use serde::Serialize;
use serde_json::{Map, Value};

use super::common::{ChunkUsage, Common, Matched, Usage};
use crate::error::ApiError;
use crate::fields::{Fields, NOT_YET, NOT_YET_CHAT, typed};
use crate::types::value::{Field, must_be};

/// A chat request whose fields have the right types; ranges are checked where they are converted.
pub(crate) struct ChatRequest {
    pub(crate) common: Common,
    pub(crate) messages: Vec<ChatMessage>,
    pub(crate) logprobs: bool,
    pub(crate) top_logprobs: Option<u32>,
    pub(crate) add_generation_prompt: bool,
    pub(crate) template_kwargs: Map<String, Value>,
    pub(crate) separate_reasoning: bool,
}

/// One message of the conversation.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ChatMessage {
    pub(crate) role: Role,
    /// Text; several parts are joined by line breaks. Empty where an assistant only called tools.
    pub(crate) content: String,
    /// An assistant's calls, as the client sent them.
    pub(crate) tool_calls: Vec<Value>,
    /// Which call a tool's message answers.
    pub(crate) tool_call_id: Option<String>,
    /// Name of the tool or of the speaker.
    pub(crate) name: Option<String>,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    System,
    User,
    Assistant,
    Tool,
}

impl Role {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

impl Field for Role {
    fn read(value: Value) -> Result<Self, String> {
        match String::read(value)?.as_str() {
            "system" | "developer" => Ok(Self::System),
            "user" => Ok(Self::User),
            "assistant" => Ok(Self::Assistant),
            "tool" => Ok(Self::Tool),
            other => Err(format!("is {other:?}; it must be system, developer, user, assistant or tool")),
        }
    }
}

/// Whether the model shall think.
struct Thinking(bool);

impl Field for Thinking {
    fn read(value: Value) -> Result<Self, String> {
        let Some(kind) = value.get("type") else {
            return Err(must_be("an object with a `type`", &value));
        };
        match kind.as_str() {
            Some("enabled") => Ok(Self(true)),
            Some("disabled") => Ok(Self(false)),
            _ => Err("`type` must be \"enabled\" or \"disabled\"".to_owned()),
        }
    }
}

impl ChatRequest {
    /// Reads a request's fields.
    pub(crate) fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        fields.refuse(&[NOT_YET, NOT_YET_CHAT])?;
        let common = Common::take(&mut fields, &["max_completion_tokens", "max_tokens"])?;
        let messages = fields
            .require::<Vec<Map<String, Value>>>("messages")?
            .into_iter()
            .enumerate()
            .map(|(i, message)| read_message(i, message))
            .collect::<Result<Vec<_>, _>>()?;
        if messages.is_empty() {
            return Err(ApiError::bad_field("messages", "empty; at least one message is needed"));
        }
        let mut template_kwargs: Map<String, Value> =
            fields.take("chat_template_kwargs")?.unwrap_or_default();
        settle_thinking(&mut template_kwargs)?;
        if let Some(Thinking(on)) = fields.take("thinking")? {
            for name in THINKING_NAMES {
                if template_kwargs.insert(name.into(), on.into()).is_some_and(|given| given != on) {
                    return Err(ApiError::bad_field("thinking", "contradicts `chat_template_kwargs`"));
                }
            }
        }
        let request = Self {
            common,
            messages,
            logprobs: fields.take("logprobs")?.unwrap_or(false),
            top_logprobs: fields.take("top_logprobs")?,
            add_generation_prompt: fields.take("add_generation_prompt")?.unwrap_or(true),
            template_kwargs,
            separate_reasoning: fields.take("separate_reasoning")?.unwrap_or(true),
        };
        if request.top_logprobs.is_some_and(|n| n > 0) && !request.logprobs {
            return Err(ApiError::bad_field("top_logprobs", "needs `logprobs: true`"));
        }
        fields.ignore_rest();
        Ok(request)
    }
}

/// Templates call the switch `thinking` (DeepSeek) or `enable_thinking` (Qwen).
const THINKING_NAMES: [&str; 2] = ["thinking", "enable_thinking"];

/// Clients do not know which name the template has, so one stands for both.
fn settle_thinking(kwargs: &mut Map<String, Value>) -> Result<(), ApiError> {
    const NAMES: [&str; 2] = THINKING_NAMES;
    kwargs.retain(|name, value| !(NAMES.contains(&name.as_str()) && value.is_null()));
    for name in NAMES {
        if kwargs.get(name).is_some_and(|value| !value.is_boolean()) {
            let param = format!("chat_template_kwargs.{name}");
            return Err(ApiError::bad_field(param, "must be true or false"));
        }
    }
    match NAMES.map(|name| kwargs.get(name).cloned()) {
        [Some(given), None] => _ = kwargs.insert(NAMES[1].into(), given),
        [None, Some(given)] => _ = kwargs.insert(NAMES[0].into(), given),
        [Some(a), Some(b)] if a != b => {
            return Err(ApiError::bad_field(
                "chat_template_kwargs",
                "`thinking` and `enable_thinking` contradict each other",
            ));
        }
        _ => {}
    }
    Ok(())
}

fn read_message(index: usize, mut message: Map<String, Value>) -> Result<ChatMessage, ApiError> {
    let at = |field: &str| format!("messages[{index}].{field}");
    let mut take = |field: &str| message.remove(field).filter(|value| !value.is_null());
    let role = take("role").ok_or_else(|| ApiError::bad_field(at("role"), "missing"))?;
    let role: Role = typed(at("role"), role)?;
    for (field, neutral) in
        [("prefix", Value::Bool(false)), ("audio", Value::Null), ("function_call", Value::Null)]
    {
        if take(field).is_some_and(|value| value != neutral) {
            return Err(ApiError::not_supported(at(field), "leave it out"));
        }
    }
    let tool_calls: Vec<Value> = take("tool_calls").map_or(Ok(Vec::new()), |v| typed(at("tool_calls"), v))?;
    if !tool_calls.is_empty() && role != Role::Assistant {
        return Err(ApiError::bad_field(at("tool_calls"), "only an assistant's message calls tools"));
    }
    for (j, call) in tool_calls.iter().enumerate() {
        check_tool_call(&at(&format!("tool_calls[{j}].function")), call)?;
    }
    let content = match take("content") {
        Some(content) => read_content(&at("content"), content)?,
        None if role == Role::Assistant => String::new(),
        None => return Err(ApiError::bad_field(at("content"), "missing")),
    };
    let tool_call_id = take("tool_call_id").map(|v| typed(at("tool_call_id"), v)).transpose()?;
    let name = take("name").map(|v| typed(at("name"), v)).transpose()?;
    Ok(ChatMessage { role, content, tool_calls, tool_call_id, name })
}

/// Templates read both and fail in their own words where one is missing.
fn check_tool_call(at: &str, call: &Value) -> Result<(), ApiError> {
    let function = &call["function"];
    if function["name"].as_str().is_none_or(str::is_empty) {
        return Err(ApiError::bad_field(format!("{at}.name"), "must be the called function's name"));
    }
    let arguments = &function["arguments"];
    if !arguments.is_string() && !arguments.is_object() {
        return Err(ApiError::bad_field(format!("{at}.arguments"), "must be a string or an object"));
    }
    Ok(())
}

fn read_content(at: &str, content: Value) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        _ => return Err(ApiError::bad_field(at.to_owned(), "must be a string or a list of parts")),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (i, mut part) in parts.into_iter().enumerate() {
        let at = format!("{at}[{i}]");
        let kind = part.get("type").and_then(Value::as_str).unwrap_or_default();
        if kind != "text" {
            let problem = format!("parts of type \"{kind}\" cannot be read; this model reads text");
            return Err(ApiError::bad_field(at, problem));
        }
        match part.get_mut("text").map(Value::take) {
            Some(Value::String(text)) => texts.push(text),
            _ => return Err(ApiError::bad_field(format!("{at}.text"), "must be a string")),
        }
    }
    Ok(texts.join("\n"))
}

/// The whole reply.
#[derive(Serialize)]
pub(crate) struct ChatReply<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) choices: Vec<ChatChoice>,
    pub(crate) usage: Usage,
    pub(crate) system_fingerprint: Option<&'a str>,
}

/// One of `n` replies.
#[derive(Serialize)]
pub(crate) struct ChatChoice {
    pub(crate) index: usize,
    pub(crate) message: ReplyMessage,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: &'static str,
    pub(crate) stop_reason: Option<Matched>,
    pub(crate) matched_stop: Option<Matched>,
}

/// What the model said. Thinking stands under both names that clients read.
#[derive(Serialize)]
pub(crate) struct ReplyMessage {
    pub(crate) role: &'static str,
    pub(crate) content: String,
    pub(crate) reasoning_content: Option<String>,
    pub(crate) reasoning: Option<String>,
}

/// One event of a stream.
#[derive(Serialize)]
pub(crate) struct ChatChunk<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) choices: Vec<ChunkChoice>,
    pub(crate) system_fingerprint: Option<&'a str>,
    #[serde(skip_serializing_if = "ChunkUsage::is_absent")]
    pub(crate) usage: ChunkUsage,
}

/// What one choice gained.
#[derive(Serialize)]
pub(crate) struct ChunkChoice {
    pub(crate) index: usize,
    pub(crate) delta: ChunkDelta,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stop_reason: Option<Matched>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) matched_stop: Option<Matched>,
}

/// The text gained.
#[derive(Default, Serialize)]
pub(crate) struct ChunkDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning: Option<String>,
}

/// One entry per generated token.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<ChatTokenLogprob>,
}

/// A drawn token and its rivals.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct ChatTokenLogprob {
    #[serde(flatten)]
    pub(crate) drawn: TokenLogprob,
    pub(crate) top_logprobs: Vec<TokenLogprob>,
}

/// One token's log-probability.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct TokenLogprob {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    /// The token's bytes; a token need not be whole characters.
    pub(crate) bytes: Vec<u8>,
}
