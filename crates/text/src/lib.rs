//! Text to tokens and back: tokenizer, chat template, streaming detokenizer, output parser.
//!
//! A request's way in: [`ChatTemplate::render`] makes a [`RenderedPrompt`] of messages, [`Tokenizer::encode_prompt`] makes
//! tokens of it. A reply's way out: [`Detokenizer::push`] makes text of each token, [`OutputParser::push`] sorts it into
//! reasoning, content and tool calls and finds stop strings. Knows nothing of HTTP or the engine.
#![forbid(unsafe_code)]

mod control;
mod detok;
mod error;
mod grammar;
mod jinja;
mod meter;
mod parse;
mod python;
mod stop;
mod strftime;
mod template;
mod tokenizer;
mod tokenizer_json;
mod tools;
mod tools_block;

pub use control::{ControlTokens, THINK_CLOSE, THINK_OPEN, TokenClass};
pub use detok::{ControlText, Detokenizer, Piece};
pub use error::{Result, TextError};
pub use grammar::{
    Constraint, Format, GrammarError, Grammars, ReplyRules, Thinking, ToolChoice, ToolRule, Tools,
    bad_word_tokens,
};
pub use parse::{Delta, Output, OutputParser, ParserConfig};
pub use template::{ChatInput, ChatTemplate, PromptEnd, RenderedPrompt};
pub use tokenizer::{AddedToken, Tokenizer};
pub use tools::{ToolParser, ToolSyntax};
pub use tools_block::ToolsBlock;
