//! A reply as a message of blocks, event by event or whole. Both are made of the same pieces, so both say the same. Must not
//! know the engine or the tokenizer.

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value};

use super::error::ErrorBody;
use crate::decode::{End, Part, Reason};
use crate::error::ApiError;
use crate::render::{Frames, Gathered, Render};
use crate::reply::{Counts, Update};

/// Writes a message.
pub(super) struct MessageRender {
    request_id: String,
    id: String,
    model: String,
    /// Tokens of the prompt: what is known of usage when a stream begins.
    num_prompt_tokens: u64,
    pieces: Pieces,
    /// The stream's block that is not closed yet.
    open: Option<Kind>,
    /// Blocks that the stream has closed.
    num_closed: usize,
    ending: Option<Ending>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Thinking,
    Text,
}

#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Block {
    Thinking {
        thinking: String,
        /// Always empty: nobody checks what comes back.
        signature: &'static str,
    },
    Text {
        text: String,
    },
    ToolUse {
        id: String,
        name: String,
        input: Map<String, Value>,
    },
}

#[derive(Debug, Serialize)]
#[serde(tag = "type")]
enum BlockDelta {
    #[serde(rename = "thinking_delta")]
    Thinking { thinking: String },
    #[serde(rename = "signature_delta")]
    Signature { signature: &'static str },
    #[serde(rename = "text_delta")]
    Text { text: String },
    #[serde(rename = "input_json_delta")]
    InputJson { partial_json: String },
}

#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event<'a> {
    MessageStart { message: Message<'a> },
    Ping,
    ContentBlockStart { index: usize, content_block: Block },
    ContentBlockDelta { index: usize, delta: BlockDelta },
    ContentBlockStop { index: usize },
    MessageDelta { delta: &'a Ending, usage: Usage },
    MessageStop,
}

impl Event<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::MessageStart { .. } => "message_start",
            Self::Ping => "ping",
            Self::ContentBlockStart { .. } => "content_block_start",
            Self::ContentBlockDelta { .. } => "content_block_delta",
            Self::ContentBlockStop { .. } => "content_block_stop",
            Self::MessageDelta { .. } => "message_delta",
            Self::MessageStop => "message_stop",
        }
    }

    fn write(&self, out: &mut Frames) {
        out.named(self.name(), self);
    }
}

#[derive(Debug, Serialize)]
struct Message<'a> {
    id: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    role: &'static str,
    model: &'a str,
    content: Vec<Block>,
    stop_reason: Option<&'static str>,
    stop_sequence: Option<String>,
    usage: Usage,
}

/// Why a message ended.
#[derive(Debug, Serialize)]
struct Ending {
    stop_reason: &'static str,
    stop_sequence: Option<String>,
}

/// Tokens; those of the prompt are counted once, cached or not.
#[derive(Clone, Copy, Debug, Serialize)]
struct Usage {
    input_tokens: u64,
    cache_creation_input_tokens: u64,
    cache_read_input_tokens: u64,
    output_tokens: u64,
    output_tokens_details: OutputTokensDetails,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct OutputTokensDetails {
    thinking_tokens: u64,
}

impl Usage {
    fn new(counts: Counts) -> Self {
        let Counts { prompt, cached, completion, reasoning } = counts;
        Self {
            input_tokens: prompt.saturating_sub(cached),
            // Blocks are cached as a matter of course, and nobody pays for it.
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: cached,
            output_tokens: completion,
            output_tokens_details: OutputTokensDetails { thinking_tokens: reasoning },
        }
    }
}

/// What a message gains.
#[derive(Debug, PartialEq)]
enum Piece {
    Thinking(String),
    Text(String),
    /// A whole call.
    ToolUse {
        id: String,
        name: String,
        input: Map<String, Value>,
        json: String,
    },
    /// A call whose arguments are no JSON object, as text: a block of its own.
    Unusable(String),
}

impl Piece {
    fn into_block(self) -> Block {
        match self {
            Self::Thinking(thinking) => Block::Thinking { thinking, signature: "" },
            Self::Text(text) | Self::Unusable(text) => Block::Text { text },
            Self::ToolUse { id, name, input, .. } => Block::ToolUse { id, name, input },
        }
    }
}

/// Makes pieces of a reply's parts: keeps a call until it is whole.
#[derive(Debug, Default)]
struct Pieces {
    call: Option<HeldCall>,
    used_tools: bool,
}

#[derive(Debug)]
struct HeldCall {
    id: String,
    name: String,
    arguments: String,
}

impl Pieces {
    fn push(&mut self, part: Part, mut piece: impl FnMut(Piece)) {
        if let (Part::Arguments { text, .. }, Some(call)) = (&part, &mut self.call) {
            call.arguments.push_str(text);
            return;
        }
        self.finish(false, &mut piece);
        match part {
            Part::Reasoning(text) => piece(Piece::Thinking(text)),
            Part::Content(text) => piece(Piece::Text(text)),
            Part::Call { id, name, .. } => {
                let id = format!("toolu_{}", id.trim_start_matches("call_"));
                self.call = Some(HeldCall { id, name, arguments: String::new() });
            }
            Part::Arguments { .. } => unreachable!("a call's arguments follow it"),
        }
    }

    /// The reply is over, or something else follows: the held call is whole, unless the reply was cut off in it.
    fn finish(&mut self, was_cut: bool, mut piece: impl FnMut(Piece)) {
        let Some(HeldCall { id, name, arguments }) = self.call.take() else { return };
        // A tool without parameters is sometimes called without arguments.
        let json = if arguments.trim().is_empty() && !was_cut { "{}" } else { arguments.trim() };
        match serde_json::from_str(json) {
            Ok(input) => {
                self.used_tools = true;
                piece(Piece::ToolUse { id, name, input, json: json.to_owned() });
            }
            Err(_) => piece(Piece::Unusable(format!("{name}\n{arguments}"))),
        }
    }

    fn ending(&self, end: &End) -> Ending {
        let stop_reason = match &end.reason {
            Reason::StopString(stop) => {
                return Ending { stop_reason: "stop_sequence", stop_sequence: Some(stop.clone()) };
            }
            Reason::Eos(_) | Reason::StopToken(_) if self.used_tools => "tool_use",
            Reason::Eos(_) | Reason::StopToken(_) => "end_turn",
            Reason::Length => "max_tokens",
            // Sent back as the last message, it is continued.
            Reason::Abort => "pause_turn",
        };
        Ending { stop_reason, stop_sequence: None }
    }
}

/// Whether the reply ended before the model wanted it to.
fn was_cut(end: &End) -> bool {
    matches!(end.reason, Reason::Length | Reason::Abort | Reason::StopString(_))
}

impl MessageRender {
    pub(super) fn new(request_id: &str, model: String, num_prompt_tokens: u64) -> Self {
        Self {
            request_id: request_id.to_owned(),
            id: format!("msg_{request_id}"),
            model,
            num_prompt_tokens,
            pieces: Pieces::default(),
            open: None,
            num_closed: 0,
            ending: None,
        }
    }

    fn message(&self, content: Vec<Block>, ending: Option<Ending>, counts: Counts) -> Message<'_> {
        let (stop_reason, stop_sequence) = match ending {
            Some(Ending { stop_reason, stop_sequence }) => (Some(stop_reason), stop_sequence),
            None => (None, None),
        };
        Message {
            id: &self.id,
            kind: "message",
            role: "assistant",
            model: &self.model,
            content,
            stop_reason,
            stop_sequence,
            usage: Usage::new(counts),
        }
    }

    fn write(&mut self, piece: Piece, out: &mut Frames) {
        let empty = String::new;
        match piece {
            Piece::Thinking(thinking) => {
                self.open(Kind::Thinking, || Block::Thinking { thinking: empty(), signature: "" }, out);
                self.delta(BlockDelta::Thinking { thinking }, out);
            }
            Piece::Text(text) => {
                self.open(Kind::Text, || Block::Text { text: empty() }, out);
                self.delta(BlockDelta::Text { text }, out);
            }
            Piece::Unusable(text) => {
                self.close(out);
                self.start(Block::Text { text: empty() }, out);
                self.delta(BlockDelta::Text { text }, out);
                self.stop(out);
            }
            Piece::ToolUse { id, name, json, .. } => {
                self.close(out);
                self.start(Block::ToolUse { id, name, input: Map::new() }, out);
                self.delta(BlockDelta::InputJson { partial_json: json }, out);
                self.stop(out);
            }
        }
    }

    /// Goes on with the open block where it is of this kind, and begins another otherwise.
    fn open(&mut self, kind: Kind, block: impl FnOnce() -> Block, out: &mut Frames) {
        if self.open != Some(kind) {
            self.close(out);
            self.start(block(), out);
            self.open = Some(kind);
        }
    }

    fn close(&mut self, out: &mut Frames) {
        match self.open.take() {
            None => return,
            Some(Kind::Thinking) => self.delta(BlockDelta::Signature { signature: "" }, out),
            Some(Kind::Text) => {}
        }
        self.stop(out);
    }

    fn start(&self, content_block: Block, out: &mut Frames) {
        Event::ContentBlockStart { index: self.num_closed, content_block }.write(out);
    }

    fn delta(&self, delta: BlockDelta, out: &mut Frames) {
        Event::ContentBlockDelta { index: self.num_closed, delta }.write(out);
    }

    fn stop(&mut self, out: &mut Frames) {
        Event::ContentBlockStop { index: self.num_closed }.write(out);
        self.num_closed += 1;
    }
}

impl Render for MessageRender {
    fn opening(&mut self, out: &mut Frames) {
        // What of the prompt was cached is known at the end.
        let counts = Counts { prompt: self.num_prompt_tokens, cached: 0, completion: 0, reasoning: 0 };
        Event::MessageStart { message: self.message(Vec::new(), None, counts) }.write(out);
        Event::Ping.write(out);
    }

    fn update(&mut self, _: usize, update: Update, out: &mut Frames) {
        let mut pieces = Vec::new();
        match update {
            Update::Delta(delta) => {
                for part in delta.parts {
                    self.pieces.push(part, |piece| pieces.push(piece));
                }
            }
            Update::End(end) => {
                self.pieces.finish(was_cut(&end), |piece| pieces.push(piece));
                self.ending = Some(self.pieces.ending(&end));
            }
        }
        for piece in pieces {
            self.write(piece, out);
        }
        if self.ending.is_some() {
            self.close(out);
        }
    }

    fn closing(&mut self, counts: Counts, out: &mut Frames) {
        let delta = self.ending.as_ref().expect("a reply that is over has ended");
        Event::MessageDelta { delta, usage: Usage::new(counts) }.write(out);
        Event::MessageStop.write(out);
    }

    fn failure(&mut self, error: &ApiError, out: &mut Frames) {
        out.named("error", &ErrorBody::new(error, Some(&self.request_id)));
    }

    fn whole(&mut self, choices: Vec<Gathered>, counts: Counts) -> Response {
        let [Gathered { delta, end }] = <[Gathered; 1]>::try_from(choices).expect("a message has one choice");
        // Neighbouring parts are of different kinds, so each piece is a block.
        let mut content = Vec::new();
        for part in delta.parts {
            self.pieces.push(part, |piece| content.push(piece.into_block()));
        }
        self.pieces.finish(was_cut(&end), |piece| content.push(piece.into_block()));
        let ending = self.pieces.ending(&end);
        Json(self.message(content, Some(ending), counts)).into_response()
    }
}
