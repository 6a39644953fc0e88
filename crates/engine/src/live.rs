//! A running sequence's sampling state: what its request asked for and what it has drawn.

use std::collections::BTreeMap;

use r1_backend::{RowSampling, SamplingBatch, SeenToken};
use r1_core::{Allowed, ConstraintError, FinishReason, SamplingParams, TokenConstraint, TokenId};

/// What sampling must remember of one sequence.
pub(crate) struct Live {
    params: SamplingParams,
    constraint: Option<Box<dyn TokenConstraint>>,
    /// Occurrences in the output of every token in prompt or output; kept only where a penalty asks for it.
    seen: Option<BTreeMap<u32, u32>>,
    prompt_len: usize,
}

impl Live {
    pub(crate) fn new(
        params: SamplingParams,
        constraint: Option<Box<dyn TokenConstraint>>,
        prompt: &[TokenId],
    ) -> Self {
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

    /// Adds this sequence's row: the token to be drawn stands at `position`.
    pub(crate) fn push_row(
        &mut self,
        position: usize,
        vocab_size: usize,
        batch: &mut SamplingBatch,
    ) -> Result<(), ConstraintError> {
        let p = &self.params;
        let bias = batch.bias.len();
        batch.bias.extend(p.logit_bias.iter().map(|&(token, bias)| (token.0, bias)));
        if position - self.prompt_len < p.min_tokens as usize {
            batch.bias.extend(p.stop_token_ids.iter().map(|token| (token.0, f32::NEG_INFINITY)));
        }
        let seen = batch.seen.len();
        if let Some(tokens) = &self.seen {
            batch.seen.extend(tokens.iter().map(|(&token, &output_count)| SeenToken { token, output_count }));
        }
        let mut mask = None;
        if let Some(constraint) = &mut self.constraint {
            let words = batch.mask.len()..batch.mask.len() + vocab_size.div_ceil(32);
            batch.mask.resize(words.end, 0);
            if constraint.fill_mask(&mut batch.mask[words.clone()])? == Allowed::Masked {
                mask = Some(words);
            }
        }
        batch.rows.push(RowSampling {
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
        });
        Ok(())
    }

    /// Remembers a drawn token, and says whether it ends the sequence.
    pub(crate) fn accept(&mut self, token: TokenId) -> Result<Option<FinishReason>, ConstraintError> {
        if let Some(seen) = &mut self.seen {
            *seen.entry(token.0).or_default() += 1;
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token)?;
        }
        Ok(self.params.stop_token_ids.contains(&token).then_some(FinishReason::Stop(token)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn rows_follow_the_request_and_what_was_drawn() {
        let params = SamplingParams {
            repetition_penalty: 1.2,
            min_tokens: 1,
            stop_token_ids: vec![TokenId(9)],
            logit_bias: vec![(TokenId(3), 2.0)],
            ..SamplingParams::default()
        };
        let mut live = Live::new(params, Some(Box::new(Only(40))), &[TokenId(5), TokenId(5)]);
        let mut batch = SamplingBatch::default();
        assert!(!live.may_run_ahead());
        live.push_row(2, 64, &mut batch).expect("a mask");
        assert_eq!(batch.bias, [(3, 2.0), (9, f32::NEG_INFINITY)]);
        assert_eq!(batch.seen, [SeenToken { token: 5, output_count: 0 }]);
        assert_eq!(batch.mask, [0, 1 << 8]);
        assert_eq!(batch.rows[0].position, 2);

        assert_eq!(live.accept(TokenId(5)), Ok(None));
        assert_eq!(live.accept(TokenId(9)), Ok(Some(FinishReason::Stop(TokenId(9)))));
        live.push_row(4, 64, &mut batch).expect("a mask");
        assert_eq!(batch.rows[1].bias, 2..3, "stop tokens are allowed once min_tokens are drawn");
        let seen = [SeenToken { token: 5, output_count: 1 }, SeenToken { token: 9, output_count: 1 }];
        assert_eq!(batch.seen[batch.rows[1].seen.clone()], seen);
        assert_eq!(batch.rows[1].mask, Some(2..4));
        assert_eq!(batch.mask[2], 1 << 10);
    }

    #[test]
    fn a_plain_request_keeps_no_counts() {
        let mut live = Live::new(SamplingParams::default(), None, &[TokenId(5)]);
        live.accept(TokenId(1)).expect("no constraint");
        let mut batch = SamplingBatch::default();
        live.push_row(2, 64, &mut batch).expect("a mask");
        assert!(batch.seen.is_empty() && batch.bias.is_empty() && batch.mask.is_empty());
    }
}
