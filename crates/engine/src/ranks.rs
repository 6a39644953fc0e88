//! All ranks of a model: the first runs on the engine's own thread, every other one on a thread of its own. Loads them side
//! by side, hands each the same steps, and puts them together again after a failure.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use r1_backend::{Backend, BackendError, Communicator};
use r1_core::Rank as RankId;
use r1_model::{DeepSeek, ModelError};
use r1_sched::SchedConfig;

use crate::config::{EngineConfig, StartError};
use crate::rank::{Drawn, Failure, Rank, Slot};

/// How the ranks of a model come to be.
pub trait RankLoader<B: Backend>: Send + Sync + 'static {
    /// A fresh group, one communicator per rank in order, at least one. Called once at the start and again after each failed step.
    fn connect(&self) -> Vec<Arc<dyn Communicator<B>>>;

    /// Loads one rank's shard; `progress` is told the share that is done, 0 to 1. Ranks are loaded side by side.
    fn load(
        &self,
        rank: RankId,
        comm: Arc<dyn Communicator<B>>,
        progress: &mut dyn FnMut(f32),
    ) -> Result<DeepSeek<B>, ModelError>;
}

/// What a rank's thread is asked; every `Wait` and `Allocate` is answered.
enum Job<B: Backend> {
    Allocate(SchedConfig, Arc<[Slot]>),
    Forward(usize),
    Sample(usize),
    Wait(usize),
    Join(Arc<dyn Communicator<B>>),
}

enum Answer {
    Loaded(Result<Loaded, StartError>),
    Allocated(Result<(), StartError>),
    Waited(Result<(), Failure>),
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
}

const GONE: &str = "the thread of a rank has ended";

impl<B: Backend> Ranks<B> {
    /// Loads all ranks and allocates what steps need; gives the scheduler's configuration that fits every one of them.
    pub(crate) fn start(
        loader: Arc<dyn RankLoader<B>>,
        config: &EngineConfig,
        progress: &mut dyn FnMut(f32),
    ) -> Result<(Self, SchedConfig), StartError> {
        let mut comms = loader.connect().into_iter();
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
        let kv_cache_bytes = first.model().kv_bytes_per_token() * sched.num_blocks * sched.block_size;
        for (rank, of_rank) in loaded.iter().enumerate() {
            let ranks = loaded.len();
            tracing::info!(
                weight_bytes = of_rank.weight_bytes,
                kv_cache_bytes,
                "rank {rank} of {ranks} holds {:.1} MiB of weights and {:.1} MiB of KV cache ({} tokens)",
                mib(of_rank.weight_bytes),
                mib(kv_cache_bytes),
                sched.num_blocks * sched.block_size,
            );
        }
        Ok((Self { first, others, slots, loader }, sched))
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

    /// Puts the ranks into a fresh group; no step may be in flight. Fails when a rank is gone for good.
    pub(crate) fn rejoin(&mut self) -> Result<(), String> {
        let mut comms = self.loader.connect().into_iter();
        self.first.join(comms.next().expect("a group has at least one rank"));
        for (worker, comm) in self.others.iter().zip(comms) {
            worker.jobs.send(Job::Join(comm)).map_err(|_| GONE.to_owned())?;
        }
        Ok(())
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
