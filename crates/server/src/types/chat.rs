//! `/v1/chat/completions`: its request and its replies. Must not know the engine or the tokenizer.

use serde::Serialize;
use serde_json::{Map, Value};

use super::common::{ChunkUsage, Common, Matched, PromptLogprobs, Usage};
use crate::error::ApiError;
use crate::fields::{Fields, NOT_YET, NOT_YET_CHAT, typed};
use crate::types::thinking::Thinking;
use crate::types::tools::Tools;
use crate::types::value::Field;

/// A chat request whose fields have the right types; ranges are checked where they are converted.
#[expect(clippy::struct_excessive_bools, reason = "the API's own switches, each independent of the others")]
pub(crate) struct ChatRequest {
    pub(crate) common: Common,
    pub(crate) messages: Vec<ChatMessage>,
    pub(crate) logprobs: bool,
    pub(crate) top_logprobs: Option<u32>,
    pub(crate) add_generation_prompt: bool,
    /// The reply goes on with the last message, an assistant's.
    pub(crate) continue_final_message: bool,
    /// The reply begins with the text that it continues.
    pub(crate) echo: bool,
    pub(crate) template_kwargs: Map<String, Value>,
    pub(crate) thinking: Thinking,
    pub(crate) separate_reasoning: bool,
    pub(crate) tools: Tools,
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
    /// What an assistant thought.
    pub(crate) reasoning: Option<String>,
    /// The reply goes on with it.
    pub(crate) prefix: bool,
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
            other => {
                let other: String = other.chars().take(MAX_SHOWN_CHARS).collect();
                Err(format!("is {other:?}; it must be system, developer, user, assistant or tool"))
            }
        }
    }
}

impl ChatRequest {
    /// Reads a request's fields.
    pub(crate) fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        fields.refuse(&[NOT_YET, NOT_YET_CHAT])?;
        let common = Common::take(&mut fields, &["max_completion_tokens", "max_tokens"])?;
        let messages = fields.require::<Vec<Map<String, Value>>>("messages")?;
        check_num_messages(&messages)?;
        let messages = messages
            .into_iter()
            .enumerate()
            .map(|(i, message)| read_message(i, message))
            .collect::<Result<Vec<_>, _>>()?;
        if messages.is_empty() {
            return Err(ApiError::bad_field("messages", "empty; at least one message is needed"));
        }
        let mut template_kwargs: Map<String, Value> =
            fields.take("chat_template_kwargs")?.unwrap_or_default();
        check_kwargs(&template_kwargs)?;
        let thinking = Thinking::take(&mut fields, &mut template_kwargs)?;
        let prefixed = messages.iter().position(|message| message.prefix);
        if let Some(index) = prefixed.filter(|index| index + 1 < messages.len()) {
            let problem = "only the last message can be continued";
            return Err(ApiError::bad_field(format!("messages[{index}].prefix"), problem));
        }
        let continues = fields.take("continue_final_message")?.unwrap_or(false) || prefixed.is_some();
        let generates = fields.take::<bool>("add_generation_prompt")?;
        if continues {
            if generates == Some(true) && prefixed.is_none() {
                let problem = "goes with `add_generation_prompt: false`: a reply begins anew or continues";
                return Err(ApiError::bad_field("continue_final_message", problem));
            }
            if messages.last().is_some_and(|message| message.role != Role::Assistant) {
                let problem = "needs an assistant's message in the last place";
                return Err(ApiError::bad_field("continue_final_message", problem));
            }
        }
        let request = Self {
            common,
            messages,
            logprobs: fields.take("logprobs")?.unwrap_or(false),
            top_logprobs: fields.take("top_logprobs")?,
            add_generation_prompt: generates.unwrap_or(!continues) && !continues,
            continue_final_message: continues,
            echo: fields.take("echo")?.unwrap_or(false),
            template_kwargs,
            thinking,
            separate_reasoning: fields.take("separate_reasoning")?.unwrap_or(true),
            tools: Tools::take(&mut fields)?,
        };
        if request.common.prompt_logprobs.is_some() && request.common.stream {
            return Err(ApiError::bad_field("prompt_logprobs", "cannot be streamed; leave `stream` out"));
        }
        if request.top_logprobs.is_some_and(|n| n > 0) && !request.logprobs {
            return Err(ApiError::bad_field("top_logprobs", "needs `logprobs: true`"));
        }
        fields.ignore_rest();
        Ok(request)
    }
}

/// Most messages and calls of one conversation together; far beyond what a context holds.
const MAX_MESSAGES: usize = 16_384;
/// Most values in `chat_template_kwargs`, and most bytes of its texts.
const MAX_KWARGS: (usize, usize) = (4096, 65_536);
/// A client's word is repeated to it up to here.
const MAX_SHOWN_CHARS: usize = 64;

/// Before they are read one by one.
fn check_num_messages(messages: &[Map<String, Value>]) -> Result<(), ApiError> {
    let calls = messages.iter().filter_map(|message| message.get("tool_calls")?.as_array());
    let num = messages.len() + calls.map(Vec::len).sum::<usize>();
    if num > MAX_MESSAGES {
        let problem = format!("{num} messages and calls; at most {MAX_MESSAGES} are allowed");
        return Err(ApiError::bad_field("messages", problem));
    }
    Ok(())
}

fn check_kwargs(kwargs: &Map<String, Value>) -> Result<(), ApiError> {
    let (mut values, mut bytes) = (0, 0);
    let mut waiting: Vec<&Value> = Vec::new();
    let mut add = |key: &str, value: &Value| {
        values += 1;
        bytes += key.len() + value.as_str().map_or(0, str::len);
        values <= MAX_KWARGS.0 && bytes <= MAX_KWARGS.1
    };
    let mut fits = kwargs.iter().all(|(key, value)| {
        waiting.push(value);
        add(key, value)
    });
    while let Some(value) = waiting.pop().filter(|_| fits) {
        fits = match value {
            Value::Array(items) => items.iter().all(|item| {
                waiting.push(item);
                add("", item)
            }),
            Value::Object(map) => map.iter().all(|(key, value)| {
                waiting.push(value);
                add(key, value)
            }),
            _ => true,
        };
    }
    if fits {
        return Ok(());
    }
    let (values, bytes) = MAX_KWARGS;
    let problem = format!("too large: at most {values} values and {bytes} bytes of text are allowed");
    Err(ApiError::bad_field("chat_template_kwargs", problem))
}

fn read_message(index: usize, mut message: Map<String, Value>) -> Result<ChatMessage, ApiError> {
    let at = |field: &str| format!("messages[{index}].{field}");
    let mut take = |field: &str| message.remove(field).filter(|value| !value.is_null());
    let role = take("role").ok_or_else(|| ApiError::bad_field(at("role"), "missing"))?;
    let role: Role = typed(at("role"), role)?;
    for (field, way_out) in [("audio", "this model reads text"), ("function_call", "use `tool_calls`")] {
        if take(field).is_some() {
            return Err(ApiError::not_supported(at(field), way_out));
        }
    }
    let prefix = take("prefix").map_or(Ok(false), |prefix| typed(at("prefix"), prefix))?;
    if prefix && role != Role::Assistant {
        return Err(ApiError::bad_field(at("prefix"), "only an assistant's message can be continued"));
    }
    let mut reasoning = None;
    for field in ["reasoning", "reasoning_content"] {
        if let Some(text) = take(field).filter(|_| role == Role::Assistant) {
            reasoning = Some(typed::<String>(at(field), text)?);
        }
    }
    let mut tool_calls: Vec<Value> =
        take("tool_calls").map_or(Ok(Vec::new()), |v| typed(at("tool_calls"), v))?;
    if !tool_calls.is_empty() && role != Role::Assistant {
        return Err(ApiError::bad_field(at("tool_calls"), "only an assistant's message calls tools"));
    }
    for (j, call) in tool_calls.iter_mut().enumerate() {
        check_tool_call(&at(&format!("tool_calls[{j}]")), call)?;
    }
    let content = match take("content") {
        Some(content) => read_content(&at("content"), content)?,
        None if role == Role::Assistant => String::new(),
        None => return Err(ApiError::bad_field(at("content"), "missing")),
    };
    let tool_call_id = take("tool_call_id").map(|v| typed(at("tool_call_id"), v)).transpose()?;
    let name = take("name").map(|v| typed(at("name"), v)).transpose()?;
    Ok(ChatMessage { role, content, tool_calls, tool_call_id, name, reasoning, prefix })
}

/// Templates read both and fail in their own words where one is missing.
fn check_tool_call(at: &str, call: &mut Value) -> Result<(), ApiError> {
    if let Some(fields) = call.as_object_mut() {
        let kind = fields.entry("type").or_insert(Value::Null);
        if kind.is_null() {
            *kind = "function".into();
        } else if kind != "function" {
            return Err(ApiError::bad_field(format!("{at}.type"), "must be \"function\""));
        }
    }
    let at = format!("{at}.function");
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
            let kind: String = kind.chars().take(MAX_SHOWN_CHARS).collect();
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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_logprobs: Option<PromptLogprobs>,
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
    /// Null where the message only calls tools.
    pub(crate) content: Option<String>,
    pub(crate) reasoning_content: Option<String>,
    pub(crate) reasoning: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<ToolCall>,
}

/// One call of a tool.
#[derive(Serialize)]
pub(crate) struct ToolCall {
    pub(crate) id: String,
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    pub(crate) function: FunctionCall,
}

/// Which function, and its arguments as the model wrote them.
#[derive(Serialize)]
pub(crate) struct FunctionCall {
    pub(crate) name: String,
    pub(crate) arguments: String,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tool_calls: Option<Vec<CallDelta>>,
}

/// What a call gained: first its id and name, then its arguments piece by piece.
#[derive(Serialize)]
pub(crate) struct CallDelta {
    pub(crate) index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<&'static str>,
    pub(crate) function: CallDeltaFunction,
}

/// A call's function, or more of its arguments.
#[derive(Serialize)]
pub(crate) struct CallDeltaFunction {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    pub(crate) arguments: String,
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
