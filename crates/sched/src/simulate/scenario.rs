//! What a simulated run looks like: the scheduler's configuration and the load on it, all drawn from the seed.

use super::rng::Rng;
use crate::{PrefixKey, SchedConfig};

/// The load and the machine of one simulated run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// Draws everything that happens during the run.
    pub seed: u64,
    /// Steps committed before arrivals cease and the rest is drained.
    pub num_steps: u64,
    /// Tiny on purpose: caches that fill up, batches that do not fit.
    pub config: SchedConfig,
    /// Most drafts per decode row; each step draws its own number.
    pub max_drafts: usize,
    /// Chance of a new sequence before each turn of the loop, and of one more after each, percent; below 100.
    pub arrival_percent: usize,
    /// Chance that some live sequence is aborted before each turn of the loop, percent.
    pub abort_percent: usize,
    /// Chance that a step fails on the device, percent.
    pub fail_percent: usize,
    /// Chance that the prefix cache is flushed before a turn of the loop, percent.
    pub flush_percent: usize,
    /// Chance that a step's limits are tighter than the configuration's, percent.
    pub tight_percent: usize,
    /// Longest prompt, tokens, but for those that continue what was generated.
    pub max_prompt: usize,
    /// Most `max_new_tokens`.
    pub max_new_tokens: usize,
    /// Priorities are drawn from `0..num_priorities`.
    pub num_priorities: usize,
    /// Common beginnings of prompts; at least 1.
    pub num_stems: usize,
    /// Chance that a prompt begins with a stem or with an earlier sequence, percent.
    pub shared_percent: usize,
    /// Salts besides none.
    pub num_salts: usize,
    /// Chance that a sequence may run ahead of the host, percent.
    pub run_ahead_percent: usize,
    /// Chance that a row of a sequence that may not run ahead draws nothing, percent; below 100. Half of them are paused.
    pub undrawn_percent: usize,
    /// Chance that the logits of a sequence's prompt are wanted, percent.
    pub prompt_logits_percent: usize,
}

impl Scenario {
    /// The scenario that belongs to `seed`.
    pub fn from_seed(seed: u64, num_steps: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x5ced_0000_0000_0000);
        let max_num_seqs = rng.range(1, 8);
        let max_num_batched_tokens =
            max_num_seqs + if rng.percent(50) { rng.range(0, 4) } else { rng.range(8, 64) };
        let block_size = rng.range(1, 8);
        let max_model_len = rng.range(4, 64);
        // From a cache that holds one sequence at the most to one that holds all, twice.
        let one = (max_model_len - 1).div_ceil(block_size);
        let most = one * rng.range(1, 2 * max_num_seqs);
        let num_blocks = rng.range(one.div_ceil(2), most);
        let config = SchedConfig {
            block_size,
            num_blocks,
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len,
            max_prompt_logits: 0,
            max_queued: rng.range(1, 12),
            headroom_tokens: if rng.percent(60) { 0 } else { rng.range(1, 8) },
            depth: rng.range(1, 2),
            prefix_cache: rng.percent(80).then_some(PrefixKey::new([seed, !seed])),
        };
        let mut scenario = Self {
            seed,
            num_steps,
            config,
            max_drafts: if rng.percent(50) { 0 } else { rng.range(1, 4) },
            arrival_percent: rng.range(2, 40),
            abort_percent: if rng.percent(30) { 0 } else { rng.range(1, 6) },
            fail_percent: if rng.percent(60) { 0 } else { rng.range(1, 6) },
            flush_percent: usize::from(rng.percent(10)),
            tight_percent: if rng.percent(70) { 0 } else { rng.range(1, 30) },
            max_prompt: rng.range(1, max_model_len),
            max_new_tokens: rng.range(2, max_model_len),
            num_priorities: rng.range(1, 3),
            num_stems: rng.range(1, 4),
            shared_percent: [0, 50, 90, 100][rng.range(0, 3)],
            num_salts: if rng.percent(50) { 0 } else { rng.range(1, 3) },
            run_ahead_percent: [0, 50, 100, 100][rng.range(0, 3)],
            undrawn_percent: [0, 0, 20, 60][rng.range(0, 3)],
            prompt_logits_percent: [0, 0, 30, 100][rng.range(0, 3)],
        };
        scenario.config.max_prompt_logits = rng.range(0, 12);
        scenario
    }
}
