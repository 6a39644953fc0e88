//! Tool calls in a reply: DeepSeek's markup, and the state machine that takes calls out of the content. Knows nothing of
//! reasoning, stop strings or JSON schemas; whether the arguments are JSON is for others to say.

use crate::control::TokenClass;
use crate::parse::{Delta, emit};
use crate::tokenizer::Tokenizer;

/// How a call is written between `<｜tool▁call▁begin｜>` and `<｜tool▁call▁end｜>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolSyntax {
    /// ``function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n``` ``: R1, V3, V3-0324.
    Fenced,
    /// `NAME<｜tool▁sep｜>ARGUMENTS`: V3.1.
    Plain,
}

impl ToolSyntax {
    /// The syntax that a chat template writes earlier calls in; `None` when it writes none that is known here.
    pub fn of_template(source: &str) -> Option<Self> {
        if !source.contains(Markup::Separator.text()) {
            return None;
        }
        Some(if source.contains("```json") { Self::Fenced } else { Self::Plain })
    }
}

/// Which calls a reply may hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolParser {
    /// The syntax; `None` takes both, each call as it is written.
    pub syntax: Option<ToolSyntax>,
    /// Functions that may be called. A call of another is content.
    pub names: Vec<String>,
    /// Whether markup that is spelled out counts, not only that which came as [`TokenClass::Tool`] tokens: for tokenizers
    /// that lack the tokens.
    pub spelled: bool,
    /// Whether markup is left out that came as tokens and whose call the end of the reply cuts off in its head: readers are
    /// shown no control tokens.
    pub hide_cut: bool,
}

impl ToolParser {
    /// Calls of `names` in replies of a model with this tokenizer.
    pub fn new(tokenizer: &Tokenizer, syntax: Option<ToolSyntax>, names: Vec<String>) -> Self {
        let token = tokenizer.token_to_id(Markup::CallBegin.text());
        let spelled = token.is_none_or(|token| tokenizer.class(token) != TokenClass::Tool);
        Self { syntax, names, spelled, hide_cut: false }
    }

    fn allows(&self, syntax: ToolSyntax) -> bool {
        self.syntax.is_none_or(|only| only == syntax)
    }

    fn knows(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }
}

/// The markup that makes up calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Markup {
    CallsBegin,
    CallsEnd,
    CallBegin,
    CallEnd,
    Separator,
}

impl Markup {
    pub(crate) const ALL: [Self; 5] =
        [Self::CallsBegin, Self::CallsEnd, Self::CallBegin, Self::CallEnd, Self::Separator];

    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::CallsBegin => "<｜tool▁calls▁begin｜>",
            Self::CallsEnd => "<｜tool▁calls▁end｜>",
            Self::CallBegin => "<｜tool▁call▁begin｜>",
            Self::CallEnd => "<｜tool▁call▁end｜>",
            Self::Separator => "<｜tool▁sep｜>",
        }
    }

    /// Whether a call can begin with it.
    pub(crate) fn begins(self) -> bool {
        matches!(self, Self::CallsBegin | Self::CallBegin)
    }
}

/// The word before the separator in [`ToolSyntax::Fenced`]: the call's type, and there is one.
const CALL_TYPE: &str = "function";
const FENCE: &str = "```";
const LANGUAGE: &str = "json";

/// White space that a call's head may hold. A model writes one line break; the bound keeps heads cheap to look at again.
const MAX_HEAD_SPACE: usize = 64;

/// Where in the content the text is.
enum State {
    Outside,
    /// Behind `<｜tool▁calls▁begin｜>`.
    Begun,
    /// Behind `<｜tool▁call▁begin｜>`: what was read of the call's type or name.
    Head(String),
    /// Behind the separator: what was read of the name and the opening fence.
    FencedHead(String),
    Arguments(Arguments),
}

/// Takes the content of one reply apart. Text and markup are kept until it is certain what they are; a call that turns out
/// not to be one is given out as content, as it was written.
pub(crate) struct ToolCalls {
    parser: ToolParser,
    state: State,
    /// White space that may separate content from markup.
    gap: String,
    /// Everything since the markup that began the present head, the gap before it included.
    raw: String,
    /// The gap follows a call's markup.
    behind_markup: bool,
    has_content: bool,
    /// A call was read since the last `<｜tool▁calls▁end｜>`.
    open: bool,
    num_calls: usize,
}

impl ToolCalls {
    pub(crate) fn new(parser: ToolParser) -> Self {
        Self {
            parser,
            state: State::Outside,
            gap: String::new(),
            raw: String::new(),
            behind_markup: false,
            has_content: false,
            open: false,
            num_calls: 0,
        }
    }

    /// Whether markup that is spelled out counts.
    pub(crate) fn spelled(&self) -> bool {
        self.parser.spelled
    }

    /// The content goes on with `text`.
    pub(crate) fn text(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        match &mut self.state {
            State::Outside => self.outside(text, deltas),
            State::Begun => {
                self.raw.push_str(text);
                if !text.trim_start().is_empty() {
                    self.not_a_call(deltas);
                }
            }
            State::Head(head) => {
                self.raw.push_str(text);
                let text = if head.is_empty() { text.trim_start() } else { text };
                head.push_str(text);
                if !may_be_head(&self.parser, head) {
                    self.not_a_call(deltas);
                }
            }
            State::FencedHead(head) => {
                self.raw.push_str(text);
                let text = if head.is_empty() { text.trim_start() } else { text };
                head.push_str(text);
                match read_fenced_head(&self.parser, head) {
                    HeadRead::More => {}
                    HeadRead::NoHead => self.not_a_call(deltas),
                    HeadRead::Whole { syntax, name, arguments } => {
                        self.begin_call(syntax, name, deltas);
                        self.text(&arguments, deltas);
                    }
                }
            }
            State::Arguments(arguments) => {
                let read = arguments.text(text);
                emit(deltas, Delta::ToolArguments { index: self.num_calls - 1, text: read.text });
                if let Some(content) = read.behind {
                    self.end_call();
                    self.outside(&content, deltas);
                }
            }
        }
    }

    /// The content goes on with markup.
    pub(crate) fn markup(&mut self, markup: Markup, deltas: &mut Vec<Delta>) {
        match (&mut self.state, markup) {
            (State::Outside, Markup::CallsBegin | Markup::CallBegin) => {
                self.raw = std::mem::take(&mut self.gap) + markup.text();
                self.state =
                    if markup == Markup::CallBegin { State::Head(String::new()) } else { State::Begun };
            }
            (State::Outside, Markup::CallsEnd) if self.open => {
                self.open = false;
                self.gap.clear();
                self.behind_markup = true;
            }
            (State::Outside, _) => self.outside(markup.text(), deltas),
            (State::Begun, Markup::CallBegin) => {
                self.raw.push_str(markup.text());
                self.state = State::Head(String::new());
            }
            (State::Head(head), Markup::Separator) => {
                let head = head.trim_end();
                if head == CALL_TYPE && self.parser.allows(ToolSyntax::Fenced) {
                    self.raw.push_str(markup.text());
                    self.state = State::FencedHead(String::new());
                } else if self.parser.knows(head) && self.parser.allows(ToolSyntax::Plain) {
                    let name = head.to_owned();
                    self.begin_call(ToolSyntax::Plain, name, deltas);
                } else {
                    self.not_a_call(deltas);
                    self.outside(markup.text(), deltas);
                }
            }
            (State::Begun | State::Head(_) | State::FencedHead(_), _) => {
                self.not_a_call(deltas);
                self.markup(markup, deltas);
            }
            (State::Arguments(_), Markup::Separator) => self.text(markup.text(), deltas),
            (State::Arguments(arguments), _) => {
                emit(
                    deltas,
                    Delta::ToolArguments { index: self.num_calls - 1, text: arguments.finish(false) },
                );
                self.end_call();
                if markup != Markup::CallEnd {
                    self.markup(markup, deltas);
                }
            }
        }
    }

    /// The reply is over. A call that it leaves open is a call, one whose head it leaves open is content, if it is shown.
    pub(crate) fn finish(&mut self, deltas: &mut Vec<Delta>) {
        match &mut self.state {
            State::Outside => {}
            State::Begun | State::Head(_) | State::FencedHead(_)
                if self.parser.hide_cut && !self.parser.spelled =>
            {
                self.state = State::Outside;
                self.raw.clear();
            }
            State::Begun | State::Head(_) | State::FencedHead(_) => self.not_a_call(deltas),
            State::Arguments(arguments) => {
                let text = arguments.finish(true);
                emit(deltas, Delta::ToolArguments { index: self.num_calls - 1, text });
                self.end_call();
            }
        }
        let gap = std::mem::take(&mut self.gap);
        if !self.behind_markup {
            emit(deltas, Delta::Content(gap));
        }
    }

    fn begin_call(&mut self, syntax: ToolSyntax, name: String, deltas: &mut Vec<Delta>) {
        self.raw.clear();
        self.state = State::Arguments(Arguments::new(syntax));
        deltas.push(Delta::ToolCall { index: self.num_calls, name });
        self.num_calls += 1;
    }

    fn end_call(&mut self) {
        self.state = State::Outside;
        self.open = true;
        self.behind_markup = true;
    }

    /// What looked like a call is content.
    fn not_a_call(&mut self, deltas: &mut Vec<Delta>) {
        self.state = State::Outside;
        let raw = std::mem::take(&mut self.raw);
        self.outside(&raw, deltas);
    }

    fn outside(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        let (mut text, gap) = text.split_at(text.trim_end().len());
        if !text.is_empty() {
            let mut lead = std::mem::take(&mut self.gap);
            if self.num_calls > 0 && !self.has_content {
                lead.clear();
                text = text.trim_start();
            }
            emit(deltas, Delta::Content(lead + text));
            self.has_content = true;
            self.behind_markup = false;
        }
        self.gap.push_str(gap);
    }
}

/// Whether text behind `<｜tool▁call▁begin｜>` can still become the type or the name before a separator.
fn may_be_head(parser: &ToolParser, head: &str) -> bool {
    let head_len = head.len();
    let head = head.trim_end();
    let begins = |candidate: &str| candidate.starts_with(head);
    head_len - head.len() <= MAX_HEAD_SPACE
        && (parser.allows(ToolSyntax::Fenced) && begins(CALL_TYPE)
            || parser.allows(ToolSyntax::Plain) && parser.names.iter().any(|name| begins(name)))
}

/// What stands behind `function<｜tool▁sep｜>`.
enum HeadRead {
    More,
    NoHead,
    Whole { syntax: ToolSyntax, name: String, arguments: String },
}

/// Reads ``NAME\n```json\n``. Any white space may stand where one line break does, and the fence may lack its language. `head` does not
/// begin with white space.
fn read_fenced_head(parser: &ToolParser, head: &str) -> HeadRead {
    if head.starts_with('{') && parser.allows(ToolSyntax::Plain) && parser.knows(CALL_TYPE) {
        let name = CALL_TYPE.to_owned();
        return HeadRead::Whole { syntax: ToolSyntax::Plain, name, arguments: head.to_owned() };
    }
    let Some(name_len) = head.find(|c: char| c.is_whitespace() || c == '`') else {
        let may_be = parser.names.iter().any(|name| name.starts_with(head));
        return if may_be { HeadRead::More } else { HeadRead::NoHead };
    };
    let (name, rest) = head.split_at(name_len);
    let fence = rest.trim_start();
    if !parser.knows(name) || rest.len() - fence.len() > MAX_HEAD_SPACE {
        return HeadRead::NoHead;
    }
    let Some(language) = fence.strip_prefix(FENCE) else {
        return if FENCE.starts_with(fence) { HeadRead::More } else { HeadRead::NoHead };
    };
    if LANGUAGE.starts_with(language) {
        return HeadRead::More;
    }
    let arguments = language.strip_prefix(LANGUAGE).unwrap_or(language);
    if !arguments.starts_with(|c: char| c.is_whitespace() || "{[\"".contains(c)) {
        return HeadRead::NoHead;
    }
    let [name, arguments] = [name, arguments].map(str::to_owned);
    HeadRead::Whole { syntax: ToolSyntax::Fenced, name, arguments }
}

/// A call's arguments as they come. What may be the end, white space and a fence, is held back.
struct Arguments {
    syntax: ToolSyntax,
    begun: bool,
    json: JsonEnd,
    /// White space, then `num_ticks` backticks, then, if there are three, white space from `behind_fence` on.
    held: String,
    num_ticks: usize,
    behind_fence: usize,
}

/// What came of a piece of the arguments.
struct ArgumentsRead {
    text: String,
    /// Content behind a call that ended without `<｜tool▁call▁end｜>`, white space in front of it included.
    behind: Option<String>,
}

impl Arguments {
    fn new(syntax: ToolSyntax) -> Self {
        Self {
            syntax,
            begun: false,
            json: JsonEnd::default(),
            held: String::new(),
            num_ticks: 0,
            behind_fence: 0,
        }
    }

    fn text(&mut self, text: &str) -> ArgumentsRead {
        let mut out = String::new();
        let text = if self.begun { text } else { text.trim_start() };
        self.begun |= !text.is_empty();
        for (at, c) in text.char_indices() {
            let is_tick = c == '`' && self.syntax == ToolSyntax::Fenced;
            let behind_fence = self.num_ticks == FENCE.len();
            if c.is_whitespace() {
                if !behind_fence && self.num_ticks > 0 {
                    self.release(&mut out, self.held.len());
                }
                self.held.push(c);
                continue;
            }
            if behind_fence && self.json.is_complete() {
                let behind = self.held.split_off(self.behind_fence) + &text[at..];
                return ArgumentsRead { text: out, behind: Some(behind) };
            }
            if !is_tick {
                self.release(&mut out, self.held.len());
                self.json.read(c);
                out.push(c);
                continue;
            }
            if behind_fence && self.behind_fence < self.held.len() {
                self.release(&mut out, self.behind_fence);
            } else if behind_fence {
                // Of a longer run the last three are the fence.
                self.release(&mut out, self.held.len() - FENCE.len() + 1);
                self.num_ticks = FENCE.len() - 1;
            }
            self.held.push(c);
            self.num_ticks += 1;
            self.behind_fence = self.held.len();
        }
        ArgumentsRead { text: out, behind: None }
    }

    /// The first `len` bytes of what is held are text.
    fn release(&mut self, out: &mut String, len: usize) {
        if len == 0 {
            return;
        }
        let rest = self.held.split_off(len);
        let text = std::mem::replace(&mut self.held, rest);
        text.chars().for_each(|c| self.json.read(c));
        out.push_str(&text);
        self.num_ticks = 0;
        self.behind_fence = 0;
    }

    /// The arguments are over. Where the reply was `cut` inside a JSON string, what is held is that string's, unless it
    /// is a whole fence.
    fn finish(&mut self, cut: bool) -> String {
        let held = std::mem::take(&mut self.held);
        if cut && self.json.in_string && self.num_ticks < FENCE.len() { held } else { String::new() }
    }
}

/// Follows JSON text to its end, without judging it.
#[derive(Default)]
struct JsonEnd {
    depth: u64,
    in_string: bool,
    escaped: bool,
    closed: bool,
}

impl JsonEnd {
    fn read(&mut self, c: char) {
        match c {
            _ if self.escaped => self.escaped = false,
            '\\' if self.in_string => self.escaped = true,
            '"' => self.in_string = !self.in_string,
            _ if self.in_string => {}
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth = self.depth.saturating_sub(1);
                self.closed = true;
            }
            _ => {}
        }
    }

    /// An object or a list was closed, and none is open.
    fn is_complete(&self) -> bool {
        self.closed && self.depth == 0 && !self.in_string
    }
}
