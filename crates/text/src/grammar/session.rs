//! A compiled grammar and the parsers that walk it. Parsers that were used once know the grammar's lexer states already,
//! so they are kept for the next request.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::{Matcher, ParserFactory};
use r1_core::{ConstraintError, TokenId};

use super::answer::{Answer, Begins};
use super::error::{GrammarError, short};
use super::vocabulary::Vocabulary;

/// Most parsers kept for the next requests of one grammar.
const MAX_IDLE: usize = 4;

/// A grammar, compiled once, shared by its requests.
pub(super) struct Compiled {
    pub(super) begins: Begins,
    /// Never walked; copied when no used one is idle.
    pristine: Matcher,
    /// Start states whose lexers earlier requests have filled.
    idle: Mutex<Vec<Matcher>>,
}

impl Compiled {
    /// Compiles, by recursion, and finds that the grammar allows a first token.
    pub(super) fn new(factory: &ParserFactory, answer: Answer) -> Result<Arc<Self>, GrammarError> {
        let Answer { begins, grammar, field } = answer;
        let refuse = |reason: &str| GrammarError::new(field, clean(reason));
        let compile = || {
            let mut matcher = Matcher::new(factory.create_parser(grammar));
            // The first mask of a copy: its lexer states would otherwise be the first request's work.
            match matcher.get_error() {
                Some(error) => Err(refuse(&error)),
                None => match matcher.compute_mask() {
                    Ok(_) => Ok(matcher),
                    Err(error) => Err(first_mask(field, &error.to_string())),
                },
            }
        };
        let pristine = compile()?;
        Ok(Arc::new(Self { begins, pristine, idle: Mutex::new(Vec::new()) }))
    }

    /// A parser at the grammar's beginning.
    pub(super) fn session(self: &Arc<Self>) -> Session {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let start = idle.unwrap_or_else(|| self.pristine.deep_clone());
        // Shares the lexer with `start`, and nothing with any other request.
        let matcher = start.clone();
        let seat = Seat { start: Some(start), grammar: Arc::clone(self), broken: AtomicBool::new(false) };
        Session { matcher, seat: Arc::new(seat) }
    }
}

fn first_mask(field: &str, message: &str) -> GrammarError {
    if message.contains("NoExtension") {
        return GrammarError::new(field, "no text satisfies the grammar");
    }
    GrammarError::new(field, format!("the grammar is too complex: {}", clean(message)))
}

/// What a client is told of the compiler's message; of a broken invariant of the compiler, only that.
fn clean(message: &str) -> String {
    if message.trim_start().starts_with("panic:") {
        return "the grammar goes beyond what the compiler can hold; make its numbers smaller".into();
    }
    short(message)
}

/// What a request borrows of a grammar; goes back when its last constraint is dropped.
struct Seat {
    start: Option<Matcher>,
    grammar: Arc<Compiled>,
    /// A parser failed, and may have left the lexer it shares in any state.
    broken: AtomicBool,
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(start) = self.start.take().filter(|_| !*self.broken.get_mut()) {
            let mut idle = self.grammar.idle.lock().unwrap_or_else(PoisonError::into_inner);
            if idle.len() < MAX_IDLE {
                idle.push(start);
            }
        }
    }
}

/// One walk through a grammar. A clone walks on by itself; clones share their lexer states, so they take turns at it.
#[derive(Clone)]
pub(super) struct Session {
    matcher: Matcher,
    seat: Arc<Seat>,
}

impl Session {
    fn fail(&self, message: &str) -> ConstraintError {
        self.seat.broken.store(true, Ordering::Relaxed);
        ConstraintError(format!("the grammar cannot go on: {}", short(message)))
    }

    /// Walks past a token.
    pub(super) fn accept(&mut self, vocabulary: &Vocabulary, token: TokenId) -> Result<(), ConstraintError> {
        if !self.matcher.is_error() && self.matcher.is_stopped() {
            if vocabulary.is_eos(token) {
                return Ok(());
            }
            return Err(ConstraintError("the reply is complete; only EOS may follow".into()));
        }
        self.matcher.consume_token(token.0).map_err(|e| self.fail(&e.to_string()))
    }

    /// Whether a token may come next.
    pub(super) fn allows(&mut self, token: TokenId) -> Result<bool, ConstraintError> {
        let valid = self.matcher.validate_tokens(&[token.0]);
        valid.map(|n| n == 1).map_err(|e| self.fail(&e.to_string()))
    }

    /// Sets the bits of the tokens that may come next; EOS where the grammar may end.
    pub(super) fn fill(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
        let set = self.matcher.compute_mask_or_eos().map_err(|e| self.fail(&e.to_string()))?;
        for (word, allowed) in mask.iter_mut().zip(set.as_slice()) {
            *word |= allowed;
        }
        Ok(())
    }
}
