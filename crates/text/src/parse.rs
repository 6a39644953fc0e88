//! Takes a reply apart: reasoning, content, tool calls; and ends it at stop strings. Fed piece by piece or at once, it
//! comes to the same. Knows nothing of token ids or of how deltas are sent.
//!
//! Text goes through three stages, each of which holds back what it cannot tell yet: stop strings are looked for in the
//! whole generated text, tags and tool markup included, as other servers do; what passes is cut into words and tool
//! markup; those are sorted by where in the reply they stand. The think tags count whether they came as tokens or were
//! spelled out. Tool markup counts only where it came as tokens, if the tokenizer has them: a reply that talks about the
//! markup makes no call.

use std::collections::VecDeque;
use std::ops::Range;

use crate::control::{THINK_CLOSE, THINK_OPEN, TokenClass};
use crate::detok::Piece;
use crate::error::{Result, TextError};
use crate::stop::StopStrings;
use crate::tools::{Markup, ToolCalls, ToolParser};

/// A piece of the reply; texts are never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    /// Text before `</think>`.
    Reasoning(String),
    /// Text after it, or all text of a reply without reasoning.
    Content(String),
    /// A call begins; its name is one of [`ToolParser::names`].
    ToolCall {
        /// Counts the reply's calls from 0.
        index: usize,
        /// The function.
        name: String,
    },
    /// More of a call's arguments, as the model wrote them. A call without any has none of these.
    ToolArguments {
        /// The call's, which has begun.
        index: usize,
        /// A fragment of the JSON text.
        text: String,
    },
}

/// How a reply is taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParserConfig {
    /// The prompt left `<think>` open ([`PromptEnd::OpenThink`](crate::PromptEnd::OpenThink)).
    pub start_inside_reasoning: bool,
    /// `false` leaves the reasoning, tags included, in the content.
    pub separate_reasoning: bool,
    /// Strings that end the reply. They are looked for in the whole generated text: reasoning, tags, tool markup and
    /// arguments included.
    pub stop: Vec<String>,
    /// Whether the stop string stays at the end of the reply.
    pub include_stop: bool,
    /// A stop string that is complete within the first `min_tokens` tokens does not act. One that begins there and ends
    /// later does.
    pub min_tokens: usize,
    /// The calls to look for; `None` leaves tool markup in the content.
    pub tools: Option<ToolParser>,
}

/// What a piece of text added to the reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// In order; neighbours are never of one kind.
    pub deltas: Vec<Delta>,
    /// The stop string that ended the reply. Text that is pushed after it is dropped.
    pub stopped: Option<String>,
}

/// Where in a reply the text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Before the first word, outside: a `<think>` here opens the reasoning. White space is held.
    Start,
    /// Inside, before the first word: line breaks are dropped, and a `<think>` that repeats the prompt's.
    ReasoningStart,
    /// Line breaks are held, which may belong to the tag.
    Reasoning,
    /// Behind `</think>`: line breaks are dropped.
    ContentStart,
    Content,
}

impl Place {
    /// The tag that matters here. None holds its first character twice.
    fn tag(self) -> &'static str {
        match self {
            Self::Start | Self::ReasoningStart => THINK_OPEN,
            Self::Reasoning => THINK_CLOSE,
            Self::ContentStart | Self::Content => "",
        }
    }

    fn is_reasoning(self) -> bool {
        matches!(self, Self::ReasoningStart | Self::Reasoning)
    }
}

/// Takes one reply apart. The concatenated deltas do not depend on how the text was cut into pieces, and the time is
/// linear in the text.
///
/// Line breaks next to a think tag belong to the tag: `<think>\nwhy\n</think>\n\nanswer` is the reasoning `why` and the
/// content `answer`. Without any tag, a reply from an open prompt is all reasoning and one from a closed prompt all
/// content; tags past the first `</think>`, or past the first word of a closed prompt's reply, are content.
///
/// With [`ParserConfig::tools`], calls are taken out of the content, with the white space around their markup. Replies
/// may leave out `<｜tool▁calls▁begin｜>` and the ends of calls. Markup that begins a call inside the reasoning ends the
/// reasoning: models forget `</think>` there. What is not a call after all (an unknown function, a bad head, no fence)
/// is content as it was written.
pub struct OutputParser {
    config: ParserConfig,
    stops: StopStrings,
    num_tokens: usize,
    /// Text past the stop strings that may still become markup.
    unread: String,
    /// Where the first byte of `unread` is in the generated text.
    unread_at: usize,
    /// Bytes of generated text.
    pushed: usize,
    /// Tool markup that came as tokens, at its place in the generated text.
    tool_tokens: VecDeque<(Range<usize>, Markup)>,
    place: Place,
    /// White space whose place is not certain yet.
    held: String,
    /// Bytes of the place's tag that the text ends with, behind `held`.
    tag_len: usize,
    tools: Option<ToolCalls>,
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
        Ok(Self {
            stops: StopStrings::new(&config.stop, config.include_stop),
            tools: config.tools.clone().map(ToolCalls::new),
            config,
            num_tokens: 0,
            unread: String::new(),
            unread_at: 0,
            pushed: 0,
            tool_tokens: VecDeque::new(),
            place,
            held: String::new(),
            tag_len: 0,
            stopped: None,
        })
    }

    /// The reply goes on with a token's piece; an empty one counts as a token too.
    pub fn push(&mut self, piece: &Piece) -> Output {
        self.num_tokens = self.num_tokens.saturating_add(1);
        if self.tools.is_some() && piece.class == TokenClass::Tool {
            let token = Markup::ALL.into_iter().find(|markup| piece.text.ends_with(markup.text()));
            if let Some(markup) = token {
                let end = self.pushed + piece.text.len();
                self.tool_tokens.push_back((end - markup.text().len()..end, markup));
            }
        }
        self.push_text(&piece.text)
    }

    /// The reply goes on with text that is no further token: what a detokenizer held back, say.
    pub fn push_text(&mut self, text: &str) -> Output {
        let mut deltas = Vec::new();
        if self.stopped.is_none() {
            self.pushed += text.len();
            let may_stop = self.config.min_tokens == 0 || self.num_tokens > self.config.min_tokens;
            let fed = self.stops.push(text, may_stop);
            self.read(&fed.text, &mut deltas);
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
        if self.stopped.is_none() {
            let rest = self.stops.finish();
            self.read(&rest, &mut deltas);
            self.flush(&mut deltas);
        }
        Output { deltas, stopped: self.stopped.clone() }
    }

    /// Whether the text that comes next is reasoning, as far as can be told.
    pub fn in_reasoning(&self) -> bool {
        self.place.is_reasoning()
    }

    /// Cuts text into words and tool markup. Markup of which the end is yet to come is held.
    fn read(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        match &self.tools {
            None => self.words(text, deltas),
            Some(tools) if tools.spelled() => self.read_spelled(text, deltas),
            Some(_) => self.read_tokens(text, deltas),
        }
    }

    fn read_tokens(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        self.unread.push_str(text);
        let mut done = 0;
        while let Some((range, markup)) = self.tool_tokens.front().cloned() {
            let [start, end] = [range.start, range.end].map(|at| at - self.unread_at);
            if start >= self.unread.len() {
                break;
            }
            let words = self.unread[done..start].to_owned();
            self.words(&words, deltas);
            done = start;
            if end > self.unread.len() {
                self.unread_at += done;
                self.unread.drain(..done);
                return;
            }
            self.tool_tokens.pop_front();
            self.markup(markup, deltas);
            done = end;
        }
        self.unread_at += self.unread.len();
        let unread = std::mem::take(&mut self.unread);
        self.words(&unread[done..], deltas);
    }

    fn read_spelled(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        let mut done = 0;
        for (at, c) in text.char_indices() {
            if self.unread.is_empty() && c != '<' {
                continue;
            }
            if self.unread.is_empty() {
                self.words(&text[done..at], deltas);
            }
            self.unread.push(c);
            done = at + c.len_utf8();
            if let Some(markup) = Markup::ALL.into_iter().find(|markup| markup.text() == self.unread) {
                self.unread.clear();
                self.markup(markup, deltas);
            } else if !Markup::ALL.iter().any(|markup| markup.text().starts_with(&self.unread)) {
                // Markup holds one `<`, its first character.
                let keep = usize::from(c == '<');
                let rest = self.unread.split_off(self.unread.len() - keep);
                let words = std::mem::replace(&mut self.unread, rest);
                self.words(&words, deltas);
            }
        }
        if self.unread.is_empty() {
            self.words(&text[done..], deltas);
        }
    }

    /// Sorts tool markup.
    fn markup(&mut self, markup: Markup, deltas: &mut Vec<Delta>) {
        if self.place != Place::Content && !markup.begins() {
            self.words(markup.text(), deltas);
            return;
        }
        if self.place != Place::Content {
            self.leave_for_content(deltas);
        }
        let tools = self.tools.as_mut().expect("markup is only looked for with tools");
        tools.markup(markup, deltas);
    }

    /// Tool calls are content: whatever was before is over. Held white space goes with the markup that follows.
    fn leave_for_content(&mut self, deltas: &mut Vec<Delta>) {
        let tag = &self.place.tag()[..std::mem::take(&mut self.tag_len)];
        let held = std::mem::take(&mut self.held);
        let place = std::mem::replace(&mut self.place, Place::Content);
        if place.is_reasoning() && !tag.is_empty() {
            emit(deltas, Delta::Reasoning(held + tag));
        } else {
            self.content(&(held + tag), deltas);
        }
    }

    /// Sorts text that is no tool markup.
    fn words(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        let mut rest = text;
        while !rest.is_empty() {
            rest = match self.place {
                Place::Content => {
                    self.content(rest, deltas);
                    ""
                }
                Place::ContentStart => {
                    let words = rest.trim_start_matches(LINE_BREAKS);
                    if !words.is_empty() {
                        self.place = Place::Content;
                    }
                    words
                }
                Place::Start | Place::ReasoningStart | Place::Reasoning => self.read_to_tag(rest, deltas),
            };
        }
    }

    /// Reads up to where the place changes, and gives the rest.
    fn read_to_tag<'t>(&mut self, text: &'t str, deltas: &mut Vec<Delta>) -> &'t str {
        let tag = self.place.tag();
        let mut reasoning = String::new();
        for (at, c) in text.char_indices() {
            if tag[self.tag_len..].starts_with(c) {
                self.tag_len += 1;
                if self.tag_len == tag.len() {
                    self.tag_len = 0;
                    self.held.clear();
                    self.place = if tag == THINK_OPEN { Place::ReasoningStart } else { Place::ContentStart };
                    emit(deltas, Delta::Reasoning(reasoning));
                    return &text[at + 1..];
                }
                continue;
            }
            let begun = &tag[..std::mem::take(&mut self.tag_len)];
            match self.place {
                Place::Start if begun.is_empty() && c.is_whitespace() => self.held.push(c),
                Place::Start => {
                    self.place = Place::Content;
                    let words = std::mem::take(&mut self.held) + begun;
                    self.content(&words, deltas);
                    return &text[at..];
                }
                Place::ReasoningStart if begun.is_empty() && LINE_BREAKS.contains(&c) => {}
                Place::ReasoningStart => {
                    self.place = Place::Reasoning;
                    self.words(begun, deltas);
                    return &text[at..];
                }
                _ => {
                    if !begun.is_empty() {
                        reasoning.push_str(&self.held);
                        reasoning.push_str(begun);
                        self.held.clear();
                    }
                    if tag.starts_with(c) {
                        self.tag_len = 1;
                    } else if LINE_BREAKS.contains(&c) {
                        self.held.push(c);
                    } else {
                        reasoning.push_str(&self.held);
                        reasoning.push(c);
                        self.held.clear();
                    }
                }
            }
        }
        emit(deltas, Delta::Reasoning(reasoning));
        ""
    }

    fn content(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        match &mut self.tools {
            Some(tools) => tools.text(text, deltas),
            None => emit(deltas, Delta::Content(text.to_owned())),
        }
    }

    /// Gives up waiting: what is held is text.
    fn flush(&mut self, deltas: &mut Vec<Delta>) {
        let unread = std::mem::take(&mut self.unread);
        self.words(&unread, deltas);
        let held = std::mem::take(&mut self.held) + &self.place.tag()[..std::mem::take(&mut self.tag_len)];
        if self.in_reasoning() {
            emit(deltas, Delta::Reasoning(held));
        } else {
            self.content(&held, deltas);
        }
        if let Some(tools) = &mut self.tools {
            tools.finish(deltas);
        }
    }
}

/// Adds a delta that has text, to the last one if that is of its kind.
pub(crate) fn emit(deltas: &mut Vec<Delta>, delta: Delta) {
    match (deltas.last_mut(), &delta) {
        (Some(Delta::Reasoning(last)), Delta::Reasoning(text))
        | (Some(Delta::Content(last)), Delta::Content(text)) => last.push_str(text),
        (Some(Delta::ToolArguments { index: i, text: last }), Delta::ToolArguments { index, text })
            if i == index =>
        {
            last.push_str(text);
        }
        (_, Delta::Reasoning(text) | Delta::Content(text) | Delta::ToolArguments { text, .. })
            if text.is_empty() => {}
        _ => deltas.push(delta),
    }
}
