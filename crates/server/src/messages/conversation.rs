//! `system` and `messages` as a chat's messages: blocks are read, turns of one role joined, results put behind the calls that
//! they answer. Must not know any other field.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

use crate::error::{ApiError, shown};
use crate::fields::typed;

/// A conversation as the chat endpoint has it.
pub(super) struct Conversation {
    pub(super) messages: Vec<Value>,
    /// The reply goes on with the last message.
    pub(super) continues: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    System,
    User,
    Assistant,
}

/// What neighbouring messages of one role say.
struct Turn {
    role: Role,
    texts: Vec<String>,
    thoughts: Vec<String>,
    calls: Vec<Call>,
    results: Vec<Outcome>,
}

/// A call that the assistant made.
struct Call {
    /// Where in the request.
    at: String,
    id: String,
    name: String,
    input: Map<String, Value>,
}

/// What a call brought.
struct Outcome {
    at: String,
    call_id: String,
    content: String,
}

/// Reads `system` and `messages`.
pub(super) fn read(system: Option<Value>, messages: Vec<Value>) -> Result<Conversation, ApiError> {
    let mut turns: Vec<Turn> = Vec::new();
    for (i, message) in messages.into_iter().enumerate() {
        read_message(&format!("messages.{i}"), message, &mut turns)?;
    }
    turns.pop_if(|turn| {
        turn.role == Role::Assistant && turn.calls.is_empty() && turn.text().trim().is_empty()
    });
    if turns.is_empty() {
        return Err(ApiError::bad_field("messages", "empty; at least one message is needed"));
    }
    let mut chat = Vec::with_capacity(turns.len() + 1);
    if let Some(system) = system {
        let text = read_texts("system", system)?;
        if !text.is_empty() {
            chat.push(json!({ "role": "system", "content": text }));
        }
    }
    let continues = turns.last().is_some_and(|turn| turn.role == Role::Assistant);
    let mut unanswered = Vec::new();
    for turn in turns {
        unanswered = turn.say(unanswered, &mut chat)?;
    }
    all_answered(&unanswered)?;
    Ok(Conversation { messages: chat, continues })
}

impl Turn {
    fn new(role: Role) -> Self {
        Self { role, texts: Vec::new(), thoughts: Vec::new(), calls: Vec::new(), results: Vec::new() }
    }

    fn text(&self) -> String {
        self.texts.join("\n")
    }

    /// Adds the chat's messages; `unanswered` are the calls of the turn before. Gives this turn's.
    fn say(self, unanswered: Vec<Call>, chat: &mut Vec<Value>) -> Result<Vec<Call>, ApiError> {
        let content = self.text();
        if self.role != Role::User {
            all_answered(&unanswered)?;
        }
        match self.role {
            Role::System => chat.push(json!({ "role": "system", "content": content })),
            Role::User => {
                let had_results = !self.results.is_empty();
                answer(unanswered, self.results, chat)?;
                if !had_results || !self.texts.is_empty() {
                    chat.push(json!({ "role": "user", "content": content }));
                }
            }
            Role::Assistant => {
                let mut message = json!({ "role": "assistant", "content": content });
                if !self.thoughts.is_empty() {
                    message["reasoning_content"] = self.thoughts.join("\n").into();
                }
                if !self.calls.is_empty() {
                    message["tool_calls"] = self.calls.iter().map(Call::as_chat).collect();
                }
                chat.push(message);
                return Ok(self.calls);
            }
        }
        Ok(Vec::new())
    }
}

impl Call {
    fn as_chat(&self) -> Value {
        let function = json!({ "name": self.name, "arguments": self.input });
        json!({ "id": self.id, "type": "function", "function": function })
    }
}

fn all_answered(calls: &[Call]) -> Result<(), ApiError> {
    match calls.first() {
        None => Ok(()),
        Some(Call { at, id, .. }) => {
            let problem =
                format!("the next message, a user's, must hold a `tool_result` for {:?}", shown(id));
            Err(ApiError::bad_field(at.clone(), problem))
        }
    }
}

/// Adds the results in the order of the calls; each call has one.
fn answer(calls: Vec<Call>, results: Vec<Outcome>, chat: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut by_id: HashMap<String, String> = HashMap::with_capacity(results.len());
    let mut known = HashSet::with_capacity(calls.len());
    if let Some(Call { at, id, .. }) = calls.iter().find(|call| !known.insert(call.id.as_str())) {
        let problem = format!("{:?} is another call's id", shown(id));
        return Err(ApiError::bad_field(format!("{at}.id"), problem));
    }
    for Outcome { at, call_id, content } in results {
        let refuse = |id: &str, problem: &str| {
            Err(ApiError::bad_field(format!("{at}.tool_use_id"), format_args!("{:?}: {problem}", shown(id))))
        };
        if !known.contains(call_id.as_str()) {
            return refuse(&call_id, "the message before holds no `tool_use` with this `id`");
        }
        match by_id.entry(call_id) {
            Entry::Occupied(taken) => return refuse(taken.key(), "this call has a result already"),
            Entry::Vacant(free) => free.insert(content),
        };
    }
    for call in calls {
        let Some(content) = by_id.remove(&call.id) else { return all_answered(&[call]) };
        chat.push(json!({ "role": "tool", "tool_call_id": call.id, "name": call.name, "content": content }));
    }
    Ok(())
}

fn read_message(at: &str, message: Value, turns: &mut Vec<Turn>) -> Result<(), ApiError> {
    let mut message: Map<String, Value> = typed(at.to_owned(), message)?;
    let role = message.remove("role").unwrap_or(Value::Null);
    let role = match role.as_str() {
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some("system") => Role::System,
        _ => {
            return Err(ApiError::bad_field(
                format!("{at}.role"),
                "must be \"user\", \"assistant\" or \"system\"",
            ));
        }
    };
    if turns.last().is_none_or(|turn| turn.role != role) {
        turns.push(Turn::new(role));
    }
    let turn = turns.last_mut().expect("one was just pushed");
    let at = format!("{at}.content");
    match message.remove("content").unwrap_or(Value::Null) {
        Value::String(text) => turn.texts.push(text),
        Value::Array(blocks) => {
            for (j, block) in blocks.into_iter().enumerate() {
                read_block(format!("{at}.{j}"), block, turn)?;
            }
        }
        Value::Null => return Err(ApiError::bad_field(at, "missing; this field is required")),
        _ => return Err(ApiError::bad_field(at, "must be a string or a list of blocks")),
    }
    Ok(())
}

fn read_block(at: String, block: Value, turn: &mut Turn) -> Result<(), ApiError> {
    let mut block: Map<String, Value> = typed(at.clone(), block)?;
    let kind = block_type(&at, &block)?;
    match (&*kind, turn.role) {
        ("text", _) => turn.texts.push(string(&at, &mut block, "text")?),
        ("thinking", Role::Assistant) => turn.thoughts.push(string(&at, &mut block, "thinking")?),
        // Encrypted by whoever made it.
        ("redacted_thinking", Role::Assistant) => {}
        ("tool_use", Role::Assistant) => {
            let (id, name) = (string(&at, &mut block, "id")?, string(&at, &mut block, "name")?);
            if name.is_empty() {
                return Err(ApiError::bad_field(format!("{at}.name"), "must be the called tool's name"));
            }
            let input = block.remove("input").unwrap_or(Value::Null);
            let input = typed(format!("{at}.input"), input)?;
            turn.calls.push(Call { at, id, name, input });
        }
        ("tool_result", Role::User) => {
            let call_id = string(&at, &mut block, "tool_use_id")?;
            let mut content = match block.remove("content") {
                None | Some(Value::Null) => String::new(),
                Some(content) => read_texts(&format!("{at}.content"), content)?,
            };
            let failed = block.remove("is_error").filter(|value| !value.is_null());
            let failed = failed.map_or(Ok(false), |failed| typed(format!("{at}.is_error"), failed))?;
            // Templates know no other way to say it.
            if failed && !content.to_ascii_lowercase().starts_with("error") {
                content = if content.is_empty() { "Error".to_owned() } else { format!("Error: {content}") };
            }
            turn.results.push(Outcome { at, call_id, content });
        }
        ("thinking" | "redacted_thinking" | "tool_use", _) => {
            let problem = format!("blocks of type {kind:?} stand in messages of the assistant");
            return Err(ApiError::bad_field(at, problem));
        }
        ("tool_result", _) => {
            let problem = "blocks of type \"tool_result\" stand in messages of the user";
            return Err(ApiError::bad_field(at, problem));
        }
        _ => return Err(unreadable(at, &kind)),
    }
    Ok(())
}

/// A string, or text blocks, which are joined by line breaks.
fn read_texts(at: &str, value: Value) -> Result<String, ApiError> {
    let blocks = match value {
        Value::String(text) => return Ok(text),
        Value::Array(blocks) => blocks,
        _ => return Err(ApiError::bad_field(at.to_owned(), "must be a string or a list of text blocks")),
    };
    let mut texts = Vec::with_capacity(blocks.len());
    for (i, block) in blocks.into_iter().enumerate() {
        let at = format!("{at}.{i}");
        let mut block: Map<String, Value> = typed(at.clone(), block)?;
        let kind = block_type(&at, &block)?;
        if kind != "text" {
            return Err(unreadable(at, &kind));
        }
        texts.push(string(&at, &mut block, "text")?);
    }
    Ok(texts.join("\n"))
}

fn block_type(at: &str, block: &Map<String, Value>) -> Result<String, ApiError> {
    let kind = block.get("type").and_then(Value::as_str).map(str::to_owned);
    kind.ok_or_else(|| ApiError::bad_field(format!("{at}.type"), "must be the block's type, as \"text\""))
}

fn string(at: &str, block: &mut Map<String, Value>, field: &str) -> Result<String, ApiError> {
    match block.remove(field) {
        None | Some(Value::Null) => {
            Err(ApiError::bad_field(format!("{at}.{field}"), "missing; this field is required"))
        }
        Some(value) => typed(format!("{at}.{field}"), value),
    }
}

fn unreadable(at: String, kind: &str) -> ApiError {
    let kind = shown(kind);
    ApiError::bad_field(at, format_args!("blocks of type {kind:?} cannot be read; this model reads text"))
}
