//! The latency of one batch: a prefill of random prompts, then decode steps, through the same steps that serve.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use r1_backend::Backend;
use r1_core::{SamplingParams, SeqId, TokenId};
use r1_model::DeepSeek;
use r1_sched::{NewSequence, Outcome, State, commit};

use crate::config::{EngineConfig, StartError};
use crate::live::Live;
use crate::pipeline::{Lives, Pipeline};
use crate::ranks::{RankLoader, Ranks};

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
    #[error("a step failed: {0}")]
    Step(String),
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
    pipeline: Pipeline<B>,
    next_id: u64,
}

impl<B: Backend> OneBatchBench<B> {
    /// Loads the ranks and allocates what the steps need. The batch's prompts are different ones in every run, so a prefix
    /// cache finds nothing.
    pub fn new(
        loader: Arc<dyn RankLoader<B>>,
        config: &EngineConfig,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Self, StartError> {
        let (ranks, sched) = Ranks::start(loader, config, progress)?;
        Ok(Self { pipeline: Pipeline::new(ranks, State::new(sched)?, Arc::default()), next_id: 0 })
    }

    /// The first rank's shard of the model.
    pub fn model(&self) -> &DeepSeek<B> {
        self.pipeline.ranks().model()
    }

    /// Runs one batch, greedily and without stop tokens; `each` sees the time of every step.
    pub fn run(
        &mut self,
        batch: OneBatch,
        each: impl FnMut(Duration),
    ) -> Result<OneBatchTimes, OneBatchError> {
        let first_id = self.next_id;
        let ran = self.run_batch(batch, each);
        if ran.is_err() {
            // What is left of the batch would be in the way of the next one.
            for id in first_id..self.next_id {
                self.pipeline.state_mut().abort(SeqId(id));
            }
        }
        ran
    }

    fn run_batch(
        &mut self,
        batch: OneBatch,
        mut each: impl FnMut(Duration),
    ) -> Result<OneBatchTimes, OneBatchError> {
        let (each_takes, kv_blocks) = {
            let config = self.pipeline.state().config();
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
            self.pipeline.state_mut().add(NewSequence {
                id,
                prompt,
                max_new_tokens: batch.output_tokens as u32,
                priority: 0,
                cache_salt: None,
                run_ahead: true,
                prompt_logits: false,
            })?;
        }
        let mut prefill = Duration::ZERO;
        let mut decode_steps = Vec::with_capacity(batch.output_tokens);
        let limits = self.pipeline.state().limits();
        let mut tokens = Vec::with_capacity(batch.batch_size);
        let mut start = Instant::now();
        while !self.pipeline.state().is_idle() {
            let began = self.pipeline.begin(&limits, &mut lives).is_some();
            if began && self.pipeline.has_room() {
                continue;
            }
            let done = match self.pipeline.wait().expect("a batch that is not done has a step in flight") {
                Ok(done) => done,
                Err(failed) => return Err(OneBatchError::Step(failed.why)),
            };
            tokens.clear();
            tokens.extend(done.sampled.iter().enumerate().map(|(row, &seq)| (seq, done.drawn.token(row))));
            let is_decode = done.plan.prefill.is_empty();
            let outcomes = tokens.iter().filter(|(seq, _)| done.state.sequence(*seq).is_some());
            let outcomes: Vec<Outcome> = outcomes
                .map(|(seq, token)| Outcome { seq: *seq, tokens: std::slice::from_ref(token), finish: None })
                .collect();
            commit(done.state, done.id, outcomes);
            let took = start.elapsed();
            start = Instant::now();
            if is_decode {
                decode_steps.push(took);
                each(took);
            } else {
                prefill += took;
            }
        }
        Ok(OneBatchTimes { prefill, decode_steps })
    }
}
