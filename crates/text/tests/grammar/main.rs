//! Grammars over real tokenizers: what may come, what may not, and what is refused.

mod formats;
mod walk;
