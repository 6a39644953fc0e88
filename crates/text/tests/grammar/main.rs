//! Grammars over real tokenizers: what may come, what may not, and what is refused.

mod bombs;
mod filters;
mod formats;
mod grammars;
mod thinking;
mod tools;
mod walk;
