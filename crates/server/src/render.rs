//! Updates of a reply as OpenAI's JSON, chunk by chunk or whole. Must not know the engine or the tokenizer.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::decode::{Delta, End, Reason, Shown, TokenEntry};
use crate::reply::{Counts, Update};
use crate::types::chat::{
    ChatChoice, ChatChunk, ChatLogprobs, ChatReply, ChatTokenLogprob, ChunkChoice, ChunkDelta, ReplyMessage,
    TokenLogprob,
};
use crate::types::common::{ChunkUsage, Matched, Usage};
use crate::types::completion::{CompletionChoice, CompletionLogprobs, CompletionReply};

/// Which endpoint's JSON to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Chat,
    Completion,
}

/// What every chunk of a reply repeats.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) id: String,
    pub(crate) created_unix_s: u64,
    pub(crate) model: String,
    pub(crate) shape: Shape,
    /// Streams end with a usage chunk.
    pub(crate) include_usage: bool,
    /// The request asked for log-probabilities.
    pub(crate) logprobs: bool,
}

impl Header {
    /// The reply's id is the request's with the endpoint's prefix, so that logs and replies can be matched.
    pub(crate) fn with_id(self, request_id: &str) -> Self {
        let prefix = match self.shape {
            Shape::Chat => "chatcmpl",
            Shape::Completion => "cmpl",
        };
        Self { id: format!("{prefix}-{request_id}"), ..self }
    }

    /// What chunks before the last say about usage.
    fn usage_so_far(&self) -> ChunkUsage {
        if self.include_usage { ChunkUsage::Later } else { ChunkUsage::Absent }
    }

    fn chat_chunk(&self, choices: Vec<ChunkChoice>) -> ChatChunk<'_> {
        ChatChunk {
            id: &self.id,
            object: "chat.completion.chunk",
            created: self.created_unix_s,
            model: &self.model,
            choices,
            system_fingerprint: None,
            usage: self.usage_so_far(),
        }
    }

    fn completion_reply(&self, choices: Vec<CompletionChoice>) -> CompletionReply<'_> {
        CompletionReply {
            id: &self.id,
            object: "text_completion",
            created: self.created_unix_s,
            model: &self.model,
            choices,
            system_fingerprint: None,
            usage: self.usage_so_far(),
        }
    }
}

/// One event of a stream.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Chunk<'a> {
    Chat(ChatChunk<'a>),
    Completion(CompletionReply<'a>),
}

/// A whole reply.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Whole<'a> {
    Chat(ChatReply<'a>),
    Completion(CompletionReply<'a>),
}

/// What a stream begins with: chat names the role of each choice before its text.
pub(crate) fn opening_chunks(header: &Header, num_choices: usize) -> Vec<Chunk<'_>> {
    match header.shape {
        Shape::Completion => Vec::new(),
        Shape::Chat => (0..num_choices)
            .map(|index| {
                let delta = ChunkDelta {
                    role: Some("assistant"),
                    content: Some(String::new()),
                    ..ChunkDelta::default()
                };
                Chunk::Chat(header.chat_chunk(vec![chunk_choice(index, delta)]))
            })
            .collect(),
    }
}

/// One update as chunks.
pub(crate) fn chunks(header: &Header, index: usize, update: Update) -> Vec<Chunk<'_>> {
    match (header.shape, update) {
        (Shape::Chat, Update::Delta(delta)) => chat_deltas(header, index, delta),
        (Shape::Chat, Update::End(end)) => {
            let (finish_reason, stop_reason, matched_stop) = ending(&end.reason);
            let mut choice = chunk_choice(index, ChunkDelta::default());
            choice.finish_reason = Some(finish_reason);
            choice.stop_reason = stop_reason;
            choice.matched_stop = matched_stop;
            vec![Chunk::Chat(header.chat_chunk(vec![choice]))]
        }
        (Shape::Completion, update) => {
            let (delta, end) = match update {
                Update::Delta(delta) => (delta, None),
                Update::End(end) => (Delta::default(), Some(end)),
            };
            vec![Chunk::Completion(header.completion_reply(vec![completion_choice(
                index,
                delta,
                end.as_ref(),
            )]))]
        }
    }
}

/// Reasoning and content never share a chunk: clients look at one of them and skip the other.
fn chat_deltas(header: &Header, index: usize, delta: Delta) -> Vec<Chunk<'_>> {
    let mut logprobs = Some(delta.logprobs).filter(|entries| !entries.is_empty()).map(chat_logprobs);
    let mut chunks = Vec::with_capacity(2);
    if !delta.reasoning.is_empty() {
        let both_names = ChunkDelta {
            reasoning_content: Some(delta.reasoning.clone()),
            reasoning: Some(delta.reasoning),
            ..ChunkDelta::default()
        };
        chunks.push(ChunkChoice { logprobs: logprobs.take(), ..chunk_choice(index, both_names) });
    }
    if !delta.content.is_empty() || logprobs.is_some() {
        let content = ChunkDelta { content: Some(delta.content), ..ChunkDelta::default() };
        chunks.push(ChunkChoice { logprobs, ..chunk_choice(index, content) });
    }
    chunks.into_iter().map(|choice| Chunk::Chat(header.chat_chunk(vec![choice]))).collect()
}

fn chunk_choice(index: usize, delta: ChunkDelta) -> ChunkChoice {
    ChunkChoice { index, delta, logprobs: None, finish_reason: None, stop_reason: None, matched_stop: None }
}

/// The chunk behind the last choice's end, where it was asked for.
pub(crate) fn usage_chunk(header: &Header, counts: Counts) -> Option<Chunk<'_>> {
    let usage = ChunkUsage::Total(usage(counts));
    header.include_usage.then(|| match header.shape {
        Shape::Chat => Chunk::Chat(ChatChunk { usage, ..header.chat_chunk(Vec::new()) }),
        Shape::Completion => {
            Chunk::Completion(CompletionReply { usage, ..header.completion_reply(Vec::new()) })
        }
    })
}

fn usage(counts: Counts) -> Usage {
    let Counts { prompt, cached, completion, reasoning } = counts;
    Usage::new(prompt, cached, completion, reasoning)
}

/// A reply that is not streamed.
pub(crate) fn whole(header: &Header, choices: Vec<(Delta, End)>, counts: Counts) -> Whole<'_> {
    let usage = usage(counts);
    let choices = choices.into_iter().enumerate();
    match header.shape {
        Shape::Chat => Whole::Chat(ChatReply {
            id: &header.id,
            object: "chat.completion",
            created: header.created_unix_s,
            model: &header.model,
            choices: choices.map(|(index, (delta, end))| chat_choice(header, index, delta, &end)).collect(),
            usage,
            system_fingerprint: None,
        }),
        Shape::Completion => {
            let choices = choices.map(|(index, (delta, end))| {
                let mut choice = completion_choice(index, delta, Some(&end));
                if header.logprobs {
                    choice.logprobs.get_or_insert_default();
                }
                choice
            });
            let reply = header.completion_reply(choices.collect());
            Whole::Completion(CompletionReply { usage: ChunkUsage::Total(usage), ..reply })
        }
    }
}

fn chat_choice(header: &Header, index: usize, delta: Delta, end: &End) -> ChatChoice {
    let (finish_reason, stop_reason, matched_stop) = ending(&end.reason);
    let reasoning = Some(delta.reasoning).filter(|text| !text.is_empty());
    ChatChoice {
        index,
        message: ReplyMessage {
            role: "assistant",
            content: delta.content,
            reasoning_content: reasoning.clone(),
            reasoning,
        },
        logprobs: header.logprobs.then(|| chat_logprobs(delta.logprobs)),
        finish_reason,
        stop_reason,
        matched_stop,
    }
}

fn completion_choice(index: usize, delta: Delta, end: Option<&End>) -> CompletionChoice {
    let ending = end.map(|end| ending(&end.reason));
    let (finish_reason, stop_reason, matched_stop) = match ending {
        Some((finish_reason, stop_reason, matched_stop)) => (Some(finish_reason), stop_reason, matched_stop),
        None => (None, None, None),
    };
    let logprobs = (!delta.logprobs.is_empty()).then(|| completion_logprobs(delta.logprobs));
    CompletionChoice { index, text: delta.content, logprobs, finish_reason, stop_reason, matched_stop }
}

/// `finish_reason`, vLLM's `stop_reason` (nothing for the end of sequence), SGLang's `matched_stop`.
fn ending(reason: &Reason) -> (&'static str, Option<Matched>, Option<Matched>) {
    match reason {
        Reason::StopString(stop) => {
            let matched = Some(Matched::Text(stop.clone()));
            ("stop", matched.clone(), matched)
        }
        Reason::StopToken(token) => ("stop", Some(Matched::Token(token.0)), Some(Matched::Token(token.0))),
        Reason::Eos(token) => ("stop", None, Some(Matched::Token(token.0))),
        Reason::Length => ("length", None, None),
        Reason::Abort => ("abort", None, None),
    }
}

fn chat_logprobs(entries: Vec<TokenEntry>) -> ChatLogprobs {
    let one = |shown: Shown| TokenLogprob { token: shown.name, logprob: shown.logprob, bytes: shown.bytes };
    let content = entries.into_iter().map(|entry| ChatTokenLogprob {
        drawn: one(entry.drawn),
        top_logprobs: entry.top.into_iter().map(one).collect(),
    });
    ChatLogprobs { content: content.collect() }
}

fn completion_logprobs(entries: Vec<TokenEntry>) -> CompletionLogprobs {
    let mut logprobs = CompletionLogprobs::default();
    for TokenEntry { drawn, top, text_offset } in entries {
        let mut rivals: Map<String, Value> =
            top.into_iter().map(|shown| (shown.name, Value::from(shown.logprob))).collect();
        // The drawn token is always among them, so there may be one more than was asked for.
        rivals.entry(drawn.name.clone()).or_insert_with(|| Value::from(drawn.logprob));
        logprobs.tokens.push(drawn.name);
        logprobs.token_logprobs.push(f64::from(drawn.logprob));
        logprobs.top_logprobs.push(rivals);
        logprobs.text_offset.push(text_offset);
    }
    logprobs
}
