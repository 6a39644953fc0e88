//! Grammars of one served tokenizer: compiled once, kept while they are used.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::ParserFactory;
use r1_core::TokenId;

use super::answer::{self, Answer};
use super::constraint::Constraint;
use super::error::GrammarError;
use super::session::Compiled;
use super::vocabulary::{self, Vocabulary};
use super::words::Filter;
use super::{ReplyRules, Thinking};
use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// Most grammars kept.
const MAX_GRAMMARS: usize = 256;
/// Most bytes of grammar text kept; what is compiled of it takes some tens of times as much.
const MAX_TEXT_BYTES: usize = 4 << 20;

/// Makes constraints; one for each served tokenizer, shared by all requests.
pub struct Grammars {
    vocabulary: Arc<Vocabulary>,
    factory: ParserFactory,
    compiled: Mutex<Cache>,
}

#[derive(Default)]
struct Cache {
    entries: HashMap<Arc<str>, Entry>,
    text_bytes: usize,
    uses: u64,
}

struct Entry {
    compiled: Arc<Compiled>,
    last_use: u64,
}

impl Cache {
    fn get(&mut self, key: &str) -> Option<Arc<Compiled>> {
        self.uses += 1;
        let entry = self.entries.get_mut(key)?;
        entry.last_use = self.uses;
        Some(Arc::clone(&entry.compiled))
    }

    fn insert(&mut self, key: &Arc<str>, compiled: Arc<Compiled>) {
        self.uses += 1;
        self.text_bytes += key.len();
        let entry = Entry { compiled, last_use: self.uses };
        if self.entries.insert(Arc::clone(key), entry).is_some() {
            self.text_bytes -= key.len();
        }
        while self.entries.len() > MAX_GRAMMARS || self.text_bytes > MAX_TEXT_BYTES {
            let oldest =
                self.entries.iter().min_by_key(|(_, entry)| entry.last_use).map(|(key, _)| Arc::clone(key));
            let Some(oldest) = oldest else { break };
            self.entries.remove(&oldest);
            self.text_bytes -= oldest.len();
        }
    }
}

impl Grammars {
    /// Reads the vocabulary. `eos`: the tokens that end a reply, at least one; `vocab_size`: the number of logits, which
    /// may exceed the tokenizer's. Takes about a second for a vocabulary of DeepSeek-V3's size.
    pub fn new(tokenizer: &Tokenizer, eos: &[TokenId], vocab_size: usize) -> Result<Self> {
        let vocabulary = Arc::new(Vocabulary::new(tokenizer, eos, vocab_size)?);
        let factory = vocabulary::factory(&vocabulary)?;
        Ok(Self { vocabulary, factory, compiled: Mutex::default() })
    }

    /// The constraint of a reply; `None` where the rules demand nothing. Compiles on the calling thread what it has not
    /// compiled lately: up to tens of milliseconds, so not a place for an async worker.
    pub fn constraint(&self, rules: &ReplyRules) -> std::result::Result<Option<Constraint>, GrammarError> {
        let filter = Filter::new(&self.vocabulary, rules.allowed_token_ids.as_deref(), &rules.bad_words)?;
        let budget = rules.thinking_budget.filter(|_| rules.thinking != Thinking::None);
        if budget.is_some() && !self.vocabulary.think_close.iter().all(|&t| filter.permits(t)) {
            let reason = "allowed_token_ids and bad_words must leave `</think>`, which ends the thinking";
            return Err(GrammarError::new("thinking_budget", reason));
        }
        let answer = answer::answer(&self.vocabulary, rules.format.as_ref(), rules.tools.as_ref())?;
        let compiled = answer.map(|answer| self.compiled(answer)).transpose()?;
        if compiled.is_none() && budget.is_none() && filter.is_empty() {
            return Ok(None);
        }
        let vocabulary = Arc::clone(&self.vocabulary);
        Ok(Some(Constraint::new(vocabulary, rules.thinking, budget, compiled, filter)))
    }

    fn compiled(&self, answer: Answer) -> std::result::Result<Arc<Compiled>, GrammarError> {
        let text = serde_json::to_string(&answer.grammar.grammars).expect("grammars are JSON");
        let key: Arc<str> = format!("{:?} {text}", answer.begins).into();
        let cache = || self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = cache().get(&key) {
            return Ok(found);
        }
        let compiled = Compiled::new(&self.factory, answer)?;
        cache().insert(&key, Arc::clone(&compiled));
        Ok(compiled)
    }
}
