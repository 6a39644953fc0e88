//! OpenAI's JSON: what requests ask and what replies look like. Must not know the engine or the tokenizer.

pub(crate) mod chat;
pub(crate) mod common;
pub(crate) mod completion;
pub(crate) mod models;
pub(crate) mod value;
