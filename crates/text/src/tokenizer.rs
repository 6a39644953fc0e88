//! Text to token ids and back, by the checkpoint's `tokenizer.json`. Knows nothing of conversations or streams.
//!
//! Added tokens (control tokens among them) are found here, not by the `tokenizers` crate: the text between them goes
//! through a copy of the tokenizer that has no added tokens, so ordinary text cannot become a control token. Decoding
//! is a table of bytes per token, because only that gives a stream whole characters at constant cost.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs;
use std::path::Path;

use r1_core::TokenId;
use serde_json::Value;

use crate::control::{ControlTokens, TokenClass, Trie, classify, unguard};
use crate::detok::ControlText;
use crate::error::{Result, TextError};
use crate::template::RenderedPrompt;
use crate::tokenizer_json::{TokenizerJson, bad};

/// A token that `tokenizer.json` lists beside the model's own vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddedToken {
    /// Its row.
    pub id: TokenId,
    /// Its text.
    pub content: String,
    /// What it is to a reader of the reply.
    pub class: TokenClass,
}

/// A byte-level BPE tokenizer with its control tokens.
pub struct Tokenizer {
    /// The tokenizer without its added tokens: whatever it is given is ordinary text.
    plain: tokenizers::Tokenizer,
    added: Vec<AddedToken>,
    added_trie: Trie,
    control: ControlTokens,
    /// `bytes[offsets[id]..offsets[id + 1]]` is token `id`'s text; empty for rows that no token owns.
    bytes: Vec<u8>,
    offsets: Vec<u32>,
    classes: Vec<TokenClass>,
    /// No token stands for more bytes of text than this.
    max_bytes_per_token: usize,
    bos: Option<TokenId>,
    eos: Option<TokenId>,
    add_bos: bool,
    chat_template: Option<String>,
}

/// A probe of an over-long text covers this many bytes per allowed token: twice what any common language needs.
const PROBE_BYTES_PER_TOKEN: usize = 8;

impl Tokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a checkpoint; the last two may be
    /// missing.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read(&path).map_err(|source| TextError::Io { path, source })
        };
        let optional = |name: &str| match read(name) {
            Err(TextError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        };
        let config = optional("tokenizer_config.json")?;
        let mut tokenizer = Self::from_bytes(&read("tokenizer.json")?, config.as_deref())?;
        if let Some(template) = optional("chat_template.jinja")? {
            tokenizer.chat_template =
                Some(String::from_utf8(template).map_err(|e| TextError::BadFile {
                    file: "chat_template.jinja",
                    reason: e.to_string(),
                })?);
        }
        Ok(tokenizer)
    }

    /// Reads a tokenizer from the contents of `tokenizer.json` and, where there is one, `tokenizer_config.json`.
    pub fn from_bytes(tokenizer_json: &[u8], tokenizer_config: Option<&[u8]>) -> Result<Self> {
        let json = TokenizerJson::parse(tokenizer_json)?;
        let config: Value = match tokenizer_config {
            Some(bytes) => serde_json::from_slice(bytes).map_err(|e| bad_config(e.to_string()))?,
            None => Value::Null,
        };
        require_byte_level(json.field("decoder"))?;
        let added = read_added_tokens(json.field("added_tokens"))?;
        let table = ByteTable::new(json.vocab(), &added);
        let adds_bos_by_template = template_processing_token(json.field("post_processor")).map(str::to_owned);
        let shrink = if has_normalizer(json.field("normalizer")) { MAX_NORMALIZER_SHRINK } else { 1 };
        let added_texts: HashSet<&str> = added.iter().map(|t| t.content.as_str()).collect();
        let plain = json.into_plain(|token| added_texts.contains(token))?;
        let guarded = added.iter().filter(|t| t.class != TokenClass::Text || is_markup(&t.content));
        let control = ControlTokens::new(guarded.map(|t| t.content.as_str()));
        let added_trie = Trie::new(added.iter().map(|t| t.content.as_str()));
        let mut tokenizer = Self {
            plain,
            added_trie,
            control,
            bytes: table.bytes,
            offsets: table.offsets,
            classes: table.classes,
            max_bytes_per_token: table.longest * shrink,
            bos: None,
            eos: None,
            add_bos: false,
            chat_template: read_chat_template(&config["chat_template"])?,
            added,
        };
        tokenizer.bos = tokenizer.configured_token(&config, "bos_token")?;
        tokenizer.eos = tokenizer.configured_token(&config, "eos_token")?;
        tokenizer.add_bos = match &config["add_bos_token"] {
            Value::Bool(add) => *add,
            Value::Null => adds_bos_by_template.is_some_and(|t| tokenizer.token_to_id(&t) == tokenizer.bos),
            other => return Err(bad_config(format!("add_bos_token is {other}, not a boolean"))),
        };
        Ok(tokenizer)
    }

    /// `config[field]` as an id: a string, or an object with `content`; null when there is none.
    fn configured_token(&self, config: &Value, field: &str) -> Result<Option<TokenId>> {
        let content = match &config[field] {
            Value::Null => return Ok(None),
            Value::String(s) => s,
            Value::Object(token) => match token.get("content") {
                Some(Value::String(s)) => s,
                _ => return Err(bad_config(format!("{field} has no content"))),
            },
            other => return Err(bad_config(format!("{field} is {other}"))),
        };
        match self.token_to_id(content) {
            Some(id) => Ok(Some(id)),
            None => Err(bad_config(format!("{field} {content:?} is not in the vocabulary"))),
        }
    }

    /// Encodes a raw prompt: control tokens written in `text` are read as such. No BOS is added.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>> {
        self.encode_bounded(text, usize::MAX)
    }

    /// Like [`encode`](Self::encode), but gives up with [`TextError::TooLong`] when `text` has more than `max_tokens`
    /// tokens, without encoding a text that is far longer.
    pub fn encode_bounded(&self, text: &str, max_tokens: usize) -> Result<Vec<TokenId>> {
        let mut out = Vec::new();
        self.encode_into(&mut out, text, max_tokens, |raw| Cow::Borrowed(raw))?;
        Ok(out)
    }

    /// Encodes a prompt of the plain completions endpoint: BOS first where the tokenizer asks for it and the text does
    /// not already begin with it.
    pub fn encode_completion(&self, text: &str, max_tokens: usize) -> Result<Vec<TokenId>> {
        let mut tokens = self.encode_bounded(text, max_tokens)?;
        if let Some(bos) = self.bos.filter(|bos| self.add_bos && tokens.first() != Some(bos)) {
            tokens.insert(0, bos);
        }
        within(&tokens, max_tokens)?;
        Ok(tokens)
    }

    /// Encodes text in which nothing is a control token.
    pub fn encode_literal(&self, text: &str) -> Result<Vec<TokenId>> {
        let mut out = Vec::new();
        self.encode_into(&mut out, &self.control.guard(text), usize::MAX, unguard)?;
        Ok(out)
    }

    /// Encodes a rendered conversation: control tokens that the template wrote are control tokens, those in the clients'
    /// words are words. Gives up like [`encode_bounded`](Self::encode_bounded).
    pub fn encode_prompt(&self, prompt: &RenderedPrompt, max_tokens: usize) -> Result<Vec<TokenId>> {
        let mut out = Vec::new();
        self.encode_into(&mut out, prompt.guarded(), max_tokens, unguard)?;
        Ok(out)
    }

    /// Encodes a prompt for what lies between `prefix` and `suffix`, BOS first where the tokenizer asks for it. Both are
    /// words: nothing in them is a control token. Gives up like [`encode_bounded`](Self::encode_bounded).
    ///
    /// # Errors
    /// [`TextError::NoFimToken`] when the tokenizer lacks DeepSeek's tokens for it.
    pub fn encode_fim(&self, prefix: &str, suffix: &str, max_tokens: usize) -> Result<Vec<TokenId>> {
        let token = |name| self.token_to_id(name).ok_or(TextError::NoFimToken(name));
        let [begin, hole, end] =
            [token("<｜fim▁begin｜>")?, token("<｜fim▁hole｜>")?, token("<｜fim▁end｜>")?];
        let mut out: Vec<TokenId> = self.bos.filter(|_| self.add_bos).into_iter().collect();
        out.push(begin);
        for (text, token) in [(prefix, hole), (suffix, end)] {
            within(&out, max_tokens)?;
            self.encode_into(&mut out, &self.control.guard(text), max_tokens, unguard)?;
            out.push(token);
        }
        within(&out, max_tokens)?;
        Ok(out)
    }

    /// Cuts `text` at added tokens and encodes what lies between after `plain_text` was applied to it.
    fn encode_into(
        &self,
        out: &mut Vec<TokenId>,
        text: &str,
        max_tokens: usize,
        plain_text: fn(&str) -> Cow<'_, str>,
    ) -> Result<()> {
        let mut done = 0;
        for (start, end, index) in self.added_trie.matches(text) {
            self.encode_plain(out, &plain_text(&text[done..start]), max_tokens)?;
            out.push(self.added[index].id);
            within(out, max_tokens)?;
            done = end;
        }
        self.encode_plain(out, &plain_text(&text[done..]), max_tokens)
    }

    fn encode_plain(&self, out: &mut Vec<TokenId>, text: &str, max_tokens: usize) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let room = max_tokens - out.len();
        let at_least = out.len() + text.len().div_ceil(self.max_bytes_per_token);
        if at_least > max_tokens {
            return Err(TextError::TooLong { at_least, max_tokens });
        }
        let probe = text.floor_char_boundary(room.saturating_mul(PROBE_BYTES_PER_TOKEN));
        if probe < text.len() / 2 {
            // The cut may split the last token into at most as many tokens as it has bytes.
            let count = self.encode_ids(&text[..probe])?.len().saturating_sub(self.max_bytes_per_token);
            if count > room {
                return Err(TextError::TooLong { at_least: out.len() + count, max_tokens });
            }
        }
        out.extend(self.encode_ids(text)?.into_iter().map(TokenId));
        within(out, max_tokens)
    }

    fn encode_ids(&self, text: &str) -> Result<Vec<u32>> {
        if has_long_whitespace_run(text) {
            let reason = format!("more than {MAX_WHITESPACE_RUN} whitespace characters in a row");
            return Err(TextError::Encode(reason));
        }
        let encoding = self.plain.encode_fast(text, false).map_err(|e| TextError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `tokens`, bytes that are not UTF-8 replaced by U+FFFD. Ids that no token owns read as nothing.
    pub fn decode(&self, tokens: &[TokenId], control: ControlText) -> String {
        let shown =
            tokens.iter().filter(|&&t| control == ControlText::Show || self.class(t) != TokenClass::Hidden);
        let bytes: Vec<u8> = shown.flat_map(|&t| self.token_bytes(t)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes that `token` stands for; they need not be whole characters. Empty when no token owns the id.
    pub fn token_bytes(&self, token: TokenId) -> &[u8] {
        let id = token.0 as usize;
        match self.offsets.get(id..id + 2) {
            Some(range) => &self.bytes[range[0] as usize..range[1] as usize],
            None => &[],
        }
    }

    /// What `token` is to a reader of the reply.
    pub fn class(&self, token: TokenId) -> TokenClass {
        self.classes.get(token.0 as usize).copied().unwrap_or(TokenClass::Text)
    }

    /// The id of a token, by its spelling in `tokenizer.json` (the byte-level alphabet, except added tokens).
    pub fn token_to_id(&self, token: &str) -> Option<TokenId> {
        let added = self.added.iter().find(|t| t.content == token).map(|t| t.id);
        added.or_else(|| self.plain.token_to_id(token).map(TokenId))
    }

    /// Most bytes of text that one token stands for.
    pub fn max_bytes_per_token(&self) -> usize {
        self.max_bytes_per_token
    }

    /// One more than the highest id.
    pub fn vocab_size(&self) -> usize {
        self.classes.len()
    }

    /// Beginning of sequence, as `tokenizer_config.json` names it.
    pub fn bos(&self) -> Option<TokenId> {
        self.bos
    }

    /// End of sequence, as `tokenizer_config.json` names it.
    pub fn eos(&self) -> Option<TokenId> {
        self.eos
    }

    /// The text of [`bos`](Self::bos).
    pub fn bos_text(&self) -> Option<&str> {
        self.added_text(self.bos?)
    }

    /// The text of [`eos`](Self::eos).
    pub fn eos_text(&self) -> Option<&str> {
        self.added_text(self.eos?)
    }

    fn added_text(&self, id: TokenId) -> Option<&str> {
        self.added.iter().find(|t| t.id == id).map(|t| t.content.as_str())
    }

    /// Whether a completion's prompt begins with BOS.
    pub fn adds_bos(&self) -> bool {
        self.add_bos
    }

    /// The tokens beside the model's own vocabulary, by id.
    pub fn added_tokens(&self) -> &[AddedToken] {
        &self.added
    }

    /// The strings that client text must not smuggle in; a [`ChatTemplate`](crate::ChatTemplate) needs them.
    pub fn control_tokens(&self) -> &ControlTokens {
        &self.control
    }

    /// The checkpoint's chat template: `chat_template.jinja`, or `tokenizer_config.json`'s field.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }
}

/// NFC can shorten a text by this factor (three Hangul jamo, 9 bytes, become one syllable of 3).
const MAX_NORMALIZER_SHRINK: usize = 3;

/// Splitting a longer run goes past the regular-expression engine's limit of a million steps back, where it stops
/// splitting and says nothing, and the tokens differ from those the model was trained on.
const MAX_WHITESPACE_RUN: usize = 400_000;

fn has_long_whitespace_run(text: &str) -> bool {
    text.len() > MAX_WHITESPACE_RUN
        && text.split(|c: char| !c.is_whitespace()).any(|run| run.len() > MAX_WHITESPACE_RUN)
}

fn within(tokens: &[TokenId], max_tokens: usize) -> Result<()> {
    let at_least = tokens.len();
    if at_least > max_tokens { Err(TextError::TooLong { at_least, max_tokens }) } else { Ok(()) }
}

fn bad_config(reason: String) -> TextError {
    TextError::BadFile { file: "tokenizer_config.json", reason }
}

/// Markup that a client must not write as a token even when a reply may show it.
fn is_markup(content: &str) -> bool {
    content.starts_with('<') && content.ends_with('>')
}

fn require_byte_level(decoder: &Value) -> Result<()> {
    let of_type = |v: &Value| v["type"] == "ByteLevel";
    let inner = decoder["decoders"].as_array();
    if of_type(decoder) || inner.is_some_and(|list| list.len() == 1 && list.iter().all(of_type)) {
        return Ok(());
    }
    let feature = format!("decoder {}", decoder["type"]);
    Err(TextError::UnsupportedTokenizer { feature, why: "byte-level BPE is" })
}

fn has_normalizer(normalizer: &Value) -> bool {
    match normalizer["normalizers"].as_array() {
        Some(list) => !list.is_empty(),
        None => !normalizer.is_null(),
    }
}

fn read_added_tokens(list: &Value) -> Result<Vec<AddedToken>> {
    let mut tokens = Vec::new();
    for entry in list.as_array().into_iter().flatten() {
        let content = entry["content"].as_str().ok_or_else(|| bad("an added token has no content".into()))?;
        let id = entry["id"].as_u64().and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or_else(|| bad(format!("added token {content:?} has no id")))?;
        if let Some(option) = ["single_word", "lstrip", "rstrip"].into_iter().find(|o| entry[o] == true) {
            let feature = format!("{option} of added token {content:?}");
            return Err(TextError::UnsupportedTokenizer {
                feature,
                why: "added tokens that match as written are",
            });
        }
        if content.is_empty() {
            return Err(bad(format!("added token {id} is empty")));
        }
        let class = classify(content, entry["special"] == true);
        tokens.push(AddedToken { id: TokenId(id), content: content.to_owned(), class });
    }
    tokens.sort_by_key(|t| t.id);
    Ok(tokens)
}

/// The control token that a `TemplateProcessing` post-processor puts first, if any.
fn template_processing_token(post: &Value) -> Option<&str> {
    if post["type"] == "Sequence" {
        return post["processors"].as_array()?.iter().find_map(template_processing_token);
    }
    if post["type"] == "TemplateProcessing" { post["single"][0]["SpecialToken"]["id"].as_str() } else { None }
}

fn read_chat_template(field: &Value) -> Result<Option<String>> {
    match field {
        Value::Null => Ok(None),
        Value::String(source) => Ok(Some(source.clone())),
        Value::Array(named) => match named.iter().find(|t| t["name"] == "default") {
            Some(entry) => read_chat_template(&entry["template"]),
            None => Err(bad_config("chat_template names several templates and none is \"default\"".into())),
        },
        other => Err(bad_config(format!("chat_template is {other}"))),
    }
}

/// Every token's bytes and class, indexed by id.
struct ByteTable {
    bytes: Vec<u8>,
    offsets: Vec<u32>,
    classes: Vec<TokenClass>,
    /// Bytes of the longest token that ordinary text can become.
    longest: usize,
}

impl ByteTable {
    fn new(vocab: &[(String, u32)], added: &[AddedToken]) -> Self {
        let alphabet = byte_level_alphabet();
        let ids = vocab.iter().map(|&(_, id)| id).chain(added.iter().map(|t| t.id.0));
        let len = ids.max().map_or(0, |id| id as usize + 1);
        let mut spellings = vec![""; len];
        for (token, id) in vocab {
            spellings[*id as usize] = token;
        }
        let mut classes = vec![TokenClass::Text; len];
        let mut contents = vec![None; len];
        for token in added {
            let id = token.id.0 as usize;
            contents[id] = Some(token.content.as_bytes());
            classes[id] = token.class;
        }
        let (mut bytes, mut offsets, mut longest) = (Vec::new(), Vec::with_capacity(len + 1), 1);
        offsets.push(0);
        for (spelling, content) in spellings.into_iter().zip(contents) {
            let start = bytes.len();
            spell(spelling, &alphabet, &mut bytes);
            longest = longest.max(bytes.len() - start);
            if let Some(content) = content {
                bytes.truncate(start);
                bytes.extend_from_slice(content);
            }
            offsets.push(bytes.len() as u32);
        }
        Self { bytes, offsets, classes, longest }
    }
}

/// Appends the bytes that a token of the vocabulary stands for.
fn spell(token: &str, alphabet: &Alphabet, out: &mut Vec<u8>) {
    let start = out.len();
    for c in token.chars() {
        let Some(&Some(byte)) = alphabet.get(c as usize) else {
            // A token outside the alphabet stands for its own UTF-8 bytes.
            out.truncate(start);
            out.extend_from_slice(token.as_bytes());
            return;
        };
        out.push(byte);
    }
}

/// By code point, the byte that a character spells.
type Alphabet = [Option<u8>; ALPHABET_END];
/// One more than the last code point that spells a byte.
const ALPHABET_END: usize = 0x144;

/// GPT-2's spelling of bytes: printable ones stand for themselves, the others take the code points from U+0100 on.
fn byte_level_alphabet() -> Alphabet {
    let mut alphabet = [None; ALPHABET_END];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        let spelt = match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => usize::from(byte),
            _ => {
                next += 1;
                next - 1
            }
        };
        alphabet[spelt] = Some(byte);
    }
    alphabet
}
