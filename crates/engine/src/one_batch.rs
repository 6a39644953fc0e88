//! The latency of one batch: a prefill of random prompts, then decode steps, through the same steps that serve.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use r1_backend::Backend;
use r1_core::{SamplingParams, SeqId, TokenId};
use r1_model::DeepSeek;
use r1_sched::{NewSequence, Outcome, begin, commit, plan};

use crate::config::{EngineConfig, StartError};
use crate::live::Live;
use crate::runner::{Lives, Runner};

/// Sizes of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OneBatch {
    /// Sequences.
    pub batch_size: usize,
    /// Tokens of each prompt.
    pub input_tokens: usize,
    /// Tokens generated per sequence.
    pub output_tokens: usize,
}

/// How long it took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OneBatchTimes {
    /// Until every sequence had its first token; steps that decode for some while others prefill are part of it.
    pub prefill: Duration,
    /// Each step after that.
    pub decode_steps: Vec<Duration>,
}

/// Why a measurement could not be made.
#[derive(Debug, thiserror::Error)]
pub enum OneBatchError {
    /// The model or its memory.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The scheduler refused the batch.
    #[error(transparent)]
    Sched(#[from] r1_sched::SchedError),
    /// A step failed.
    #[error(transparent)]
    Step(#[from] r1_model::StepError),
    /// The batch does not run side by side in the memory that is free.
    #[error(
        "the batch takes {needed} KV blocks and the cache has {kv_blocks}; make the batch smaller or shorter"
    )]
    TooLarge {
        /// Blocks of the batch.
        needed: usize,
        /// Blocks of the cache.
        kv_blocks: usize,
    },
}

impl Lives for BTreeMap<SeqId, Live> {
    fn get(&mut self, seq: SeqId) -> &mut Live {
        self.get_mut(&seq).expect("every sequence of the batch has a state")
    }
}

/// A model ready to be measured.
pub struct OneBatchBench<B: Backend> {
    runner: Runner<B>,
    state: r1_sched::State,
    next_id: u64,
}

impl<B: Backend> OneBatchBench<B> {
    /// Allocates what the steps need.
    pub fn new(model: DeepSeek<B>, config: &EngineConfig) -> Result<Self, StartError> {
        let (runner, state) = Runner::new(model, config)?;
        Ok(Self { runner, state, next_id: 0 })
    }

    /// The model.
    pub fn model(&self) -> &DeepSeek<B> {
        self.runner.model()
    }

    /// Runs one batch, greedily and without stop tokens; `each` sees the time of every step.
    pub fn run(
        &mut self,
        batch: OneBatch,
        mut each: impl FnMut(Duration),
    ) -> Result<OneBatchTimes, OneBatchError> {
        let (each_takes, kv_blocks) = {
            let config = self.state.config();
            (config.blocks_for(batch.input_tokens + batch.output_tokens), config.num_blocks)
        };
        let needed = batch.batch_size.saturating_mul(each_takes);
        if needed > kv_blocks {
            return Err(OneBatchError::TooLarge { needed, kv_blocks });
        }
        let vocab_size = self.model().config().vocab_size as u64;
        let mut lives = BTreeMap::new();
        for _ in 0..batch.batch_size {
            let id = SeqId(self.next_id);
            self.next_id += 1;
            // Any tokens will do; a multiplicative sequence spreads them over the vocabulary and so over the experts.
            let prompt: Vec<TokenId> = (0..batch.input_tokens as u64)
                .map(|i| {
                    TokenId(
                        ((id.0 + 1).wrapping_mul(2_654_435_761).wrapping_add(i * 40_503) % vocab_size) as u32,
                    )
                })
                .collect();
            let params = SamplingParams {
                temperature: 0.0,
                max_tokens: batch.output_tokens as u32,
                ..SamplingParams::default()
            };
            lives.insert(id, Live::new(params, None, &prompt));
            let max_new_tokens = batch.output_tokens as u32;
            self.state.add(NewSequence { id, prompt, max_new_tokens, priority: 0 })?;
        }
        let mut prefill = Duration::ZERO;
        let mut decode_steps = Vec::with_capacity(batch.output_tokens);
        while !self.state.is_idle() {
            let start = Instant::now();
            let chosen = plan(&self.state, &self.state.limits());
            let id = begin(&mut self.state, &chosen);
            let drawn = self.runner.step(&self.state, &chosen, &mut lives)?;
            let outcomes: Vec<Outcome> = drawn
                .into_iter()
                .map(|drawn| Outcome { seq: drawn.seq, tokens: vec![drawn.token], finish: None })
                .collect();
            commit(&mut self.state, id, &outcomes);
            let took = start.elapsed();
            if chosen.prefill.is_empty() {
                decode_steps.push(took);
                each(took);
            } else {
                prefill += took;
            }
        }
        Ok(OneBatchTimes { prefill, decode_steps })
    }
}
