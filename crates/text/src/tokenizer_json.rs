//! The parts of `tokenizer.json`, read in one pass: a large vocabulary becomes the maps of its model at once, without a tree of
//! JSON values between. Knows the file's form, not what tokens mean.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use tokenizers::models::bpe::BPE;

use crate::error::{Result, TextError};

/// A `tokenizer.json`.
#[derive(Deserialize)]
pub(crate) struct TokenizerJson {
    model: BpeJson,
    /// Everything but the model; a field that is missing reads as null.
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// Byte-pair encoding as the file has it.
#[derive(Deserialize)]
struct BpeJson {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    vocab: Vocab,
    #[serde(default)]
    merges: Vec<Merge>,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
}

impl TokenizerJson {
    pub(crate) fn parse(json: &[u8]) -> Result<Self> {
        let file: Self = serde_json::from_slice(json).map_err(|e| bad(e.to_string()))?;
        let unsupported =
            |feature: String| TextError::UnsupportedTokenizer { feature, why: "byte-level BPE is" };
        match (&file.model.kind, &file.model.vocab) {
            (Some(kind), _) if kind != "BPE" => Err(unsupported(format!("the model {kind}"))),
            (_, Vocab::Unnamed) => Err(unsupported("a model without a vocabulary by name".into())),
            _ => Ok(file),
        }
    }

    /// A field of the file beside the model.
    pub(crate) fn field(&self, name: &str) -> &Value {
        self.rest.get(name).unwrap_or(&Value::Null)
    }

    /// Tokens of the model's vocabulary as they are spelled, with their ids.
    pub(crate) fn vocab(&self) -> &[(String, u32)] {
        match &self.model.vocab {
            Vocab::Named(entries) => entries,
            Vocab::Unnamed => &[],
        }
    }

    /// The tokenizer without what acts on a whole prompt, without added tokens, and without the vocabulary's tokens that
    /// `is_added` names.
    pub(crate) fn into_plain(self, is_added: impl Fn(&str) -> bool) -> Result<tokenizers::Tokenizer> {
        let Self { model, mut rest } = self;
        let fail = |error: &dyn fmt::Display| bad(error.to_string());
        rest.insert("added_tokens".into(), Value::Array(Vec::new()));
        for field in ["truncation", "padding", "post_processor"] {
            rest.insert(field.into(), Value::Null);
        }
        rest.insert("model".into(), serde_json::json!({"type": "BPE", "vocab": {}, "merges": []}));
        let mut plain: tokenizers::Tokenizer = serde_json::from_value(rest.into()).map_err(|e| fail(&e))?;
        plain.with_model(model.build(is_added)?);
        Ok(plain)
    }
}

impl BpeJson {
    fn build(self, is_added: impl Fn(&str) -> bool) -> Result<BPE> {
        let entries = match self.vocab {
            Vocab::Named(entries) => entries,
            Vocab::Unnamed => Vec::new(),
        };
        let num_entries = entries.len();
        let mut vocab: tokenizers::models::bpe::Vocab = entries.into_iter().collect();
        if vocab.len() < num_entries {
            return Err(bad("a token stands twice in the vocabulary".into()));
        }
        vocab.retain(|token, _| !is_added(token));
        let merges = self.merges.into_iter().filter_map(|Merge(pair)| pair).collect();
        let mut builder = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .fuse_unk(self.fuse_unk.unwrap_or(false))
            .byte_fallback(self.byte_fallback.unwrap_or(false))
            .ignore_merges(self.ignore_merges.unwrap_or(false));
        if let Some(dropout) = self.dropout {
            builder = builder.dropout(dropout);
        }
        if let Some(token) = self.unk_token {
            builder = builder.unk_token(token);
        }
        if let Some(prefix) = self.continuing_subword_prefix {
            builder = builder.continuing_subword_prefix(prefix);
        }
        if let Some(suffix) = self.end_of_word_suffix {
            builder = builder.end_of_word_suffix(suffix);
        }
        builder.build().map_err(|e| bad(e.to_string()))
    }
}

/// `{token: id}`, in the order of the file.
#[derive(Default)]
enum Vocab {
    Named(Vec<(String, u32)>),
    /// Something else, as other kinds of models have it.
    #[default]
    Unnamed,
}

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Read;

        impl<'de> Visitor<'de> for Read {
            type Value = Vocab;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Vocab, A::Error> {
                let mut entries = Vec::new();
                while let Some(token) = map.next_key::<String>()? {
                    let id = map
                        .next_value()
                        .map_err(|e| A::Error::custom(format_args!("token {token:?} has no id: {e}")))?;
                    entries.push((token, id));
                }
                Ok(Vocab::Named(entries))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Vocab, A::Error> {
                while seq.next_element::<serde::de::IgnoredAny>()?.is_some() {}
                Ok(Vocab::Unnamed)
            }

            fn visit_unit<E>(self) -> std::result::Result<Vocab, E> {
                Ok(Vocab::Unnamed)
            }
        }

        deserializer.deserialize_any(Read)
    }
}

/// Two tokens that become one: `["a", "b"]`, or `"a b"` as older files have it. A comment at the head of old lists is none.
struct Merge(Option<(String, String)>);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Read;

        impl<'de> Visitor<'de> for Read {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("two tokens")
            }

            fn visit_str<E: serde::de::Error>(self, line: &str) -> std::result::Result<Merge, E> {
                if line.starts_with("#version") {
                    return Ok(Merge(None));
                }
                match line.split_once(' ') {
                    Some((a, b)) if !b.contains(' ') => Ok(Merge(Some((a.to_owned(), b.to_owned())))),
                    _ => Err(E::custom(format_args!("the merge {line:?} is not two tokens"))),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Merge, A::Error> {
                let (a, b) = (seq.next_element()?, seq.next_element()?);
                match (a, b, seq.next_element::<serde::de::IgnoredAny>()?) {
                    (Some(a), Some(b), None) => Ok(Merge(Some((a, b)))),
                    _ => Err(A::Error::custom("a merge is not two tokens")),
                }
            }
        }

        deserializer.deserialize_any(Read)
    }
}

pub(crate) fn bad(reason: String) -> TextError {
    TextError::BadFile { file: "tokenizer.json", reason }
}
