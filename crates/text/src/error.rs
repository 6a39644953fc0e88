//! What can go wrong between text and tokens. Knows nothing of status codes: the server maps the variants.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, TextError>;

/// Errors of tokenizer, chat template and output parser.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file of the checkpoint could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of the checkpoint is not what it must be.
    #[error("{file}: {reason}")]
    BadFile {
        /// `tokenizer.json` or `tokenizer_config.json`.
        file: &'static str,
        /// What is wrong, with the field's name.
        reason: String,
    },
    /// The tokenizer asks for something that is not implemented and would change the tokens.
    #[error("tokenizer.json: {feature} is not supported ({why})")]
    UnsupportedTokenizer {
        /// The setting.
        feature: String,
        /// What is supported instead.
        why: &'static str,
    },
    /// The tokenizer refused the text.
    #[error("cannot tokenize: {0}")]
    Encode(String),
    /// The text is longer than the caller allows.
    #[error("the text is at least {at_least} tokens long, {max_tokens} are allowed")]
    TooLong {
        /// A lower bound of the text's length; the exact count when the text was encoded whole.
        at_least: usize,
        /// The caller's limit.
        max_tokens: usize,
    },
    /// The chat template does not compile, or failed on this conversation. Holds `raise_exception`'s text verbatim.
    #[error("chat template: {message}")]
    Template {
        /// What the template or the engine said.
        message: String,
    },
    /// The template needs a call's arguments as an object and the string given is not one.
    #[error("messages[{message}].tool_calls[{call}].function.arguments is not a JSON object: {reason}")]
    Arguments {
        /// Index of the message.
        message: usize,
        /// Index of the call in it.
        call: usize,
        /// The JSON parser's words.
        reason: String,
    },
    /// A tool without a name, which a tools block cannot write.
    #[error("tools[{0}].function.name is missing")]
    BadTool(usize),
    /// The last message brings reasoning to continue from, and the prompt opens none.
    #[error(
        "messages[{0}] has reasoning to continue from, but the chat template does not open the reasoning here: leave its \
         reasoning out, or turn thinking on"
    )]
    NoReasoningToContinue(usize),
    /// The tokenizer lacks the tokens of fill-in-the-middle prompts.
    #[error("this model cannot fill in the middle: its tokenizer has no token {0}")]
    NoFimToken(&'static str),
    /// A template variable that only the server sets.
    #[error("{0} is reserved")]
    ReservedKwarg(String),
    /// An empty stop string would stop every reply before its first character.
    #[error("stop[{0}] is empty")]
    EmptyStop(usize),
}
