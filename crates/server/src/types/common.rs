//! Fields that chat and completions share, and usage. Must not know the engine or the tokenizer.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::{Fields, typed};
use crate::types::format::{AskedFormat, take_format};
use crate::types::value::{Field, must_be};

/// Longest string of `stop`: each choice keeps what it needs to find it.
const MAX_STOP_BYTES: usize = 1024;
/// Most ids of `stop_token_ids`.
const MAX_STOP_TOKENS: usize = 1024;
/// Most ids of `logit_bias`.
const MAX_BIASES: usize = 16_384;
/// Most strings of one request's `stop`.
pub(crate) const MAX_STOP_STRINGS: usize = 16;
/// Most strings of `bad_words`.
const MAX_BAD_WORDS: usize = 1024;
/// Longest `cache_salt`; a hash in any notation fits.
pub(crate) const MAX_CACHE_SALT_BYTES: usize = 256;

/// One string or several.
struct OneOrMany(Vec<String>);

impl Field for OneOrMany {
    fn read(value: Value) -> Result<Self, String> {
        match value {
            Value::String(one) => Ok(Self(vec![one])),
            Value::Array(_) => Vec::read(value).map(Self),
            other => Err(must_be("a string or a list of strings", &other)),
        }
    }
}

struct StreamOptions {
    include_usage: bool,
}

impl Field for StreamOptions {
    fn read(value: Value) -> Result<Self, String> {
        let include_usage = match Map::read(value)?.remove("include_usage") {
            None | Some(Value::Null) => false,
            Some(given) => bool::read(given).map_err(|problem| format!("`include_usage` {problem}"))?,
        };
        Ok(Self { include_usage })
    }
}

/// A number, or vLLM's older switch.
fn read_prompt_logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    match fields.take::<Value>("prompt_logprobs")? {
        None | Some(Value::Bool(false)) => Ok(None),
        Some(Value::Bool(true)) => Ok(Some(0)),
        Some(number) => typed("prompt_logprobs", number).map(Some),
    }
}

/// A seed as clients send it: any 64-bit integer; a signed one counts by its bits.
struct Seed(u64);

impl Field for Seed {
    fn read(value: Value) -> Result<Self, String> {
        let signed = i64::read(value.clone()).map(|seed| seed as u64);
        signed.or_else(|_| u64::read(value)).map(Self)
    }
}

/// What both endpoints let a client choose; `None` where the client is silent.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "the API's own switches, each independent of the others")]
pub(crate) struct Common {
    pub(crate) model: Option<String>,
    /// Wide enough that what is over the context is told so.
    pub(crate) max_tokens: Option<u64>,
    /// Under which of its names it was given.
    pub(crate) max_tokens_name: &'static str,
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    /// -1 and 0 keep all.
    pub(crate) top_k: Option<i64>,
    pub(crate) min_p: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) presence_penalty: Option<f32>,
    pub(crate) frequency_penalty: Option<f32>,
    pub(crate) logit_bias: Option<Map<String, Value>>,
    pub(crate) seed: Option<u64>,
    pub(crate) n: usize,
    /// Choices to generate, of which the `n` likeliest are shown.
    pub(crate) best_of: usize,
    pub(crate) format: Option<AskedFormat>,
    pub(crate) allowed_token_ids: Option<Vec<u32>>,
    pub(crate) bad_words: Vec<String>,
    /// Keep this many tokens of the prompt's end; -1 keeps what fits.
    pub(crate) truncate_prompt_tokens: Option<i64>,
    pub(crate) prompt_logprobs: Option<u32>,
    pub(crate) stop: Vec<String>,
    pub(crate) include_stop_str_in_output: bool,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) min_tokens: u32,
    pub(crate) ignore_eos: bool,
    pub(crate) skip_special_tokens: bool,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) return_tokens_as_token_ids: bool,
    pub(crate) priority: i32,
    /// Requests share cached prefixes only with those that have the same one.
    pub(crate) cache_salt: Option<String>,
}

impl Common {
    /// Takes the shared fields out of a request; `max_tokens_names` are tried in order.
    pub(crate) fn take(
        fields: &mut Fields,
        max_tokens_names: &'static [&'static str],
    ) -> Result<Self, ApiError> {
        let (mut max_tokens, mut max_tokens_name) = (None, "max_tokens");
        for name in max_tokens_names {
            let given = fields.take::<u64>(name)?;
            if max_tokens.is_none() && given.is_some() {
                (max_tokens, max_tokens_name) = (given, name);
            }
        }
        let n = fields.take::<usize>("n")?.unwrap_or(1);
        if n == 0 {
            return Err(ApiError::bad_field("n", "is 0; it must be at least 1"));
        }
        let stream = fields.take("stream")?.unwrap_or(false);
        let best_of = fields.take::<usize>("best_of")?.unwrap_or(n);
        if best_of < n {
            return Err(ApiError::bad_field("best_of", format!("is {best_of}; it must be at least n, {n}")));
        }
        if best_of > n && stream {
            let problem = "more than `n` cannot be streamed: which are the best is known at the end";
            return Err(ApiError::bad_field("best_of", problem));
        }
        let prompt_logprobs = read_prompt_logprobs(fields)?;
        let truncate_prompt_tokens = fields.take::<i64>("truncate_prompt_tokens")?;
        if let Some(tokens) = truncate_prompt_tokens.filter(|tokens| *tokens < 1 && *tokens != -1) {
            let problem = format!("is {tokens}; it must be at least 1, or -1 for what fits");
            return Err(ApiError::bad_field("truncate_prompt_tokens", problem));
        }
        let allowed_token_ids = fields.take::<Vec<u32>>("allowed_token_ids")?.filter(|ids| !ids.is_empty());
        let bad_words = fields.take::<Vec<String>>("bad_words")?.unwrap_or_default();
        if bad_words.iter().any(String::is_empty) {
            return Err(ApiError::bad_field("bad_words", "an empty word cannot be kept out"));
        }
        if bad_words.len() > MAX_BAD_WORDS {
            let problem = format!("{} words; at most {MAX_BAD_WORDS} are allowed", bad_words.len());
            return Err(ApiError::bad_field("bad_words", problem));
        }
        let stop = fields.take::<OneOrMany>("stop")?.map_or_else(Vec::new, |stop| stop.0);
        if stop.len() > MAX_STOP_STRINGS {
            let problem = format!("{} strings; at most {MAX_STOP_STRINGS} are allowed", stop.len());
            return Err(ApiError::bad_field("stop", problem));
        }
        if stop.iter().any(String::is_empty) {
            return Err(ApiError::bad_field("stop", "an empty string would stop at once"));
        }
        if let Some(len) = stop.iter().map(String::len).find(|len| *len > MAX_STOP_BYTES) {
            let problem = format!("a string of {len} bytes; at most {MAX_STOP_BYTES} are allowed");
            return Err(ApiError::bad_field("stop", problem));
        }
        let stop_token_ids = fields.take::<Vec<u32>>("stop_token_ids")?.unwrap_or_default();
        if stop_token_ids.len() > MAX_STOP_TOKENS {
            let problem = format!("{} ids; at most {MAX_STOP_TOKENS} are allowed", stop_token_ids.len());
            return Err(ApiError::bad_field("stop_token_ids", problem));
        }
        let logit_bias = fields.take::<Map<String, Value>>("logit_bias")?;
        if let Some(len) = logit_bias.as_ref().map(Map::len).filter(|len| *len > MAX_BIASES) {
            let problem = format!("{len} ids; at most {MAX_BIASES} are allowed");
            return Err(ApiError::bad_field("logit_bias", problem));
        }
        // What they would change is nothing that this server has.
        for text in ["user", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"] {
            fields.take::<String>(text)?;
        }
        fields.take::<Map<String, Value>>("metadata")?;
        fields.take::<bool>("store")?;
        let cache_salt = fields.take::<String>("cache_salt")?.filter(|salt| !salt.is_empty());
        if let Some(len) = cache_salt.as_ref().map(String::len).filter(|len| *len > MAX_CACHE_SALT_BYTES) {
            let problem = format!("has {len} bytes; at most {MAX_CACHE_SALT_BYTES} are allowed");
            return Err(ApiError::bad_field("cache_salt", problem));
        }
        let stream_options = fields.take::<StreamOptions>("stream_options")?;
        Ok(Self {
            model: fields.take("model")?,
            max_tokens,
            max_tokens_name,
            temperature: fields.take("temperature")?,
            top_p: fields.take("top_p")?,
            top_k: fields.take("top_k")?,
            min_p: fields.take("min_p")?,
            repetition_penalty: fields.take("repetition_penalty")?,
            presence_penalty: fields.take("presence_penalty")?,
            frequency_penalty: fields.take("frequency_penalty")?,
            logit_bias,
            seed: fields.take::<Seed>("seed")?.map(|seed| seed.0),
            n,
            best_of,
            format: take_format(fields)?,
            allowed_token_ids,
            bad_words,
            truncate_prompt_tokens,
            prompt_logprobs,
            stop,
            include_stop_str_in_output: fields.take("include_stop_str_in_output")?.unwrap_or(false),
            stop_token_ids,
            min_tokens: fields.take("min_tokens")?.unwrap_or(0),
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            skip_special_tokens: fields.take("skip_special_tokens")?.unwrap_or(true),
            stream,
            include_usage: stream_options.is_some_and(|options| options.include_usage),
            return_tokens_as_token_ids: fields.take("return_tokens_as_token_ids")?.unwrap_or(false),
            priority: fields.take("priority")?.unwrap_or(0),
            cache_salt,
        })
    }
}

/// Tokens read and written, with DeepSeek's names for the prefix cache's share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    pub(crate) total_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) prompt_tokens_details: PromptTokensDetails,
    pub(crate) completion_tokens_details: CompletionTokensDetails,
    pub(crate) prompt_cache_hit_tokens: u64,
    pub(crate) prompt_cache_miss_tokens: u64,
}

/// How the prompt's tokens were got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct PromptTokensDetails {
    pub(crate) cached_tokens: u64,
}

/// What the reply's tokens were spent on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct CompletionTokensDetails {
    pub(crate) reasoning_tokens: u64,
}

impl Usage {
    /// From the four counts; the rest follows.
    pub(crate) fn new(prompt: u64, cached: u64, completion: u64, reasoning: u64) -> Self {
        Self {
            prompt_tokens: prompt,
            total_tokens: prompt + completion,
            completion_tokens: completion,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: cached },
            completion_tokens_details: CompletionTokensDetails { reasoning_tokens: reasoning },
            prompt_cache_hit_tokens: cached,
            prompt_cache_miss_tokens: prompt.saturating_sub(cached),
        }
    }
}

/// Usage as a chunk of a stream shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum ChunkUsage {
    /// It was not asked for: the field is left out.
    Absent,
    /// It comes in a later chunk: null.
    Later,
    /// The whole reply's.
    Total(Usage),
}

impl ChunkUsage {
    pub(crate) fn is_absent(&self) -> bool {
        *self == Self::Absent
    }
}

/// Log-probabilities of a prompt's tokens, a map per token; null for the first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct PromptLogprobs(pub(crate) Vec<Option<Map<String, Value>>>);

/// Which stop ended a choice: a stop string or a token id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum Matched {
    Text(String),
    Token(u32),
}
