//! A running sequence's sampling state: what its request asked for and what it has drawn.

use std::collections::BTreeMap;

use r1_backend::{RowSampling, SamplingBatch, SeenToken};
use r1_core::{FinishReason, SamplingParams, TokenId};

use crate::masks::{Constrained, Mask, Masks};

/// What sampling must remember of one sequence.
pub(crate) struct Live {
    params: SamplingParams,
    constraint: Option<Constrained>,
    /// Occurrences in the output of every token in prompt or output; kept only where a penalty asks for it.
    seen: Option<BTreeMap<u32, u32>>,
    prompt_len: usize,
}

/// How the next token of a sequence is drawn.
#[derive(Debug, PartialEq)]
pub(crate) enum Row {
    /// So.
    Known(RowSampling),
    /// Its mask is being worked out.
    Waits,
    /// Its constraint has failed.
    Failed(String),
}

impl Live {
    pub(crate) fn new(params: SamplingParams, constraint: Option<Constrained>, prompt: &[TokenId]) -> Self {
        let penalised = params.repetition_penalty != 1.0
            || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0;
        let seen = penalised.then(|| prompt.iter().map(|token| (token.0, 0)).collect());
        Self { params, constraint, seen, prompt_len: prompt.len() }
    }

    /// Whether its next token can be drawn before the host has seen the one before.
    pub(crate) fn may_run_ahead(&self) -> bool {
        self.seen.is_none() && self.constraint.is_none()
    }

    /// Most likely alternatives to report; `None` when the request wants no log-probabilities.
    pub(crate) fn logprobs(&self) -> Option<usize> {
        self.params.logprobs.map(|n| n as usize)
    }

    /// What restricts it.
    pub(crate) fn constraint(&mut self) -> Option<&mut Constrained> {
        self.constraint.as_mut()
    }

    /// Whether it is not known yet what its constraint allows.
    pub(crate) fn waits(&mut self) -> bool {
        self.constraint.as_mut().is_some_and(|constraint| matches!(constraint.mask(), Mask::Unknown))
    }

    /// This sequence's row, whose lists it adds to the batch: the token to be drawn stands at `position`.
    pub(crate) fn row(&mut self, position: usize, batch: &mut SamplingBatch) -> Row {
        let p = &self.params;
        let mut forbids_stops = position - self.prompt_len < p.min_tokens as usize;
        let mask = match self.constraint.as_mut().map_or(Mask::Any, Constrained::mask) {
            Mask::Unknown => return Row::Waits,
            Mask::Failed(error) => return Row::Failed(error.0.clone()),
            Mask::Any => None,
            Mask::Only(words) => {
                // The constraint has come to its end, which wins: something must be drawn.
                forbids_stops &= !allows_only(words, &p.stop_token_ids);
                let start = batch.mask.len();
                batch.mask.extend_from_slice(words);
                Some(start..batch.mask.len())
            }
        };
        let bias = batch.bias.len();
        batch.bias.extend(p.logit_bias.iter().map(|&(token, bias)| (token.0, bias)));
        if forbids_stops {
            batch.bias.extend(p.stop_token_ids.iter().map(|token| (token.0, f32::NEG_INFINITY)));
        }
        let seen = batch.seen.len();
        if let Some(tokens) = &self.seen {
            batch.seen.extend(tokens.iter().map(|(&token, &output_count)| SeenToken { token, output_count }));
        }
        Row::Known(RowSampling {
            temperature: p.temperature,
            top_p: p.top_p,
            top_k: p.top_k.unwrap_or(0),
            min_p: p.min_p,
            repetition_penalty: p.repetition_penalty,
            presence_penalty: p.presence_penalty,
            frequency_penalty: p.frequency_penalty,
            seed: p.seed,
            position: position as u64,
            bias: bias..batch.bias.len(),
            seen: seen..batch.seen.len(),
            mask,
        })
    }

    /// Remembers a drawn token, and says whether it ends the sequence. If it does not, its constraint is told.
    pub(crate) fn accept(&mut self, token: TokenId, masks: &Masks) -> Option<FinishReason> {
        if self.params.stop_token_ids.contains(&token) {
            return Some(FinishReason::Stop(token));
        }
        if let Some(seen) = &mut self.seen {
            *seen.entry(token.0).or_default() += 1;
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.advance(token, masks);
        }
        None
    }
}

/// Whether a mask allows none but these tokens.
fn allows_only(mask: &[u32], tokens: &[TokenId]) -> bool {
    mask.iter().enumerate().filter(|&(_, &word)| word != 0).all(|(at, &word)| {
        let bit = |token: &TokenId| if token.0 as usize / 32 == at { 1 << (token.0 % 32) } else { 0 };
        word & !tokens.iter().map(bit).fold(0, |bits, bit| bits | bit) == 0
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use r1_core::{Allowed, ConstraintError, TokenConstraint};

    use super::*;
    use crate::bell::Bell;
    use crate::masks::tests::tokens;

    struct Only(u32);

    impl TokenConstraint for Only {
        fn accept(&mut self, token: TokenId) -> Result<(), ConstraintError> {
            self.0 = token.0 + 1;
            Ok(())
        }

        fn fill_mask(&mut self, mask: &mut [u32]) -> Result<Allowed, ConstraintError> {
            mask[self.0 as usize / 32] |= 1 << (self.0 % 32);
            Ok(Allowed::Masked)
        }
    }

    fn masks() -> (Masks, Arc<Bell>) {
        let bell = Arc::new(Bell::default());
        (Masks::new(64, bell.clone()), bell)
    }

    /// The row, once it is known.
    fn row(live: &mut Live, position: usize, batch: &mut SamplingBatch, bell: &Bell) -> RowSampling {
        tokens(live.constraint().expect("a constraint"), bell).expect("a mask");
        match live.row(position, batch) {
            Row::Known(row) => row,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn rows_follow_the_request_and_what_was_drawn() {
        let (mut masks, bell) = masks();
        let params = SamplingParams {
            repetition_penalty: 1.2,
            min_tokens: 1,
            stop_token_ids: vec![TokenId(9)],
            logit_bias: vec![(TokenId(3), 2.0)],
            ..SamplingParams::default()
        };
        let constrained = masks.constrain(Box::new(Only(40)));
        let mut live = Live::new(params, Some(constrained), &[TokenId(5), TokenId(5)]);
        let mut batch = SamplingBatch::default();
        assert!(!live.may_run_ahead());
        let first = row(&mut live, 2, &mut batch, &bell);
        assert_eq!(batch.bias, [(3, 2.0), (9, f32::NEG_INFINITY)]);
        assert_eq!(batch.seen, [SeenToken { token: 5, output_count: 0 }]);
        assert_eq!(batch.mask, [0, 1 << 8]);
        assert_eq!((first.position, first.mask), (2, Some(0..2)));

        assert_eq!(live.accept(TokenId(5), &masks), None);
        assert_eq!(live.accept(TokenId(9), &masks), Some(FinishReason::Stop(TokenId(9))));
        let second = row(&mut live, 3, &mut batch, &bell);
        assert_eq!(second.bias, 2..3, "stop tokens are allowed once min_tokens are drawn");
        assert_eq!(batch.seen[second.seen.clone()], [SeenToken { token: 5, output_count: 1 }]);
        assert_eq!(second.mask, Some(2..4));
        assert_eq!(batch.mask[2], 1 << 6, "the token after 5");
    }

    #[test]
    fn the_end_of_a_constraint_wins_over_min_tokens() {
        for (only, forbidden) in [(9, false), (41, false), (8, true)] {
            let (mut masks, bell) = masks();
            let params = SamplingParams {
                min_tokens: 4,
                stop_token_ids: vec![TokenId(9), TokenId(41)],
                ..SamplingParams::default()
            };
            let constrained = masks.constrain(Box::new(Only(only)));
            let mut live = Live::new(params, Some(constrained), &[TokenId(5)]);
            let mut batch = SamplingBatch::default();
            let row = row(&mut live, 2, &mut batch, &bell);
            assert_eq!(row.bias.len(), if forbidden { 2 } else { 0 }, "only {only} is allowed");
        }
        let stops = [1, 9, 41].map(TokenId);
        assert!(allows_only(&[1 << 9 | 2, 1 << 9], &stops));
        assert!(!allows_only(&[1 << 9, 1 << 10], &stops));
    }

    #[test]
    fn a_row_waits_for_its_mask_and_fails_with_its_constraint() {
        let (mut masks, bell) = masks();
        // Token 64 is outside the vocabulary, so there is nothing to draw after 63.
        let constrained = masks.constrain(Box::new(Only(63)));
        let mut live = Live::new(SamplingParams::default(), Some(constrained), &[TokenId(5)]);
        let mut batch = SamplingBatch::default();
        row(&mut live, 1, &mut batch, &bell);
        assert!(!live.waits());
        live.accept(TokenId(63), &masks);
        batch.clear();
        let failed = loop {
            match live.row(2, &mut batch) {
                Row::Waits => assert!(batch.mask.is_empty() && batch.bias.is_empty()),
                Row::Failed(why) => break why,
                Row::Known(row) => panic!("{row:?}"),
            }
        };
        assert!(failed.contains("out of bounds"), "it panicked: {failed}");
    }

    #[test]
    fn a_plain_request_keeps_no_counts() {
        let (masks, _bell) = masks();
        let mut live = Live::new(SamplingParams::default(), None, &[TokenId(5)]);
        assert!(live.may_run_ahead() && !live.waits());
        live.accept(TokenId(1), &masks);
        let mut batch = SamplingBatch::default();
        assert!(matches!(live.row(2, &mut batch), Row::Known(_)));
        assert!(batch.seen.is_empty() && batch.bias.is_empty() && batch.mask.is_empty());
    }
}
