//! Follows a reply through its parts: reasoning, line breaks, answer.

use std::sync::Arc;

use r1_core::{Allowed, ConstraintError, TokenConstraint, TokenId};

use super::Thinking;
use super::answer::Begins;
use super::session::{Compiled, Session};
use super::vocabulary::{MAX_LEAD_BYTES, Vocabulary};
use super::words::{Filter, clear, ones, set};
use crate::control::{THINK_CLOSE, THINK_OPEN};

/// Holds one reply to its [`ReplyRules`](super::ReplyRules). A clone goes its own way from where it is cloned.
#[derive(Clone)]
pub struct Constraint {
    vocabulary: Arc<Vocabulary>,
    /// What comes behind the reasoning; `None`: any text.
    grammar: Option<Arc<Compiled>>,
    budget: Option<u32>,
    filter: Filter,
    phase: Phase,
}

/// Where in the reply the next token stands.
#[derive(Clone)]
enum Phase {
    /// Nothing but white space so far, or a beginning of `<think>`, of a reply that may open its reasoning.
    Start(Start),
    /// Inside the reasoning.
    Thinking(Thought),
    /// Behind `</think>`, after so many bytes of line breaks. The line breaks are not the answer's.
    Lead(usize, Session),
    /// Any text, until a token brings the grammar.
    Until,
    /// In the grammar.
    Answer(Session),
    /// Any text to the end.
    Free,
}

#[derive(Clone)]
struct Start {
    /// The reply so far.
    text: Vec<u8>,
    /// The grammar's reading of it, while there is one.
    session: Option<Session>,
}

#[derive(Clone, Default)]
struct Thought {
    /// Tokens drawn since `<think>`.
    tokens: u32,
    /// Tokens of the forced `</think>` already drawn.
    forced: usize,
    /// The last bytes, as many as a `</think>` that is spelled over several tokens can need.
    tail: Vec<u8>,
}

impl Constraint {
    pub(super) fn new(
        vocabulary: Arc<Vocabulary>,
        thinking: Thinking,
        budget: Option<u32>,
        grammar: Option<Arc<Compiled>>,
        filter: Filter,
    ) -> Self {
        let mut constraint = Self { vocabulary, grammar, budget, filter, phase: Phase::Free };
        constraint.phase = match thinking {
            Thinking::Open => Phase::Thinking(Thought::default()),
            Thinking::MayOpen => {
                Phase::Start(Start { text: Vec::new(), session: constraint.first_session() })
            }
            Thinking::None => constraint.answer(),
        };
        constraint
    }

    /// Whether a grammar holds the answer from its first token.
    fn is_held_at_once(&self) -> bool {
        self.grammar.as_ref().is_some_and(|g| g.begins == Begins::AtOnce)
    }

    /// The grammar's beginning, where it begins at once.
    fn first_session(&self) -> Option<Session> {
        self.grammar.as_ref().filter(|g| g.begins == Begins::AtOnce).map(Compiled::session)
    }

    /// The phase of an answer that begins here.
    fn answer(&self) -> Phase {
        match self.grammar.as_ref().map(|g| g.begins) {
            None => Phase::Free,
            Some(Begins::Behind(_)) => Phase::Until,
            Some(Begins::AtOnce) => Phase::Answer(self.first_session().expect("it begins at once")),
        }
    }

    /// The phase behind `</think>` and `rest`, text of the same token.
    fn behind_thinking(&self, rest: &[u8]) -> Result<Phase, ConstraintError> {
        match self.answer() {
            Phase::Answer(session) if is_lead(rest) => Ok(Phase::Lead(rest.len(), session)),
            Phase::Answer(_) => Err(refused("text of the answer came in one token with `</think>`")),
            other => Ok(other),
        }
    }

    /// The phase after `token`, which came in any text.
    fn in_text(&self, token: TokenId) -> Result<Phase, ConstraintError> {
        if let Some(phase) = self.call(token)? {
            return Ok(phase);
        }
        Ok(match self.grammar.as_ref().map(|grammar| grammar.begins) {
            Some(Begins::Behind(_)) => Phase::Until,
            Some(Begins::AtOnce) | None => Phase::Free,
        })
    }

    /// The grammar of a call that `token` begins, where the model may call when it likes. Calls may begin without the
    /// markup around all of them, and inside the reasoning, which they end: the output parser reads them so.
    fn call(&self, token: TokenId) -> Result<Option<Phase>, ConstraintError> {
        let Some(grammar) = &self.grammar else { return Ok(None) };
        let Begins::Behind(begin) = grammar.begins else { return Ok(None) };
        if token == begin {
            return Ok(Some(Phase::Answer(grammar.session())));
        }
        let single = self.vocabulary.tool_tokens.as_ref().is_ok_and(|tokens| tokens.call_begin == token);
        if !single {
            return Ok(None);
        }
        let mut session = grammar.session();
        session.accept(&self.vocabulary, token)?;
        Ok(Some(Phase::Answer(session)))
    }

    /// Goes on thinking with `bytes`.
    fn think(&self, mut thought: Thought, bytes: &[u8]) -> Result<Phase, ConstraintError> {
        thought.tail.extend_from_slice(bytes);
        let tag = THINK_CLOSE.as_bytes();
        if let Some(at) = thought.tail.windows(tag.len()).position(|w| w == tag) {
            return self.behind_thinking(&thought.tail[at + tag.len()..]);
        }
        let surplus = thought.tail.len().saturating_sub(tag.len() - 1);
        thought.tail.drain(..surplus);
        Ok(Phase::Thinking(thought))
    }

    fn start(&self, mut start: Start, token: TokenId) -> Result<Phase, ConstraintError> {
        start.text.extend_from_slice(self.vocabulary.bytes(token));
        let word = start.text.trim_ascii_start();
        if let Some(rest) = word.strip_prefix(THINK_OPEN.as_bytes()) {
            return self.think(Thought::default(), rest);
        }
        let open = THINK_OPEN.as_bytes().starts_with(word) && !self.vocabulary.is_eos(token);
        if let Some(mut session) = start.session.take() {
            if !open || session.allows(token)? {
                session.accept(&self.vocabulary, token)?;
                start.session = Some(session);
            }
            return match start.session {
                Some(session) if !open => Ok(Phase::Answer(session)),
                session => Ok(Phase::Start(Start { session, ..start })),
            };
        }
        if open {
            return Ok(Phase::Start(start));
        }
        if self.is_held_at_once() {
            // The grammar had given up at the white space before.
            return Err(refused("only `<think>` may follow"));
        }
        self.in_text(token)
    }

    /// Sets the bits of what may follow the reply's beginning.
    fn fill_start(&self, start: &mut Start, mask: &mut [u32]) -> Result<(), ConstraintError> {
        if let Some(session) = &mut start.session {
            session.fill(mask)?;
        }
        let word = start.text.trim_ascii_start();
        let mut spelled = Vec::new();
        for &token in &self.vocabulary.think_open {
            if spelled == word {
                set(mask, token);
                break;
            }
            spelled.extend_from_slice(self.vocabulary.bytes(token));
        }
        if word.is_empty() {
            self.fill_short(&self.vocabulary.spaces, start.text.len(), mask);
        }
        Ok(())
    }

    /// Sets the bits of those white-space tokens that still fit before an answer.
    fn fill_short(&self, tokens: &[TokenId], taken: usize, mask: &mut [u32]) {
        for &token in tokens {
            if taken + self.vocabulary.bytes(token).len() <= MAX_LEAD_BYTES {
                set(mask, token);
            }
        }
    }

    /// What may follow in the reasoning. `None`: anything. A reply that must be something does not end before it.
    fn fill_thought(&self, thought: &Thought, mask: &mut [u32]) -> Option<()> {
        if thought.forced > 0 || self.budget.is_some_and(|budget| thought.tokens >= budget) {
            set(mask, self.vocabulary.think_close[thought.forced]);
            return Some(());
        }
        // A tag that is spelled out over several tokens must not end in the middle of one: what the last one holds
        // besides would be the answer's.
        let tag = THINK_CLOSE.as_bytes();
        if !self.is_held_at_once() {
            return None;
        }
        mask.copy_from_slice(&ones(self.vocabulary.len()));
        for &eos in self.vocabulary.eos() {
            clear(mask, eos);
        }
        // Nor does it skip to a call: the reasoning is closed first.
        if let Ok(tokens) = &self.vocabulary.tool_tokens {
            clear(mask, tokens.calls_begin);
            clear(mask, tokens.call_begin);
        }
        let begun = (1..tag.len()).rev().find(|&n| thought.tail.ends_with(&tag[..n]));
        let Some(begun) = begun else { return Some(()) };
        for id in 0..self.vocabulary.len() as u32 {
            let rest = self.vocabulary.bytes(TokenId(id)).strip_prefix(&tag[begun..]);
            if rest.is_some_and(|rest| !is_lead(rest)) {
                clear(mask, TokenId(id));
            }
        }
        Some(())
    }
}

/// Whether text may stand between `</think>` and an answer.
fn is_lead(text: &[u8]) -> bool {
    text.len() <= MAX_LEAD_BYTES && text.iter().all(|&b| b == b'\n')
}

fn refused(reason: &str) -> ConstraintError {
    ConstraintError(reason.to_owned())
}

impl TokenConstraint for Constraint {
    fn accept(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        if token.0 as usize >= self.vocabulary.len() {
            return Err(refused(&format!("there is no token {}", token.0)));
        }
        self.filter.accept(token);
        let vocabulary = Arc::clone(&self.vocabulary);
        // Sessions are moved, not copied: on an error the constraint is over and stays free.
        self.phase = match std::mem::replace(&mut self.phase, Phase::Free) {
            Phase::Free => Phase::Free,
            Phase::Until => self.in_text(token)?,
            Phase::Answer(mut session) => {
                session.accept(&vocabulary, token)?;
                Phase::Answer(session)
            }
            Phase::Lead(taken, mut session) => {
                let bytes = vocabulary.bytes(token);
                if !bytes.is_empty() && is_lead(bytes) && taken + bytes.len() <= MAX_LEAD_BYTES {
                    Phase::Lead(taken + bytes.len(), session)
                } else {
                    session.accept(&vocabulary, token)?;
                    Phase::Answer(session)
                }
            }
            Phase::Start(start) => self.start(start, token)?,
            Phase::Thinking(mut thought) => {
                let is_forced =
                    thought.forced > 0 || self.budget.is_some_and(|budget| thought.tokens >= budget);
                if is_forced {
                    if vocabulary.think_close[thought.forced] != token {
                        return Err(refused("the thinking budget is spent; only `</think>` may follow"));
                    }
                    thought.forced += 1;
                }
                thought.tokens = thought.tokens.saturating_add(1);
                match self.call(token)? {
                    Some(call) => call,
                    None => self.think(thought, vocabulary.bytes(token))?,
                }
            }
        };
        Ok(())
    }

    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<Allowed, ConstraintError> {
        let words = self.vocabulary.len().div_ceil(32);
        let Some(mask) = mask.get_mut(..words) else {
            return Err(refused(&format!("the mask has {} words; the vocabulary needs {words}", mask.len())));
        };
        let mut phase = std::mem::replace(&mut self.phase, Phase::Free);
        let filled = match &mut phase {
            Phase::Free | Phase::Until => Ok(Allowed::Any),
            Phase::Answer(session) => session.fill(mask).map(|()| Allowed::Masked),
            Phase::Lead(taken, session) => {
                self.fill_short(&self.vocabulary.newlines, *taken, mask);
                session.fill(mask).map(|()| Allowed::Masked)
            }
            Phase::Start(_) if !self.is_held_at_once() => Ok(Allowed::Any),
            Phase::Start(start) => self.fill_start(start, mask).map(|()| Allowed::Masked),
            Phase::Thinking(thought) => {
                Ok(self.fill_thought(thought, mask).map_or(Allowed::Any, |()| Allowed::Masked))
            }
        };
        self.phase = phase;
        let allowed = filled?;
        if !self.filter.acts() {
            return Ok(allowed);
        }
        if allowed == Allowed::Any {
            mask.copy_from_slice(&ones(self.vocabulary.len()));
        }
        self.filter.apply(mask);
        if mask.iter().all(|&word| word == 0) {
            return Err(refused(
                "allowed_token_ids and bad_words leave none of the tokens that the rest of the rules allow here",
            ));
        }
        Ok(Allowed::Masked)
    }
}
