//! `/v1/responses`' replies: parts of a reply into output items, and items into events or the whole response. Must not know
//! the engine or the tokenizer.

use std::sync::Arc;

use axum::response::Response;
use serde::Serialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};

use super::Ids;
use super::item::{Item, ItemStatus, Said, Speaker, logprob, message_part};
use super::store::{Owner, Segment};
use crate::app::{App, unix_s};
use crate::decode::{Delta, End, Part, Place, Reason, TokenEntry};
use crate::error::ApiError;
use crate::render::{Frames, Gathered, Render};
use crate::reply::{Counts, Update};

/// Writes one response.
pub(crate) struct ResponseRender {
    head: Head,
    /// For the items.
    ids: Ids,
    /// How the response is stored once it has ended well.
    keep: Option<Keep>,
    logprobs: bool,
    outputs: Vec<Output>,
    /// Tokens of texts that are still to come.
    waiting: Vec<TokenEntry>,
    ended: Option<Reason>,
    /// Number of the next event.
    sequence: u64,
}

/// What every form of a response repeats.
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created_unix_s: u64,
    pub(crate) model: String,
    /// Fields of the request, and what became of them.
    pub(crate) echo: Map<String, Value>,
}

/// How a response is stored.
pub(crate) struct Keep {
    pub(crate) app: Arc<App>,
    pub(crate) owner: Owner,
    pub(crate) parent: Option<Arc<Segment>>,
    pub(crate) inputs: Vec<Item>,
}

/// An item of the reply; only the last may still grow.
#[derive(Debug)]
struct Output {
    item: Item,
    /// Of a message's text.
    logprobs: Vec<Value>,
}

/// How far a response came.
#[derive(Clone, Copy, Debug)]
enum Status<'a> {
    InProgress,
    Completed,
    /// The limit of tokens was reached.
    Incomplete,
    Failed {
        message: &'a str,
    },
}

/// An event as it travels.
#[derive(Serialize)]
struct Event<T> {
    #[serde(rename = "type")]
    kind: &'static str,
    sequence_number: u64,
    #[serde(flatten)]
    body: T,
}

/// More of an item's text.
#[derive(Serialize)]
struct TextDelta<'a> {
    item_id: &'a str,
    output_index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_index: Option<usize>,
    delta: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<&'a [Value]>,
}

fn emit(out: Option<&mut Frames>, sequence: &mut u64, kind: &'static str, body: impl Serialize) {
    if let Some(out) = out {
        out.named(kind, &Event { kind, sequence_number: *sequence, body });
        *sequence += 1;
    }
}

impl ResponseRender {
    /// `keep`: it shall be stored; `logprobs`: it shows those of its texts.
    pub(crate) fn new(head: Head, ids: Ids, keep: Option<Keep>, logprobs: bool) -> Self {
        let (outputs, waiting) = (Vec::new(), Vec::new());
        Self { head, ids, keep, logprobs, outputs, waiting, ended: None, sequence: 0 }
    }

    /// Takes what the reply gained, and writes it as events where there is a stream.
    fn gain(&mut self, delta: Delta, mut out: Option<&mut Frames>) {
        if self.logprobs {
            let of_content = |entry: &TokenEntry| matches!(entry.place, Place::Content { .. });
            self.waiting.extend(delta.logprobs.into_iter().filter(of_content));
        }
        for part in delta.parts {
            let out = out.as_deref_mut();
            match part {
                Part::Reasoning(text) => self.reasoning(&text, out),
                Part::Content(text) => self.content(&text, out),
                Part::Call { id, name, .. } => {
                    self.open(Said::Call { call_id: id, name, arguments: String::new() }, out);
                }
                Part::Arguments { text, .. } => self.arguments(&text, out),
            }
        }
    }

    fn reasoning(&mut self, more: &str, mut out: Option<&mut Frames>) {
        if !matches!(self.last_open(), Some(Said::Reasoning { .. })) {
            self.open(Said::Reasoning { text: String::new() }, out.as_deref_mut());
        }
        let (output_index, output) = self.last();
        if let Said::Reasoning { text } = &mut output.item.said {
            text.push_str(more);
        }
        let item_id = output.item.id.clone();
        let delta = TextDelta {
            item_id: &item_id,
            output_index,
            content_index: Some(0),
            delta: more,
            logprobs: None,
        };
        emit(out, &mut self.sequence, "response.reasoning_text.delta", delta);
    }

    fn content(&mut self, more: &str, mut out: Option<&mut Frames>) {
        if !matches!(self.last_open(), Some(Said::Message { .. })) {
            let said = Said::Message { role: Speaker::Assistant, texts: vec![String::new()] };
            self.open(said, out.as_deref_mut());
        }
        let logprobs = self.take_logprobs(more);
        let (output_index, output) = self.last();
        if let Said::Message { texts, .. } = &mut output.item.said {
            texts[0].push_str(more);
        }
        output.logprobs.extend_from_slice(&logprobs);
        let item_id = output.item.id.clone();
        let delta = TextDelta {
            item_id: &item_id,
            output_index,
            content_index: Some(0),
            delta: more,
            logprobs: Some(&logprobs),
        };
        emit(out, &mut self.sequence, "response.output_text.delta", delta);
    }

    fn arguments(&mut self, more: &str, out: Option<&mut Frames>) {
        let (output_index, output) = self.last();
        let Said::Call { arguments, .. } = &mut output.item.said else {
            unreachable!("a call's arguments follow its name");
        };
        arguments.push_str(more);
        let item_id = output.item.id.clone();
        let delta =
            TextDelta { item_id: &item_id, output_index, content_index: None, delta: more, logprobs: None };
        emit(out, &mut self.sequence, "response.function_call_arguments.delta", delta);
    }

    /// The log-probabilities of the open message's tokens, `more` being its next text.
    fn take_logprobs(&mut self, more: &str) -> Vec<Value> {
        let num_calls =
            self.outputs.iter().filter(|output| matches!(output.item.said, Said::Call { .. })).count();
        let here = |entry: &TokenEntry| entry.place == Place::Content { calls: num_calls };
        let (entries, waiting): (Vec<TokenEntry>, _) =
            std::mem::take(&mut self.waiting).into_iter().partition(here);
        self.waiting = waiting;
        // Blanks before the answer are not part of it.
        let begins = self.outputs.last().is_some_and(|output| output.logprobs.is_empty());
        let blank = |entry: &TokenEntry| entry.drawn.bytes.iter().all(u8::is_ascii_whitespace);
        let skip = if begins && !more.starts_with(|c: char| c.is_ascii_whitespace()) {
            entries.iter().take_while(|entry| blank(entry)).count()
        } else {
            0
        };
        entries[skip..].iter().map(logprob).collect()
    }

    fn last_open(&self) -> Option<&Said> {
        let last = self.outputs.last()?;
        (last.item.status == ItemStatus::InProgress).then_some(&last.item.said)
    }

    /// The item that grows, with its place.
    fn last(&mut self) -> (usize, &mut Output) {
        let index = self.outputs.len().checked_sub(1).expect("an item was opened");
        (index, &mut self.outputs[index])
    }

    fn open(&mut self, said: Said, mut out: Option<&mut Frames>) {
        self.close(ItemStatus::Completed, out.as_deref_mut());
        let part = match &said {
            Said::Message { .. } => Some(message_part(Speaker::Assistant, "", &[])),
            Said::Reasoning { .. } => Some(json!({ "type": "reasoning_text", "text": "" })),
            Said::Call { .. } | Said::CallOutput { .. } => None,
        };
        let item = Item { id: self.ids.next(said.id_prefix()), status: ItemStatus::InProgress, said };
        if out.is_some() {
            let (output_index, item_id) = (self.outputs.len(), &item.id);
            let added = json!({ "output_index": output_index, "item": item.json_opening() });
            emit(out.as_deref_mut(), &mut self.sequence, "response.output_item.added", added);
            if let Some(part) = part {
                let added = json!({
                    "item_id": item_id, "output_index": output_index, "content_index": 0, "part": part,
                });
                emit(out, &mut self.sequence, "response.content_part.added", added);
            }
        }
        self.outputs.push(Output { item, logprobs: Vec::new() });
    }

    /// Ends the item that grows, if one does.
    fn close(&mut self, status: ItemStatus, mut out: Option<&mut Frames>) {
        if self.last_open().is_none() {
            return;
        }
        let (output_index, output) = self.last();
        output.item.status = status;
        if out.is_none() {
            return;
        }
        let item = output.item.json_with(&output.logprobs);
        let item_id = item["id"].clone();
        let part = item["content"][0].clone();
        let sequence = &mut self.sequence;
        let mut done = match &self.outputs[output_index].item.said {
            Said::Message { .. } => {
                json!({ "text": part["text"], "logprobs": part["logprobs"], "content_index": 0 })
            }
            Said::Reasoning { .. } => json!({ "text": part["text"], "content_index": 0 }),
            _ => json!({ "name": item["name"], "arguments": item["arguments"] }),
        };
        done["item_id"] = item_id.clone();
        done["output_index"] = output_index.into();
        let kind = match &self.outputs[output_index].item.said {
            Said::Message { .. } => "response.output_text.done",
            Said::Reasoning { .. } => "response.reasoning_text.done",
            _ => "response.function_call_arguments.done",
        };
        emit(out.as_deref_mut(), sequence, kind, done);
        if !part.is_null() {
            let done = json!({
                "item_id": item_id, "output_index": output_index, "content_index": 0, "part": part,
            });
            emit(out.as_deref_mut(), sequence, "response.content_part.done", done);
        }
        let done = json!({ "output_index": output_index, "item": item });
        emit(out, sequence, "response.output_item.done", done);
    }

    fn end(&mut self, end: End, out: Option<&mut Frames>) {
        let cut_off = match &end.reason {
            Reason::Length | Reason::Abort => true,
            // Texts end well there, a call only where it is whole.
            Reason::StopString(_) | Reason::StopToken(_) => match self.last_open() {
                Some(Said::Call { arguments, .. }) => serde_json::from_str::<IgnoredAny>(arguments).is_err(),
                _ => false,
            },
            Reason::Eos(_) => false,
        };
        self.close(if cut_off { ItemStatus::Incomplete } else { ItemStatus::Completed }, out);
        self.ended = Some(end.reason);
    }

    /// How a reply whose choice has ended came out, and the event that says so.
    fn status(&self) -> (Status<'static>, &'static str) {
        match self.ended {
            Some(Reason::Length) => (Status::Incomplete, "response.incomplete"),
            Some(Reason::StopString(_) | Reason::Eos(_) | Reason::StopToken(_)) => {
                (Status::Completed, "response.completed")
            }
            Some(Reason::Abort) | None => {
                (Status::Failed { message: "the generation was aborted" }, "response.failed")
            }
        }
    }

    /// The response as it stands.
    fn response(&self, status: Status<'_>, counts: Option<Counts>) -> Value {
        let Head { id, created_unix_s, model, echo } = &self.head;
        let (name, error, incomplete) = match status {
            Status::InProgress => ("in_progress", Value::Null, Value::Null),
            Status::Completed => ("completed", Value::Null, Value::Null),
            Status::Incomplete => ("incomplete", Value::Null, json!({ "reason": "max_output_tokens" })),
            // Of OpenAI's codes the one that says whose fault it is.
            Status::Failed { message } => {
                ("failed", json!({ "code": "server_error", "message": message }), Value::Null)
            }
        };
        let completed_at = matches!(status, Status::Completed).then(unix_s);
        let output: Vec<Value> =
            self.outputs.iter().map(|output| output.item.json_with(&output.logprobs)).collect();
        let mut response = json!({
            "id": id, "object": "response", "created_at": created_unix_s, "status": name, "background": false,
            "completed_at": completed_at, "error": error, "incomplete_details": incomplete, "model": model,
            "output": output,
        });
        for (field, value) in echo {
            response[field.as_str()] = value.clone();
        }
        response["usage"] = counts.map_or(Value::Null, usage);
        response
    }

    /// Keeps a response that has ended well for those who come back to it; one that has grown too large says that it is
    /// not kept.
    fn keep(&mut self, status: Status<'_>, response: &mut Value) {
        if !matches!(status, Status::Completed | Status::Incomplete) {
            return;
        }
        let Some(Keep { app, owner, parent, inputs }) = self.keep.take() else { return };
        let num_inputs = inputs.len();
        let mut items = inputs;
        items.extend(self.outputs.drain(..).map(|output| output.item));
        let id = self.head.id.clone();
        if !app.responses.insert(owner, id, response.to_string(), parent, items, num_inputs) {
            response["store"] = false.into();
        }
    }
}

impl Render for ResponseRender {
    fn opening(&mut self, out: &mut Frames) {
        let response = self.response(Status::InProgress, None);
        for kind in ["response.created", "response.in_progress"] {
            emit(Some(out), &mut self.sequence, kind, json!({ "response": response }));
        }
    }

    fn update(&mut self, _: usize, update: Update, out: &mut Frames) {
        match update {
            Update::Delta(delta) => self.gain(delta, Some(out)),
            Update::End(end) => self.end(end, Some(out)),
        }
    }

    fn closing(&mut self, counts: Counts, out: &mut Frames) {
        let (status, kind) = self.status();
        let mut response = self.response(status, Some(counts));
        // Before the client can know of it.
        self.keep(status, &mut response);
        emit(Some(out), &mut self.sequence, kind, json!({ "response": response }));
    }

    fn failure(&mut self, error: &ApiError, out: &mut Frames) {
        self.close(ItemStatus::Incomplete, Some(out));
        let ApiError { code, message, param, .. } = error;
        let body = json!({ "code": code.unwrap_or("server_error"), "message": message, "param": param });
        emit(Some(out), &mut self.sequence, "error", body);
        let response = self.response(Status::Failed { message }, None);
        emit(Some(out), &mut self.sequence, "response.failed", json!({ "response": response }));
    }

    fn whole(&mut self, choices: Vec<Gathered>, counts: Counts) -> Response {
        for Gathered { delta, end } in choices {
            self.gain(delta, None);
            self.end(end, None);
        }
        let (status, _) = self.status();
        let mut response = self.response(status, Some(counts));
        self.keep(status, &mut response);
        super::json_response(response.to_string())
    }
}

fn usage(counts: Counts) -> Value {
    let Counts { prompt, cached, completion, reasoning } = counts;
    json!({
        "input_tokens": prompt,
        // What was not found in the cache is there now.
        "input_tokens_details": { "cached_tokens": cached, "cache_write_tokens": prompt.saturating_sub(cached) },
        "output_tokens": completion, "output_tokens_details": { "reasoning_tokens": reasoning },
        "total_tokens": prompt + completion,
    })
}
