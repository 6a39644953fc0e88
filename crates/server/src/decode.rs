//! One choice's tokens into text: detokenizes, sorts into reasoning and content, finds stops, keeps log-probabilities in
//! step with the text. The same for streams and plain replies. Must not know OpenAI's JSON or channels.

use std::sync::Arc;

use r1_core::{FinishReason, TokenId};
use r1_engine::TokenLogprobs;
use r1_text::{
    ControlText, Delta as Sorted, Detokenizer, Output, OutputParser, ParserConfig, TextError, TokenClass,
    Tokenizer,
};

use crate::metrics::Ended;

/// What a choice gained. Reasoning precedes content.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Delta {
    pub(crate) reasoning: String,
    pub(crate) content: String,
    /// One entry per token since the last delta, when they were asked for.
    pub(crate) logprobs: Vec<TokenEntry>,
}

impl Delta {
    pub(crate) fn of_content(content: String) -> Self {
        Self { content, ..Self::default() }
    }

    /// Joins what came later.
    pub(crate) fn append(&mut self, later: Self) {
        self.reasoning.push_str(&later.reasoning);
        self.content.push_str(&later.content);
        self.logprobs.extend(later.logprobs);
    }

    fn has_text(&self) -> bool {
        !self.reasoning.is_empty() || !self.content.is_empty()
    }
}

/// A token to be shown with its log-probability.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Shown {
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
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct End {
    pub(crate) reason: Reason,
    pub(crate) cached_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) reasoning_tokens: u64,
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
pub(crate) struct DecodeRules {
    pub(crate) parser: ParserConfig,
    pub(crate) control: ControlText,
    /// Tokens that end the reply as the model means it.
    pub(crate) eos: Vec<TokenId>,
    /// Further tokens that end it because the request says so.
    pub(crate) stop_token_ids: Vec<TokenId>,
    /// Show tokens as `token_id:<id>`.
    pub(crate) token_ids_as_names: bool,
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
    /// Characters of all tokens so far.
    text_chars: usize,
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
        })
    }

    pub(crate) fn scheduled(&mut self, cached_tokens: u64) {
        self.cached_tokens = cached_tokens;
    }

    /// Takes the next token; `true` when a stop string is now complete. Tokens after that must not come.
    ///
    /// Stop strings act from the first token on: `min_tokens` holds back stop tokens only, which the engine does.
    pub(crate) fn push(&mut self, token: TokenId, logprobs: Option<TokenLogprobs>) -> bool {
        self.completion_tokens += 1;
        if let Some(logprobs) = logprobs {
            let entry = self.entry(token, &logprobs);
            self.pending.logprobs.push(entry);
        }
        let was_reasoning = self.parser.in_reasoning();
        if self.is_text(token) {
            self.text_chars += num_chars(self.tokenizer.token_bytes(token));
            let piece = self.detokenizer.push(token);
            let output = self.parser.push(&piece);
            self.take(output);
        }
        self.reasoning_tokens += u64::from(was_reasoning || self.parser.in_reasoning());
        self.stop_string.is_some()
    }

    /// The text since the last call; `None` while there is none.
    pub(crate) fn take_delta(&mut self) -> Option<Delta> {
        self.pending.has_text().then(|| std::mem::take(&mut self.pending))
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
        };
        let rest = self.pending;
        ((rest.has_text() || !rest.logprobs.is_empty()).then_some(rest), end)
    }

    /// A token that ends the reply is not part of its text, unless stops shall be seen.
    fn is_text(&self, token: TokenId) -> bool {
        let ends = self.rules.eos.contains(&token) || self.rules.stop_token_ids.contains(&token);
        let hidden =
            self.rules.control == ControlText::Hide && self.tokenizer.class(token) == TokenClass::Hidden;
        !hidden && (!ends || self.rules.parser.include_stop)
    }

    fn take(&mut self, output: Output) {
        self.gain(output.deltas);
        self.stop_string = output.stopped;
    }

    fn gain(&mut self, deltas: Vec<Sorted>) {
        for delta in deltas {
            match delta {
                Sorted::Reasoning(text) => self.pending.reasoning.push_str(&text),
                Sorted::Content(text) => self.pending.content.push_str(&text),
                Sorted::ToolCall { .. } | Sorted::ToolArguments { .. } => {
                    unreachable!("no tools were asked for")
                }
            }
        }
    }

    fn entry(&self, token: TokenId, logprobs: &TokenLogprobs) -> TokenEntry {
        TokenEntry {
            drawn: self.show(token, logprobs.logprob),
            top: logprobs.top.iter().map(|&(token, logprob)| self.show(token, logprob)).collect(),
            text_offset: self.text_chars,
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
        Shown { name, bytes, logprob: logprob.max(LEAST_LOGPROB) }
    }
}

/// Characters that begin in these bytes.
fn num_chars(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count()
}
