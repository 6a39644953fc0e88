//! One tensor-parallel rank: its shard of the model, its caches, its input tensors. Runs steps that others have chosen, and
//! keeps a failure until it is asked for. Knows no sequence and no request.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use r1_backend::{
    Backend, BackendError, CommError, Communicator, HostSlice, HostSliceMut, LatentCache, LogprobsOut,
    SamplingBatch, Ticket,
};
use r1_core::TokenId;
use r1_model::{DeepSeek, StageInput, StageOutput, StepError};
use r1_sched::SchedConfig;

use crate::TokenLogprobs;
use crate::config::StartError;
use crate::input::{Inputs, StepInput, StepTensors, logit_rows};

/// How the rows of a step are drawn.
#[derive(Default)]
pub(crate) struct StepSampling {
    pub(crate) batch: SamplingBatch,
    /// Some row reports log-probabilities.
    pub(crate) wants_logprobs: bool,
}

/// A step's place between the engine thread, which fills it, and the ranks, which read it. There are as many as steps may be
/// in flight.
pub(crate) struct Slot {
    input: RwLock<StepInput>,
    sampling: RwLock<StepSampling>,
}

impl Slot {
    pub(crate) fn new(config: &SchedConfig) -> Self {
        Self {
            input: RwLock::new(StepInput::with_room(config)),
            sampling: RwLock::new(StepSampling {
                batch: SamplingBatch {
                    rows: Vec::with_capacity(config.max_num_seqs),
                    ..SamplingBatch::default()
                },
                wants_logprobs: false,
            }),
        }
    }

    // Whoever fills a slot clears it first, so one that a panic left half-filled is as good as new.

    pub(crate) fn input(&self) -> RwLockReadGuard<'_, StepInput> {
        self.input.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn input_mut(&self) -> RwLockWriteGuard<'_, StepInput> {
        self.input.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn sampling(&self) -> RwLockReadGuard<'_, StepSampling> {
        self.sampling.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn sampling_mut(&self) -> RwLockWriteGuard<'_, StepSampling> {
        self.sampling.write().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".into())
}

/// Why a step failed on one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) why: String,
    /// Only another rank's failure made this one fail.
    pub(crate) is_consequence: bool,
}

impl Failure {
    pub(crate) fn cause(why: String) -> Self {
        Self { why, is_consequence: false }
    }
}

impl From<StepError> for Failure {
    fn from(error: StepError) -> Self {
        let is_consequence = matches!(error, StepError::Comm(CommError::PeerGone { .. }));
        Self { why: error.to_string(), is_consequence }
    }
}

/// What a rank holds of a step in flight.
#[derive(Default)]
struct InFlight {
    ticket: Option<Ticket>,
    failure: Option<Failure>,
}

/// A rank ready to run steps.
pub(crate) struct Rank<B: Backend> {
    /// Captured decode steps, by their number of sequences. They hold collectives of the group that the rank is in and the
    /// addresses of its tensors, so they go first.
    graphs: Vec<(usize, B::Graph)>,
    model: DeepSeek<B>,
    caches: Vec<LatentCache<B>>,
    inputs: Inputs<B>,
    slots: Arc<[Slot]>,
    in_flight: Vec<InFlight>,
    /// Why this rank left its group; until it joins another, its steps fail.
    left: Option<Failure>,
}

impl<B: Backend> Rank<B> {
    /// Allocates caches and inputs.
    pub(crate) fn new(
        model: DeepSeek<B>,
        config: &SchedConfig,
        slots: Arc<[Slot]>,
    ) -> Result<Self, StartError> {
        let caches = model.alloc_cache(config.num_blocks, config.block_size)?;
        let inputs = Inputs::alloc(&**model.backend(), config, model.config().vocab_size)?;
        let in_flight = slots.iter().map(|_| InFlight::default()).collect();
        Ok(Self { model, caches, inputs, slots, in_flight, graphs: Vec::new(), left: None })
    }

    pub(crate) fn model(&self) -> &DeepSeek<B> {
        &self.model
    }

    /// Captures a decode step of each of these sizes, in this order, which every rank of the group does at the same time; the
    /// rank has no other graphs then. A failure frees the ranks that wait for this one.
    pub(crate) fn capture(&mut self, sizes: &[usize]) -> Result<(), Failure> {
        let captured = catch_unwind(AssertUnwindSafe(|| self.try_capture(sizes)));
        let failure = match captured {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => Failure::from(error),
            Err(panic) => Failure::cause(panic_text(&*panic)),
        };
        self.leave(failure.clone());
        Err(failure)
    }

    fn try_capture(&mut self, sizes: &[usize]) -> Result<(), StepError> {
        self.graphs.clear();
        let Some(&smallest) = sizes.first() else { return Ok(()) };
        // One step runs eagerly first, so that what a device sets up when it is first used is there.
        let padding = StepInput::only_padding(smallest);
        let step = self.inputs.upload(&**self.model.backend(), &padding, 0);
        self.run(&step);
        self.model.finish()?;
        for &num_seqs in sizes {
            let step = self.inputs.decodes(num_seqs);
            let graph = self.model.backend().capture(&mut || self.run(&step))?;
            let name = self.model.backend().name();
            let graph = graph.unwrap_or_else(|| panic!("{name} says that it captures, and gives no graph"));
            self.graphs.push((num_seqs, graph));
        }
        // The input is still the padding. What a collective refused while it was captured is known now, too.
        self.model.backend().replay(&self.graphs[0].1);
        self.model.finish()
    }

    /// Enqueues a step, eagerly.
    fn run(&self, step: &StepTensors<B>) {
        let output = StageOutput::Logits { rows: &step.logit_rows, logits: &step.logits };
        self.model.forward(&StageInput::Tokens(&step.ids), &step.batch, &self.caches, &output);
    }

    /// Enqueues the forward pass of the step in `slot`: as it was captured, where it was.
    pub(crate) fn forward(&mut self, slot: usize) {
        self.guarded(slot, |rank| {
            let backend = &**rank.model.backend();
            let input = rank.slots[slot].input();
            let step = rank.inputs.upload(backend, &input, slot);
            match rank.graphs.iter().find(|(num_seqs, _)| Some(*num_seqs) == input.bucket()) {
                Some((_, graph)) => backend.replay(graph),
                None => rank.run(&step),
            }
        });
    }

    /// Enqueues what draws the step's tokens, and closes it.
    pub(crate) fn sample(&mut self, slot: usize) {
        self.guarded(slot, |rank| {
            let backend = &**rank.model.backend();
            let input = rank.slots[slot].input();
            let num_logits = input.num_logits();
            let sampling = rank.slots[slot].sampling();
            let (logits, draws) = (rank.inputs.logits(num_logits), rank.inputs.draws(slot, num_logits));
            let num_drawn = num_logits - input.prompt_tokens().len();
            if num_drawn > 0 {
                let rows = 0..num_drawn;
                backend.sample(&logits.rows(rows.clone()), &sampling.batch, &draws.tokens.rows(rows));
            }
            if num_drawn < num_logits {
                let of_prompts = draws.tokens.rows(num_drawn..num_logits);
                backend.upload(HostSlice::U32(input.prompt_tokens()), &of_prompts);
            }
            if sampling.wants_logprobs {
                backend.logprobs(&logits, &draws.tokens, &draws.logprobs);
            }
            rank.in_flight[slot].ticket = Some(backend.flush());
        });
    }

    /// Runs a part of a step; a panic is its failure, and frees the ranks that wait for this one.
    fn guarded(&mut self, slot: usize, part: impl FnOnce(&mut Self)) {
        if self.in_flight[slot].failure.is_some() {
            return;
        }
        if let Some(why) = &self.left {
            self.in_flight[slot].failure = Some(Failure { is_consequence: true, ..why.clone() });
            return;
        }
        // What a half-run step leaves behind is overwritten by the next one: the tensors are filled anew, and the scheduler
        // forgets the blocks.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| part(self))) {
            self.fail(slot, Failure::cause(panic_text(&*panic)));
        }
    }

    fn fail(&mut self, slot: usize, failure: Failure) {
        self.leave(failure.clone());
        self.in_flight[slot].failure = Some(failure);
    }

    /// Leaves the group, with the graphs that hold its collectives.
    fn leave(&mut self, why: Failure) {
        self.graphs.clear();
        self.model.leave();
        self.left = Some(why);
    }

    /// Waits for the step in `slot`; a step that was not sampled is closed first.
    pub(crate) fn wait(&mut self, slot: usize) -> Result<(), Failure> {
        let ticket = self.in_flight[slot].ticket.take();
        let waited = catch_unwind(AssertUnwindSafe(|| -> Result<(), StepError> {
            ticket.unwrap_or_else(|| self.model.backend().flush()).wait()?;
            self.model.check()
        }));
        let failure = match waited {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Failure::from(error)),
            Err(panic) => Some(Failure::cause(panic_text(&*panic))),
        };
        if let Some(failure) = failure
            && self.in_flight[slot].failure.is_none()
        {
            self.fail(slot, failure);
        }
        self.in_flight[slot].failure.take().map_or(Ok(()), Err)
    }

    /// Goes on in a new group after a failure; nothing is captured in it yet.
    pub(crate) fn join(&mut self, comm: Arc<dyn Communicator<B>>) {
        // A rank that did not fail has not left: graphs go before the group whose collectives they hold.
        self.graphs.clear();
        self.model.join(comm);
        self.left = None;
    }

    /// Reads what the step in `slot`, which was waited for, has drawn.
    pub(crate) fn read(&self, slot: usize, drawn: &mut Drawn) -> Result<(), BackendError> {
        let backend = &**self.model.backend();
        let num_logits = self.slots[slot].input().num_logits();
        let draws = self.inputs.draws(slot, num_logits);
        drawn.tokens.clear();
        drawn.tokens.resize(num_logits, 0);
        drawn.num_top = None;
        if num_logits > 0 {
            backend.read_back(&draws.tokens, HostSliceMut::U32(&mut drawn.tokens))?;
        }
        if self.slots[slot].sampling().wants_logprobs {
            drawn.read_logprobs(backend, &draws.logprobs)?;
        }
        Ok(())
    }
}

/// What a step has drawn, on the host.
#[derive(Default)]
pub(crate) struct Drawn {
    /// One per row of logits; for those of prompts, the prompt's next.
    tokens: Vec<u32>,
    /// Likely tokens per row, where log-probabilities were read.
    num_top: Option<usize>,
    chosen: Vec<f32>,
    top_ids: Vec<u32>,
    top: Vec<f32>,
}

impl Drawn {
    pub(crate) fn with_room(config: &SchedConfig) -> Self {
        Self { tokens: Vec::with_capacity(logit_rows(config)), ..Self::default() }
    }

    pub(crate) fn token(&self, row: usize) -> TokenId {
        TokenId(self.tokens[row])
    }

    fn read_logprobs<B: Backend>(&mut self, backend: &B, out: &LogprobsOut<B>) -> Result<(), BackendError> {
        let (rows, num_top) = (out.chosen.dim(0), out.top.dim(1));
        self.num_top = Some(num_top);
        self.chosen.resize(rows, 0.0);
        self.top_ids.resize(rows * num_top, 0);
        self.top.resize(rows * num_top, 0.0);
        backend.read_back(&out.chosen, HostSliceMut::F32(&mut self.chosen))?;
        backend.read_back(&out.top_ids, HostSliceMut::U32(&mut self.top_ids))?;
        backend.read_back(&out.top, HostSliceMut::F32(&mut self.top))
    }

    /// The row's log-probabilities, with the `num_top` most likely tokens.
    ///
    /// # Panics
    /// When the step did not ask for any.
    pub(crate) fn logprobs(&self, row: usize, num_top: usize) -> TokenLogprobs {
        let width = self.num_top.expect("the step asked for log-probabilities");
        let range = row * width..row * width + num_top.min(width);
        let top = self.top_ids[range.clone()].iter().zip(&self.top[range]);
        TokenLogprobs {
            logprob: self.chosen[row],
            top: top.map(|(&id, &logprob)| (TokenId(id), logprob)).collect(),
        }
    }
}
