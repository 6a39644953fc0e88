//! One choice's tokens into text: detokenizes, sorts into reasoning and content, finds stops, keeps log-probabilities in
//! step with the text. The same for streams and plain replies. Must not know OpenAI's JSON or channels.

use std::sync::Arc;

use r1_core::{FinishReason, TokenId};
use r1_engine::TokenLogprobs;
use r1_text::{
    ControlText, Delta as Sorted, Detokenizer, Output, OutputParser, ParserConfig, TextError, TokenClass,
    Tokenizer,
};

use crate::access::random_u64;
use crate::metrics::Ended;

/// A piece of a reply; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Reasoning(String),
    Content(String),
    /// A call begins; calls of a reply count from 0.
    Call {
        index: usize,
        id: String,
        name: String,
    },
    /// More of a call's arguments.
    Arguments {
        index: usize,
        text: String,
    },
}

/// What a choice gained, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Delta {
    /// Neighbours are of different kinds.
    pub(crate) parts: Vec<Part>,
    /// One entry per token since the last delta, when they were asked for.
    pub(crate) logprobs: Vec<TokenEntry>,
    /// Of the prompt, when they were asked for; stands in a choice's first delta.
    pub(crate) prompt: Option<PromptScores>,
}

impl Delta {
    pub(crate) fn of_content(content: String) -> Self {
        Self { parts: vec![Part::Content(content)], ..Self::default() }
    }

    /// Joins what came later.
    pub(crate) fn append(&mut self, later: Self) {
        for part in later.parts {
            self.push(part);
        }
        self.logprobs.extend(later.logprobs);
        self.prompt = self.prompt.take().or(later.prompt);
    }

    fn push(&mut self, part: Part) {
        match (self.parts.last_mut(), &part) {
            (Some(Part::Reasoning(text)), Part::Reasoning(more))
            | (Some(Part::Content(text)), Part::Content(more)) => text.push_str(more),
            (Some(Part::Arguments { index, text }), Part::Arguments { index: of, text: more })
                if index == of =>
            {
                text.push_str(more);
            }
            _ => self.parts.push(part),
        }
    }
}

/// Log-probabilities of a prompt's tokens.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PromptScores {
    /// The first token, which has nothing before it.
    pub(crate) first: String,
    pub(crate) rest: Vec<TokenEntry>,
}

/// A token to be shown with its log-probability.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Shown {
    pub(crate) token: TokenId,
    /// Its text, or `token_id:<id>` where that was asked for.
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) logprob: f32,
}

/// A drawn token, its rivals, and where it begins in the text, in characters.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenEntry {
    pub(crate) drawn: Shown,
    pub(crate) top: Vec<Shown>,
    pub(crate) text_offset: usize,
    pub(crate) place: Place,
}

/// Where a generated token's text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It is held back.
    Open,
    /// In the content behind so many calls.
    Content { calls: usize },
    /// In the reasoning, in a call, or nowhere.
    Elsewhere,
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct End {
    pub(crate) reason: Reason,
    pub(crate) cached_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) reasoning_tokens: u64,
    /// The reply holds a call of a tool.
    pub(crate) called_tools: bool,
    /// Mean log-probability of the generated tokens; 0 where they were not asked for.
    pub(crate) mean_logprob: f64,
}

/// Why a choice ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Reason {
    StopString(String),
    /// The model said that it is done.
    Eos(TokenId),
    /// One of the request's `stop_token_ids`.
    StopToken(TokenId),
    Length,
    Abort,
}

impl End {
    /// As metrics count it.
    pub(crate) fn ended(&self) -> Ended {
        match self.reason {
            Reason::StopString(_) | Reason::Eos(_) | Reason::StopToken(_) => Ended::Stop,
            Reason::Length => Ended::Length,
            Reason::Abort => Ended::Abort,
        }
    }
}

/// How to read a choice's tokens.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "switches of the API, each independent of the others")]
pub(crate) struct DecodeRules {
    pub(crate) parser: ParserConfig,
    pub(crate) control: ControlText,
    /// Tokens that end the reply as the model means it.
    pub(crate) eos: Vec<TokenId>,
    /// Further tokens that end it because the request says so.
    pub(crate) stop_token_ids: Vec<TokenId>,
    /// Show tokens as `token_id:<id>`.
    pub(crate) token_ids_as_names: bool,
    /// The reply shows its tokens' log-probabilities.
    pub(crate) logprobs: bool,
    /// The reasoning is generated and counted, and not shown.
    pub(crate) hide_reasoning: bool,
    /// Tokens that mark calls are no text.
    pub(crate) hide_calls: bool,
    /// Nothing was to be generated; the engine draws one token all the same.
    pub(crate) discard: bool,
}

/// Reads one choice's tokens.
pub(crate) struct Decoder {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    parser: OutputParser,
    rules: DecodeRules,
    pending: Delta,
    stop_string: Option<String>,
    cached_tokens: u64,
    completion_tokens: u64,
    reasoning_tokens: u64,
    /// Characters of all tokens so far, those of an echoed prompt among them.
    text_chars: usize,
    num_calls: usize,
    sum_logprobs: f64,
}

impl Decoder {
    /// # Errors
    /// When a stop string is empty.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, rules: DecodeRules) -> Result<Self, TextError> {
        Ok(Self {
            detokenizer: Detokenizer::new(tokenizer.clone(), rules.control),
            parser: OutputParser::new(rules.parser.clone())?,
            tokenizer,
            rules,
            pending: Delta::default(),
            stop_string: None,
            cached_tokens: 0,
            completion_tokens: 0,
            reasoning_tokens: 0,
            text_chars: 0,
            num_calls: 0,
            sum_logprobs: 0.0,
        })
    }

    /// The reply's text stands behind `echo`.
    pub(crate) fn echo(&mut self, echo: &str) {
        self.text_chars = echo.chars().count();
    }

    /// The prompt's log-probabilities: `logprobs` holds those of all tokens but the first.
    pub(crate) fn prompt_scores(&self, prompt: &[TokenId], logprobs: &[TokenLogprobs]) -> PromptScores {
        let Some((&first, rest)) = prompt.split_first() else {
            return PromptScores { first: String::new(), rest: Vec::new() };
        };
        let mut text_offset = self.chars_of(first);
        let rest = rest.iter().zip(logprobs).map(|(&token, logprobs)| {
            let entry = self.entry(token, logprobs, text_offset);
            text_offset += self.chars_of(token);
            entry
        });
        PromptScores { first: self.show(first, 0.0).name, rest: rest.collect() }
    }

    /// Characters that a token adds to an echoed prompt.
    fn chars_of(&self, token: TokenId) -> usize {
        let hidden =
            self.rules.control == ControlText::Hide && self.tokenizer.class(token) == TokenClass::Hidden;
        if hidden { 0 } else { num_chars(self.tokenizer.token_bytes(token)) }
    }

    pub(crate) fn scheduled(&mut self, cached_tokens: u64) {
        self.cached_tokens = cached_tokens;
    }

    /// Takes the next token; `true` when a stop string is now complete. Tokens after that must not come.
    pub(crate) fn push(&mut self, token: TokenId, logprobs: Option<TokenLogprobs>) -> bool {
        if self.rules.discard {
            return false;
        }
        self.completion_tokens += 1;
        if let Some(logprobs) = logprobs {
            self.sum_logprobs += f64::from(logprobs.logprob);
            if self.rules.logprobs && !(self.rules.hide_reasoning && self.parser.in_reasoning()) {
                let mut entry = self.entry(token, &logprobs, self.text_chars);
                if self.parser.in_reasoning() || !self.is_text(token) {
                    entry.place = Place::Elsewhere;
                }
                self.pending.logprobs.push(entry);
            }
        }
        let was_reasoning = self.parser.in_reasoning();
        if self.is_text(token) {
            self.text_chars += num_chars(self.tokenizer.token_bytes(token));
            let piece = self.detokenizer.push(token);
            let output = self.parser.push(&piece);
            self.take(output);
        }
        self.reasoning_tokens += u64::from(was_reasoning || self.parser.in_reasoning());
        if let Some(entry) = self.pending.logprobs.last_mut().filter(|_| self.parser.in_reasoning()) {
            entry.place = Place::Elsewhere;
        }
        self.stop_string.is_some()
    }

    /// The text since the last call; `None` while there is none.
    pub(crate) fn take_delta(&mut self) -> Option<Delta> {
        (!self.pending.parts.is_empty()).then(|| std::mem::take(&mut self.pending))
    }

    /// What was held back, and the end. `reason` is the engine's; `None` where a stop string ended the choice.
    pub(crate) fn finish(mut self, reason: Option<FinishReason>) -> (Option<Delta>, End) {
        if self.stop_string.is_none() {
            let rest = std::mem::replace(
                &mut self.detokenizer,
                Detokenizer::new(self.tokenizer.clone(), self.rules.control),
            );
            let output = self.parser.push_text(&rest.finish());
            self.take(output);
        }
        let last = self.parser.finish().deltas;
        self.gain(last);
        let reason = match (self.stop_string, reason) {
            (Some(stop), _) => Reason::StopString(stop),
            (None, Some(FinishReason::Stop(token))) if self.rules.eos.contains(&token) => Reason::Eos(token),
            (None, Some(FinishReason::Stop(token))) => Reason::StopToken(token),
            (None, Some(FinishReason::Length)) => Reason::Length,
            (None, Some(FinishReason::Abort) | None) => Reason::Abort,
        };
        let end = End {
            reason,
            cached_tokens: self.cached_tokens,
            completion_tokens: self.completion_tokens,
            reasoning_tokens: self.reasoning_tokens,
            called_tools: self.num_calls > 0,
            mean_logprob: self.sum_logprobs / self.completion_tokens.max(1) as f64,
        };
        let rest = self.pending;
        ((!rest.parts.is_empty() || !rest.logprobs.is_empty()).then_some(rest), end)
    }

    /// A token that ends the reply is not part of its text, unless stops shall be seen.
    fn is_text(&self, token: TokenId) -> bool {
        let ends = self.rules.eos.contains(&token) || self.rules.stop_token_ids.contains(&token);
        let hidden = match self.tokenizer.class(token) {
            TokenClass::Hidden => self.rules.control == ControlText::Hide,
            TokenClass::Tool => self.rules.hide_calls,
            TokenClass::Text | TokenClass::Think => false,
        };
        !hidden && (!ends || self.rules.parser.include_stop)
    }

    fn take(&mut self, output: Output) {
        self.gain(output.deltas);
        self.stop_string = output.stopped;
    }

    fn gain(&mut self, deltas: Vec<Sorted>) {
        for delta in deltas {
            let part = match delta {
                Sorted::Reasoning(_) if self.rules.hide_reasoning => continue,
                Sorted::Reasoning(text) => Part::Reasoning(text),
                Sorted::Content(text) => Part::Content(text),
                Sorted::ToolCall { index, name } => {
                    self.num_calls += 1;
                    Part::Call { index, id: call_id(), name }
                }
                Sorted::ToolArguments { index, text } => Part::Arguments { index, text },
            };
            let place = match &part {
                Part::Content(_) => Place::Content { calls: self.num_calls },
                _ => Place::Elsewhere,
            };
            for entry in self.pending.logprobs.iter_mut().filter(|entry| entry.place == Place::Open) {
                entry.place = place;
            }
            self.pending.push(part);
        }
    }

    fn entry(&self, token: TokenId, logprobs: &TokenLogprobs, text_offset: usize) -> TokenEntry {
        TokenEntry {
            drawn: self.show(token, logprobs.logprob),
            top: logprobs.top.iter().map(|&(token, logprob)| self.show(token, logprob)).collect(),
            text_offset,
            place: Place::Open,
        }
    }

    fn show(&self, token: TokenId, logprob: f32) -> Shown {
        /// JSON has no infinity; a forbidden token gets what OpenAI gives for "very unlikely".
        const LEAST_LOGPROB: f32 = -9999.0;
        let bytes = self.tokenizer.token_bytes(token).to_vec();
        let name = if self.rules.token_ids_as_names {
            format!("token_id:{token}")
        } else {
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Shown { token, name, bytes, logprob: logprob.max(LEAST_LOGPROB) }
    }
}

/// A call's id, as OpenAI's look.
fn call_id() -> String {
    format!("call_{:016x}{:08x}", random_u64(), random_u64() as u32)
}

/// Characters that begin in these bytes.
fn num_chars(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count()
}
