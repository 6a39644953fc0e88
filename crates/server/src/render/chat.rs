//! `/v1/chat/completions`' replies. Must not know the engine or the tokenizer.

use std::cell::OnceCell;

use axum::Json;
use axum::response::{IntoResponse, Response};

use super::{Ending, Frames, Gathered, Header, Render, chat_logprobs, ending, prompt_logprobs, usage};
use crate::decode::{Delta, Part};
use crate::error::ApiError;
use crate::reply::{Counts, Update};
use crate::types::chat::{
    CallDelta, CallDeltaFunction, ChatChoice, ChatChunk, ChatReply, ChunkChoice, ChunkDelta, FunctionCall,
    ReplyMessage, ToolCall,
};
use crate::types::common::ChunkUsage;

/// Writes a chat reply.
pub(crate) struct ChatRender {
    header: Header,
    /// A chunk's JSON before and behind its choice, the same in all of a stream.
    around: OnceCell<(String, String)>,
}

impl ChatRender {
    pub(crate) fn new(header: Header) -> Self {
        Self { header, around: OnceCell::new() }
    }

    fn chunk(&self, choices: Vec<ChunkChoice>) -> ChatChunk<'_> {
        ChatChunk {
            id: &self.header.id,
            object: "chat.completion.chunk",
            created: self.header.created_unix_s,
            model: &self.header.model,
            choices,
            system_fingerprint: None,
            usage: self.header.usage_so_far(),
        }
    }

    fn event(&self, choice: &ChunkChoice, out: &mut Frames) {
        let (before, behind) = self.around.get_or_init(|| {
            let json = serde_json::to_string(&self.chunk(Vec::new())).expect("replies serialize");
            // Quotes inside of strings are escaped, so no string holds this.
            let (before, behind) = json.split_once(r#""choices":[]"#).expect("chunks have choices");
            (format!("{before}\"choices\":["), format!("]{behind}"))
        });
        out.data_between(before, choice, behind);
    }

    /// Kinds of text never share a chunk: clients look at one of them and skip the others.
    fn deltas(&self, index: usize, delta: Delta, out: &mut Frames) {
        let mut logprobs = Some(delta.logprobs).filter(|entries| !entries.is_empty()).map(chat_logprobs);
        for part in delta.parts {
            let choice = ChunkChoice { logprobs: logprobs.take(), ..chunk_choice(index, chunk_delta(part)) };
            self.event(&choice, out);
        }
        if logprobs.is_some() {
            let content = ChunkDelta { content: Some(String::new()), ..ChunkDelta::default() };
            self.event(&ChunkChoice { logprobs, ..chunk_choice(index, content) }, out);
        }
    }
}

impl Render for ChatRender {
    /// The role of each choice comes before its text.
    fn opening(&mut self, out: &mut Frames) {
        for index in 0..self.header.num_choices {
            let delta =
                ChunkDelta { role: Some("assistant"), content: Some(String::new()), ..ChunkDelta::default() };
            self.event(&chunk_choice(index, delta), out);
        }
    }

    fn update(&mut self, index: usize, update: Update, out: &mut Frames) {
        match update {
            Update::Delta(delta) => self.deltas(index, delta, out),
            Update::End(end) => {
                let Ending { finish_reason, stop_reason, matched_stop } = ending(&end);
                let mut choice = chunk_choice(index, ChunkDelta::default());
                choice.finish_reason = Some(finish_reason);
                choice.stop_reason = stop_reason;
                choice.matched_stop = matched_stop;
                self.event(&choice, out);
            }
        }
    }

    fn closing(&mut self, counts: Counts, out: &mut Frames) {
        if self.header.include_usage {
            out.data(&ChatChunk { usage: ChunkUsage::Total(usage(counts)), ..self.chunk(Vec::new()) });
        }
        out.done();
    }

    fn failure(&mut self, error: &ApiError, out: &mut Frames) {
        out.data(&error.body());
        out.done();
    }

    fn whole(&mut self, choices: Vec<Gathered>, counts: Counts) -> Response {
        let header = &self.header;
        let mut prompt = None;
        let mut rendered = Vec::with_capacity(choices.len());
        for (index, mut gathered) in choices.into_iter().enumerate() {
            let scores = gathered.delta.prompt.take();
            if index == 0 && header.prompt_logprobs {
                prompt = scores.as_ref().map(prompt_logprobs);
            }
            rendered.push(choice(header, index, gathered));
        }
        let reply = ChatReply {
            id: &header.id,
            object: "chat.completion",
            created: header.created_unix_s,
            model: &header.model,
            choices: rendered,
            usage: usage(counts),
            system_fingerprint: None,
            prompt_logprobs: prompt,
        };
        Json(reply).into_response()
    }
}

fn chunk_delta(part: Part) -> ChunkDelta {
    let call = |call| ChunkDelta { tool_calls: Some(vec![call]), ..ChunkDelta::default() };
    match part {
        Part::Reasoning(text) => ChunkDelta {
            reasoning_content: Some(text.clone()),
            reasoning: Some(text),
            ..ChunkDelta::default()
        },
        Part::Content(text) => ChunkDelta { content: Some(text), ..ChunkDelta::default() },
        Part::Call { index, id, name } => {
            let function = CallDeltaFunction { name: Some(name), arguments: String::new() };
            call(CallDelta { index, id: Some(id), kind: Some("function"), function })
        }
        Part::Arguments { index, text } => {
            let function = CallDeltaFunction { name: None, arguments: text };
            call(CallDelta { index, id: None, kind: None, function })
        }
    }
}

fn chunk_choice(index: usize, delta: ChunkDelta) -> ChunkChoice {
    ChunkChoice { index, delta, logprobs: None, finish_reason: None, stop_reason: None, matched_stop: None }
}

fn choice(header: &Header, index: usize, gathered: Gathered) -> ChatChoice {
    let Gathered { delta, end } = gathered;
    let Ending { finish_reason, stop_reason, matched_stop } = ending(&end);
    let logprobs = header.logprobs.then(|| chat_logprobs(delta.logprobs));
    let message = Message::of(delta.parts);
    let reasoning = Some(message.reasoning).filter(|text| !text.is_empty());
    let tool_calls: Vec<ToolCall> = message.calls.into_iter().map(tool_call).collect();
    // OpenAI's content of a message that only calls tools.
    let content = Some(message.content).filter(|text| !text.is_empty() || tool_calls.is_empty());
    ChatChoice {
        index,
        message: ReplyMessage {
            role: "assistant",
            content,
            reasoning_content: reasoning.clone(),
            reasoning,
            tool_calls,
        },
        logprobs,
        finish_reason,
        stop_reason,
        matched_stop,
    }
}

fn tool_call(call: Call) -> ToolCall {
    let Call { id, name, arguments } = call;
    ToolCall { id, kind: "function", function: FunctionCall { name, arguments } }
}

/// A reply's parts, joined by kind.
#[derive(Debug, Default)]
pub(crate) struct Message {
    pub(crate) reasoning: String,
    pub(crate) content: String,
    pub(crate) calls: Vec<Call>,
}

/// One call of a tool.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) arguments: String,
}

impl Message {
    pub(crate) fn of(parts: Vec<Part>) -> Self {
        let mut message = Self::default();
        for part in parts {
            match part {
                Part::Reasoning(text) => message.reasoning.push_str(&text),
                Part::Content(text) => message.content.push_str(&text),
                Part::Call { id, name, .. } => {
                    message.calls.push(Call { id, name, arguments: String::new() });
                }
                Part::Arguments { index, text } => message.calls[index].arguments.push_str(&text),
            }
        }
        message
    }
}
