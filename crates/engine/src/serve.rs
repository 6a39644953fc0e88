//! The engine thread: takes requests from the inbox, keeps the pipeline full, sends events.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use r1_backend::Backend;
use r1_core::{FinishReason, SeqId, TokenId};
use r1_sched::{NewSequence, Outcome, State, commit};

use crate::config::{EngineConfig, StartError};
use crate::events::{EventSender, Sent};
use crate::handle::{Command, EngineError, Event, Inbox, Stats, Status, TokenLogprobs};
use crate::live::Live;
use crate::masks::Masks;
use crate::pipeline::{Became, Failed, Lives, Pipeline};
use crate::rank::panic_text;
use crate::ranks::{RankLoader, Ranks};

/// Starts the engine thread: it loads the model's ranks, then serves `inbox` until it is told to stop. Failures are published
/// as [`Status::Failed`].
///
/// # Panics
/// When the operating system cannot start a thread.
pub fn spawn<B: Backend>(
    inbox: Inbox,
    config: EngineConfig,
    loader: Arc<dyn RankLoader<B>>,
) -> JoinHandle<()> {
    let run = move || {
        let mut progress = |progress| inbox.set_status(Status::Loading { progress, elapsed: Duration::ZERO });
        let started = catch_unwind(AssertUnwindSafe(|| -> Result<_, StartError> {
            let (ranks, sched) = Ranks::start(loader, &config, &mut progress)?;
            Ok(Pipeline::new(ranks, State::new(sched)?, inbox.bell().clone()))
        }));
        match started {
            Ok(Ok(pipeline)) => Engine::new(inbox, config, pipeline).run(),
            Ok(Err(error)) => inbox.set_status(Status::Failed(error.to_string())),
            Err(panic) => inbox.set_status(Status::Failed(panic_text(&*panic))),
        }
    };
    thread::Builder::new().name("engine".into()).spawn(run).expect("a thread can be started")
}

/// A request that the scheduler holds.
struct Active {
    events: EventSender,
    live: Live,
    scheduled: bool,
    prompt_len: usize,
    /// Prompt tokens that were found in the prefix cache or have been computed at least once.
    prompt_done: usize,
    prompt_logprobs: Option<PromptLogprobs>,
}

/// Log-probabilities of a prompt, as far as they are known.
struct PromptLogprobs {
    num_top: usize,
    known: Vec<TokenLogprobs>,
}

impl Active {
    /// Reports the log-probabilities of the prompt once all are known.
    fn report_prompt(&mut self) {
        let num_wanted = self.prompt_len - 1;
        if let Some(found) = self.prompt_logprobs.take_if(|found| found.known.len() == num_wanted) {
            // Whether anybody reads shows with the first token.
            self.events.send(Event::PromptLogprobs(found.known));
        }
    }
}

type Actives = BTreeMap<SeqId, Active>;

impl Lives for Actives {
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

impl Interval {
    fn new() -> Self {
        Self { since: Instant::now(), steps: 0, tokens: 0 }
    }
}

/// How long the engine sleeps at most while everything waits for masks. It can run a step, and says so.
const MAX_SLEEP: Duration = Duration::from_millis(100);

/// A row's draw on its way from the device to the scheduler.
struct Draw {
    seq: SeqId,
    /// None where its mask came too late.
    token: Option<TokenId>,
    finish: Option<FinishReason>,
}

struct Engine<B: Backend> {
    inbox: Inbox,
    config: EngineConfig,
    pipeline: Pipeline<B>,
    active: Actives,
    masks: Masks,
    /// Sequences that were late, and are not run before their masks are known.
    paused: Vec<SeqId>,
    stats: Stats,
    interval: Interval,
    draws: Vec<Draw>,
    /// Sequences whose reader is gone or too slow.
    unread: Vec<SeqId>,
    /// Why no step can run any more.
    broken: Option<String>,
}

impl<B: Backend> Engine<B> {
    fn new(inbox: Inbox, config: EngineConfig, pipeline: Pipeline<B>) -> Self {
        let sched = pipeline.state().config();
        let stats = Stats {
            kv_blocks_total: sched.num_blocks,
            kv_block_size_tokens: sched.block_size,
            ..Stats::default()
        };
        let max_num_seqs = sched.max_num_seqs;
        let vocab_size = pipeline.ranks().model().config().vocab_size;
        let masks = Masks::new(vocab_size, inbox.bell().clone());
        inbox.set_stats(stats.clone());
        inbox.set_status(Status::Ready);
        Self {
            inbox,
            config,
            pipeline,
            active: Actives::new(),
            masks,
            paused: Vec::with_capacity(max_num_seqs),
            stats,
            interval: Interval::new(),
            draws: Vec::with_capacity(max_num_seqs),
            unread: Vec::with_capacity(max_num_seqs),
            broken: None,
        }
    }

    fn run(mut self) {
        loop {
            if self.pipeline.state().is_idle() {
                self.publish();
                let command = self.inbox.wait();
                // Time without work is nobody's throughput.
                self.interval = Interval::new();
                match command {
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
            let began = self.begin();
            if began && self.pipeline.has_room() {
                // Another step ahead, with what has arrived meanwhile.
                continue;
            }
            let finished = self.finish();
            if self.broken.is_some() {
                break;
            }
            // An abort may have emptied the engine.
            if !began && !finished && !self.pipeline.state().is_idle() {
                assert!(!self.paused.is_empty(), "the scheduler has sequences and runs none of them");
                self.inbox.bell().wait_until(Instant::now() + MAX_SLEEP);
                self.inbox.step_ended();
            }
        }
        // From here on nothing is submitted; what came before is answered below.
        self.inbox.set_status(self.broken.take().map_or(Status::Stopped, Status::Failed));
        while let Some(command) = self.inbox.poll() {
            if let Command::Submit { events, .. } = command {
                self.inbox.ended(1);
                events.end(Event::Failed(EngineError::Stopped));
            }
        }
        for (_, active) in std::mem::take(&mut self.active) {
            end(&self.inbox, active, Event::Failed(EngineError::Stopped));
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit { id, request, events } => {
                let constraint = request.constraint.map(|constraint| self.masks.constrain(constraint));
                let live = Live::new(request.params.clone(), constraint, &request.prompt);
                let prompt_len = request.prompt.len();
                let added = self.pipeline.state_mut().add(NewSequence {
                    id,
                    prompt: request.prompt,
                    max_new_tokens: request.params.max_tokens,
                    priority: request.priority,
                    cache_salt: request.cache_salt.map(|salt| salt.into_bytes().into_boxed_slice()),
                    run_ahead: live.may_run_ahead(),
                    prompt_logits: request.prompt_logprobs.is_some(),
                });
                match added {
                    Ok(()) => {
                        let prompt_logprobs = request.prompt_logprobs.map(|num_top| PromptLogprobs {
                            num_top: num_top as usize,
                            known: Vec::with_capacity(prompt_len - 1),
                        });
                        let active = Active {
                            events,
                            live,
                            scheduled: false,
                            prompt_len,
                            prompt_done: 0,
                            prompt_logprobs,
                        };
                        self.active.insert(id, active);
                    }
                    Err(error) => {
                        self.inbox.ended(1);
                        events.end(Event::Failed(EngineError::Refused(error.to_string())));
                    }
                }
            }
            Command::Abort(id) => self.abort(id),
            Command::FlushPrefixCache(answer) => {
                let num_blocks = self.pipeline.state_mut().flush_prefix_cache();
                self.publish();
                // Whoever asked may have given up.
                let _ = answer.send(num_blocks);
            }
            Command::Stop => unreachable!("the loop handles it"),
        }
    }

    /// Ends a sequence whose client left.
    fn abort(&mut self, id: SeqId) {
        self.pipeline.state_mut().abort(id);
        if self.active.remove(&id).is_some() {
            self.inbox.ended(1);
        }
    }

    /// Lets sequences go on whose masks are known by now.
    fn resume(&mut self) {
        if !self.paused.is_empty() {
            self.masks.relieve();
        }
        let state = self.pipeline.state_mut();
        self.paused.retain(|&seq| {
            let Some(active) = self.active.get_mut(&seq) else { return false };
            let waits = active.live.waits();
            if !waits {
                state.resume(seq);
            }
            waits
        });
    }

    /// Begins the next step, if one can run now.
    fn begin(&mut self) -> bool {
        self.resume();
        let limits = self.pipeline.state().limits();
        let Some(plan) = self.pipeline.begin(&limits, &mut self.active) else { return false };
        for chunk in &plan.prefill {
            let active = self.active.get_mut(&chunk.seq).expect("a planned sequence is active");
            if !active.scheduled {
                active.scheduled = true;
                // Chunks begin behind what was found.
                active.prompt_done = chunk.start;
                self.stats.prompt_tokens_total += chunk.start as u64;
                // Whether anybody reads shows with the first token.
                active.events.send(Event::Scheduled { cached_tokens: chunk.start as u32 });
            }
        }
        true
    }

    /// Waits for the oldest step in flight, and hands on what it drew; `false`: there is none.
    fn finish(&mut self) -> bool {
        let done = match self.pipeline.wait() {
            None => return false,
            Some(Ok(done)) => done,
            Some(Err(failed)) => {
                self.failed(failed);
                return true;
            }
        };
        self.stats.steps_total += 1;
        self.interval.steps += 1;
        // Rows of prompts follow those that sample.
        let mut row = done.sampled.len();
        for chunk in &done.plan.prefill {
            let seq = done.state.sequence(chunk.seq).expect("a sequence outlives its steps");
            let wanted = seq.prompt_logits(chunk.start, chunk.len);
            let rows = row..row + wanted.len();
            row = rows.end;
            if let Some(active) = self.active.get_mut(&chunk.seq) {
                if let Some(found) = &mut active.prompt_logprobs {
                    assert_eq!(found.known.len(), wanted.start, "a gap in the prompt of {}", chunk.seq);
                    found.known.extend(rows.map(|row| done.drawn.logprobs(row, found.num_top)));
                    active.report_prompt();
                }
                let end = (chunk.start + chunk.len).min(active.prompt_len).max(active.prompt_done);
                self.stats.prompt_tokens_total += (end - active.prompt_done) as u64;
                active.prompt_done = end;
            }
        }
        self.draws.clear();
        for (row, &seq) in done.sampled.iter().enumerate() {
            let Some(active) = self.active.get_mut(&seq) else { continue };
            match done.became(seq) {
                Became::Drawn => {}
                Became::Late => {
                    if let Some(constraint) = active.live.constraint() {
                        self.masks.hurry(constraint);
                    }
                    self.stats.late_masks_total += 1;
                    self.paused.push(seq);
                    self.draws.push(Draw { seq, token: None, finish: None });
                    continue;
                }
                Became::Spoilt(why) => {
                    let failed = Event::Failed(EngineError::Constraint(why.to_owned()));
                    done.state.abort(seq);
                    let active = self.active.remove(&seq).expect("it was found above");
                    end(&self.inbox, active, failed);
                    continue;
                }
            }
            let token = done.drawn.token(row);
            let logprobs = active.live.logprobs().map(|num_top| done.drawn.logprobs(row, num_top));
            let finish = active.live.accept(token, &self.masks);
            if active.events.send(Event::Token { token, logprobs }) != Sent::Delivered {
                self.unread.push(seq);
            }
            self.draws.push(Draw { seq, token: Some(token), finish });
        }
        let num_drawn = self.draws.iter().filter(|draw| draw.token.is_some()).count() as u64;
        self.stats.generation_tokens_total += num_drawn;
        self.interval.tokens += num_drawn;
        let outcomes = self.draws.iter().map(|draw| Outcome {
            seq: draw.seq,
            tokens: draw.token.as_slice(),
            finish: draw.finish,
        });
        for finished in commit(done.state, done.id, outcomes) {
            if let Some(active) = self.active.remove(&finished.seq) {
                end(&self.inbox, active, Event::Finished(finished.reason));
            }
        }
        for draw in self.draws.iter().filter(|draw| draw.token.is_none()) {
            self.pipeline.state_mut().pause(draw.seq);
        }
        while let Some(seq) = self.unread.pop() {
            self.abort(seq);
        }
        self.inbox.step_ended();
        self.publish();
        true
    }

    /// Tells the requests of steps that failed.
    fn failed(&mut self, failed: Failed) {
        let Failed { why, ended, num_steps, fatal } = failed;
        tracing::error!(%why, num_steps, requests = ended.len(), "a step failed");
        self.stats.failed_steps_total += num_steps as u64;
        for finished in ended {
            if let Some(active) = self.active.remove(&finished.seq) {
                end(&self.inbox, active, failure(why.clone()));
            }
        }
        if let Some(why) = fatal {
            tracing::error!(%why, "no step can run any more");
            self.broken = Some(why);
        }
        self.inbox.step_ended();
        self.publish();
    }

    /// Publishes statistics, and a line in the log every so many steps.
    fn publish(&mut self) {
        let state = self.pipeline.state();
        let sched = state.stats();
        self.stats.running = sched.running;
        self.stats.kv_blocks_used = sched.blocks_used;
        self.stats.kv_blocks_cached = sched.blocks_cached;
        self.stats.preemptions_total = sched.preemptions;
        self.stats.prefix_cache_query_tokens_total = sched.prefix_queries_tokens;
        self.stats.prefix_cache_hit_tokens_total = sched.prefix_hits_tokens;
        if sched.running == 0 {
            self.stats.gen_throughput_tokens_per_s = 0.0;
        }
        if self.interval.steps >= self.config.log_every_steps {
            self.stats.gen_throughput_tokens_per_s =
                self.interval.tokens as f64 / self.interval.since.elapsed().as_secs_f64();
            let tokens: usize = state.running().map(r1_sched::Sequence::len_upper_bound).sum();
            tracing::info!(
                "Decode batch. #running-req: {}, #token: {tokens}, token usage: {:.2}, gen throughput (token/s): {:.2}, \
                 #queue-req: {}",
                sched.running,
                sched.blocks_used as f64 / sched.blocks_total as f64,
                self.stats.gen_throughput_tokens_per_s,
                sched.waiting,
            );
            self.interval = Interval::new();
        }
        self.inbox.set_stats(self.stats.clone());
    }
}

/// The last word on a request.
fn end(inbox: &Inbox, active: Active, event: Event) {
    // First, so that whoever reads the end finds the place free.
    inbox.ended(1);
    active.events.end(event);
}

fn failure(why: String) -> Event {
    Event::Failed(EngineError::Step(why))
}
