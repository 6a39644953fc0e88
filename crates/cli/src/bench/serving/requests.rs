//! Prompts and requests as they go over the wire, and the times at which their replies come. Must not know the workload.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use super::report::Reply;
use super::workload::{self, Planned};
use crate::client::Client;

/// What generates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    Completions,
    Chat,
}

/// How prompts are made to a number of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Prompts {
    /// Ids below this: as many as tokens.
    Ids { vocab_size: usize },
    /// Words, of that many tokens each, beside what every prompt has.
    Words { base_tokens: f64, tokens_per_word: f64 },
}

/// How requests are written.
pub(super) struct Requests {
    pub(super) client: Client,
    pub(super) path: String,
    pub(super) endpoint: Endpoint,
    pub(super) model: String,
    /// Fields that every request has.
    pub(super) common: Map<String, Value>,
}

impl Requests {
    /// Learns from the server's own counts what a word takes: it counts all words once, then twice.
    pub(super) fn calibrate(&self) -> Result<Prompts> {
        let count = |times: usize| -> Result<f64> {
            let prompt = json!(workload::every_word(times));
            let reply = self.client.post(&self.path, &self.body(prompt, 1, false))?.json()?;
            let tokens = reply["usage"]["prompt_tokens"].as_f64();
            tokens.context("its reply does not say how many tokens a prompt has (`usage`)")
        };
        let (once, twice) = (count(1)?, count(2)?);
        if twice <= once {
            bail!("a prompt has {once} tokens by its count, and twice as many words {twice}");
        }
        let tokens_per_word = (twice - once) / workload::WORDS.len() as f64;
        Ok(Prompts::Words { base_tokens: once - (twice - once), tokens_per_word })
    }

    fn body(&self, prompt: Value, max_tokens: usize, stream: bool) -> Value {
        let mut body = json!({"model": self.model, "max_tokens": max_tokens, "stream": stream});
        let fields = body.as_object_mut().expect("an object");
        match self.endpoint {
            Endpoint::Completions => fields.insert("prompt".into(), prompt),
            Endpoint::Chat => fields.insert("messages".into(), json!([{"role": "user", "content": prompt}])),
        };
        if stream {
            fields.insert("stream_options".into(), json!({"include_usage": true}));
        }
        fields.extend(self.common.clone());
        body
    }

    /// Sends a request, made beforehand by [`planned`](Self::planned), and waits for the end of its reply.
    pub(super) fn send(&self, body: &Value) -> Result<Reply> {
        let sent = Instant::now();
        let (mut first, mut last_text) = (None, sent);
        let mut reply = Reply::default();
        self.client.post(&self.path, body)?.events(|event| {
            let now = Instant::now();
            let count = |name| event["usage"][name].as_u64();
            reply.input_tokens = count("prompt_tokens").or(reply.input_tokens);
            reply.output_tokens = count("completion_tokens").or(reply.output_tokens);
            let Some(choice) = event["choices"].get(0) else { return Ok(()) };
            reply.latency = now - sent;
            if has_text(choice) {
                if first.replace(first.unwrap_or(now - sent)).is_some() {
                    reply.gaps.push(now - last_text);
                }
                last_text = now;
            }
            Ok(())
        })?;
        reply.first = first.context("the reply has no text, so its tokens cannot be timed")?;
        Ok(reply)
    }

    /// The body of a request of the workload.
    pub(super) fn planned(&self, planned: &Planned, prompts: Prompts) -> Value {
        let tokens = planned.input_tokens;
        let prompt = match prompts {
            Prompts::Ids { vocab_size } => {
                json!(workload::token_ids(tokens, vocab_size, planned.prompt_seed))
            }
            Prompts::Words { base_tokens, tokens_per_word } => {
                let words = ((tokens as f64 - base_tokens) / tokens_per_word).round().max(1.0) as usize;
                json!(workload::words(words, planned.prompt_seed))
            }
        };
        self.body(prompt, planned.output_tokens, true)
    }
}

/// Whether a choice of an event brings text of the model's, of whatever kind. A chat's first event may bring a role alone.
fn has_text(choice: &Value) -> bool {
    let texts = [
        &choice["text"],
        &choice["delta"]["content"],
        &choice["delta"]["reasoning_content"],
        &choice["delta"]["reasoning"],
    ];
    texts.iter().any(|text| text.as_str().is_some_and(|text| !text.is_empty()))
        || choice["delta"]["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_every_kind_counts_and_a_role_does_not() {
        for (choice, expected) in [
            (json!({"text": "a"}), true),
            (json!({"text": ""}), false),
            (json!({"delta": {"role": "assistant", "content": ""}}), false),
            (json!({"delta": {"role": "assistant", "content": null}}), false),
            (json!({"delta": {"content": "a"}}), true),
            (json!({"delta": {"reasoning_content": "a"}}), true),
            (json!({"delta": {"reasoning": "a"}}), true),
            (json!({"delta": {"tool_calls": [{"index": 0}]}}), true),
            (json!({"delta": {}, "finish_reason": "stop"}), false),
        ] {
            assert_eq!(has_text(&choice), expected, "{choice}");
        }
    }
}
