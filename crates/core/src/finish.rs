//! Why a sequence ended.

use crate::TokenId;

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was drawn. The token is part of the sequence but not of its text.
    Stop(TokenId),
    /// `max_tokens` or the context limit was reached.
    Length,
    /// The client left, or the request was cancelled.
    Abort,
}
