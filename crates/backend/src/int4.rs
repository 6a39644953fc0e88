//! The int4 weight format: 4-bit codes with a scale and a zero point per group of inputs. Knows no file format.

use crate::{Backend, Tensor};

/// Codes per word.
const PER_WORD: usize = 8;

/// A weight `[N, K]` in 4-bit codes, group-wise along K, as AWQ quantises: element `(n, k)` is
/// `(code[n, k] - zeros[n, k / group]) * scales[n, k / group]`, exactly, which an F32 holds without rounding.
///
/// K is a multiple of 8, so a row is whole words; so is `group`, so a word has one scale; the last group may be short. There
/// is no offset: where a shard's cut of K falls inside a group, the shard takes a smaller group that divides both, with zeros
/// and scales repeated.
pub struct Int4Group<B: Backend> {
    /// `[N, K / 8]` U32: code `(n, k)` is bits `4 (k % 8)..4 (k % 8) + 4` of word `(n, k / 8)`, lowest first.
    pub codes: Tensor<B>,
    /// `[N, ceil(K / group)]` F16, whole numbers from 0 to 16. Not packed, so that any range of groups is a view; F16, so
    /// that they cost what the scales cost (at a group of 128, 4.25 bits per element in all, where packed zeros give 4.16).
    pub zeros: Tensor<B>,
    /// `[N, ceil(K / group)]` F16, as AWQ stores them: wider ones would hold nothing more.
    pub scales: Tensor<B>,
    /// Inputs that share a zero and a scale.
    pub group: usize,
}

impl<B: Backend> Int4Group<B> {
    /// Output features, N.
    pub fn out_features(&self) -> usize {
        self.codes.dim(0)
    }

    /// Input features, K.
    pub fn in_features(&self) -> usize {
        self.codes.dim(1) * PER_WORD
    }
}

impl<B: Backend> Clone for Int4Group<B> {
    fn clone(&self) -> Self {
        Self {
            codes: self.codes.clone(),
            zeros: self.zeros.clone(),
            scales: self.scales.clone(),
            group: self.group,
        }
    }
}
