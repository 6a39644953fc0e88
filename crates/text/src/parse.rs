//! Sorts a reply's text into reasoning and content and ends it at stop strings. Works on text alone: a tag that came as a
//! token and one that was spelled out count the same. Knows nothing of tokens or chunks of a stream.
//!
//! Tool markup (`<｜tool▁calls▁begin｜>` …) is text here and stays in the content as the model wrote it, so nothing is
//! lost; a tool parser takes [`Delta::Content`] apart after this one, and knows from
//! [`Piece::class`](crate::Piece::class) which markup came as tokens.

use crate::control::{THINK_CLOSE, THINK_OPEN};
use crate::error::{Result, TextError};
use crate::stop::StopStrings;

/// A piece of the reply; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    /// Text before `</think>`.
    Reasoning(String),
    /// Text after it, or all text of a reply without reasoning.
    Content(String),
}

/// How a reply is taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParserConfig {
    /// The prompt left `<think>` open ([`PromptEnd::OpenThink`](crate::PromptEnd::OpenThink)).
    pub start_inside_reasoning: bool,
    /// `false` leaves everything, tags included, in the content.
    pub separate_reasoning: bool,
    /// Strings that end the reply. They are looked for in the whole generated text, reasoning and tags included.
    pub stop: Vec<String>,
    /// Whether the stop string stays at the end of the reply.
    pub include_stop: bool,
}

/// What a piece of text added to the reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// In order.
    pub deltas: Vec<Delta>,
    /// The stop string that ended the reply. Text that is pushed after it is dropped.
    pub stopped: Option<String>,
}

/// Where in a reply the text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Before the first word, outside: a `<think>` here opens the reasoning.
    Start,
    /// Inside, before the first word: line breaks are dropped, and a `<think>` that repeats the prompt's.
    ReasoningStart,
    Reasoning,
    /// Behind `</think>`: line breaks are dropped.
    ContentStart,
    Content,
}

/// Takes one reply apart. The concatenated deltas do not depend on how the text was cut into pieces.
///
/// Line breaks next to a tag belong to the tag: `<think>\nwhy\n</think>\n\nanswer` is the reasoning `why` and the content
/// `answer`. Without any tag, a reply from an open prompt is all reasoning and one from a closed prompt all content; tags
/// past the first `</think>`, or past the first word of a closed prompt's reply, are content.
pub struct OutputParser {
    config: ParserConfig,
    stops: StopStrings,
    place: Place,
    /// Text whose place is not certain yet: a tag's beginning, line breaks before a tag.
    held: String,
    stopped: Option<String>,
}

const LINE_BREAKS: [char; 2] = ['\n', '\r'];

impl OutputParser {
    /// Starts a reply. An empty stop string is refused.
    pub fn new(config: ParserConfig) -> Result<Self> {
        if let Some(i) = config.stop.iter().position(String::is_empty) {
            return Err(TextError::EmptyStop(i));
        }
        let place = match (config.separate_reasoning, config.start_inside_reasoning) {
            (false, _) => Place::Content,
            (true, true) => Place::ReasoningStart,
            (true, false) => Place::Start,
        };
        let stops = StopStrings::new(&config.stop, config.include_stop);
        Ok(Self { config, stops, place, held: String::new(), stopped: None })
    }

    /// The reply goes on with `text`.
    pub fn push(&mut self, text: &str) -> Output {
        let mut deltas = Vec::new();
        if self.stopped.is_none() {
            let fed = self.stops.push(text);
            self.sort(&fed.text, &mut deltas);
            if let Some(i) = fed.stopped {
                self.stopped = Some(self.config.stop[i].clone());
                self.flush(&mut deltas);
            }
        }
        Output { deltas, stopped: self.stopped.clone() }
    }

    /// The reply is over: gives what was held back.
    pub fn finish(&mut self) -> Output {
        let mut deltas = Vec::new();
        let rest = self.stops.finish();
        self.sort(&rest, &mut deltas);
        self.flush(&mut deltas);
        Output { deltas, stopped: self.stopped.clone() }
    }

    /// Whether the text that comes next is reasoning, as far as can be told.
    pub fn in_reasoning(&self) -> bool {
        matches!(self.place, Place::ReasoningStart | Place::Reasoning)
    }

    fn sort(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        if self.place == Place::Content {
            emit(deltas, Delta::Content, text.to_owned());
            return;
        }
        self.held.push_str(text);
        while self.step(deltas) {}
    }

    /// Moves on by one place; `false` when more text is needed.
    fn step(&mut self, deltas: &mut Vec<Delta>) -> bool {
        match self.place {
            Place::Start => {
                let word = self.held.trim_start();
                if let Some(rest) = word.strip_prefix(THINK_OPEN) {
                    self.move_to(Place::ReasoningStart, rest.to_owned());
                } else if THINK_OPEN.starts_with(word) {
                    return false;
                } else {
                    self.place = Place::Content;
                }
            }
            Place::ReasoningStart => {
                let word = self.held.trim_start_matches(LINE_BREAKS);
                if let Some(rest) = word.strip_prefix(THINK_OPEN) {
                    self.held = rest.to_owned();
                } else if THINK_OPEN.starts_with(word) {
                    self.held = word.to_owned();
                    return false;
                } else {
                    self.move_to(Place::Reasoning, word.to_owned());
                }
            }
            Place::Reasoning => {
                if let Some(at) = self.held.find(THINK_CLOSE) {
                    let rest = self.held.split_off(at + THINK_CLOSE.len());
                    self.held.truncate(at);
                    let reasoning = self.held.trim_end_matches(LINE_BREAKS).to_owned();
                    emit(deltas, Delta::Reasoning, reasoning);
                    self.move_to(Place::ContentStart, rest);
                } else {
                    let tag = (1..THINK_CLOSE.len()).rev().find(|&n| self.held.ends_with(&THINK_CLOSE[..n]));
                    let certain = &self.held[..self.held.len() - tag.unwrap_or(0)];
                    let certain = certain.trim_end_matches(LINE_BREAKS).len();
                    let rest = self.held.split_off(certain);
                    emit(deltas, Delta::Reasoning, std::mem::replace(&mut self.held, rest));
                    return false;
                }
            }
            Place::ContentStart => {
                let word = self.held.trim_start_matches(LINE_BREAKS);
                if word.is_empty() {
                    self.held.clear();
                    return false;
                }
                self.move_to(Place::Content, word.to_owned());
            }
            Place::Content => {
                emit(deltas, Delta::Content, std::mem::take(&mut self.held));
                return false;
            }
        }
        true
    }

    fn move_to(&mut self, place: Place, rest: String) {
        self.place = place;
        self.held = rest;
    }

    /// Gives up waiting: what is held is text.
    fn flush(&mut self, deltas: &mut Vec<Delta>) {
        let kind = if self.in_reasoning() { Delta::Reasoning } else { Delta::Content };
        emit(deltas, kind, std::mem::take(&mut self.held));
    }
}

fn emit(deltas: &mut Vec<Delta>, kind: fn(String) -> Delta, text: String) {
    if !text.is_empty() {
        deltas.push(kind(text));
    }
}
