//! The tokenizer as llguidance wants it: a trie of every token's bytes, in which control tokens cannot be spelled.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::api::ParserLimits;
use llguidance::earley::SlicedBiasComputer;
use r1_core::TokenId;
use toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};

use crate::control::{THINK_CLOSE, THINK_OPEN, TokenClass};
use crate::error::{Result, TextError};
use crate::tokenizer::Tokenizer;

/// Most bytes of white space before an answer.
pub(super) const MAX_LEAD_BYTES: usize = 4;

/// Tokens of DeepSeek's tool markup.
#[derive(Clone, Copy, Debug)]
pub(super) struct ToolTokens {
    pub(super) calls_begin: TokenId,
    pub(super) calls_end: TokenId,
    pub(super) call_begin: TokenId,
    pub(super) call_end: TokenId,
    pub(super) sep: TokenId,
}

/// One served vocabulary.
pub(super) struct Vocabulary {
    trie: TokTrie,
    eos: Vec<TokenId>,
    /// Tokens that are line breaks and nothing else, at most [`MAX_LEAD_BYTES`] long.
    pub(super) newlines: Vec<TokenId>,
    /// The same of all white space.
    pub(super) spaces: Vec<TokenId>,
    /// `<think>` as the tokenizer writes it; one token in DeepSeek's.
    pub(super) think_open: Vec<TokenId>,
    /// `</think>`, likewise.
    pub(super) think_close: Vec<TokenId>,
    /// Or the names of those that the tokenizer lacks.
    pub(super) tool_tokens: std::result::Result<ToolTokens, Vec<&'static str>>,
}

impl Vocabulary {
    /// `vocab_size` is the number of logits.
    pub(super) fn new(tokenizer: &Tokenizer, eos: &[TokenId], vocab_size: usize) -> Result<Self> {
        let ThinkTags { open, close } = check(tokenizer, eos, vocab_size)?;
        let word = |id: usize| {
            let token = TokenId(id as u32);
            let bytes = tokenizer.token_bytes(token);
            match tokenizer.class(token) {
                _ if eos.contains(&token) => Vec::new(),
                // A lone 0xff is no text, and llguidance's mark of a control token.
                TokenClass::Text if bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) => Vec::new(),
                TokenClass::Text => bytes.to_vec(),
                TokenClass::Think | TokenClass::Tool => {
                    let mut marked = vec![TokTrie::SPECIAL_TOKEN_MARKER];
                    marked.extend(bytes);
                    marked
                }
                TokenClass::Hidden => Vec::new(),
            }
        };
        let words: Vec<Vec<u8>> = (0..vocab_size).map(word).collect();
        let made_of = |set: &[u8]| {
            let ids = words.iter().enumerate().filter(|(_, w)| {
                !w.is_empty() && w.len() <= MAX_LEAD_BYTES && w.iter().all(|b| set.contains(b))
            });
            ids.map(|(id, _)| TokenId(id as u32)).collect()
        };
        let info = TokRxInfo::new(vocab_size as u32, eos[0].0);
        let eos_ids: Vec<u32> = eos.iter().map(|t| t.0).collect();
        Ok(Self {
            newlines: made_of(b"\n"),
            spaces: made_of(b" \t\r\n"),
            trie: TokTrie::from(&info, &words).with_eos_tokens(&eos_ids),
            eos: eos.to_vec(),
            think_open: open,
            think_close: close,
            tool_tokens: tool_tokens(tokenizer),
        })
    }

    /// Number of logits.
    pub(super) fn len(&self) -> usize {
        self.trie.vocab_size()
    }

    /// Tokens that end a reply.
    pub(super) fn eos(&self) -> &[TokenId] {
        &self.eos
    }

    pub(super) fn is_eos(&self, token: TokenId) -> bool {
        self.eos.contains(&token)
    }

    /// The token's text; empty for EOS, hidden tokens and rows without one.
    pub(super) fn bytes(&self, token: TokenId) -> &[u8] {
        let bytes = self.trie.token(token.0);
        bytes.strip_prefix(&[TokTrie::SPECIAL_TOKEN_MARKER]).unwrap_or(bytes)
    }
}

/// How the tokenizer writes the tags around the reasoning.
pub(super) struct ThinkTags {
    open: Vec<TokenId>,
    close: Vec<TokenId>,
}

/// Refuses what [`Vocabulary::new`] cannot work with.
pub(super) fn check(tokenizer: &Tokenizer, eos: &[TokenId], vocab_size: usize) -> Result<ThinkTags> {
    if let Some(&end) = eos.iter().find(|t| t.0 as usize >= vocab_size) {
        return Err(bad(format!("EOS token {} is not one of the {vocab_size} logits", end.0)));
    }
    if eos.is_empty() {
        return Err(bad("grammars need an EOS token".into()));
    }
    Ok(ThinkTags { open: spell(tokenizer, THINK_OPEN)?, close: spell(tokenizer, THINK_CLOSE)? })
}

fn bad(reason: String) -> TextError {
    TextError::BadFile { file: "tokenizer.json", reason }
}

fn spell(tokenizer: &Tokenizer, tag: &str) -> Result<Vec<TokenId>> {
    match tokenizer.added_tokens().iter().find(|t| t.content == tag) {
        Some(token) => Ok(vec![token.id]),
        None => tokenizer.encode_literal(tag),
    }
}

fn tool_tokens(tokenizer: &Tokenizer) -> std::result::Result<ToolTokens, Vec<&'static str>> {
    let mut missing = Vec::new();
    let mut find = |name: &'static str| {
        let token = tokenizer.added_tokens().iter().find(|t| t.content == name).map(|t| t.id);
        if token.is_none() {
            missing.push(name);
        }
        token.unwrap_or(TokenId(0))
    };
    let tokens = ToolTokens {
        calls_begin: find("<｜tool▁calls▁begin｜>"),
        calls_end: find("<｜tool▁calls▁end｜>"),
        call_begin: find("<｜tool▁call▁begin｜>"),
        call_end: find("<｜tool▁call▁end｜>"),
        sep: find("<｜tool▁sep｜>"),
    };
    if missing.is_empty() { Ok(tokens) } else { Err(missing) }
}

/// llguidance's view of [`Vocabulary`].
struct Env(Arc<Vocabulary>);

impl TokenizerEnv for Env {
    fn tok_trie(&self) -> &TokTrie {
        &self.0.trie
    }

    fn tokenize_bytes(&self, s: &[u8]) -> Vec<toktrie::TokenId> {
        self.0.trie.greedy_tokenize(s)
    }

    /// Any spelling of the grammar's text may come: the model knows better than the trie how it splits words.
    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// Bounds of compiling and of one mask. At run time a mask that exceeds them fails its request.
fn limits() -> ParserLimits {
    ParserLimits {
        initial_lexer_fuel: 500_000,
        step_lexer_fuel: 300_000,
        max_items_in_row: 20_000,
        step_max_items: 50_000,
        max_lexer_states: 50_000,
        max_grammar_size: 200_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// What makes parsers over this vocabulary.
pub(super) fn factory(vocabulary: &Arc<Vocabulary>) -> Result<ParserFactory> {
    let env: TokEnv = Arc::new(Env(Arc::clone(vocabulary)));
    let slices = SlicedBiasComputer::general_slices();
    let made = ParserFactory::new(&env, InferenceCapabilities::default(), &slices);
    let mut factory = made.map_err(|e| bad(e.to_string()))?;
    factory.quiet();
    *factory.limits_mut() = limits();
    Ok(factory)
}
