//! What the sampler must know about each row of logits.

use std::ops::Range;

use crate::{Backend, Tensor};

/// A token that a sequence already holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenToken {
    /// Its id.
    pub token: u32,
    /// Occurrences in the output; 0 when it is in the prompt only.
    pub output_count: u32,
}

/// How one row of logits is drawn from.
#[derive(Clone, Debug, PartialEq)]
pub struct RowSampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 0 drops none.
    pub min_p: f32,
    /// 1 is neutral.
    pub repetition_penalty: f32,
    /// 0 is neutral.
    pub presence_penalty: f32,
    /// 0 is neutral.
    pub frequency_penalty: f32,
    /// The request's seed.
    pub seed: u64,
    /// Position of the token that is drawn, counted from the first token of the prompt.
    pub position: u64,
    /// This row's entries of [`SamplingBatch::bias`].
    pub bias: Range<usize>,
    /// This row's entries of [`SamplingBatch::seen`].
    pub seen: Range<usize>,
    /// This row's words of [`SamplingBatch::mask`]; `None` allows every token.
    pub mask: Option<Range<usize>>,
}

impl RowSampling {
    /// The largest logit, nothing else.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            position: 0,
            bias: 0..0,
            seen: 0..0,
            mask: None,
        }
    }
}

/// One step's sampling parameters; cleared and refilled every step, so that its vectors keep their room.
///
/// A row is drawn so, with all arithmetic in F32 except the running sum of step 4:
/// 1. tokens outside the mask get -inf; `bias` is added (-inf forbids a token);
/// 2. a seen token's logit is divided (if positive) or multiplied (if not) by `repetition_penalty`; then
///    `frequency_penalty * output_count + presence_penalty * (output_count > 0)` is subtracted;
/// 3. at temperature 0, when the largest logit is not finite, or when dividing it by the temperature overflows, the largest
///    logit wins, the lowest id among equals;
/// 4. logits are divided by the temperature; tokens below `max + ln(min_p)` are dropped; of the rest the `top_k` largest
///    are kept (ties: the lower id); of those the smallest set, largest first, whose probabilities (renormalised over what
///    is left) reach `top_p`;
/// 5. of what is kept, the largest `logit / temperature + gumbel(seed, position, token)` wins. The noise of a token depends on
///    nothing else ([`philox`](crate::philox)), so the same request draws the same whatever runs beside it, and a draft
///    that is verified draws what it would have drawn alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingBatch {
    /// One per row of logits.
    pub rows: Vec<RowSampling>,
    /// Token and what is added to its logit.
    pub bias: Vec<(u32, f32)>,
    /// Tokens that sequences hold; each token once per row.
    pub seen: Vec<SeenToken>,
    /// Bit masks of `ceil(V / 32)` words each; a set bit allows its token.
    pub mask: Vec<u32>,
}

impl SamplingBatch {
    /// Forgets the rows and keeps the room.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.bias.clear();
        self.seen.clear();
        self.mask.clear();
    }
}

/// Where log-probabilities go. Natural logarithms of the softmax of the raw logits.
pub struct LogprobsOut<B: Backend> {
    /// `[L]` F32: of the drawn tokens.
    pub chosen: Tensor<B>,
    /// `[L, N]` U32: the N most likely tokens, best first; equal logits take the lower id first.
    pub top_ids: Tensor<B>,
    /// `[L, N]` F32.
    pub top: Tensor<B>,
}
