//! `/v1/completions`' replies. Must not know the engine or the tokenizer.

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value};

use super::{Ending, Frames, Gathered, Header, Render, ending, prompt_logprobs, usage};
use crate::decode::{Delta, End, Part, PromptScores, TokenEntry};
use crate::error::ApiError;
use crate::reply::{Counts, Update};
use crate::types::common::ChunkUsage;
use crate::types::completion::{CompletionChoice, CompletionLogprobs, CompletionReply};

/// Writes a text completion.
pub(crate) struct CompletionRender {
    pub(crate) header: Header,
    /// The prompt stands before what is generated, its log-probabilities with it where they were asked for.
    pub(crate) echo: bool,
}

impl CompletionRender {
    fn reply(&self, choices: Vec<CompletionChoice>) -> CompletionReply<'_> {
        CompletionReply {
            id: &self.header.id,
            object: "text_completion",
            created: self.header.created_unix_s,
            model: &self.header.model,
            choices,
            system_fingerprint: None,
            usage: self.header.usage_so_far(),
        }
    }

    fn choice(&self, index: usize, mut delta: Delta, end: Option<&End>) -> CompletionChoice {
        let (finish_reason, stop_reason, matched_stop) = match end.map(ending) {
            Some(Ending { finish_reason, stop_reason, matched_stop }) => {
                (Some(finish_reason), stop_reason, matched_stop)
            }
            None => (None, None, None),
        };
        let prompt = delta.prompt.take();
        let prompt_logprobs = prompt.as_ref().filter(|_| self.header.prompt_logprobs).map(prompt_logprobs);
        let mut logprobs = None;
        if self.header.logprobs {
            let of_prompt = prompt.filter(|_| self.echo);
            let has_some = of_prompt.is_some() || !delta.logprobs.is_empty();
            logprobs = has_some.then(|| logprobs_of(of_prompt, delta.logprobs));
        }
        CompletionChoice {
            index,
            text: text_of(delta.parts),
            logprobs,
            finish_reason,
            stop_reason,
            matched_stop,
            prompt_logprobs,
        }
    }
}

impl Render for CompletionRender {
    fn opening(&mut self, _: &mut Frames) {}

    fn update(&mut self, index: usize, update: Update, out: &mut Frames) {
        let (delta, end) = match update {
            Update::Delta(delta) => (delta, None),
            Update::End(end) => (Delta::default(), Some(end)),
        };
        out.data(&self.reply(vec![self.choice(index, delta, end.as_ref())]));
    }

    fn closing(&mut self, counts: Counts, out: &mut Frames) {
        if self.header.include_usage {
            out.data(&CompletionReply { usage: ChunkUsage::Total(usage(counts)), ..self.reply(Vec::new()) });
        }
        out.done();
    }

    fn failure(&mut self, error: &ApiError, out: &mut Frames) {
        out.data(&error.body());
        out.done();
    }

    fn whole(&mut self, choices: Vec<Gathered>, counts: Counts) -> Response {
        let choices = choices.into_iter().enumerate().map(|(index, gathered)| {
            let mut choice = self.choice(index, gathered.delta, Some(&gathered.end));
            if self.header.logprobs {
                choice.logprobs.get_or_insert_default();
            }
            choice
        });
        let choices = choices.collect();
        Json(CompletionReply { usage: ChunkUsage::Total(usage(counts)), ..self.reply(choices) })
            .into_response()
    }
}

/// Completions show everything as text.
fn text_of(parts: Vec<Part>) -> String {
    let mut parts = parts.into_iter().filter_map(|part| match part {
        Part::Reasoning(text) | Part::Content(text) => Some(text),
        Part::Call { .. } | Part::Arguments { .. } => None,
    });
    let Some(mut text) = parts.next() else { return String::new() };
    text.extend(parts);
    text
}

/// Of the echoed prompt, whose first token has nothing before it, and of what was generated.
fn logprobs_of(prompt: Option<PromptScores>, entries: Vec<TokenEntry>) -> CompletionLogprobs {
    let mut logprobs = CompletionLogprobs::default();
    if let Some(PromptScores { first, rest }) = prompt {
        logprobs.tokens.push(first);
        logprobs.token_logprobs.push(None);
        logprobs.top_logprobs.push(None);
        logprobs.text_offset.push(0);
        push_all(&mut logprobs, rest);
    }
    push_all(&mut logprobs, entries);
    logprobs
}

fn push_all(logprobs: &mut CompletionLogprobs, entries: Vec<TokenEntry>) {
    for TokenEntry { drawn, top, text_offset, place: _ } in entries {
        let mut rivals: Map<String, Value> =
            top.into_iter().map(|shown| (shown.name, Value::from(shown.logprob))).collect();
        // The token itself is always among them, so there may be one more than was asked for.
        rivals.entry(drawn.name.clone()).or_insert_with(|| Value::from(drawn.logprob));
        logprobs.tokens.push(drawn.name);
        logprobs.token_logprobs.push(Some(f64::from(drawn.logprob)));
        logprobs.top_logprobs.push(Some(rivals));
        logprobs.text_offset.push(text_offset);
    }
}
