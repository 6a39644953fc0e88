//! What a grammar must offer the sampler.

use crate::TokenId;

/// Restricts which tokens a sequence may draw next; grammars implement it.
pub trait TokenConstraint: Send {
    /// Advances past a drawn token.
    fn accept(&mut self, token: TokenId);

    /// Sets the bits of the tokens that may come next; bit `i % 32` of word `i / 32` is token `i`.
    /// `mask` arrives zeroed, with `ceil(vocab_size / 32)` words.
    fn fill_mask(&mut self, mask: &mut [u32]);
}
