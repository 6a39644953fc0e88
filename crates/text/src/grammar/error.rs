//! Why a grammar is refused, and where in the request.

use std::fmt;

/// A rule that cannot be enforced: bad, too large or not supported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrammarError {
    /// Field of [`ReplyRules`](super::ReplyRules): `format`, `tools[2].parameters`, `bad_words[0]`.
    pub field: String,
    /// Where in the field's value, if known: a JSON pointer, a line, or a character of a regex.
    pub place: Option<String>,
    /// What is wrong, and the way out.
    pub reason: String,
}

impl std::error::Error for GrammarError {}

impl fmt::Display for GrammarError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Some(place) => write!(f, "{} at {}: {}", self.field, place, self.reason),
            None => write!(f, "{}: {}", self.field, self.reason),
        }
    }
}

impl GrammarError {
    pub(super) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), place: None, reason: reason.into() }
    }
}

/// A fault inside one field's value; the caller knows the field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) place: Option<String>,
    pub(super) reason: String,
}

impl Fault {
    pub(super) fn new(reason: impl Into<String>) -> Self {
        Self { place: None, reason: reason.into() }
    }

    pub(super) fn at(place: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { place: Some(place.into()), reason: reason.into() }
    }

    pub(super) fn of(self, field: impl Into<String>) -> GrammarError {
        GrammarError { field: field.into(), place: self.place, reason: self.reason }
    }
}

/// The first lines of what llguidance says: without its excerpts, state dumps and backtraces.
pub(super) fn short(message: &str) -> String {
    let message = message.split("\n<").next().unwrap_or_default();
    let lines = message.lines().map(str::trim).filter(|line| !line.is_empty());
    // Excerpts of the grammar are numbered lines, `  12 | start: …`, with a marker below.
    let is_excerpt = |line: &&str| {
        line.split_once('|').is_some_and(|(n, _)| n.trim().parse::<u32>().is_ok())
            || line.chars().all(|c| c == '^' || c == ' ')
    };
    let words: Vec<&str> = lines.filter(|line| !is_excerpt(line)).take(3).collect();
    let mut text = words.join("; ");
    if text.len() > 400 {
        let cut = (0..=400).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        text.truncate(cut);
        text.push('…');
    }
    text
}
