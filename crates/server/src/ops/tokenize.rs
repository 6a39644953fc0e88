//! `/tokenize` and `/detokenize`: vLLM's fields, SGLang's lists, llama-server's `content`. Tokenizes as the generating
//! endpoints do, by the same functions. Must not know HTTP.

use std::borrow::Cow;

use r1_core::TokenId;
use r1_text::{ControlText, TextError, Tokenizer};
use serde::Serialize;
use serde_json::Value;

use crate::app::App;
use crate::convert;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::types::chat::ChatRequest;
use crate::types::value::{Field, must_be};

/// Most tokens of one request, where the model's context is not longer: what a core does in about a second. The context
/// does not bound these endpoints, since how far a text is over it is what clients want to know.
pub(crate) const MAX_TOKENS: usize = 1 << 18;

fn max_tokens(app: &App) -> usize {
    MAX_TOKENS.max(app.engine.info().max_model_len)
}

/// A value, or a list of them where a list was sent.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub(crate) enum Batch<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> Batch<T> {
    fn map<U>(&self, mut each: impl FnMut(&T) -> U) -> Batch<U> {
        match self {
            Self::One(one) => Batch::One(each(one)),
            Self::Many(many) => Batch::Many(many.iter().map(each).collect()),
        }
    }

    fn try_map<U, E>(self, mut each: impl FnMut(T) -> Result<U, E>) -> Result<Batch<U>, E> {
        match self {
            Self::One(one) => each(one).map(Batch::One),
            Self::Many(many) => many.into_iter().map(each).collect::<Result<_, _>>().map(Batch::Many),
        }
    }
}

impl Field for Batch<String> {
    fn read(value: Value) -> Result<Self, String> {
        match value {
            Value::String(one) => Ok(Self::One(one)),
            Value::Array(_) => Vec::read(value).map(Self::Many),
            other => Err(must_be("a string or a list of strings", &other)),
        }
    }
}

impl Field for Batch<Vec<u32>> {
    fn read(value: Value) -> Result<Self, String> {
        match &value {
            Value::Array(items) if matches!(items.first(), Some(Value::Array(_))) => {
                Vec::read(value).map(Self::Many)
            }
            Value::Array(_) => Vec::read(value).map(Self::One),
            other => Err(must_be("a list of token ids or a list of such lists", other)),
        }
    }
}

/// The reply of `/tokenize`.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Tokenized {
    count: Batch<usize>,
    max_model_len: usize,
    tokens: Batch<Vec<u32>>,
    /// As `tokenizer.json` spells them, so that tokens which are no whole characters stay apart.
    token_strs: Option<Batch<Vec<String>>>,
}

/// Reads the body of `/tokenize`.
pub(crate) fn tokenize(app: &App, body: &[u8]) -> Result<Tokenized, ApiError> {
    let mut fields = Fields::parse(body)?;
    let with_strings = fields.take("return_token_strs")?.unwrap_or(false);
    let prompt = fields.take::<Batch<String>>("prompt")?;
    let content = fields.take::<Batch<String>>("content")?;
    let given = [prompt.is_some(), content.is_some(), fields.is_given("messages")];
    let tokens = match (prompt, content) {
        _ if given.iter().filter(|given| **given).count() > 1 => {
            return Err(ApiError::bad_request(
                "`prompt`, `messages` and llama-server's `content` exclude each other",
            ));
        }
        (Some(texts), _) => plain(app, fields, "prompt", texts)?,
        (_, Some(texts)) => plain(app, fields, "content", texts)?,
        _ if given[2] => conversation(app, fields)?,
        _ => return Err(ApiError::bad_field("prompt", "missing; send `prompt` or `messages`")),
    };
    let tokenizer = &*app.model.tokenizer;
    Ok(Tokenized {
        count: tokens.map(Vec::len),
        max_model_len: app.engine.info().max_model_len,
        token_strs: with_strings
            .then(|| tokens.map(|ids| ids.iter().map(|&id| spelling(tokenizer, TokenId(id))).collect())),
        tokens,
    })
}

/// Texts as they are; with special tokens as `/v1/completions` reads its prompt.
fn plain(
    app: &App,
    mut fields: Fields,
    param: &'static str,
    texts: Batch<String>,
) -> Result<Batch<Vec<u32>>, ApiError> {
    app.reply_name(fields.take::<String>("model")?.as_deref())?;
    let vllm = fields.take("add_special_tokens")?;
    let llama = fields.take("add_special")?;
    let special = vllm.or(llama).unwrap_or(param == "prompt");
    fields.ignore_rest();
    let (tokenizer, max) = (&app.model.tokenizer, max_tokens(app));
    if let Batch::Many(texts) = &texts
        && texts.len() > max
    {
        let problem = format!("holds {} texts; up to {max} are read in one request", texts.len());
        return Err(ApiError::bad_field(param, problem));
    }
    let mut room = max;
    texts.try_map(|text| {
        let tokens = if special {
            tokenizer.encode_completion(&text, room)
        } else {
            tokenizer.encode_bounded(&text, room)
        };
        let tokens = tokens.map_err(|error| text_error(error, param, max - room, max))?;
        room -= tokens.len();
        Ok(ids(&tokens))
    })
}

/// A conversation as `/v1/chat/completions` reads it.
fn conversation(app: &App, fields: Fields) -> Result<Batch<Vec<u32>>, ApiError> {
    let request = ChatRequest::parse(fields)?;
    app.reply_name(request.common.model.as_deref())?;
    let Some(template) = &app.model.template else {
        return Err(ApiError::bad_field("messages", "this model has no chat template; send `prompt`"));
    };
    let max = max_tokens(app);
    let rendered = convert::render_any_length(app, template, &request);
    let tokens = rendered.and_then(|rendered| app.model.tokenizer.encode_prompt(&rendered, max));
    Ok(Batch::One(ids(&tokens.map_err(|error| text_error(error, "messages", 0, max))?)))
}

/// The reply of `/detokenize`: the text under the names that vLLM, SGLang and llama-server give it.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Detokenized {
    prompt: Batch<String>,
    text: Batch<String>,
    content: Batch<String>,
}

/// Reads the body of `/detokenize`.
pub(crate) fn detokenize(app: &App, body: &[u8]) -> Result<Detokenized, ApiError> {
    let mut fields = Fields::parse(body)?;
    let ids = fields.require::<Batch<Vec<u32>>>("tokens")?;
    app.reply_name(fields.take::<String>("model")?.as_deref())?;
    let hide = fields.take("skip_special_tokens")?.unwrap_or(false);
    fields.ignore_rest();
    let max = max_tokens(app);
    let given = match &ids {
        Batch::One(ids) => ids.len(),
        Batch::Many(lists) => lists.iter().map(|ids| ids.len().max(1)).sum(),
    };
    if given > max {
        let problem = format!("holds {given} ids; up to {max} are read in one request");
        return Err(ApiError::bad_field("tokens", problem));
    }
    let control = if hide { ControlText::Hide } else { ControlText::Show };
    let tokenizer = &*app.model.tokenizer;
    let text = ids.try_map(|ids| {
        let tokens: Vec<TokenId> = ids.into_iter().map(TokenId).collect();
        match tokens.iter().find(|id| tokenizer.token_bytes(**id).is_empty()) {
            Some(unknown) => {
                let problem =
                    format!("{unknown} is the id of no token; ids are below {}", tokenizer.vocab_size());
                Err(ApiError::bad_field("tokens", problem))
            }
            None => Ok(tokenizer.decode(&tokens, control)),
        }
    })?;
    Ok(Detokenized { prompt: text.clone(), content: text.clone(), text })
}

fn ids(tokens: &[TokenId]) -> Vec<u32> {
    tokens.iter().map(|token| token.0).collect()
}

/// A token as `tokenizer.json` spells it: added tokens as they are, others in the byte-level alphabet.
fn spelling(tokenizer: &Tokenizer, token: TokenId) -> String {
    let bytes = tokenizer.token_bytes(token);
    let added = tokenizer.added_tokens();
    match added.binary_search_by_key(&token.0, |added| added.id.0) {
        Ok(at) => added[at].content.clone(),
        Err(_) => bytes.iter().map(|byte| byte_level(*byte)).collect(),
    }
}

/// A byte's letter in the alphabet of byte-level BPE: itself where it can be seen, else one of those from U+0100 on.
fn byte_level(byte: u8) -> char {
    let shifted = match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => return char::from(byte),
        0..=0x20 => 0x100 + u32::from(byte),
        0x7F..=0xA0 => 0x121 + u32::from(byte - 0x7F),
        0xAD => 0x143,
    };
    char::from_u32(shifted).expect("U+0100 to U+0143 are letters")
}

/// A client's fault names its field; a fault of the model's files is ours.
fn text_error(error: TextError, param: &'static str, before: usize, max: usize) -> ApiError {
    let param: Cow<'static, str> = param.into();
    match error {
        TextError::TooLong { at_least, .. } => {
            let at_least = before + at_least;
            ApiError::bad_field(
                param,
                format!("at least {at_least} tokens; up to {max} are counted in one request"),
            )
        }
        TextError::ReservedKwarg(_) => ApiError::bad_field("chat_template_kwargs", error),
        TextError::Io { .. } | TextError::BadFile { .. } | TextError::UnsupportedTokenizer { .. } => {
            ApiError::internal(error.to_string())
        }
        other => ApiError::bad_field(param, other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_level_alphabet_has_a_letter_per_byte() {
        let letters: std::collections::BTreeSet<char> = (0..=255).map(byte_level).collect();
        assert_eq!(letters.len(), 256);
        assert!(letters.iter().all(|letter| !letter.is_whitespace() && !letter.is_control()));
        assert_eq!((byte_level(b' '), byte_level(b'\n'), byte_level(b'a')), ('Ġ', 'Ċ', 'a'));
    }
}
