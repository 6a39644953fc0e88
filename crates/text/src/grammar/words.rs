//! Token filters that hold for the whole reply: the only tokens allowed, and words that must not come.

use std::collections::HashSet;
use std::sync::Arc;

use r1_core::TokenId;

use super::error::GrammarError;
use super::vocabulary::Vocabulary;
use crate::tokenizer::Tokenizer;

/// Most bad words of a request, as token sequences.
const MAX_BAD_WORDS: usize = 4096;
/// Most bytes of a request's bad words together: they are tokenized twice.
const MAX_BAD_WORDS_BYTES: usize = 64 << 10;
/// Longest bad word, in tokens.
const MAX_BAD_WORD_TOKENS: usize = 128;

/// Token sequences of words, each without and with a space before it, for
/// [`ReplyRules::bad_words`](super::ReplyRules::bad_words). Control tokens in a word are read as text.
pub fn bad_word_tokens(tokenizer: &Tokenizer, words: &[String]) -> Result<Vec<Vec<TokenId>>, GrammarError> {
    let num_bytes: usize = words.iter().map(String::len).sum();
    if num_bytes > MAX_BAD_WORDS_BYTES {
        let problem = format!("{num_bytes} bytes; at most {MAX_BAD_WORDS_BYTES} are allowed");
        return Err(GrammarError::new("bad_words", problem));
    }
    let mut seen: HashSet<Vec<TokenId>> = HashSet::new();
    let mut sequences: Vec<Vec<TokenId>> = Vec::with_capacity(2 * words.len());
    for (i, word) in words.iter().enumerate() {
        let field = || format!("bad_words[{i}]");
        let bare = word.trim_start_matches(' ');
        if bare.is_empty() {
            return Err(GrammarError::new(field(), "a bad word must not be empty"));
        }
        // Before it is tokenized, which takes a while.
        if bare.len() > MAX_BAD_WORD_TOKENS * tokenizer.max_bytes_per_token() {
            let problem = format!("has {} bytes, more than {MAX_BAD_WORD_TOKENS} tokens", bare.len());
            return Err(GrammarError::new(field(), problem));
        }
        for text in [bare.to_owned(), format!(" {bare}")] {
            let tokens = tokenizer.encode_literal(&text);
            let tokens = tokens.map_err(|e| GrammarError::new(field(), e.to_string()))?;
            if seen.insert(tokens.clone()) {
                sequences.push(tokens);
            }
        }
    }
    Ok(sequences)
}

/// What every mask of a reply is cut down to.
#[derive(Clone, Default)]
pub(super) struct Filter {
    /// Bits of the tokens that may come at all; `None`: all.
    base: Option<Arc<[u32]>>,
    /// Bad words of two and more tokens.
    sequences: Arc<[Vec<TokenId>]>,
    /// The reply's last tokens, as many as the longest sequence looks back.
    recent: Vec<TokenId>,
    longest: usize,
}

impl Filter {
    pub(super) fn new(
        vocabulary: &Vocabulary,
        allowed: Option<&[TokenId]>,
        bad_words: &[Vec<TokenId>],
    ) -> Result<Self, GrammarError> {
        let known = |token: TokenId| (token.0 as usize) < vocabulary.len();
        let mut base = None;
        if let Some(ids) = allowed {
            if ids.is_empty() {
                return Err(GrammarError::new("allowed_token_ids", "at least one token must be allowed"));
            }
            let mut bits = vec![0; vocabulary.len().div_ceil(32)];
            for (i, &id) in ids.iter().enumerate() {
                if !known(id) {
                    let reason = format!("there is no token {}; ids are below {}", id.0, vocabulary.len());
                    return Err(GrammarError::new(format!("allowed_token_ids[{i}]"), reason));
                }
                set(&mut bits, id);
            }
            base = Some(bits);
        }
        if bad_words.len() > MAX_BAD_WORDS {
            let reason = format!("{} words; at most {MAX_BAD_WORDS} are supported", bad_words.len());
            return Err(GrammarError::new("bad_words", reason));
        }
        let mut sequences = Vec::new();
        for (i, word) in bad_words.iter().enumerate() {
            let field = || format!("bad_words[{i}]");
            if word.is_empty() || word.len() > MAX_BAD_WORD_TOKENS {
                let reason =
                    format!("a bad word is 1 to {MAX_BAD_WORD_TOKENS} tokens long, not {}", word.len());
                return Err(GrammarError::new(field(), reason));
            }
            if let Some(id) = word.iter().find(|&&t| !known(t)) {
                let reason = format!("there is no token {}; ids are below {}", id.0, vocabulary.len());
                return Err(GrammarError::new(field(), reason));
            }
            if let [single] = word[..] {
                clear(base.get_or_insert_with(|| ones(vocabulary.len())), single);
            } else {
                sequences.push(word.clone());
            }
        }
        if base.as_ref().is_some_and(|bits| bits.iter().all(|&word| word == 0)) {
            let reason = "bad_words forbids every token of allowed_token_ids";
            return Err(GrammarError::new("allowed_token_ids", reason));
        }
        let longest = sequences.iter().map(|s| s.len() - 1).max().unwrap_or(0);
        Ok(Self { base: base.map(Into::into), sequences: sequences.into(), recent: Vec::new(), longest })
    }

    /// Whether nothing is ever filtered.
    pub(super) fn is_empty(&self) -> bool {
        self.base.is_none() && self.sequences.is_empty()
    }

    /// Whether the filter lets a token come at all.
    pub(super) fn permits(&self, token: TokenId) -> bool {
        self.base.as_ref().is_none_or(|bits| get(bits, token))
    }

    pub(super) fn accept(&mut self, token: TokenId) {
        if self.longest > 0 {
            if self.recent.len() == self.longest {
                self.recent.remove(0);
            }
            self.recent.push(token);
        }
    }

    /// Tokens that would complete a bad word now.
    fn completing(&self) -> impl Iterator<Item = TokenId> + '_ {
        self.sequences.iter().filter_map(|sequence| {
            let (&last, before) = sequence.split_last()?;
            self.recent.ends_with(before).then_some(last)
        })
    }

    /// Whether anything is filtered now.
    pub(super) fn acts(&self) -> bool {
        self.base.is_some() || self.completing().next().is_some()
    }

    pub(super) fn apply(&self, mask: &mut [u32]) {
        if let Some(base) = &self.base {
            for (word, allowed) in mask.iter_mut().zip(base.iter()) {
                *word &= allowed;
            }
        }
        for token in self.completing() {
            clear(mask, token);
        }
    }
}

pub(super) fn set(mask: &mut [u32], token: TokenId) {
    mask[token.0 as usize / 32] |= 1 << (token.0 % 32);
}

pub(super) fn clear(mask: &mut [u32], token: TokenId) {
    mask[token.0 as usize / 32] &= !(1 << (token.0 % 32));
}

pub(super) fn get(mask: &[u32], token: TokenId) -> bool {
    mask[token.0 as usize / 32] >> (token.0 % 32) & 1 == 1
}

/// A mask that allows every one of `len` tokens.
pub(super) fn ones(len: usize) -> Vec<u32> {
    let mut mask = vec![u32::MAX; len.div_ceil(32)];
    if !len.is_multiple_of(32) {
        *mask.last_mut().expect("len is not 0") = (1 << (len % 32)) - 1;
    }
    mask
}
