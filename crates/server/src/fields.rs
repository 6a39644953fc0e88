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
    /// Further values that ask for nothing, as JSON; `*` accepts any value because it has no effect without
    /// the features below.
    pub(crate) neutral: &'static [&'static str],
    /// Completes "not supported yet; ...".
    pub(crate) way_out: &'static str,
}

const fn row(name: &'static str, neutral: &'static [&'static str], way_out: &'static str) -> NotYet {
    NotYet { name, neutral, way_out }
}

const LEAVE_OUT: &str = "leave it out";
const NO_GRAMMAR: &str = "ask for the format in the prompt and leave this field out";

/// Fields that both endpoints refuse.
pub(crate) const NOT_YET: &[NotYet] = &[
    row("suffix", &[r#""""#], LEAVE_OUT),
    row("response_format", &[r#"{"type":"text"}"#], NO_GRAMMAR),
    row("structured_outputs", &["{}"], NO_GRAMMAR),
    row("guided_json", &[], NO_GRAMMAR),
    row("guided_regex", &[], NO_GRAMMAR),
    row("guided_choice", &["[]"], NO_GRAMMAR),
    row("guided_grammar", &[], NO_GRAMMAR),
    row("guided_decoding_backend", &["*"], NO_GRAMMAR),
    row("guided_whitespace_pattern", &["*"], NO_GRAMMAR),
    row("json_schema", &[], NO_GRAMMAR),
    row("regex", &[], NO_GRAMMAR),
    row("ebnf", &[], NO_GRAMMAR),
    row("structural_tag", &[], NO_GRAMMAR),
    row("prompt_logprobs", &["false"], "only generated tokens have log-probabilities"),
    row("truncate_prompt_tokens", &[], "shorten the prompt before sending it"),
    row("allowed_token_ids", &["[]"], "`logit_bias` can forbid single tokens"),
    row("bad_words", &["[]"], "`logit_bias` can forbid single tokens"),
    row("stop_regex", &["[]", r#""""#], "use `stop`"),
    row("no_stop_trim", &["false"], "use `include_stop_str_in_output`"),
    row("use_beam_search", &["false"], LEAVE_OUT),
    row("length_penalty", &["1", "1.0"], LEAVE_OUT),
    row("logits_processors", &["[]"], LEAVE_OUT),
    row("custom_logit_processor", &[], LEAVE_OUT),
    row("cache_salt", &[r#""""#], "the prefix cache is shared by all requests"),
    row("lora_path", &[], LEAVE_OUT),
    row("prompt_embeds", &[], "send `prompt` as text or token ids"),
    row("return_hidden_states", &["false"], LEAVE_OUT),
    row("return_token_ids", &["false"], "`return_tokens_as_token_ids` with `logprobs` shows token ids"),
    row("spaces_between_special_tokens", &["true", "false"], LEAVE_OUT),
    row("kv_transfer_params", &[], LEAVE_OUT),
];

/// Fields of chat that are refused.
pub(crate) const NOT_YET_CHAT: &[NotYet] = &[
    row("tools", &["[]"], r#"leave it out or send `tool_choice: "none"`"#),
    row("tool_choice", &[r#""none""#, r#""auto""#], "leave it out"),
    row("parallel_tool_calls", &["true", "false"], LEAVE_OUT),
    row("functions", &["[]"], LEAVE_OUT),
    row("function_call", &[r#""none""#, r#""auto""#], LEAVE_OUT),
    row("reasoning_effort", &[], "`chat_template_kwargs` or `thinking` switch thinking on and off"),
    row("thinking_budget", &[], "`max_tokens` bounds thinking and answer together"),
    row("reasoning", &["{}"], "`max_tokens` bounds thinking and answer together"),
    row("stream_reasoning", &["true"], LEAVE_OUT),
    row("include_reasoning", &["true"], LEAVE_OUT),
    row("continue_final_message", &["false"], "render the template yourself and use /v1/completions"),
    row("add_special_tokens", &["false"], "the chat template places the special tokens"),
    row("echo", &["false"], LEAVE_OUT),
    row("chat_template", &[], "templates come with the model (--chat-template), never with a request"),
    row("documents", &["[]"], "put them into a message"),
    row("modalities", &[r#"["text"]"#], "this model reads and writes text"),
    row("audio", &[], "this model reads and writes text"),
    row("prediction", &[], LEAVE_OUT),
    row("web_search_options", &[], LEAVE_OUT),
    row("mm_processor_kwargs", &["{}"], "this model reads and writes text"),
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
        let value: Value = serde_json::from_slice(body)
            .map_err(|e| ApiError::bad_request(format!("the body is not valid JSON: {e}")))?;
        match value {
            Value::Object(map) => Ok(Self { map }),
            _ => Err(ApiError::bad_request("the body must be a JSON object")),
        }
    }

    /// A field's value; absent and null are `None`, what `T` cannot be is a 400 that names the field.
    pub(crate) fn take<T: Field>(&mut self, name: &'static str) -> Result<Option<T>, ApiError> {
        match self.map.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => typed(name, value).map(Some),
        }
    }

    /// As [`take`](Self::take) for a field without which there is no request.
    pub(crate) fn require<T: Field>(&mut self, name: &'static str) -> Result<T, ApiError> {
        self.take(name)?.ok_or_else(|| ApiError::bad_field(name, "missing; this field is required"))
    }

    /// Refuses fields whose feature does not exist yet, unless they ask for nothing.
    pub(crate) fn refuse(&mut self, tables: &[&[NotYet]]) -> Result<(), ApiError> {
        // Tools that must not be called change nothing; every other choice needs them.
        if self.map.get("tool_choice").and_then(Value::as_str) == Some("none") {
            self.map.remove("tools");
        }
        for entry in tables.iter().copied().flatten() {
            let Some(value) = self.map.remove(entry.name) else { continue };
            let neutral = value.is_null()
                || entry.neutral.iter().any(|text| {
                    *text == "*" || serde_json::from_str::<Value>(text).is_ok_and(|neutral| neutral == value)
                });
            if !neutral {
                return Err(ApiError::not_supported(entry.name, entry.way_out));
            }
        }
        Ok(())
    }

    /// Names what is left in the debug log: unknown fields are never an error.
    pub(crate) fn ignore_rest(self) {
        if !self.map.is_empty() {
            let names: Vec<&String> = self.map.keys().collect();
            tracing::debug!(?names, "unknown request fields ignored");
        }
    }
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
                for text in entry.neutral.iter().filter(|t| **t != "*") {
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
}
