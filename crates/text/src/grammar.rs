//! What a reply must be: JSON, a schema, a regex, a grammar, tool calls; and how long it may think first. [`Grammars`]
//! turns a request's [`ReplyRules`] into a [`Constraint`], which tells the sampler which tokens may come next. Parsing
//! itself is llguidance's. Knows nothing of HTTP or the engine.
//!
//! Nothing here constrains the reasoning but its budget, the bad words and the allowed ids: grammars begin behind
//! `</think>`. What is too large or not supported is refused before it is compiled, with the place in the request.

mod answer;
mod cache;
mod constraint;
mod ebnf;
mod error;
mod lark;
mod regex;
mod schema;
mod session;
mod vocabulary;
mod words;

use r1_core::TokenId;
use serde_json::Value;

use crate::tools::ToolSyntax;

pub use cache::Grammars;
pub use constraint::Constraint;
pub use error::GrammarError;
pub use words::bad_word_tokens;

/// What a reply must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Format {
    /// Any JSON object.
    JsonObject,
    /// JSON that satisfies a schema (draft 2020-12, as far as tokens can be held to it). Keys come in the schema's order.
    /// `oneOf` is read as `anyOf`: the reply satisfies at least one of the schemas.
    JsonSchema(Value),
    /// Text that matches a regular expression from beginning to end, in Rust's syntax: no look-around, no backreferences.
    Regex(String),
    /// One of these strings.
    Choice(Vec<String>),
    /// Text of a context-free grammar: Lark (`start: …`), or GBNF as llama.cpp and xgrammar write it (`root ::= …`).
    Grammar(String),
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolRule {
    /// The function's name.
    pub name: String,
    /// JSON schema of the arguments; `null` and `{}` are any object.
    pub parameters: Value,
    /// Hold the arguments to the schema where the model is free to call or not. A demanded call always follows it.
    pub strict: bool,
}

/// Whether to call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// The model decides.
    Auto,
    /// At least one call.
    Required,
    /// Calls of this function.
    Named(String),
}

/// Functions and how they are called.
#[derive(Clone, Debug, PartialEq)]
pub struct Tools {
    /// The functions; at least one.
    pub rules: Vec<ToolRule>,
    /// Whether to call.
    pub choice: ToolChoice,
    /// Whether a reply may hold more than one call.
    pub parallel: bool,
    /// How this model writes calls.
    pub syntax: ToolSyntax,
}

/// How a reply begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thinking {
    /// The prompt left `<think>` open.
    Open,
    /// The prompt did not; the model may open it itself, first thing.
    MayOpen,
    /// No reasoning: rules hold from the first token.
    None,
}

/// What a reply must be. The default of each field demands nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplyRules {
    /// How the reply begins.
    pub thinking: Thinking,
    /// Most tokens between `<think>` and `</think>`, neither counted; then `</think>` is forced. 0 closes at once.
    pub thinking_budget: Option<u32>,
    /// What the answer must be.
    pub format: Option<Format>,
    /// Calls that the answer may or must hold instead.
    pub tools: Option<Tools>,
    /// The only tokens of the whole reply; EOS is not implied.
    pub allowed_token_ids: Option<Vec<TokenId>>,
    /// Token sequences that never come: the last token is forbidden after the others. [`bad_word_tokens`] makes them.
    pub bad_words: Vec<Vec<TokenId>>,
}

impl ReplyRules {
    /// Whether every reply satisfies them, so that they need no grammars.
    pub fn demand_nothing(&self) -> bool {
        (self.thinking_budget.is_none() || self.thinking == Thinking::None)
            && self.format.is_none()
            && self.tools.is_none()
            && self.allowed_token_ids.is_none()
            && self.bad_words.is_empty()
    }
}

impl Default for ReplyRules {
    fn default() -> Self {
        Self {
            thinking: Thinking::None,
            thinking_budget: None,
            format: None,
            tools: None,
            allowed_token_ids: None,
            bad_words: Vec::new(),
        }
    }
}
