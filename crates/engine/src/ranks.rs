//! All ranks of a model: the first runs on the engine's own thread, every other one on a thread of its own. Loads them side
//! by side, hands each the same steps, and puts them together again after a failure.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Instant;

use r1_backend::{Backend, BackendError, CommError, Communicator, MemoryUse};
use r1_core::Rank as RankId;
use r1_model::{DeepSeek, ModelError};
use r1_sched::SchedConfig;

use crate::buckets::Buckets;
use crate::config::{EngineConfig, StartError};
use crate::memory::{Held, plan};
use crate::rank::{Drawn, Failure, Rank, Slot};

/// How the ranks of a model come to be.
pub trait RankLoader<B: Backend>: Send + Sync + 'static {
    /// A fresh group, one communicator per rank in order, at least one. Called once at the start and again after each failed
    /// step. A failure at the start refuses to start; later, no step can run any more.
    fn connect(&self) -> Result<Vec<Arc<dyn Communicator<B>>>, CommError>;

    /// Loads one rank's shard; `progress` is told the share that is done, 0 to 1. Ranks are loaded side by side.
    fn load(
        &self,
        rank: RankId,
        comm: Arc<dyn Communicator<B>>,
        progress: &mut dyn FnMut(f32),
    ) -> Result<DeepSeek<B>, ModelError>;
}

/// What a rank's thread is asked; every `Wait`, `Allocate`, `Capture` and `Memory` is answered.
enum Job<B: Backend> {
    Allocate(SchedConfig, Arc<[Slot]>),
    Forward(usize),
    Sample(usize),
    Wait(usize),
    Join(Arc<dyn Communicator<B>>),
    Capture(Buckets),
    Memory,
}

enum Answer {
    Loaded(Result<Loaded, StartError>),
    Allocated(Result<(), StartError>),
    Waited(Result<(), Failure>),
    Captured(Result<(), Failure>),
    Memory(Option<MemoryUse>),
}

/// What a loaded rank says of itself.
#[derive(Clone, Copy)]
struct Loaded {
    num_blocks: usize,
    weight_bytes: usize,
}

/// A rank on its own thread, which ends when the worker is dropped.
struct Worker<B: Backend> {
    jobs: SyncSender<Job<B>>,
    answers: Receiver<Answer>,
}

/// Every rank, ready to run steps.
pub(crate) struct Ranks<B: Backend> {
    first: Rank<B>,
    others: Vec<Worker<B>>,
    slots: Arc<[Slot]>,
    loader: Arc<dyn RankLoader<B>>,
    /// Sizes that decode steps are padded to.
    buckets: Buckets,
    /// They are captured.
    captures: bool,
}

const GONE: &str = "the thread of a rank has ended";

impl<B: Backend> Ranks<B> {
    /// Loads all ranks and allocates what steps need; gives the scheduler's configuration that fits every one of them.
    pub(crate) fn start(
        loader: Arc<dyn RankLoader<B>>,
        config: &EngineConfig,
        progress: &mut dyn FnMut(f32),
    ) -> Result<(Self, SchedConfig), StartError> {
        let mut comms = loader.connect()?.into_iter();
        let first_comm = comms.next().expect("a group has at least one rank");
        let others: Vec<_> = comms
            .enumerate()
            .map(|(i, comm)| Worker::spawn(RankId(i + 1), loader.clone(), config.clone(), comm))
            .collect();
        let model = loader.load(RankId(0), first_comm, progress)?;
        let mut sched = config.sched(&model)?;
        let mut loaded = vec![Loaded { num_blocks: sched.num_blocks, weight_bytes: model.weight_bytes() }];
        for worker in &others {
            match worker.answers.recv() {
                Ok(Answer::Loaded(Ok(of_rank))) => loaded.push(of_rank),
                Ok(Answer::Loaded(Err(error))) => return Err(error),
                _ => return Err(StartError::RankEnded),
            }
        }
        // Every rank holds the same blocks of the same sequences.
        sched.num_blocks = loaded.iter().map(|rank| rank.num_blocks).min().unwrap_or(sched.num_blocks);
        let slots: Arc<[Slot]> = (0..sched.depth).map(|_| Slot::new(&sched)).collect();
        for worker in &others {
            worker.ask(Job::Allocate(sched.clone(), slots.clone()));
        }
        let first = Rank::new(model, &sched, slots.clone())?;
        for worker in &others {
            match worker.answers.recv() {
                Ok(Answer::Allocated(Ok(()))) => {}
                Ok(Answer::Allocated(Err(error))) => return Err(error),
                _ => return Err(StartError::RankEnded),
            }
        }
        let captures = first.model().backend().capabilities().captures;
        let mut ranks = Self { first, others, slots, loader, buckets: config.buckets(captures), captures };
        ranks.capture().map_err(|(rank, failure)| StartError::Capture { rank, why: failure.why })?;
        ranks.report(&loaded, &sched)?;
        Ok((ranks, sched))
    }

    /// Captures decode steps in the group that the ranks are in, on all of them at once; gives the failure that caused the
    /// others', where there are several.
    fn capture(&mut self) -> Result<(), (RankId, Failure)> {
        if !self.captures || self.buckets.sizes().is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        for worker in &self.others {
            worker.ask(Job::Capture(self.buckets.clone()));
        }
        let mut failure = self.first.capture(self.buckets.sizes()).err().map(|failure| (RankId(0), failure));
        for (i, worker) in self.others.iter().enumerate() {
            let captured = match worker.answers.recv() {
                Ok(Answer::Captured(captured)) => captured,
                _ => Err(Failure::cause(GONE.into())),
            };
            if let Err(of_rank) = captured
                && failure.as_ref().is_none_or(|(_, known)| known.is_consequence && !of_rank.is_consequence)
            {
                failure = Some((RankId(i + 1), of_rank));
            }
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
        let sizes = self.buckets.sizes();
        tracing::info!(
            num_graphs = sizes.len(),
            "captured decode steps of {sizes:?} sequences in {:.1} s",
            start.elapsed().as_secs_f64()
        );
        Ok(())
    }

    /// Says where the memory of each rank went.
    fn report(&self, loaded: &[Loaded], sched: &SchedConfig) -> Result<(), StartError> {
        let kv_cache_tokens = sched.num_blocks * sched.block_size;
        let kv_cache_bytes = self.model().kv_bytes_per_token() * kv_cache_tokens;
        for (rank, &Loaded { weight_bytes, .. }) in loaded.iter().enumerate() {
            let memory = match rank.checked_sub(1) {
                None => self.model().backend().memory(),
                Some(other) => {
                    self.others[other].ask(Job::Memory);
                    match self.others[other].answers.recv() {
                        Ok(Answer::Memory(memory)) => memory,
                        _ => return Err(StartError::RankEnded),
                    }
                }
            };
            let held = match memory {
                Some(memory) => plan(Held { weight_bytes, kv_cache_bytes, kv_cache_tokens }, memory),
                None => format!(
                    "holds {:.1} MiB of weights and {:.1} MiB of KV cache ({kv_cache_tokens} tokens)",
                    mib(weight_bytes),
                    mib(kv_cache_bytes),
                ),
            };
            tracing::info!(weight_bytes, kv_cache_bytes, "rank {rank} of {} {held}", loaded.len());
        }
        Ok(())
    }

    /// Sizes that decode steps are padded to.
    pub(crate) fn buckets(&self) -> &Buckets {
        &self.buckets
    }

    /// The first rank's shard.
    pub(crate) fn model(&self) -> &DeepSeek<B> {
        self.first.model()
    }

    /// Where the input of a step goes.
    pub(crate) fn slot(&self, slot: usize) -> &Slot {
        &self.slots[slot]
    }

    /// Enqueues the forward pass of the step whose input stands in `slot`.
    pub(crate) fn forward(&mut self, slot: usize) {
        for worker in &self.others {
            worker.ask(Job::Forward(slot));
        }
        self.first.forward(slot);
    }

    /// Enqueues the drawing of its tokens.
    pub(crate) fn sample(&mut self, slot: usize) {
        for worker in &self.others {
            worker.ask(Job::Sample(slot));
        }
        self.first.sample(slot);
    }

    /// Waits for the step on every rank; gives the failure that caused the others', where there are several.
    pub(crate) fn wait(&mut self, slot: usize) -> Result<(), Failure> {
        for worker in &self.others {
            worker.ask(Job::Wait(slot));
        }
        let mut failure = self.first.wait(slot).err();
        for worker in &self.others {
            let waited = match worker.answers.recv() {
                Ok(Answer::Waited(waited)) => waited,
                _ => Err(Failure::cause(GONE.into())),
            };
            if let Err(of_rank) = waited
                && failure.as_ref().is_none_or(|known| known.is_consequence && !of_rank.is_consequence)
            {
                failure = Some(of_rank);
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Reads what a step drew, once it was waited for.
    pub(crate) fn read(&self, slot: usize, drawn: &mut Drawn) -> Result<(), BackendError> {
        self.first.read(slot, drawn)
    }

    /// Puts the ranks into a fresh group, and captures in it what was captured before; no step may be in flight. Fails when a
    /// rank is gone for good, or the ranks no longer reach each other.
    pub(crate) fn rejoin(&mut self) -> Result<(), String> {
        let mut comms = self.loader.connect().map_err(|error| error.to_string())?.into_iter();
        self.first.join(comms.next().expect("a group has at least one rank"));
        for (worker, comm) in self.others.iter().zip(comms) {
            worker.jobs.send(Job::Join(comm)).map_err(|_| GONE.to_owned())?;
        }
        self.capture().map_err(|(rank, failure)| {
            format!("rank {rank} cannot capture its decode steps again: {}", failure.why)
        })
    }
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl<B: Backend> Worker<B> {
    fn spawn(
        id: RankId,
        loader: Arc<dyn RankLoader<B>>,
        config: EngineConfig,
        comm: Arc<dyn Communicator<B>>,
    ) -> Self {
        // A forward pass, its sampling and a wait for each step in flight.
        let (jobs, asked) = sync_channel(8);
        let (answer, answers) = sync_channel(2);
        let run = move || {
            let loaded = catch_unwind(AssertUnwindSafe(|| -> Result<_, StartError> {
                let model = loader.load(id, comm, &mut |_| {})?;
                let num_blocks = config.sched(&model)?.num_blocks;
                Ok((Loaded { num_blocks, weight_bytes: model.weight_bytes() }, model))
            }));
            let model = match loaded.map_err(|panic| StartError::panic(id, &*panic)).flatten() {
                Ok((of_rank, model)) => {
                    let _ = answer.send(Answer::Loaded(Ok(of_rank)));
                    model
                }
                Err(error) => {
                    let _ = answer.send(Answer::Loaded(Err(error)));
                    return;
                }
            };
            // The engine may have given up, and then nobody asks.
            let Ok(Job::Allocate(sched, slots)) = asked.recv() else { return };
            let allocated = catch_unwind(AssertUnwindSafe(|| Rank::new(model, &sched, slots)));
            let mut rank = match allocated.map_err(|panic| StartError::panic(id, &*panic)).flatten() {
                Ok(rank) => {
                    let _ = answer.send(Answer::Allocated(Ok(())));
                    rank
                }
                Err(error) => {
                    let _ = answer.send(Answer::Allocated(Err(error)));
                    return;
                }
            };
            while let Ok(job) = asked.recv() {
                match job {
                    Job::Allocate(..) => unreachable!("ranks allocate once"),
                    Job::Forward(slot) => rank.forward(slot),
                    Job::Sample(slot) => rank.sample(slot),
                    Job::Wait(slot) => {
                        let _ = answer.send(Answer::Waited(rank.wait(slot)));
                    }
                    Job::Join(comm) => rank.join(comm),
                    Job::Capture(buckets) => {
                        let _ = answer.send(Answer::Captured(rank.capture(buckets.sizes())));
                    }
                    Job::Memory => {
                        let _ = answer.send(Answer::Memory(rank.model().backend().memory()));
                    }
                }
            }
        };
        thread::Builder::new().name(format!("rank-{}", id.0)).spawn(run).expect("a thread can be started");
        Self { jobs, answers }
    }

    /// A rank that is gone answers nothing, which is noticed where its answer is awaited.
    fn ask(&self, job: Job<B>) {
        let _ = self.jobs.send(job);
    }
}
