//! Runs one begun step on the device: inputs, forward pass, sampling, tokens back.

use r1_backend::{Backend, BackendError, HostSliceMut, LatentCache, LogprobsOut, SamplingBatch};
use r1_core::{FinishReason, SeqId, TokenId};
use r1_model::{DeepSeek, StageInput, StageOutput, StepError};
use r1_sched::{Plan, State};

use crate::TokenLogprobs;
use crate::config::{EngineConfig, StartError};
use crate::input::Inputs;
use crate::live::Live;

/// A token that a step drew.
pub(crate) struct Drawn {
    pub(crate) seq: SeqId,
    pub(crate) token: TokenId,
    pub(crate) logprobs: Option<TokenLogprobs>,
    /// Set when the token ends its sequence.
    pub(crate) finish: Option<FinishReason>,
}

/// Where a step finds the sampling state of its sequences.
pub(crate) trait Lives {
    /// The state of a sequence in the step.
    fn get(&mut self, seq: SeqId) -> &mut Live;
}

/// A model with its caches and input tensors: everything a step needs but the choice of what to run.
pub(crate) struct Runner<B: Backend> {
    model: DeepSeek<B>,
    caches: Vec<LatentCache<B>>,
    inputs: Inputs<B>,
    sampling: SamplingBatch,
    drawn: Vec<u32>,
}

impl<B: Backend> Runner<B> {
    /// Allocates caches and inputs; gives the scheduler that fits them.
    pub(crate) fn new(model: DeepSeek<B>, config: &EngineConfig) -> Result<(Self, State), StartError> {
        let sched = config.sched(&model)?;
        let caches = model.alloc_cache(sched.num_blocks, sched.block_size)?;
        let inputs = Inputs::alloc(&**model.backend(), &sched, model.config().vocab_size)?;
        let runner = Self { model, caches, inputs, sampling: SamplingBatch::default(), drawn: Vec::new() };
        Ok((runner, State::new(sched)?))
    }

    pub(crate) fn model(&self) -> &DeepSeek<B> {
        &self.model
    }

    /// Runs a step that has begun. `lives` holds the sampling state of the plan's sequences.
    pub(crate) fn step(
        &mut self,
        state: &State,
        plan: &Plan,
        lives: &mut impl Lives,
    ) -> Result<Vec<Drawn>, StepError> {
        let backend = self.model.backend().clone();
        let vocab_size = self.model.config().vocab_size;
        let step = self.inputs.fill(&*backend, state, plan);
        let output = StageOutput::Logits { rows: &step.logit_rows, logits: &step.logits };
        self.model.forward(&StageInput::Tokens(&step.ids), &step.batch, &self.caches, &output);

        let decodes = plan.decode.iter().map(|row| row.seq);
        let seqs: Vec<SeqId> =
            decodes.chain(plan.prefill.iter().filter(|chunk| chunk.samples).map(|chunk| chunk.seq)).collect();
        self.sampling.clear();
        let mut num_top = None;
        for &seq in &seqs {
            let live = lives.get(seq);
            live.push_row(state.tokens(seq).len(), vocab_size, &mut self.sampling);
            num_top = num_top.max(live.logprobs());
        }
        if !seqs.is_empty() {
            backend.sample(&step.logits, &self.sampling, &step.drawn);
        }
        if num_top.is_some() {
            backend.logprobs(&step.logits, &step.drawn, &step.logprobs);
        }
        self.model.finish()?;

        self.drawn.clear();
        self.drawn.resize(seqs.len(), 0);
        backend.download(&step.drawn, HostSliceMut::U32(&mut self.drawn))?;
        let mut logprobs = LogprobRows::default();
        if num_top.is_some() {
            logprobs.download(&*backend, &step.logprobs)?;
        }
        Ok(seqs
            .iter()
            .enumerate()
            .map(|(row, &seq)| {
                let (token, live) = (TokenId(self.drawn[row]), lives.get(seq));
                let logprobs = live.logprobs().map(|n| logprobs.row(row, n));
                Drawn { seq, token, logprobs, finish: live.accept(token) }
            })
            .collect())
    }
}

/// A step's log-probabilities on the host.
#[derive(Default)]
struct LogprobRows {
    chosen: Vec<f32>,
    top_ids: Vec<u32>,
    top: Vec<f32>,
    num_top: usize,
}

impl LogprobRows {
    fn download<B: Backend>(&mut self, backend: &B, out: &LogprobsOut<B>) -> Result<(), BackendError> {
        let rows = out.chosen.dim(0);
        self.num_top = out.top.dim(1);
        self.chosen.resize(rows, 0.0);
        self.top_ids.resize(rows * self.num_top, 0);
        self.top.resize(rows * self.num_top, 0.0);
        backend.download(&out.chosen, HostSliceMut::F32(&mut self.chosen))?;
        backend.download(&out.top_ids, HostSliceMut::U32(&mut self.top_ids))?;
        backend.download(&out.top, HostSliceMut::F32(&mut self.top))
    }

    fn row(&self, row: usize, num_top: usize) -> TokenLogprobs {
        let from = row * self.num_top;
        let range = from..from + num_top.min(self.num_top);
        let top = self.top_ids[range.clone()].iter().zip(&self.top[range]);
        TokenLogprobs {
            logprob: self.chosen[row],
            top: top.map(|(&id, &logprob)| (TokenId(id), logprob)).collect(),
        }
    }
}
