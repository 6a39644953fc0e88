//! A request to `/v1/responses`: what is its own is read here, the rest becomes a request to the chat endpoint. Must not
//! know the engine.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::item::{self, Item, ItemStatus, Said, Sent};
use super::store::{Owner, Segment, Store};
use super::{Ids, not_found};
use crate::error::{ApiError, shown};
use crate::fields::{Fields, NOT_YET, NOT_YET_CHAT, NotYet, typed};
use crate::types::chat::ChatRequest;
use crate::types::value::must_be;

/// Most alternatives that OpenAI gives per token.
const MAX_TOP_LOGPROBS: u32 = 20;
const MAX_METADATA_PAIRS: usize = 16;
const MAX_METADATA_KEY_CHARS: usize = 64;
const MAX_METADATA_VALUE_CHARS: usize = 512;
const MAX_FORMAT_NAME_BYTES: usize = 64;

const fn row(name: &'static str, neutral: &'static [&'static str], way_out: &'static str) -> NotYet {
    NotYet { name, neutral, way_out }
}

/// Fields of this endpoint that are refused, and the chat endpoint's that are called otherwise here.
const REFUSED: &[NotYet] = &[
    row("background", &["false"], "leave it out and wait for the reply, or read it with `stream: true`"),
    row("conversation", &[], "continue a response with `previous_response_id`"),
    row("prompt", &[], "send the text itself as `instructions` and `input`"),
    row("truncation", &[r#""disabled""#], "`truncate_prompt_tokens` keeps a prompt's end"),
    row("context_management", &["[]"], "send fewer items"),
    row("messages", &["[]"], "use `input`"),
    row("max_tokens", &[], "use `max_output_tokens`"),
    row("max_completion_tokens", &[], "use `max_output_tokens`"),
    row("response_format", &[], "use `text.format`"),
    row("logprobs", &["false"], "use `include: [\"message.output_text.logprobs\"]`"),
    row("n", &["1"], "a response is one reply; send several requests"),
    row("best_of", &["1"], "a response is one reply; send several requests"),
    row("echo", &["false"], "it belongs to /v1/chat/completions"),
    row("continue_final_message", &["false"], "it belongs to /v1/chat/completions"),
    row("add_generation_prompt", &["true"], "it belongs to /v1/chat/completions"),
    row("separate_reasoning", &["true"], "reasoning is an item of its own here"),
    row("prompt_logprobs", &["false"], "it belongs to /v1/chat/completions"),
];

/// Fields that mean here what they mean to the chat endpoint.
const SHARED: &[&str] = &[
    "model",
    "stream",
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "bad_words",
    "allowed_token_ids",
    "truncate_prompt_tokens",
    "return_tokens_as_token_ids",
    "priority",
    "cache_salt",
    "chat_template_kwargs",
    "enable_thinking",
    "thinking",
    "thinking_budget",
    "thinking_token_budget",
    "reasoning_effort",
    "include_reasoning",
    "structured_outputs",
    "guided_json",
    "json_schema",
    "guided_regex",
    "regex",
    "guided_grammar",
    "ebnf",
    "grammar",
    "guided_choice",
    "guided_json_object",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
];

/// What can be asked to be included. What encrypted reasoning is for, sending it back, its plain text does.
const INCLUDABLE: [&str; 2] = ["message.output_text.logprobs", "reasoning.encrypted_content"];

/// A request, read.
pub(crate) struct Asked {
    pub(crate) chat: ChatRequest,
    /// Its own items.
    pub(crate) items: Vec<Item>,
    /// The conversation that it continues.
    pub(crate) parent: Option<Arc<Segment>>,
    pub(crate) store: bool,
    /// What the reply repeats.
    pub(crate) echo: Map<String, Value>,
}

/// Where items and responses that a request speaks of are found.
pub(crate) struct Known<'a> {
    pub(crate) store: &'a Store,
    pub(crate) owner: Owner,
    /// Most bytes of items that a request may refer to or continue, as if it had sent them.
    pub(crate) max_bytes: usize,
    /// Most items of a conversation: the model's context, of which each takes a token at least.
    pub(crate) max_items: usize,
}

impl Asked {
    /// Reads a request's fields; its items get ids where they have none.
    pub(crate) fn read(mut fields: Fields, known: &Known<'_>, ids: &mut Ids) -> Result<Self, ApiError> {
        fields.refuse(&[REFUSED, NOT_YET, NOT_YET_CHAT])?;
        let mut chat = Map::new();
        let mut echo = Map::new();
        let previous = fields.take::<String>("previous_response_id")?;
        let parent = match &previous {
            Some(id) => Some(previous_segment(known, id)?),
            None => None,
        };
        let instructions = fields.take::<String>("instructions")?;
        let sent = item::read_input(fields.require("input")?)?;
        check_num_items(known, parent.as_deref(), sent.len())?;
        let chain = parent.as_ref().map_or_else(Vec::new, Segment::chain);
        let items = resolve(known, sent, ids)?;
        let before = || chain.iter().flat_map(|segment| segment.items());
        check_call_outputs(before(), &items)?;
        let messages = item::chat_messages(instructions.as_deref(), before().chain(&items));
        chat.insert("messages".into(), messages.into());

        echo.insert("instructions".into(), instructions.into());
        let max_output_tokens = fields.take::<u64>("max_output_tokens")?;
        if let Some(tokens) = max_output_tokens {
            chat.insert("max_completion_tokens".into(), tokens.into());
        }
        echo.insert("max_output_tokens".into(), max_output_tokens.into());
        echo.insert("max_tool_calls".into(), fields.take::<u32>("max_tool_calls")?.into());
        echo.insert("metadata".into(), read_metadata(&mut fields)?.into());
        let parallel = fields.take::<bool>("parallel_tool_calls")?.unwrap_or(true);
        chat.insert("parallel_tool_calls".into(), parallel.into());
        echo.insert("parallel_tool_calls".into(), parallel.into());
        echo.insert("previous_response_id".into(), previous.into());
        for name in ["prompt_cache_key", "safety_identifier", "user"] {
            echo.insert(name.into(), fields.take::<String>(name)?.into());
        }
        echo.insert("reasoning".into(), read_reasoning(&mut fields, &mut chat)?);
        fields.take::<String>("service_tier")?;
        // There is one.
        echo.insert("service_tier".into(), "default".into());
        let conversation_bytes = parent.as_ref().map_or(0, |parent| parent.chain_bytes())
            + items.iter().map(Item::bytes).sum::<usize>();
        let store = read_store(&mut fields, known, conversation_bytes)?;
        echo.insert("store".into(), store.into());
        echo.insert("text".into(), read_text(&mut fields, &mut chat)?);
        echo.insert("tool_choice".into(), read_tool_choice(&mut fields, &mut chat)?);
        echo.insert("tools".into(), read_tools(&mut fields, &mut chat)?);
        echo.insert("top_logprobs".into(), read_logprobs(&mut fields, &mut chat)?.into());
        echo.insert("truncation".into(), "disabled".into());
        fields.take::<Map<String, Value>>("stream_options")?;
        for name in SHARED {
            if let Some(value) = fields.take::<Value>(name)? {
                chat.insert((*name).into(), value);
            }
        }
        fields.ignore_rest();

        let mut chat = ChatRequest::parse(Fields::of(chat)).map_err(in_our_words)?;
        chat.common.max_tokens_name = "max_output_tokens";
        if let Some(asked) = &mut chat.common.format {
            asked.param = our_name(&asked.param).into_owned();
        }
        Ok(Self { chat, items, parent, store, echo })
    }
}

fn previous_segment(known: &Known<'_>, id: &str) -> Result<Arc<Segment>, ApiError> {
    if let Some(stored) = known.store.get(known.owner, id) {
        let bytes = stored.segment.chain_bytes();
        if bytes > known.max_bytes {
            let problem = format!(
                "its conversation takes {bytes} bytes, more than the {} that a request may have (--max-body-bytes); \
                 begin a new one with the items that are still needed",
                known.max_bytes
            );
            return Err(ApiError::bad_field("previous_response_id", problem));
        }
        return Ok(stored.segment.clone());
    }
    let message = format!("Previous response with id {:?} not found.", shown(id));
    let mut error = not_found("previous_response_id", message);
    if known.store.is_off() {
        error.message.push_str(" This server stores no responses (--max-stored-responses 0).");
    }
    error.code = Some("previous_response_not_found");
    Err(error)
}

fn check_num_items(known: &Known<'_>, parent: Option<&Segment>, num_sent: usize) -> Result<(), ApiError> {
    let num_before = parent.map_or(0, Segment::num_chain_items);
    if num_before + num_sent <= known.max_items {
        return Ok(());
    }
    let before = if num_before == 0 { String::new() } else { format!(" behind {num_before} earlier ones") };
    let problem =
        format!("{num_sent} items{before} cannot fit the model's context of {} tokens", known.max_items);
    Err(ApiError::bad_field("input", problem))
}

/// Gives items their ids, and references their items.
fn resolve(known: &Known<'_>, sent: Vec<Sent>, ids: &mut Ids) -> Result<Vec<Item>, ApiError> {
    let wanted: HashSet<&str> = sent
        .iter()
        .filter_map(|sent| match sent {
            Sent::Reference(id) => Some(id.as_str()),
            Sent::Item { .. } => None,
        })
        .collect();
    let found = known.store.find_items(known.owner, &wanted);
    let mut room = known.max_bytes;
    let mut items = Vec::with_capacity(sent.len());
    for (i, sent) in sent.into_iter().enumerate() {
        items.push(match sent {
            Sent::Item { id, said } => {
                let id = id.unwrap_or_else(|| ids.next(said.id_prefix()));
                Item { id, status: ItemStatus::Completed, said }
            }
            Sent::Reference(id) => {
                let (segment, at) = found.get(&id).ok_or_else(|| {
                    let id = shown(&id);
                    let mut error =
                        ApiError::bad_request(format!("input[{i}].id: Item with id {id:?} not found."));
                    error.param = Some(format!("input[{i}].id"));
                    error
                })?;
                let item = &segment.items()[*at];
                room = room.checked_sub(item.bytes()).ok_or_else(|| {
                    let problem = format!("the items referred to are over {} bytes", known.max_bytes);
                    ApiError::bad_field(format!("input[{i}]"), problem)
                })?;
                item.clone()
            }
        });
    }
    Ok(items)
}

/// What a call gave stands behind the call.
fn check_call_outputs<'a>(before: impl Iterator<Item = &'a Item>, items: &'a [Item]) -> Result<(), ApiError> {
    if !items.iter().any(|item| matches!(item.said, Said::CallOutput { .. })) {
        return Ok(());
    }
    let mut called = HashSet::new();
    let own = items.iter().enumerate().map(|(i, item)| (Some(i), item));
    for (index, item) in before.map(|item| (None, item)).chain(own) {
        match (&item.said, index) {
            (Said::Call { call_id, .. }, _) => {
                called.insert(call_id.as_str());
            }
            (Said::CallOutput { call_id, .. }, Some(i)) if !called.contains(call_id.as_str()) => {
                let problem = format!("no function_call with call_id {:?} stands before it", shown(call_id));
                return Err(ApiError::bad_field(format!("input[{i}].call_id"), problem));
            }
            _ => {}
        }
    }
    Ok(())
}

fn read_metadata(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let metadata = fields.take::<Map<String, Value>>("metadata")?.unwrap_or_default();
    if metadata.len() > MAX_METADATA_PAIRS {
        let problem = format!("{} pairs; at most {MAX_METADATA_PAIRS} are allowed", metadata.len());
        return Err(ApiError::bad_field("metadata", problem));
    }
    for (key, value) in &metadata {
        if key.chars().count() > MAX_METADATA_KEY_CHARS {
            let problem = format!("a key has over {MAX_METADATA_KEY_CHARS} characters");
            return Err(ApiError::bad_field("metadata", problem));
        }
        let at = || format!("metadata.{key}");
        let Value::String(text) = value else {
            return Err(ApiError::bad_field(at(), must_be("a string", value)));
        };
        if text.chars().count() > MAX_METADATA_VALUE_CHARS {
            let problem = format!("has over {MAX_METADATA_VALUE_CHARS} characters");
            return Err(ApiError::bad_field(at(), problem));
        }
    }
    Ok(metadata)
}

/// How hard to think is the chat endpoint's to judge. The reasoning is given as it is, so it has no summary.
fn read_reasoning(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<Value, ApiError> {
    let mut reasoning = fields.take::<Map<String, Value>>("reasoning")?.unwrap_or_default();
    let mut summary = Value::Null;
    for name in ["generate_summary", "summary"] {
        let Some(asked) = reasoning.remove(name).filter(|value| !value.is_null()) else { continue };
        if !matches!(asked.as_str(), Some("auto" | "concise" | "detailed")) {
            let problem = "must be \"auto\", \"concise\" or \"detailed\"";
            return Err(ApiError::bad_field(format!("reasoning.{name}"), problem));
        }
        summary = asked;
    }
    let effort = reasoning.get("effort").cloned().unwrap_or_default();
    if !reasoning.is_empty() {
        chat.insert("reasoning".into(), reasoning.into());
    }
    Ok(json!({ "effort": effort, "summary": summary }))
}

fn read_store(fields: &mut Fields, known: &Known<'_>, conversation_bytes: usize) -> Result<bool, ApiError> {
    let asked = fields.take::<bool>("store")?;
    if asked == Some(true) && known.store.is_off() {
        let problem = "this server stores no responses (--max-stored-responses 0); leave it out";
        return Err(ApiError::bad_field("store", problem));
    }
    let (max_bytes, off) = (known.store.max_conversation_bytes(), known.store.is_off());
    if asked == Some(true) && conversation_bytes > max_bytes {
        let problem = format!(
            "the conversation takes {conversation_bytes} bytes, more than the {max_bytes} that are stored of one; send \
             `store: false`"
        );
        return Err(ApiError::bad_field("store", problem));
    }
    Ok(asked.unwrap_or(true) && !off && conversation_bytes <= max_bytes)
}

/// The form of the answer. Its verbosity is the model's own.
fn read_text(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<Value, ApiError> {
    let mut text = fields.take::<Map<String, Value>>("text")?.unwrap_or_default();
    let mut take = |name: &str| text.remove(name).filter(|value| !value.is_null());
    let verbosity = take("verbosity").unwrap_or_else(|| "medium".into());
    if !matches!(verbosity.as_str(), Some("low" | "medium" | "high")) {
        return Err(ApiError::bad_field("text.verbosity", "must be \"low\", \"medium\" or \"high\""));
    }
    let format = take("format").unwrap_or_else(|| json!({ "type": "text" }));
    let format: Map<String, Value> = typed("text.format", format)?;
    let kind = format.get("type").and_then(Value::as_str).unwrap_or_default();
    let (ours, theirs) = match kind {
        "text" => (json!({ "type": "text" }), None),
        "json_object" => (json!({ "type": "json_object" }), Some(json!({ "type": "json_object" }))),
        "json_schema" => {
            let (ours, theirs) = read_schema_format(format)?;
            (ours, Some(theirs))
        }
        _ => {
            let problem = "must be \"text\", \"json_object\" or \"json_schema\"";
            return Err(ApiError::bad_field("text.format.type", problem));
        }
    };
    if let Some(format) = theirs {
        chat.insert("response_format".into(), format);
    }
    Ok(json!({ "format": ours, "verbosity": verbosity }))
}

/// As the reply repeats it, and as the chat endpoint has it.
fn read_schema_format(mut format: Map<String, Value>) -> Result<(Value, Value), ApiError> {
    let at = |field: &str| format!("text.format.{field}");
    let mut take = |field: &str| format.remove(field).filter(|value| !value.is_null());
    let name = take("name").ok_or_else(|| ApiError::bad_field(at("name"), "missing"))?;
    let name: String = typed(at("name"), name)?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    if name.is_empty() || name.len() > MAX_FORMAT_NAME_BYTES || !name.bytes().all(plain) {
        let problem = format!("must be 1 to {MAX_FORMAT_NAME_BYTES} letters, digits, underscores and dashes");
        return Err(ApiError::bad_field(at("name"), problem));
    }
    let description = match take("description") {
        Some(description) => Value::from(typed::<String>(at("description"), description)?),
        None => Value::Null,
    };
    let strict = take("strict").map_or(Ok(false), |strict| typed::<bool>(at("strict"), strict))?;
    let schema = take("schema").ok_or_else(|| ApiError::bad_field(at("schema"), "missing"))?;
    let schema: Map<String, Value> = typed(at("schema"), schema)?;
    let theirs = json!({ "type": "json_schema", "json_schema": { "name": name, "schema": schema } });
    let ours = json!({
        "type": "json_schema", "name": name, "description": description, "schema": schema, "strict": strict,
    });
    Ok((ours, theirs))
}

fn read_tool_choice(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<Value, ApiError> {
    const FORMS: &str = "must be \"none\", \"auto\", \"required\" or {\"type\": \"function\", \"name\": …}";
    let Some(choice) = fields.take::<Value>("tool_choice")? else { return Ok("auto".into()) };
    let theirs = match &choice {
        Value::String(word) if matches!(word.as_str(), "none" | "auto" | "required") => choice.clone(),
        Value::Object(named) => match named.get("type").and_then(Value::as_str) {
            Some("function") => match named.get("name") {
                Some(Value::String(name)) => json!({ "type": "function", "function": { "name": name } }),
                Some(other) => {
                    return Err(ApiError::bad_field("tool_choice.name", must_be("a string", other)));
                }
                None => return Err(ApiError::bad_field("tool_choice.name", "missing")),
            },
            Some("allowed_tools") => {
                let way_out = "send only the tools that may be called, with \"auto\" or \"required\"";
                return Err(ApiError::not_supported("tool_choice.type", way_out));
            }
            Some(hosted) => return Err(hosted_tool("tool_choice.type".into(), hosted)),
            None => return Err(ApiError::bad_field("tool_choice", FORMS)),
        },
        _ => return Err(ApiError::bad_field("tool_choice", FORMS)),
    };
    chat.insert("tool_choice".into(), theirs);
    Ok(choice)
}

fn read_tools(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<Value, ApiError> {
    let tools = fields.take::<Vec<Value>>("tools")?.unwrap_or_default();
    let (mut ours, mut theirs) = (Vec::with_capacity(tools.len()), Vec::with_capacity(tools.len()));
    for (i, tool) in tools.into_iter().enumerate() {
        let mut tool: Map<String, Value> = typed(format!("tools[{i}]"), tool)?;
        match tool.get("type").and_then(Value::as_str) {
            Some("function") => {}
            Some(hosted) => return Err(hosted_tool(format!("tools[{i}].type"), hosted)),
            None => return Err(ApiError::bad_field(format!("tools[{i}].type"), "must be \"function\"")),
        }
        let mut function = Map::new();
        for name in ["name", "description", "parameters", "strict"] {
            if let Some(value) = tool.remove(name).filter(|value| !value.is_null()) {
                function.insert(name.into(), value);
            }
        }
        let shown = |name: &str| function.get(name).cloned().unwrap_or_default();
        ours.push(json!({
            "type": "function", "name": shown("name"), "description": shown("description"),
            "parameters": shown("parameters"), "strict": function.get("strict").cloned().unwrap_or(false.into()),
        }));
        theirs.push(json!({ "type": "function", "function": function }));
    }
    chat.insert("tools".into(), theirs.into());
    Ok(ours.into())
}

fn hosted_tool(at: String, kind: &str) -> ApiError {
    let kind = shown(kind);
    let way_out = format!("{kind:?} would run on the server, which runs none; offer a function of your own");
    ApiError::not_supported(at, &way_out)
}

fn read_logprobs(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<u32, ApiError> {
    let include = fields.take::<Vec<String>>("include")?.unwrap_or_default();
    for (i, asked) in include.iter().enumerate() {
        if !INCLUDABLE.contains(&asked.as_str()) {
            let asked = shown(asked);
            let way_out =
                format!("{asked:?} belongs to what is not here; {} are there", INCLUDABLE.join(" and "));
            return Err(ApiError::not_supported(format!("include[{i}]"), &way_out));
        }
    }
    let logprobs = include.iter().any(|asked| asked == INCLUDABLE[0]);
    let top = fields.take::<u32>("top_logprobs")?.unwrap_or(0);
    if top > MAX_TOP_LOGPROBS {
        let problem = format!("is {top}; it must be at most {MAX_TOP_LOGPROBS}");
        return Err(ApiError::bad_field("top_logprobs", problem));
    }
    if top > 0 && !logprobs {
        let problem = format!("needs `include: [{:?}]`", INCLUDABLE[0]);
        return Err(ApiError::bad_field("top_logprobs", problem));
    }
    if logprobs {
        chat.insert("logprobs".into(), true.into());
        chat.insert("top_logprobs".into(), top.into());
    }
    Ok(top)
}

/// A complaint of the chat endpoint's, with the field's name here.
pub(crate) fn in_our_words(mut error: ApiError) -> ApiError {
    let Some(param) = error.param.take() else { return error };
    let name = our_name(&param).into_owned();
    if let Some(problem) = error.message.strip_prefix(&param).filter(|problem| problem.starts_with(':')) {
        error.message = format!("{name}{problem}");
    }
    error.param = Some(name);
    error
}

fn our_name(param: &str) -> Cow<'_, str> {
    let format = param.strip_prefix("response_format");
    if let Some(rest) = format.map(|rest| rest.strip_prefix(".json_schema").unwrap_or(rest)) {
        return format!("text.format{rest}").into();
    }
    match param {
        "max_completion_tokens" | "max_tokens" => "max_output_tokens".into(),
        // Its items were read before.
        _ if param.starts_with("messages") => "input".into(),
        _ if param.starts_with("tools[") => param.replacen("].function", "]", 1).into(),
        _ => param.into(),
    }
}
