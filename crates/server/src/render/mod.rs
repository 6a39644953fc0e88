//! Updates of a reply as an endpoint's JSON, event by event or whole: one [`Render`] per family of endpoints. Must not know
//! the engine or the tokenizer.

mod chat;
mod completion;

use axum::response::Response;
use serde::Serialize;
use serde_json::{Map, Value, json};

pub(crate) use chat::ChatRender;
pub(crate) use completion::CompletionRender;

use crate::decode::{Delta, End, PromptScores, Reason, Shown, TokenEntry};
use crate::error::ApiError;
use crate::reply::{Counts, Update};
use crate::types::chat::{ChatLogprobs, ChatTokenLogprob, TokenLogprob};
use crate::types::common::{ChunkUsage, Matched, PromptLogprobs, Usage};

/// One finished choice, gathered.
#[derive(Debug)]
pub(crate) struct Gathered {
    pub(crate) delta: Delta,
    pub(crate) end: End,
}

/// Writes one reply. Streams call [`opening`](Self::opening), [`update`](Self::update) for each update, then
/// [`closing`](Self::closing) or [`failure`](Self::failure); plain replies call [`whole`](Self::whole) alone.
pub(crate) trait Render: Send {
    /// What a stream begins with.
    fn opening(&mut self, out: &mut Frames);
    /// What one choice gained.
    fn update(&mut self, index: usize, update: Update, out: &mut Frames);
    /// What a stream whose choices have all ended ends with.
    fn closing(&mut self, counts: Counts, out: &mut Frames);
    /// What a stream that failed ends with.
    fn failure(&mut self, error: &ApiError, out: &mut Frames);
    /// A reply that is not streamed.
    fn whole(&mut self, choices: Vec<Gathered>, counts: Counts) -> Response;
}

/// Server-sent events as they travel.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    bytes: Vec<u8>,
}

impl Frames {
    /// An event of JSON.
    ///
    /// # Panics
    /// Never: reply types hold strings, numbers, lists and maps with string keys only.
    pub(crate) fn data(&mut self, value: &impl Serialize) {
        self.data_between("", value, "");
    }

    /// An event of JSON that stands between JSON written before.
    ///
    /// # Panics
    /// As [`data`](Self::data).
    pub(crate) fn data_between(&mut self, before: &str, value: &impl Serialize, behind: &str) {
        // JSON has no raw line breaks, so its text is one line.
        self.bytes.extend_from_slice(b"data: ");
        self.bytes.extend_from_slice(before.as_bytes());
        serde_json::to_writer(&mut self.bytes, value).expect("replies serialize");
        self.bytes.extend_from_slice(behind.as_bytes());
        self.bytes.extend_from_slice(b"\n\n");
    }

    /// An event of JSON with a name.
    pub(crate) fn named(&mut self, name: &str, value: &impl Serialize) {
        self.bytes.extend_from_slice(b"event: ");
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(b'\n');
        self.data(value);
    }

    /// What every OpenAI stream ends with, after an error too.
    pub(crate) fn done(&mut self) {
        self.bytes.extend_from_slice(b"data: [DONE]\n\n");
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

/// What every chunk of an OpenAI reply repeats.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) id: String,
    pub(crate) created_unix_s: u64,
    pub(crate) model: String,
    pub(crate) num_choices: usize,
    /// Streams end with a usage chunk.
    pub(crate) include_usage: bool,
    /// The request asked for log-probabilities.
    pub(crate) logprobs: bool,
    /// It asked for those of the prompt.
    pub(crate) prompt_logprobs: bool,
}

impl Header {
    /// What chunks before the last say about usage.
    fn usage_so_far(&self) -> ChunkUsage {
        if self.include_usage { ChunkUsage::Later } else { ChunkUsage::Absent }
    }
}

fn usage(counts: Counts) -> Usage {
    let Counts { prompt, cached, completion, reasoning } = counts;
    Usage::new(prompt, cached, completion, reasoning)
}

/// How a choice ended, in the words of three servers.
struct Ending {
    finish_reason: &'static str,
    /// vLLM's: nothing for the end of sequence.
    stop_reason: Option<Matched>,
    /// SGLang's.
    matched_stop: Option<Matched>,
}

fn ending(end: &End) -> Ending {
    let (finish_reason, stop_reason, matched_stop) = match &end.reason {
        Reason::StopString(stop) => {
            let matched = Some(Matched::Text(stop.clone()));
            ("stop", matched.clone(), matched)
        }
        Reason::StopToken(token) => ("stop", Some(Matched::Token(token.0)), Some(Matched::Token(token.0))),
        Reason::Eos(token) => ("stop", None, Some(Matched::Token(token.0))),
        Reason::Length => ("length", None, None),
        Reason::Abort => ("abort", None, None),
    };
    // A reply that was cut off in a call, by its length or by a stop string, is still cut off.
    let ended_itself = matches!(end.reason, Reason::Eos(_) | Reason::StopToken(_));
    let finish_reason = if ended_itself && end.called_tools { "tool_calls" } else { finish_reason };
    Ending { finish_reason, stop_reason, matched_stop }
}

fn chat_logprobs(entries: Vec<TokenEntry>) -> ChatLogprobs {
    let one = |shown: Shown| TokenLogprob { token: shown.name, logprob: shown.logprob, bytes: shown.bytes };
    let content = entries.into_iter().map(|entry| ChatTokenLogprob {
        drawn: one(entry.drawn),
        top_logprobs: entry.top.into_iter().map(one).collect(),
    });
    ChatLogprobs { content: content.collect() }
}

/// vLLM's form: a map per token from ids to what is known of them; the first token has nothing before it.
fn prompt_logprobs(scores: &PromptScores) -> PromptLogprobs {
    let entry = |shown: &Shown, rank: Option<usize>| {
        let value = json!({ "logprob": shown.logprob, "rank": rank, "decoded_token": shown.name });
        (shown.token.0.to_string(), value)
    };
    let token = |scored: &TokenEntry| {
        let ranked = scored.top.iter().enumerate().map(|(i, shown)| entry(shown, Some(i + 1)));
        let mut tokens: Map<String, Value> = ranked.collect();
        // Beyond the most likely ones a token's rank is not known.
        let (id, value) = entry(&scored.drawn, None);
        tokens.entry(id).or_insert(value);
        Some(tokens)
    };
    PromptLogprobs(std::iter::once(None).chain(scores.rest.iter().map(token)).collect())
}
