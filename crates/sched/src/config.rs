//! What the scheduler may use in all, and per step.

use crate::{PrefixKey, SchedError};

/// What the scheduler may use. Fixed for the life of a [`State`](crate::State).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedConfig {
    /// Tokens per KV cache block.
    pub block_size: usize,
    /// Blocks in the KV cache.
    pub num_blocks: usize,
    /// Most sequences that hold blocks at one time.
    pub max_num_seqs: usize,
    /// Most tokens in one step, decode and prefill together; at least `max_num_seqs`, so that a full batch of decode
    /// rows never shuts out a prefill.
    pub max_num_batched_tokens: usize,
    /// Most tokens in one sequence, prompt and output together.
    pub max_model_len: usize,
    /// Most rows of logits in one step beyond one for each of its sequences: for prompts whose logits are wanted.
    pub max_prompt_logits: usize,
    /// Most sequences waiting when another is added. Preempted ones count, but are never refused.
    pub max_queued: usize,
    /// Tokens that each running sequence should still be able to grow by when another one is admitted. More of it
    /// means fewer preemptions and smaller batches; 0 admits whatever fits now. A sequence that runs alone or is
    /// admitted to an idle machine is not held back by it.
    pub headroom_tokens: usize,
    /// Steps in flight: 1 waits for each step, 2 runs one step ahead of the device.
    pub depth: usize,
    /// Turns the prefix cache on: blocks that hold the same tokens after the same beginning are computed once. `None`:
    /// off.
    pub prefix_cache: Option<PrefixKey>,
}

impl Default for SchedConfig {
    /// Blocks of 64 tokens, one step of run-ahead and no prefix cache, which needs a key. `num_blocks` has no sensible
    /// default and is 1: size it from the memory that is there.
    ///
    /// `headroom_tokens`: 2000 sequences of 50 to 1050 prompt and 20 to 1520 new tokens, all waiting from the start for
    /// a cache of 128k tokens, recompute 107% of their prompt tokens with 0, 15% with 16, 5% with 32 and 2% with 64. By
    /// a step time of max(20 ms, 10 ms + 50 us per token) the whole takes 386, 339, 337 and 342 s: smaller batches then
    /// cost more than they save. Blocks of 16 tokens and half the cache agree within 2%.
    fn default() -> Self {
        Self {
            block_size: 64,
            num_blocks: 1,
            max_num_seqs: 256,
            max_num_batched_tokens: 8192,
            max_model_len: 4096,
            max_prompt_logits: 64,
            max_queued: 1024,
            headroom_tokens: 32,
            depth: 2,
            prefix_cache: None,
        }
    }
}

impl SchedConfig {
    /// Checks every value against its range.
    pub fn validate(&self) -> Result<(), SchedError> {
        let check = |field, value, ok: bool, range| {
            if ok { Ok(()) } else { Err(SchedError::InvalidConfig { field, value, range }) }
        };
        check("block_size", self.block_size, self.block_size > 0, "at least 1")?;
        check(
            "num_blocks",
            self.num_blocks,
            self.num_blocks > 0 && u32::try_from(self.num_blocks).is_ok(),
            "at least 1 and at most 2^32 - 1",
        )?;
        check("max_num_seqs", self.max_num_seqs, self.max_num_seqs > 0, "at least 1")?;
        let tokens = self.max_num_batched_tokens;
        check("max_num_batched_tokens", tokens, tokens >= self.max_num_seqs, "at least max_num_seqs")?;
        let len = self.max_model_len;
        check("max_model_len", len, len >= 2, "at least 2, for one prompt token and one new token")?;
        check("max_queued", self.max_queued, self.max_queued > 0, "at least 1")?;
        check("depth", self.depth, (1..=2).contains(&self.depth), "1 or 2")
    }

    /// The limits of a step when nothing calls for tighter ones: no drafts.
    pub fn limits(&self) -> Limits {
        Limits {
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_num_seqs: self.max_num_seqs,
            max_prompt_logits: self.max_prompt_logits,
            num_drafts: 0,
        }
    }

    /// Blocks that hold `num_tokens` tokens.
    pub fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }
}

/// What one step may use. Values above the configuration's count as the configuration's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens in the step. Below the number of running sequences, those in front go first.
    pub max_num_batched_tokens: usize,
    /// Most rows (sequences) in the step.
    pub max_num_seqs: usize,
    /// Most rows of logits beyond one per sequence. With 0, prompts whose logits are wanted advance by a token a step.
    pub max_prompt_logits: usize,
    /// Draft tokens per decode row, fewer where a sequence's limits, the budget or the cache leave less room.
    pub num_drafts: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_checked() {
        let good = SchedConfig::default();
        good.validate().unwrap();
        let bad = |change: fn(&mut SchedConfig)| {
            let mut config = good.clone();
            change(&mut config);
            match config.validate().unwrap_err() {
                SchedError::InvalidConfig { field, .. } => field,
                other => panic!("{other}"),
            }
        };
        assert_eq!(bad(|c| c.block_size = 0), "block_size");
        assert_eq!(bad(|c| c.num_blocks = 0), "num_blocks");
        assert_eq!(bad(|c| c.num_blocks = 1 << 32), "num_blocks");
        assert_eq!(bad(|c| c.max_num_seqs = 0), "max_num_seqs");
        assert_eq!(bad(|c| c.max_num_batched_tokens = c.max_num_seqs - 1), "max_num_batched_tokens");
        assert_eq!(bad(|c| c.max_model_len = 1), "max_model_len");
        assert_eq!(bad(|c| c.max_queued = 0), "max_queued");
        assert_eq!(bad(|c| c.depth = 0), "depth");
        assert_eq!(bad(|c| c.depth = 3), "depth");
    }
}
