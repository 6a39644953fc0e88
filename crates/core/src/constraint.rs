//! What a grammar must offer the sampler.

use crate::TokenId;

/// Restricts which tokens a sequence may draw next; grammars implement it.
pub trait TokenConstraint: Send {
    /// Advances past a drawn token.
    fn accept(&mut self, token: TokenId) -> Result<(), ConstraintError>;

    /// Sets the bits of the tokens that may come next; bit `i % 32` of word `i / 32` is token `i`.
    /// `mask` arrives zeroed, with `ceil(vocab_size / 32)` words; it is not looked at where any token may come.
    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<Allowed, ConstraintError>;
}

/// What may come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Every token.
    Any,
    /// Those of the mask, at least one.
    Masked,
}

/// A constraint cannot go on; its request fails.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConstraintError(pub String);
