//! Items of a Responses conversation: what clients send, what replies are made of, what the store keeps, and the messages
//! that the chat template reads. Must not know requests, the engine or the store.

use r1_core::TokenId;
use serde_json::{Map, Value, json};

use crate::decode::{Shown, TokenEntry};
use crate::error::{ApiError, shown};
use crate::fields::typed;

/// Longest id of an item that a client may give.
const MAX_ID_BYTES: usize = 256;
const TEXT_ONLY: &str = "this model reads and writes text";

/// One step of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) id: String,
    pub(crate) status: ItemStatus,
    pub(crate) said: Said,
}

/// How far an item came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ItemStatus {
    InProgress,
    Completed,
    /// The reply was cut off in it.
    Incomplete,
}

/// What an item holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// Texts of its parts.
    Message { role: Speaker, texts: Vec<String> },
    /// The model calls a function; arguments as it wrote them.
    Call { call_id: String, name: String, arguments: String },
    /// What a call gave, the texts of its parts where it was sent in parts.
    CallOutput { call_id: String, texts: Vec<String>, parts: bool },
    /// What the model thought.
    Reasoning { text: String },
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speaker {
    User,
    System,
    Developer,
    Assistant,
}

/// An item as a client sends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// With its id where the client gave one.
    Item { id: Option<String>, said: Said },
    /// One that is stored already.
    Reference(String),
}

impl ItemStatus {
    fn name(self) -> &'static str {
        match self {
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
        }
    }
}

impl Speaker {
    fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::System => "system",
            Self::Developer => "developer",
            Self::Assistant => "assistant",
        }
    }
}

impl Said {
    /// What the ids of such items begin with.
    pub(crate) fn id_prefix(&self) -> &'static str {
        match self {
            Self::Message { .. } => "msg",
            Self::Call { .. } => "fc",
            Self::CallOutput { .. } => "fco",
            Self::Reasoning { .. } => "rs",
        }
    }
}

impl Item {
    /// Memory that it takes, about.
    pub(crate) fn bytes(&self) -> usize {
        let texts = |texts: &[String]| texts.iter().map(|text| size_of::<String>() + text.len()).sum();
        let said: usize = match &self.said {
            Said::Message { texts: all, .. } => texts(all),
            Said::Call { call_id, name, arguments } => call_id.len() + name.len() + arguments.len(),
            Said::CallOutput { call_id, texts: all, .. } => call_id.len() + texts(all),
            Said::Reasoning { text } => text.len(),
        };
        size_of::<Self>() + self.id.len() + said
    }

    /// As the API shows it.
    pub(crate) fn json(&self) -> Value {
        self.json_with(&[])
    }

    /// As the API shows it, with the log-probabilities of a message's only text.
    pub(crate) fn json_with(&self, logprobs: &[Value]) -> Value {
        let (id, status) = (&self.id, self.status.name());
        match &self.said {
            Said::Message { role, texts } => {
                let content: Vec<Value> =
                    texts.iter().map(|text| message_part(*role, text, logprobs)).collect();
                json!({ "id": id, "type": "message", "status": status, "role": role.name(), "content": content })
            }
            Said::Call { call_id, name, arguments } => json!({
                "id": id, "type": "function_call", "status": status,
                "call_id": call_id, "name": name, "arguments": arguments,
            }),
            Said::CallOutput { call_id, texts, parts } => {
                let output = if *parts {
                    texts.iter().map(|text| message_part(Speaker::User, text, &[])).collect()
                } else {
                    Value::from(texts.concat())
                };
                json!({
                    "id": id, "type": "function_call_output", "status": status,
                    "call_id": call_id, "output": output,
                })
            }
            Said::Reasoning { text } => json!({
                "id": id, "type": "reasoning", "status": status, "summary": [],
                "content": [{ "type": "reasoning_text", "text": text }], "encrypted_content": null,
            }),
        }
    }

    /// As a stream shows it when it begins: texts come as parts of their own.
    pub(crate) fn json_opening(&self) -> Value {
        let mut json = self.json();
        if let Some(content) = json.get_mut("content") {
            *content = json!([]);
        }
        json
    }
}

/// A text of a message.
pub(crate) fn message_part(role: Speaker, text: &str, logprobs: &[Value]) -> Value {
    match role {
        Speaker::Assistant => {
            json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": logprobs })
        }
        _ => json!({ "type": "input_text", "text": text }),
    }
}

/// A token's log-probability as output texts have it.
pub(crate) fn logprob(entry: &TokenEntry) -> Value {
    let one = |shown: &Shown| {
        let Shown { token: TokenId(_), name, bytes, logprob } = shown;
        json!({ "token": name, "bytes": bytes, "logprob": logprob })
    };
    let mut drawn = one(&entry.drawn);
    drawn["top_logprobs"] = entry.top.iter().map(one).collect();
    drawn
}

/// A conversation as `messages` of the chat endpoint: an assistant's reasoning, text and calls are one message there.
pub(crate) fn chat_messages<'a>(
    instructions: Option<&str>,
    items: impl Iterator<Item = &'a Item>,
) -> Vec<Value> {
    let mut messages: Vec<Map<String, Value>> = Vec::new();
    if let Some(instructions) = instructions {
        begin(&mut messages, "system", instructions.to_owned());
    }
    // How much of an assistant's last message is there.
    let mut assistant = Assistant::Over;
    for item in items {
        let goes_on = match &item.said {
            Said::Call { .. } => !matches!(assistant, Assistant::Over),
            Said::Reasoning { .. } | Said::Message { role: Speaker::Assistant, .. } => {
                matches!(assistant, Assistant::Thinks)
            }
            // Others begin their own.
            Said::Message { .. } | Said::CallOutput { .. } => true,
        };
        if !goes_on {
            begin(&mut messages, "assistant", String::new());
        }
        match &item.said {
            Said::Message { role: Speaker::Assistant, texts } => {
                last(&mut messages).insert("content".into(), texts.join("\n").into());
                assistant = Assistant::Speaks;
            }
            Said::Reasoning { text } => {
                match last(&mut messages).entry("reasoning_content").or_insert_with(|| "".into()) {
                    Value::String(thoughts) if !thoughts.is_empty() => {
                        thoughts.push('\n');
                        thoughts.push_str(text);
                    }
                    thoughts => *thoughts = text.as_str().into(),
                }
                assistant = Assistant::Thinks;
            }
            Said::Call { call_id, name, arguments } => {
                let function = json!({ "name": name, "arguments": arguments });
                let call = json!({ "id": call_id, "type": "function", "function": function });
                let calls = last(&mut messages).entry("tool_calls").or_insert_with(|| json!([]));
                if let Value::Array(calls) = calls {
                    calls.push(call);
                }
                assistant = Assistant::Speaks;
            }
            Said::Message { role, texts } => {
                begin(&mut messages, role.name(), texts.join("\n"));
                assistant = Assistant::Over;
            }
            Said::CallOutput { call_id, texts, .. } => {
                let message = begin(&mut messages, "tool", texts.join("\n"));
                message.insert("tool_call_id".into(), call_id.as_str().into());
                assistant = Assistant::Over;
            }
        }
    }
    messages.into_iter().map(Value::Object).collect()
}

/// How an assistant's last message may go on.
#[derive(Clone, Copy, Debug)]
enum Assistant {
    /// Not at all: somebody else spoke, or nobody.
    Over,
    /// With anything: it holds thoughts so far.
    Thinks,
    /// With calls.
    Speaks,
}

fn last(messages: &mut [Map<String, Value>]) -> &mut Map<String, Value> {
    messages.last_mut().expect("a message was begun")
}

fn begin<'m>(
    messages: &'m mut Vec<Map<String, Value>>,
    role: &str,
    content: String,
) -> &'m mut Map<String, Value> {
    messages.push(Map::from_iter([("role".into(), role.into()), ("content".into(), content.into())]));
    last(messages)
}

/// Reads `input`.
pub(crate) fn read_input(input: Value) -> Result<Vec<Sent>, ApiError> {
    match input {
        Value::String(text) => {
            let said = Said::Message { role: Speaker::User, texts: vec![text] };
            Ok(vec![Sent::Item { id: None, said }])
        }
        Value::Array(items) => {
            items.into_iter().enumerate().map(|(i, item)| read_item(&format!("input[{i}]"), item)).collect()
        }
        _ => Err(ApiError::bad_field("input", "must be a string or a list of items")),
    }
}

fn read_item(at: &str, item: Value) -> Result<Sent, ApiError> {
    let mut item: Map<String, Value> = typed(at.to_owned(), item)?;
    let kind = match item.remove("type").filter(|kind| !kind.is_null()) {
        Some(kind) => typed::<String>(format!("{at}.type"), kind)?,
        None if item.contains_key("role") => "message".to_owned(),
        None if item.contains_key("id") => "item_reference".to_owned(),
        None => return Err(ApiError::bad_field(format!("{at}.type"), "missing")),
    };
    let mut fields = ItemFields { at, item };
    let id = fields.id()?;
    let said = match kind.as_str() {
        "message" => fields.message()?,
        "function_call" => Said::Call {
            call_id: fields.text("call_id")?,
            name: fields.text("name")?,
            arguments: fields.text("arguments")?,
        },
        "function_call_output" => fields.call_output()?,
        "reasoning" => fields.reasoning()?,
        "item_reference" => {
            let id = id.ok_or_else(|| ApiError::bad_field(format!("{at}.id"), "missing"))?;
            return Ok(Sent::Reference(id));
        }
        _ => {
            let way_out =
                "items are message, function_call, function_call_output, reasoning and item_reference";
            let mut error = ApiError::not_supported(format!("{at}.type"), way_out);
            error.message = format!("{at}.type: items of type {:?} cannot be read; {way_out}", shown(&kind));
            return Err(error);
        }
    };
    Ok(Sent::Item { id, said })
}

/// One item's fields that nobody has asked about yet.
struct ItemFields<'a> {
    at: &'a str,
    item: Map<String, Value>,
}

impl ItemFields<'_> {
    fn take(&mut self, field: &str) -> Option<Value> {
        self.item.remove(field).filter(|value| !value.is_null())
    }

    fn require(&mut self, field: &str) -> Result<(String, Value), ApiError> {
        let at = format!("{}.{field}", self.at);
        match self.take(field) {
            Some(value) => Ok((at, value)),
            None => Err(ApiError::bad_field(at, "missing")),
        }
    }

    fn text(&mut self, field: &str) -> Result<String, ApiError> {
        let (at, value) = self.require(field)?;
        let text: String = typed(at.clone(), value)?;
        // Templates and clients tell calls apart by them.
        if text.is_empty() && field != "arguments" {
            return Err(ApiError::bad_field(at, "empty"));
        }
        Ok(text)
    }

    fn id(&mut self) -> Result<Option<String>, ApiError> {
        let at = format!("{}.id", self.at);
        let Some(id) = self.take("id") else { return Ok(None) };
        let id: String = typed(at.clone(), id)?;
        if id.is_empty() || id.len() > MAX_ID_BYTES || !id.bytes().all(|byte| byte.is_ascii_graphic()) {
            let problem = format!("must be 1 to {MAX_ID_BYTES} printable ASCII characters");
            return Err(ApiError::bad_field(at, problem));
        }
        Ok(Some(id))
    }

    fn message(&mut self) -> Result<Said, ApiError> {
        let (at, role) = self.require("role")?;
        let role = match typed::<String>(at.clone(), role)?.as_str() {
            "user" => Speaker::User,
            "system" => Speaker::System,
            "developer" => Speaker::Developer,
            "assistant" => Speaker::Assistant,
            other => {
                let problem =
                    format!("is {:?}; it must be user, system, developer or assistant", shown(other));
                return Err(ApiError::bad_field(at, problem));
            }
        };
        let (at, content) = self.require("content")?;
        let (texts, _) = read_texts(&at, content)?;
        Ok(Said::Message { role, texts })
    }

    fn call_output(&mut self) -> Result<Said, ApiError> {
        let call_id = self.text("call_id")?;
        let (at, output) = self.require("output")?;
        let (texts, parts) = read_texts(&at, output)?;
        Ok(Said::CallOutput { call_id, texts, parts })
    }

    /// A summary is not what was thought, so it is left out.
    fn reasoning(&mut self) -> Result<Said, ApiError> {
        if self.take("encrypted_content").is_some() {
            return Err(ApiError::not_supported(
                format!("{}.encrypted_content", self.at),
                "this server did not write it; send the reasoning's `content`",
            ));
        }
        let at = format!("{}.content", self.at);
        let parts: Vec<Value> =
            self.take("content").map_or(Ok(Vec::new()), |parts| typed(at.clone(), parts))?;
        let texts = parts.into_iter().enumerate().map(|(i, part)| read_part(&format!("{at}[{i}]"), part));
        Ok(Said::Reasoning { text: texts.collect::<Result<Vec<_>, _>>()?.join("\n") })
    }
}

/// Texts, and whether they came in parts.
fn read_texts(at: &str, content: Value) -> Result<(Vec<String>, bool), ApiError> {
    match content {
        Value::String(text) => Ok((vec![text], false)),
        Value::Array(parts) => {
            let read = |(i, part)| read_part(&format!("{at}[{i}]"), part);
            Ok((parts.into_iter().enumerate().map(read).collect::<Result<_, _>>()?, true))
        }
        _ => Err(ApiError::bad_field(at.to_owned(), "must be a string or a list of parts")),
    }
}

fn read_part(at: &str, part: Value) -> Result<String, ApiError> {
    let mut part: Map<String, Value> = typed(at.to_owned(), part)?;
    let kind = part.get("type").and_then(Value::as_str).unwrap_or_default();
    let field = match kind {
        "input_text" | "output_text" | "text" | "reasoning_text" => "text",
        "refusal" => "refusal",
        _ => {
            let problem = format!("parts of type {:?} cannot be read; {TEXT_ONLY}", shown(kind));
            return Err(ApiError::bad_field(at.to_owned(), problem));
        }
    };
    let text = part.remove(field).ok_or_else(|| ApiError::bad_field(format!("{at}.{field}"), "missing"))?;
    typed(format!("{at}.{field}"), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(input: Value) -> Vec<Item> {
        let item = |sent| match sent {
            Sent::Item { id, said } => {
                Item { id: id.unwrap_or_default(), status: ItemStatus::Completed, said }
            }
            Sent::Reference(id) => panic!("{id}"),
        };
        read_input(input).unwrap().into_iter().map(item).collect()
    }

    #[test]
    fn an_assistants_items_are_one_message() {
        let call = |id: &str| json!({"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"});
        let input = json!([
            {"role": "user", "content": "hi"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "why"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "well"}]},
            call("a"),
            call("b"),
            {"type": "function_call_output", "call_id": "a", "output": "1"},
            {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "2"}]},
            {"role": "assistant", "content": "one"},
            {"role": "assistant", "content": "two"},
        ]);
        let chat_call =
            |id: &str| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}});
        let expected = json!([
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "well", "reasoning_content": "why",
             "tool_calls": [chat_call("a"), chat_call("b")]},
            {"role": "tool", "content": "1", "tool_call_id": "a"},
            {"role": "tool", "content": "2", "tool_call_id": "b"},
            {"role": "assistant", "content": "one"},
            {"role": "assistant", "content": "two"},
        ]);
        assert_eq!(Value::from(chat_messages(Some("be brief"), items(input).iter())), expected);
    }

    #[test]
    fn what_an_item_shows_can_be_sent_back() {
        let input = json!([
            {"type": "message", "role": "developer", "content": "a"},
            {"type": "message", "role": "assistant", "content": [{"type": "text", "text": "b"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": ""},
            {"type": "function_call_output", "call_id": "c", "output": "d"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "e"}]},
            {"type": "reasoning", "id": "rs_1", "content": [{"type": "reasoning_text", "text": "f"}]},
        ]);
        let mut read = items(input);
        for (i, item) in read.iter_mut().enumerate() {
            item.id = format!("id{i}");
        }
        let shown: Value = read.iter().map(Item::json).collect();
        assert_eq!(items(shown), read);
    }
}
