//! `/v1/completions`: its request and its replies. Must not know the engine or the tokenizer.

use serde::Serialize;
use serde_json::{Map, Value};

use super::common::{ChunkUsage, Common, Matched, PromptLogprobs};
use crate::error::ApiError;
use crate::fields::{Fields, NOT_YET, NOT_YET_COMPLETION};
use crate::types::value::{Field, must_be};

/// A completion request whose fields have the right types.
pub(crate) struct CompletionRequest {
    pub(crate) common: Common,
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) echo: bool,
    pub(crate) logprobs: Option<u32>,
    /// The text behind the hole that is to be filled.
    pub(crate) suffix: Option<String>,
}

/// What to continue.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

struct Prompts(Vec<Prompt>);

impl Field for Prompts {
    fn read(value: Value) -> Result<Self, String> {
        const FORMS: &str = "a string, a list of strings, a list of token ids or a list of such lists";
        let prompts = match value {
            Value::String(text) => vec![Prompt::Text(text)],
            Value::Array(items) => match items.first() {
                None | Some(Value::Number(_)) => vec![Prompt::Tokens(Vec::read(items.into())?)],
                Some(Value::String(_)) => Vec::read(items.into())?.into_iter().map(Prompt::Text).collect(),
                Some(Value::Array(_)) => Vec::read(items.into())?.into_iter().map(Prompt::Tokens).collect(),
                Some(_) => return Err(format!("must be {FORMS}")),
            },
            other => return Err(must_be(FORMS, &other)),
        };
        Ok(Self(prompts))
    }
}

impl CompletionRequest {
    /// Reads a request's fields.
    pub(crate) fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        fields.refuse(&[NOT_YET, NOT_YET_COMPLETION])?;
        let common = Common::take(&mut fields, &["max_tokens"])?;
        let prompts = fields.require::<Prompts>("prompt")?.0;
        let request = Self {
            common,
            prompts,
            echo: fields.take("echo")?.unwrap_or(false),
            logprobs: fields.take("logprobs")?,
            suffix: fields.take::<String>("suffix")?.filter(|suffix| !suffix.is_empty()),
        };
        if request.suffix.is_some() {
            if request.echo {
                return Err(ApiError::bad_field(
                    "suffix",
                    "goes with no `echo`: the prompt is what stands before the hole",
                ));
            }
            if request.prompts.iter().any(|prompt| matches!(prompt, Prompt::Tokens(_))) {
                return Err(ApiError::bad_field("suffix", "needs `prompt` as text"));
            }
        }
        fields.ignore_rest();
        Ok(request)
    }
}

/// The whole reply, or one event of a stream: their shapes are the same.
#[derive(Serialize)]
pub(crate) struct CompletionReply<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) choices: Vec<CompletionChoice>,
    pub(crate) system_fingerprint: Option<&'a str>,
    #[serde(skip_serializing_if = "ChunkUsage::is_absent")]
    pub(crate) usage: ChunkUsage,
}

/// One continuation, or what it gained.
#[derive(Serialize)]
pub(crate) struct CompletionChoice {
    pub(crate) index: usize,
    pub(crate) text: String,
    pub(crate) logprobs: Option<CompletionLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
    pub(crate) stop_reason: Option<Matched>,
    pub(crate) matched_stop: Option<Matched>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_logprobs: Option<PromptLogprobs>,
}

/// Four lists of one length, one entry per token; null for an echoed prompt's first.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct CompletionLogprobs {
    pub(crate) tokens: Vec<String>,
    /// As wide as the numbers of `top_logprobs`, so that the same value is written the same way.
    pub(crate) token_logprobs: Vec<Option<f64>>,
    pub(crate) top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Where each token begins in `text`, in characters.
    pub(crate) text_offset: Vec<usize>,
}
