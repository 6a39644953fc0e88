//! A request's JSON object, taken apart field by field so that every complaint names its field, and the table of fields
//! that are known but whose feature does not exist here yet. Must not know what the fields mean to the engine.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::types::value::Field;

/// A known field that cannot be honoured yet.
///
/// Null and the neutral values ask for nothing and are accepted; anything else is refused, never ignored.
pub(crate) struct NotYet {
    /// The field.
    pub(crate) name: &'static str,
    /// Further values that ask for nothing, as JSON.
    pub(crate) neutral: &'static [&'static str],
    /// Completes "not supported yet; ...".
    pub(crate) way_out: &'static str,
}

const fn row(name: &'static str, neutral: &'static [&'static str], way_out: &'static str) -> NotYet {
    NotYet { name, neutral, way_out }
}

const LEAVE_OUT: &str = "leave it out";
const TEXT_ONLY: &str = "this model reads and writes text";

/// Fields that both endpoints refuse.
pub(crate) const NOT_YET: &[NotYet] = &[
    row("structural_tag", &[], "`tools` with `tool_choice` constrain calls, `response_format` the answer"),
    row("stop_regex", &["[]", r#""""#], "use `stop`"),
    row("no_stop_trim", &["false"], "use `include_stop_str_in_output`"),
    row("use_beam_search", &["false"], "`best_of` gives the likeliest of several draws"),
    row("length_penalty", &["1", "1.0"], LEAVE_OUT),
    row("logits_processors", &["[]"], "`logit_bias`, `bad_words` and `allowed_token_ids` are there"),
    row("custom_logit_processor", &[], "`logit_bias`, `bad_words` and `allowed_token_ids` are there"),
    row("lora_path", &[], LEAVE_OUT),
    row("prompt_embeds", &[], "send `prompt` as text or token ids"),
    row("return_hidden_states", &["false"], LEAVE_OUT),
    row("return_token_ids", &["false"], "`return_tokens_as_token_ids` with `logprobs` shows token ids"),
    row("spaces_between_special_tokens", &["true", "false"], LEAVE_OUT),
    row("kv_transfer_params", &[], LEAVE_OUT),
];

/// Fields of chat that are refused.
pub(crate) const NOT_YET_CHAT: &[NotYet] = &[
    row("functions", &["[]"], "use `tools`"),
    row("function_call", &[r#""none""#, r#""auto""#], "use `tool_choice`"),
    row("stream_reasoning", &["true"], "join the `reasoning_content` of the stream"),
    row("add_special_tokens", &["false"], "the chat template places the special tokens"),
    row("suffix", &[r#""""#], "it belongs to /v1/completions"),
    row("chat_template", &[], "templates come with the model (--chat-template), never with a request"),
    row("documents", &["[]"], "put them into a message"),
    row("modalities", &[r#"["text"]"#], TEXT_ONLY),
    row("audio", &[], TEXT_ONLY),
    row("prediction", &[], LEAVE_OUT),
    row("web_search_options", &[], LEAVE_OUT),
    row("mm_processor_kwargs", &["{}"], TEXT_ONLY),
];

/// Fields of completions that are refused.
pub(crate) const NOT_YET_COMPLETION: &[NotYet] = &[row(
    "add_special_tokens",
    &["true"],
    "send `prompt` as token ids to decide about special tokens yourself",
)];

/// The fields of one request that nobody has asked about yet.
pub(crate) struct Fields {
    map: Map<String, Value>,
}

impl Fields {
    /// Reads a body; it must be one JSON object.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_slice(body).map_err(|e| {
            let mut error = ApiError::bad_request(format!("the body is not valid JSON: {e}"));
            error.param = field_at(body, offset(body, &e));
            if let Some(field) = &error.param {
                error.message = format!("{field}: {}", error.message);
            }
            error
        })?;
        match value {
            Value::Object(map) => Ok(Self { map }),
            _ => Err(ApiError::bad_request("the body must be a JSON object")),
        }
    }

    /// The fields of an object that was read already.
    pub(crate) fn of(map: Map<String, Value>) -> Self {
        Self { map }
    }

    /// A field's value; absent and null are `None`, what `T` cannot be is a 400 that names the field.
    pub(crate) fn take<T: Field>(&mut self, name: &'static str) -> Result<Option<T>, ApiError> {
        match self.map.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => typed(name, value).map(Some),
        }
    }

    /// Whether a field is there and not null.
    pub(crate) fn is_given(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|value| !value.is_null())
    }

    /// As [`take`](Self::take) for a field without which there is no request.
    pub(crate) fn require<T: Field>(&mut self, name: &'static str) -> Result<T, ApiError> {
        self.take(name)?.ok_or_else(|| ApiError::bad_field(name, "missing; this field is required"))
    }

    /// Refuses fields whose feature does not exist yet, unless they ask for nothing.
    pub(crate) fn refuse(&mut self, tables: &[&[NotYet]]) -> Result<(), ApiError> {
        for entry in tables.iter().copied().flatten() {
            let Some(value) = self.map.remove(entry.name) else { continue };
            let neutral = value.is_null()
                || entry
                    .neutral
                    .iter()
                    .any(|text| serde_json::from_str::<Value>(text).is_ok_and(|neutral| neutral == value));
            if !neutral {
                return Err(ApiError::not_supported(entry.name, entry.way_out));
            }
        }
        Ok(())
    }

    /// What nobody has asked about, for another endpoint's request.
    pub(crate) fn into_rest(self) -> Map<String, Value> {
        self.map
    }

    /// Names what is left in the debug log: unknown fields are never an error.
    pub(crate) fn ignore_rest(self) {
        if !self.map.is_empty() {
            let names: Vec<&String> = self.map.keys().collect();
            tracing::debug!(?names, "unknown request fields ignored");
        }
    }
}

/// Where in the body the parser stopped.
fn offset(body: &[u8], error: &serde_json::Error) -> usize {
    let before = body.split_inclusive(|byte| *byte == b'\n').take(error.line().saturating_sub(1));
    before.map(<[u8]>::len).sum::<usize>() + error.column()
}

/// The field of the body's object that holds the byte at `offset`, where its name is a plain one. What stands before
/// `offset` must be JSON.
fn field_at(body: &[u8], offset: usize) -> Option<String> {
    const MAX_NAME_LEN: usize = 64;
    let (mut depth, mut at, mut field) = (0_usize, 0, None);
    // Names stand behind the object's brace and behind its commas, values behind colons.
    let mut name_next = true;
    let body = &body[..offset.min(body.len())];
    while let Some(&byte) = body.get(at) {
        at += 1;
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            // A comma in the last place may be what ended the number that is no JSON.
            b',' if depth == 1 && at < body.len() => (name_next, field) = (true, None),
            b':' if depth == 1 => name_next = false,
            b'"' => {
                let start = at;
                while body.get(at).is_some_and(|byte| *byte != b'"') {
                    at += 1 + usize::from(body[at] == b'\\');
                }
                if depth == 1 && name_next {
                    let name = body.get(start..at).filter(|name| (1..=MAX_NAME_LEN).contains(&name.len()));
                    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
                    let name = name.filter(|name| name.iter().all(plain));
                    field = name.map(|name| String::from_utf8_lossy(name).into_owned());
                }
                at += 1;
            }
            _ => {}
        }
    }
    field.filter(|_| !name_next)
}

/// Reads one value, naming `param` when it is not what it must be.
pub(crate) fn typed<T: Field>(param: impl Into<Cow<'static, str>>, value: Value) -> Result<T, ApiError> {
    T::read(value).map_err(|problem| ApiError::bad_field(param, problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neutral_values_are_json_and_names_are_unique() {
        for endpoint in [NOT_YET_CHAT, NOT_YET_COMPLETION] {
            let mut names = std::collections::BTreeSet::new();
            for entry in NOT_YET.iter().chain(endpoint) {
                assert!(names.insert(entry.name), "{} twice", entry.name);
                for text in entry.neutral {
                    serde_json::from_str::<Value>(text).unwrap_or_else(|e| panic!("{}: {e}", entry.name));
                }
            }
        }
    }

    #[test]
    fn a_wrong_type_names_its_field() {
        let mut fields = Fields::parse(br#"{"temperature":"hot","top_p":null}"#).unwrap();
        assert_eq!(fields.take::<f32>("top_p").unwrap(), None);
        let error = fields.take::<f32>("temperature").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("temperature"));
        assert_eq!(error.message, "temperature: must be a number, not a string");
        assert!(Fields::parse(b"[1]").is_err() && Fields::parse(b"{").is_err());
    }

    #[test]
    fn what_is_no_json_names_the_field_it_stands_in() {
        for (body, field) in [
            (r#"{"temperature": NaN}"#, Some("temperature")),
            (r#"{"a": 1, "top_p": -Infinity, "b": 2}"#, Some("top_p")),
            (r#"{"a": 1, "top_p": 1e999, "b": 2}"#, Some("top_p")),
            (r#"{"a": 1, "top_p": 1e999}"#, Some("top_p")),
            ("{\n \"a\": 1,\n\"n\": +1\n}", Some("n")),
            (r#"{"stop": ["a", "b\"], \" {", NaN]}"#, Some("stop")),
            (r#"{"logit_bias": {"5": NaN}}"#, Some("logit_bias")),
            (r#"{"prompt": "never ends"#, Some("prompt")),
            (r#"{"prompt": "\ud800"}"#, Some("prompt")),
            (r#"{"a": 1, NaN: 2}"#, None),
            (r#"{"odd name": NaN}"#, None),
            ("[NaN]", None),
            ("NaN", None),
            ("", None),
        ] {
            let error = Fields::parse(body.as_bytes()).err().unwrap_or_else(|| panic!("{body} is accepted"));
            assert_eq!(error.param.as_deref(), field, "{body}: {error}");
        }
    }
}
