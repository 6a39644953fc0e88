//! Grammars of one served tokenizer: compiled once, kept while they are used. Compiling has threads of its own, so that
//! one grammar that takes for ever holds neither its caller nor, while a place is free, the next grammar.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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
const MAX_GRAMMARS: usize = 64;
/// Most bytes of grammar text kept; what is compiled of it takes some tens of times as much.
const MAX_TEXT_BYTES: usize = 4 << 20;

/// Stack of a compiling thread: schemas and rules are compiled by recursion, and the caller's stack is not known.
const COMPILE_STACK_BYTES: usize = 64 << 20;
/// Most grammars compiled at once.
const MAX_COMPILING: usize = 2;
/// Longest wait for a place to compile in.
const PLACE_WAIT: Duration = Duration::from_secs(2);
/// Longest wait for the compiler.
const RESULT_WAIT: Duration = Duration::from_secs(2);

/// Makes constraints; one for each served tokenizer, shared by all requests.
pub struct Grammars {
    vocabulary: Arc<Vocabulary>,
    shared: Arc<Shared>,
}

/// What compiling threads share with the callers.
struct Shared {
    factory: ParserFactory,
    state: Mutex<State>,
    /// A compiling thread has ended.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    cache: Cache,
    /// The grammars that threads are compiling.
    compiling: Vec<Arc<Job>>,
}

type Outcome = std::result::Result<Arc<Compiled>, GrammarError>;

/// One grammar on a compiling thread.
struct Job {
    key: Arc<str>,
    since: Instant,
    outcome: Mutex<Option<Outcome>>,
}

impl Job {
    fn outcome(&self) -> MutexGuard<'_, Option<Outcome>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
    /// What [`Grammars::new`] refuses, without building its tables.
    pub fn check(tokenizer: &Tokenizer, eos: &[TokenId], vocab_size: usize) -> Result<()> {
        vocabulary::check(tokenizer, eos, vocab_size).map(|_| ())
    }

    /// Reads the vocabulary. `eos`: the tokens that end a reply, at least one; `vocab_size`: the number of logits, which
    /// may exceed the tokenizer's. Takes 0.3 to 1 s for a vocabulary of DeepSeek-V3's size.
    pub fn new(tokenizer: &Tokenizer, eos: &[TokenId], vocab_size: usize) -> Result<Self> {
        let vocabulary = Arc::new(Vocabulary::new(tokenizer, eos, vocab_size)?);
        let factory = vocabulary::factory(&vocabulary)?;
        let shared = Shared { factory, state: Mutex::default(), ended: Condvar::new() };
        Ok(Self { vocabulary, shared: Arc::new(shared) })
    }

    /// The constraint of a reply; `None` where the rules demand nothing. Waits for what has not been
    /// compiled lately: mostly tens of milliseconds, at most four seconds, so not a place for an async worker. A grammar
    /// that takes longer is an error, as is a new one while others hold the compiler.
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
        self.shared.compiled(&key, answer)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn compiled(self: &Arc<Self>, key: &Arc<str>, answer: Answer) -> Outcome {
        let field = answer.field;
        let begun = Instant::now();
        let mut state = self.state();
        let job = loop {
            if let Some(found) = state.cache.get(key) {
                return Ok(found);
            }
            if let Some(job) = state.compiling.iter().find(|job| job.key == *key) {
                break Arc::clone(job);
            }
            if state.compiling.len() < MAX_COMPILING {
                break self.start(&mut state, key, answer)?;
            }
            // Those that have taken too long already are not about to end.
            let left = PLACE_WAIT.saturating_sub(begun.elapsed());
            if left.is_zero() || state.compiling.iter().all(|job| job.since.elapsed() > RESULT_WAIT) {
                let reason = "the server is busy preparing other grammars; try again later";
                return Err(GrammarError::new(field, reason));
            }
            state = self.wait(state, left);
        };
        let begun = Instant::now();
        loop {
            if let Some(outcome) = job.outcome().clone() {
                // Whoever asked first named the field.
                return outcome.map_err(|error| GrammarError { field: field.into(), ..error });
            }
            // Measured from the job's own beginning: one more caller does not make it faster.
            let left = RESULT_WAIT.saturating_sub(begun.elapsed().max(job.since.elapsed()));
            if left.is_zero() {
                let reason = "the grammar takes too long to prepare; make it simpler";
                return Err(GrammarError::new(field, reason));
            }
            state = self.wait(state, left);
        }
    }

    fn wait<'s>(&self, state: MutexGuard<'s, State>, most: Duration) -> MutexGuard<'s, State> {
        self.ended.wait_timeout(state, most).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Compiles on a thread that nobody has to wait for.
    fn start(
        self: &Arc<Self>,
        state: &mut State,
        key: &Arc<str>,
        answer: Answer,
    ) -> std::result::Result<Arc<Job>, GrammarError> {
        let field = answer.field;
        let job = Arc::new(Job { key: Arc::clone(key), since: Instant::now(), outcome: Mutex::default() });
        let (shared, ours) = (Arc::clone(self), Arc::clone(&job));
        let work = move || {
            let compile = std::panic::AssertUnwindSafe(|| Compiled::new(&shared.factory, answer));
            let outcome = std::panic::catch_unwind(compile)
                .unwrap_or_else(|_| Err(GrammarError::new(field, "the grammar could not be compiled")));
            let mut state = shared.state();
            if let Ok(compiled) = &outcome {
                state.cache.insert(&ours.key, Arc::clone(compiled));
            }
            *ours.outcome() = Some(outcome);
            state.compiling.retain(|job| !Arc::ptr_eq(job, &ours));
            drop(state);
            shared.ended.notify_all();
        };
        let thread = std::thread::Builder::new().name("grammar".into()).stack_size(COMPILE_STACK_BYTES);
        // It ends by itself, and its place with it.
        thread.spawn(work).map_err(|e| GrammarError::new(field, format!("no thread: {e}")))?;
        state.compiling.push(Arc::clone(&job));
        Ok(job)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Format;
    use super::*;

    fn grammars() -> Grammars {
        let json = include_bytes!("../../testdata/tiny-r1-tokenizer.json");
        let tokenizer = Tokenizer::from_bytes(json, None).expect("a tokenizer");
        let eos = tokenizer.token_to_id("<｜end▁of▁sentence｜>").expect("EOS");
        Grammars::new(&tokenizer, &[eos], tokenizer.vocab_size()).expect("grammars")
    }

    fn rules(regex: &str) -> ReplyRules {
        ReplyRules { format: Some(Format::Regex(regex.into())), ..ReplyRules::default() }
    }

    /// A compile that began `ago` and does not end.
    fn stuck(key: &str, ago: Duration) -> Arc<Job> {
        let since = Instant::now().checked_sub(ago).expect("the clock is older");
        Arc::new(Job { key: key.into(), since, outcome: Mutex::default() })
    }

    #[test]
    fn stuck_compiles_leave_what_is_known() {
        let grammars = grammars();
        grammars.constraint(&rules("known")).expect("a grammar");
        let jobs = [stuck("a", RESULT_WAIT * 2), stuck("b", RESULT_WAIT * 2)];
        grammars.shared.state().compiling.extend(jobs.clone());
        let begun = Instant::now();
        let refused = grammars.constraint(&rules("new")).err().expect("no place");
        assert!(refused.reason.contains("busy preparing"), "{refused}");
        grammars.constraint(&rules("known")).expect("a known grammar");
        assert!(begun.elapsed() < RESULT_WAIT, "{:?}", begun.elapsed());
        // One ends: its place is free.
        grammars.shared.state().compiling.remove(0);
        grammars.constraint(&rules("new")).expect("a place");
    }

    #[test]
    fn a_caller_leaves_what_takes_too_long() {
        let grammars = grammars();
        grammars.constraint(&rules("slow")).expect("a grammar");
        // The same grammar, as if its compile had not ended.
        let mut state = grammars.shared.state();
        let key = state.cache.entries.keys().next().cloned().expect("one entry");
        state.cache = Cache::default();
        state.compiling.push(stuck(&key, RESULT_WAIT));
        drop(state);
        let refused = grammars.constraint(&rules("slow")).err().expect("it does not end");
        assert!(refused.reason.contains("too long to prepare"), "{refused}");
        assert_eq!(grammars.shared.state().compiling.len(), 1);
        grammars.constraint(&rules("other")).expect("the other place");
    }

    #[test]
    fn one_compile_for_all_who_ask() {
        let grammars = grammars();
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| grammars.constraint(&rules("(a|b){1,200}c")).expect("a grammar"));
            }
        });
        let state = grammars.shared.state();
        assert_eq!((state.cache.entries.len(), state.compiling.len()), (1, 0));
    }
}
