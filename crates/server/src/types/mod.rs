//! OpenAI's JSON: what requests ask and what replies look like. Must not know the engine or the tokenizer.

pub(crate) mod chat;
pub(crate) mod common;
pub(crate) mod completion;
pub(crate) mod format;
pub(crate) mod models;
pub(crate) mod thinking;
pub(crate) mod tools;
pub(crate) mod value;
