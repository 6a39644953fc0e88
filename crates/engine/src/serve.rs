//! The engine thread: takes requests from the inbox, runs steps, sends events.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use r1_backend::Backend;
use r1_core::SeqId;
use r1_model::{DeepSeek, ModelError};
use r1_sched::{NewSequence, Outcome, Plan, State, begin, commit, plan};

use crate::config::{EngineConfig, StartError};
use crate::events::{EventSender, Sent};
use crate::handle::{Command, EngineError, Event, Inbox, Stats, Status};
use crate::live::Live;
use crate::runner::{Drawn, Lives, Runner};

/// Starts the engine thread: it loads the model with `load`, which reports progress from 0 to 1, then serves `inbox`
/// until it is told to stop. Failures are published as [`Status::Failed`].
///
/// # Panics
/// When the operating system cannot start a thread.
pub fn spawn<B, F>(inbox: Inbox, config: EngineConfig, load: F) -> JoinHandle<()>
where
    B: Backend,
    F: FnOnce(&mut dyn FnMut(f32)) -> Result<DeepSeek<B>, ModelError> + Send + 'static,
{
    let run = move || {
        let mut progress = |progress| inbox.set_status(Status::Loading { progress, elapsed: Duration::ZERO });
        let started = catch_unwind(AssertUnwindSafe(|| {
            let model = load(&mut progress)?;
            Runner::new(model, &config).map_err(|error: StartError| error)
        }));
        match started {
            Ok(Ok((runner, state))) => Engine::new(inbox, config, runner, state).run(),
            Ok(Err(error)) => inbox.set_status(Status::Failed(error.to_string())),
            Err(panic) => inbox.set_status(Status::Failed(panic_text(&*panic))),
        }
    };
    thread::Builder::new().name("engine".into()).spawn(run).expect("a thread can be started")
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".into())
}

/// A request that the scheduler holds.
struct Active {
    events: EventSender,
    live: Live,
    scheduled: bool,
    prompt_len: usize,
    /// Prompt tokens that have been computed at least once.
    prompt_done: usize,
}

impl Lives for BTreeMap<SeqId, Active> {
    fn get(&mut self, seq: SeqId) -> &mut Live {
        &mut self.get_mut(&seq).expect("a sequence in a step is active").live
    }
}

/// Tokens and time since the last line in the log.
struct Interval {
    since: Instant,
    steps: u64,
    tokens: u64,
}

struct Engine<B: Backend> {
    inbox: Inbox,
    config: EngineConfig,
    runner: Runner<B>,
    state: State,
    active: BTreeMap<SeqId, Active>,
    stats: Stats,
    interval: Interval,
}

impl<B: Backend> Engine<B> {
    fn new(inbox: Inbox, config: EngineConfig, runner: Runner<B>, state: State) -> Self {
        let sched = state.config();
        let stats = Stats {
            kv_blocks_total: sched.num_blocks,
            kv_block_size_tokens: sched.block_size,
            ..Stats::default()
        };
        tracing::info!(
            weights_bytes = runner.model().weight_bytes(),
            kv_cache_bytes = runner.model().kv_bytes_per_token() * sched.num_blocks * sched.block_size,
            kv_cache_tokens = sched.num_blocks * sched.block_size,
            "engine ready"
        );
        inbox.set_stats(stats.clone());
        inbox.set_status(Status::Ready);
        let interval = Interval { since: Instant::now(), steps: 0, tokens: 0 };
        Self { inbox, config, runner, state, active: BTreeMap::new(), stats, interval }
    }

    fn run(mut self) {
        loop {
            if self.state.is_idle() {
                self.publish();
                self.interval = Interval { since: Instant::now(), steps: 0, tokens: 0 };
                match self.inbox.wait() {
                    Some(Command::Stop) | None => break,
                    Some(command) => self.take(command),
                }
            }
            let mut stop = false;
            while let Some(command) = self.inbox.poll() {
                match command {
                    Command::Stop => stop = true,
                    command => self.take(command),
                }
            }
            if stop {
                break;
            }
            let chosen = plan(&self.state, &self.state.limits());
            // An abort may have emptied the engine; otherwise something can always run, since no step is in flight here.
            assert!(
                !chosen.is_empty() || self.state.is_idle(),
                "the scheduler has sequences and runs none of them"
            );
            if !chosen.is_empty() {
                self.step(&chosen);
            }
        }
        // From here on nothing is submitted; what came before is answered below.
        self.inbox.set_status(Status::Stopped);
        while let Some(command) = self.inbox.poll() {
            if let Command::Submit { events, .. } = command {
                self.inbox.ended(1);
                events.end(Event::Failed(EngineError::Stopped));
            }
        }
        self.inbox.ended(self.active.len());
        for (_, active) in std::mem::take(&mut self.active) {
            active.events.end(Event::Failed(EngineError::Stopped));
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit { id, request, events } => {
                let live = Live::new(request.params.clone(), request.constraint, &request.prompt);
                let prompt_len = request.prompt.len();
                let added = self.state.add(NewSequence {
                    id,
                    prompt: request.prompt,
                    max_new_tokens: request.params.max_tokens,
                    priority: request.priority,
                });
                match added {
                    Ok(()) => {
                        self.active.insert(
                            id,
                            Active { events, live, scheduled: false, prompt_len, prompt_done: 0 },
                        );
                    }
                    Err(error) => {
                        self.inbox.ended(1);
                        events.end(Event::Failed(EngineError::Step(error.to_string())));
                    }
                }
            }
            Command::Abort(id) => self.abort(id),
            Command::Stop => unreachable!("the loop handles it"),
        }
    }

    /// Ends a sequence whose client left, or whose step failed.
    fn abort(&mut self, id: SeqId) {
        self.state.abort(id);
        if self.active.remove(&id).is_some() {
            self.inbox.ended(1);
        }
    }

    fn step(&mut self, chosen: &Plan) {
        let id = begin(&mut self.state, chosen);
        for chunk in &chosen.prefill {
            let active = self.active.get_mut(&chunk.seq).expect("a planned sequence is active");
            if !active.scheduled {
                active.scheduled = true;
                active.events.send(Event::Scheduled { cached_tokens: 0 });
            }
        }
        let ran = {
            let Self { runner, state, active, .. } = self;
            // The step's tensors hold nothing that a half-run step could leave invalid: the next step overwrites them, and
            // the blocks of the failed sequences are freed.
            catch_unwind(AssertUnwindSafe(|| runner.step(state, chosen, active)))
        };
        self.stats.steps_total += 1;
        let failure = match ran {
            Ok(Ok(drawn)) => {
                self.commit(id, chosen, drawn);
                None
            }
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(panic_text(&*panic)),
        };
        if let Some(why) = failure {
            tracing::error!(%why, "a step failed");
            self.stats.failed_steps_total += 1;
            let seqs =
                chosen.decode.iter().map(|row| row.seq).chain(chosen.prefill.iter().map(|chunk| chunk.seq));
            for seq in seqs {
                self.state.abort(seq);
                if let Some(active) = self.active.remove(&seq) {
                    self.inbox.ended(1);
                    active.events.end(Event::Failed(EngineError::Step(why.clone())));
                }
            }
            commit(&mut self.state, id, &[]);
        }
        self.inbox.step_ended();
        self.publish();
    }

    fn commit(&mut self, id: r1_sched::StepId, chosen: &Plan, drawn: Vec<Drawn>) {
        for chunk in &chosen.prefill {
            if let Some(active) = self.active.get_mut(&chunk.seq) {
                let done = (chunk.start + chunk.len).min(active.prompt_len).max(active.prompt_done);
                self.stats.prompt_tokens_total += (done - active.prompt_done) as u64;
                active.prompt_done = done;
            }
        }
        self.stats.generation_tokens_total += drawn.len() as u64;
        self.interval.tokens += drawn.len() as u64;
        self.interval.steps += 1;
        let mut outcomes = Vec::with_capacity(drawn.len());
        let mut gone = Vec::new();
        for Drawn { seq, token, logprobs, finish } in drawn {
            let active = &self.active[&seq];
            if active.events.send(Event::Token { token, logprobs }) != Sent::Delivered {
                gone.push(seq);
            }
            outcomes.push(Outcome { seq, tokens: vec![token], finish });
        }
        for finished in commit(&mut self.state, id, &outcomes) {
            if let Some(active) = self.active.remove(&finished.seq) {
                self.inbox.ended(1);
                active.events.end(Event::Finished(finished.reason));
            }
        }
        for seq in gone {
            self.abort(seq);
        }
    }

    /// Publishes statistics, and a line in the log every so many steps.
    fn publish(&mut self) {
        let sched = self.state.stats();
        self.stats.running = sched.running;
        self.stats.kv_blocks_used = sched.blocks_used;
        self.stats.preemptions_total = sched.preemptions;
        let elapsed = self.interval.since.elapsed().as_secs_f64();
        if sched.running == 0 {
            self.stats.gen_throughput_tokens_per_s = 0.0;
        }
        if self.interval.steps >= self.config.log_every_steps {
            self.stats.gen_throughput_tokens_per_s = self.interval.tokens as f64 / elapsed;
            let tokens: usize = self.state.running().map(r1_sched::Sequence::len_upper_bound).sum();
            tracing::info!(
                "Decode batch. #running-req: {}, #token: {tokens}, token usage: {:.2}, gen throughput (token/s): {:.2}, \
                 #queue-req: {}",
                sched.running,
                sched.blocks_used as f64 / sched.blocks_total as f64,
                self.stats.gen_throughput_tokens_per_s,
                sched.waiting,
            );
            self.interval = Interval { since: Instant::now(), steps: 0, tokens: 0 };
        }
        self.inbox.set_stats(self.stats.clone());
    }
}
