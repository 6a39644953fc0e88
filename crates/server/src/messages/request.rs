//! A request's fields as those of a chat request, and the way back: whatever is wrong is told under the name that the client
//! gave. Must not know what the fields mean to the engine.

use serde_json::{Map, Value, json};

use super::conversation;
use crate::error::{ApiError, shown};
use crate::fields::{Fields, NotYet, typed};
use crate::types::chat::ChatRequest;

const NO_PLACE: &str = "a message has no place for it; /v1/chat/completions has";
const BY_ITSELF: &str = "a last message of the assistant is continued, any other is answered";

const fn row(name: &'static str, neutral: &'static [&'static str], way_out: &'static str) -> NotYet {
    NotYet { name, neutral, way_out }
}

/// Fields that are refused; those of the chat endpoint would otherwise be passed on.
const REFUSED: &[NotYet] = &[
    row("mcp_servers", &["[]"], "connect to the servers yourself and give their tools as `tools`"),
    row("container", &[], "no code is run here; give `tools` and run them yourself"),
    row("n", &["1"], NO_PLACE),
    row("best_of", &["1"], NO_PLACE),
    row("logprobs", &["false"], NO_PLACE),
    row("top_logprobs", &["0"], NO_PLACE),
    row("prompt_logprobs", &["false"], NO_PLACE),
    row("echo", &["false"], NO_PLACE),
    row("add_generation_prompt", &["true"], BY_ITSELF),
    row("continue_final_message", &["false"], BY_ITSELF),
    row("max_completion_tokens", &[], "use `max_tokens`"),
    row("stop", &["[]"], "use `stop_sequences`"),
    row("parallel_tool_calls", &["true"], "use `tool_choice.disable_parallel_tool_use`"),
];

/// A request that was read.
pub(super) struct Asked {
    pub(super) chat: ChatRequest,
    pub(super) origin: Origin,
}

/// Which of the client's fields some of the chat's came from.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Origin {
    /// Of `response_format`.
    format: Option<&'static str>,
    /// Of `reasoning_effort`.
    effort: bool,
}

/// Reads a request for a message.
pub(super) fn read(body: &[u8]) -> Result<Asked, ApiError> {
    let mut fields = Fields::parse(body)?;
    let max_tokens = fields.require::<u64>("max_tokens")?;
    if max_tokens == 0 {
        return Err(ApiError::bad_field("max_tokens", "is 0; it must be at least 1"));
    }
    let mut chat = Map::new();
    chat.insert("max_tokens".into(), max_tokens.into());
    read_rest(fields, chat)
}

/// Reads a request for a count of tokens. What is over the context is counted too.
pub(super) fn read_to_count(body: &[u8]) -> Result<Asked, ApiError> {
    let mut fields = Fields::parse(body)?;
    // What bounds the reply says nothing about the prompt.
    for field in ["max_tokens", "stream", "truncate_prompt_tokens"] {
        fields.take::<Value>(field)?;
    }
    let mut chat = Map::new();
    chat.insert("truncate_prompt_tokens".into(), (-1).into());
    read_rest(fields, chat)
}

/// `chat` holds what is settled already.
fn read_rest(mut fields: Fields, mut chat: Map<String, Value>) -> Result<Asked, ApiError> {
    fields.refuse(&[REFUSED])?;
    let mut origin = Origin::default();
    let mut put = |field: &str, value: Value| chat.insert(field.to_owned(), value);

    let messages = fields.require::<Vec<Value>>("messages")?;
    let conversation = conversation::read(fields.take("system")?, messages)?;
    put("messages", conversation.messages.into());
    put("continue_final_message", conversation.continues.into());

    if let Some(tools) = fields.take::<Vec<Value>>("tools")? {
        let tools = tools.into_iter().enumerate().map(|(i, tool)| read_tool(i, tool));
        put("tools", Value::Array(tools.collect::<Result<_, _>>()?));
    }
    if let Some(choice) = fields.take::<Map<String, Value>>("tool_choice")? {
        let (choice, parallel) = read_tool_choice(choice)?;
        put("tool_choice", choice);
        put("parallel_tool_calls", parallel.into());
    }
    if let Some(thinking) = fields.take::<Map<String, Value>>("thinking")? {
        if read_display(&thinking)? {
            put("include_reasoning", false.into());
        }
        put("thinking", read_thinking(thinking)?);
    }
    if let Some(stop) = fields.take::<Vec<String>>("stop_sequences")? {
        put("stop", stop.into());
    }
    let mut formats = Vec::new();
    if let Some(mut config) = fields.take::<Map<String, Value>>("output_config")? {
        if let Some(effort) = config.remove("effort").filter(|effort| !effort.is_null()) {
            origin.effort = true;
            put("reasoning_effort", effort);
        }
        if let Some(format) = config.remove("format").filter(|format| !format.is_null()) {
            formats.push(("output_config.format", format));
        }
    }
    if let Some(format) = fields.take::<Value>("output_format")? {
        formats.push(("output_format", format));
    }
    let mut rest = fields.into_rest();
    for (at, format) in formats {
        let other = if origin.format.is_some() {
            origin.format
        } else {
            rest.get("response_format").and(Some("response_format"))
        };
        if let Some(other) = other {
            return Err(ApiError::bad_field(at, format_args!("contradicts `{other}`: a reply has one form")));
        }
        origin.format = Some(at);
        put("response_format", read_format(at, format)?);
    }
    // What was settled overrules the chat's own words for it.
    rest.append(&mut chat);
    let chat = ChatRequest::parse(Fields::of(rest)).map_err(|error| origin.rename(error))?;
    Ok(Asked { chat, origin })
}

/// `{"name", "description", "input_schema"}` as a function.
fn read_tool(index: usize, tool: Value) -> Result<Value, ApiError> {
    let at = format!("tools.{index}");
    let mut tool: Map<String, Value> = typed(at.clone(), tool)?;
    let mut take = |field: &str| tool.remove(field).filter(|value| !value.is_null());
    if let Some(kind) = take("type") {
        let kind: String = typed(format!("{at}.type"), kind)?;
        if kind != "custom" {
            let way_out = format!(
                "{:?} is a tool of Anthropic's; give its `name`, `description` and `input_schema` and run it yourself",
                shown(&kind)
            );
            return Err(ApiError::not_supported(at, &way_out));
        }
    }
    let mut function = Map::new();
    for (theirs, ours, required) in [
        ("name", "name", true),
        ("description", "description", false),
        ("input_schema", "parameters", true),
        ("strict", "strict", false),
    ] {
        match take(theirs) {
            Some(value) => function.insert(ours.into(), value),
            None if required => {
                return Err(ApiError::bad_field(format!("{at}.{theirs}"), "missing; this field is required"));
            }
            None => None,
        };
    }
    Ok(json!({ "type": "function", "function": function }))
}

/// The chat's `tool_choice`, and whether several calls may be made.
fn read_tool_choice(mut choice: Map<String, Value>) -> Result<(Value, bool), ApiError> {
    let mut take = |field: &str| choice.remove(field).filter(|value| !value.is_null());
    let single = take("disable_parallel_tool_use");
    let single = single.map_or(Ok(false), |single| typed("tool_choice.disable_parallel_tool_use", single))?;
    let chat = match take("type").as_ref().and_then(Value::as_str) {
        Some("auto") => json!("auto"),
        Some("any") => json!("required"),
        Some("none") => json!("none"),
        Some("tool") => {
            const AT: &str = "tool_choice.name";
            let name =
                take("name").ok_or_else(|| ApiError::bad_field(AT, "missing; it names the tool to use"))?;
            json!({ "type": "function", "function": { "name": typed::<String>(AT, name)? } })
        }
        _ => {
            let problem = "must be \"auto\", \"any\", \"tool\" or \"none\"";
            return Err(ApiError::bad_field("tool_choice.type", problem));
        }
    };
    Ok((chat, !single))
}

/// The chat endpoint knows Anthropic's object.
fn read_thinking(mut thinking: Map<String, Value>) -> Result<Value, ApiError> {
    const AT: &str = "thinking.type";
    let kind = thinking.remove("type").unwrap_or(Value::Null);
    match kind.as_str() {
        Some("enabled" | "disabled" | "adaptive") => {}
        Some("between_tools") => {
            let way_out = "use \"enabled\", \"disabled\" or \"adaptive\"";
            return Err(ApiError::not_supported(AT, way_out));
        }
        _ => return Err(ApiError::bad_field(AT, "must be \"enabled\", \"disabled\" or \"adaptive\"")),
    }
    let budget = thinking.remove("budget_tokens").unwrap_or(Value::Null);
    Ok(json!({ "type": kind, "budget_tokens": budget }))
}

/// Whether the thinking is to be left out of the reply.
fn read_display(thinking: &Map<String, Value>) -> Result<bool, ApiError> {
    match thinking.get("display").unwrap_or(&Value::Null) {
        Value::Null => Ok(false),
        display if display == "omitted" => Ok(true),
        // There is nothing shorter than the thinking itself.
        display if display == "summarized" => Ok(false),
        _ => Err(ApiError::bad_field("thinking.display", "must be \"summarized\" or \"omitted\"")),
    }
}

/// `{"type": "json_schema", "schema"}` as a `response_format`.
fn read_format(at: &'static str, format: Value) -> Result<Value, ApiError> {
    let mut format: Map<String, Value> = typed(at, format)?;
    if format.get("type").and_then(Value::as_str) != Some("json_schema") {
        return Err(ApiError::bad_field(format!("{at}.type"), "must be \"json_schema\""));
    }
    let schema = format.remove("schema").filter(|schema| !schema.is_null());
    let schema = schema
        .ok_or_else(|| ApiError::bad_field(format!("{at}.schema"), "missing; this field is required"))?;
    Ok(json!({ "type": "json_schema", "json_schema": { "name": "output", "schema": schema } }))
}

impl Origin {
    /// Puts the client's name for a field where the chat's stands.
    pub(super) fn rename(&self, mut error: ApiError) -> ApiError {
        let Some(chat) = error.param.take() else { return error };
        let theirs = self.name(&chat);
        if let Some(problem) = error.message.strip_prefix(&chat) {
            error.message = format!("{theirs}{problem}");
        }
        error.param = Some(theirs);
        error
    }

    fn name(&self, chat: &str) -> String {
        if chat == "stop" {
            return "stop_sequences".to_owned();
        }
        if let Some(format) = self.format.filter(|_| chat.starts_with("response_format")) {
            return format!("{format}.schema");
        }
        if self.effort && chat == "reasoning_effort" {
            return "output_config.effort".to_owned();
        }
        if let Some(place) = chat.strip_prefix("tools[") {
            let place = place.replacen(']', "", 1).replacen(".function.parameters", ".input_schema", 1);
            return format!("tools.{}", place.replacen(".function", "", 1));
        }
        chat.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_name_the_clients_field() {
        let origin = Origin { format: Some("output_format"), effort: true };
        for (chat, theirs) in [
            ("stop", "stop_sequences"),
            ("response_format.json_schema.schema", "output_format.schema"),
            ("reasoning_effort", "output_config.effort"),
            ("tools[12].function.parameters", "tools.12.input_schema"),
            ("tools[0].function.name", "tools.0.name"),
            ("temperature", "temperature"),
        ] {
            let error = origin.rename(ApiError::bad_field(chat, "is wrong"));
            assert_eq!(
                (error.param.as_deref(), &*error.message),
                (Some(theirs), &*format!("{theirs}: is wrong"))
            );
        }
        let mut own = ApiError::bad_request("too long");
        own.param = Some("messages".into());
        assert_eq!(Origin::default().rename(own.clone()), own);
        let plain = Origin::default().rename(ApiError::bad_field("response_format.type", "is wrong"));
        assert_eq!(plain.message, "response_format.type: is wrong");
    }
}
