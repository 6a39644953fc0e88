//! The engine's outside: what a request is, what comes back, and how the two travel between threads.
//!
//! [`channel`](Handle::channel) makes both ends. Whoever serves requests holds the [`Handle`]; the engine thread holds
//! the [`Inbox`].

use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use r1_core::{FinishReason, InvalidSampling, SamplingParams, SeqId, TokenConstraint, TokenId};

use crate::bell::Bell;
use crate::events::{EventReceiver, EventSender, queue};

/// One generation to run.
pub struct Request {
    /// The prompt, at least one token.
    pub prompt: Vec<TokenId>,
    /// How to draw the tokens that follow.
    pub params: SamplingParams,
    /// Lower runs first; equal priorities run in order of arrival.
    pub priority: i32,
    /// Restricts which tokens may be drawn.
    pub constraint: Option<Box<dyn TokenConstraint>>,
    /// Requests share cached prefixes only with those that have the same salt.
    pub cache_salt: Option<String>,
    /// Report the log-probabilities of the prompt's own tokens, and of this many most likely alternatives for each, at most
    /// [`SamplingParams::MAX_LOGPROBS`]. Such a prompt is computed whole, whatever the prefix cache holds.
    pub prompt_logprobs: Option<u32>,
}

impl Request {
    /// A request that asks for nothing beyond its tokens: to be completed with `..Request::new(prompt, params)`.
    pub fn new(prompt: Vec<TokenId>, params: SamplingParams) -> Self {
        Self { prompt, params, priority: 0, constraint: None, cache_salt: None, prompt_logprobs: None }
    }
}

/// Log-probabilities of one token of the reply or of the prompt, natural logarithm, of the model's own distribution (before penalties,
/// temperature and truncation).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that is there.
    pub logprob: f32,
    /// The most likely tokens, best first, as many as the request asked for.
    pub top: Vec<(TokenId, f32)>,
}

/// What the engine says about one generation, in order: `Scheduled`, `PromptLogprobs` if they were asked for, tokens, then
/// exactly one of the other two.
#[derive(Clone, Debug)]
pub enum Event {
    /// The prompt's first chunk runs now; the time in the queue is over.
    Scheduled {
        /// Prompt tokens whose KV came from the prefix cache.
        cached_tokens: u32,
    },
    /// Of every token of the prompt but the first, given those before it: one less than the prompt has tokens.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// A token was drawn. A stop token is reported too, before `Finished`.
    Token {
        /// The token.
        token: TokenId,
        /// Present when the request asked for them.
        logprobs: Option<TokenLogprobs>,
    },
    /// The generation ended by itself.
    Finished(FinishReason),
    /// The generation failed.
    Failed(EngineError),
}

/// Why a generation failed after it was accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The forward pass or the sampler failed; the next request is served.
    #[error("the step that ran this request failed: {0}")]
    Step(String),
    /// Its constraint cannot go on: it broke, or it leaves no token to draw.
    #[error("the constraint of this request failed: {0}")]
    Constraint(String),
    /// The scheduler does not take it.
    #[error("the request cannot be scheduled: {0}")]
    Refused(String),
    /// The reader fell too far behind, so the generation was aborted.
    #[error(
        "the reply was read too slowly: {max_unread} tokens were waiting to be read; the generation was aborted"
    )]
    SlowReader {
        /// Tokens that may wait to be read.
        max_unread: usize,
    },
    /// The engine thread is gone.
    #[error("the engine has stopped")]
    Stopped,
}

/// Why a request was not accepted.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// The model is still being loaded.
    #[error("the model is still loading")]
    Loading,
    /// The engine stopped or could not start.
    #[error("the engine is not running: {0}")]
    NotRunning(String),
    /// As many requests run and wait as there are seats in the batch and places in the queue.
    #[error("the queue is full: {max_queued} requests may wait (--max-queued-requests), and no more do")]
    QueueFull {
        /// Size of the queue.
        max_queued: usize,
    },
    /// More generations at once than could ever be admitted.
    #[error("{choices} generations in one request are more than run and wait together: {capacity}")]
    TooManyChoices {
        /// Generations of the request.
        choices: usize,
        /// Seats in the batch and places in the queue.
        capacity: usize,
    },
    /// No token to continue from.
    #[error("the prompt is empty; it must hold at least one token")]
    EmptyPrompt,
    /// The prompt leaves no room, or less than was asked for.
    #[error(
        "this model's context is {max_model_len} tokens, but {prompt_tokens} in the prompt and {max_tokens} to generate \
         were asked for; shorten the prompt or lower max_tokens"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens to generate.
        max_tokens: usize,
        /// The context's size.
        max_model_len: usize,
    },
    /// A token id that the vocabulary does not have.
    #[error("token id {token} is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        token: TokenId,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// A sampling parameter is out of range.
    #[error(transparent)]
    Sampling(#[from] InvalidSampling),
}

/// What the engine is at this moment.
#[derive(Clone, Debug, PartialEq)]
pub enum Status {
    /// Weights are being read.
    Loading {
        /// 0 to 1.
        progress: f32,
        /// Since loading began.
        elapsed: Duration,
    },
    /// Requests are served.
    Ready,
    /// The engine could not start, or its thread died; holds why.
    Failed(String),
    /// It was asked to stop.
    Stopped,
}

/// Facts that are known before the weights are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineInfo {
    /// Most tokens of prompt and reply together.
    pub max_model_len: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Most sequences in the running batch.
    pub max_num_seqs: usize,
    /// Most requests that may wait beyond those.
    pub max_queued: usize,
    /// Most tokens of one generation that may wait to be read; one more aborts it.
    pub max_unread_tokens: usize,
}

impl EngineInfo {
    /// Most generations that run and wait together.
    fn capacity(&self) -> usize {
        self.max_num_seqs.saturating_add(self.max_queued)
    }
}

/// Counters and gauges, as of the last step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Sequences in the running batch.
    pub running: usize,
    /// Sequences that were accepted and neither run nor have ended; preempted ones are among them.
    pub waiting: usize,
    /// Blocks of the KV cache.
    pub kv_blocks_total: usize,
    /// Of these, held by sequences.
    pub kv_blocks_used: usize,
    /// Of these, held by no sequence, but findable by their content.
    pub kv_blocks_cached: usize,
    /// Tokens per block.
    pub kv_block_size_tokens: usize,
    /// Prompt tokens processed since start, found in the prefix cache or computed, each once however often its sequence was
    /// preempted.
    pub prompt_tokens_total: u64,
    /// Prompt tokens that were looked up in the prefix cache since start.
    pub prefix_cache_query_tokens_total: u64,
    /// Of these, found.
    pub prefix_cache_hit_tokens_total: u64,
    /// Tokens generated since start.
    pub generation_tokens_total: u64,
    /// Steps run since start.
    pub steps_total: u64,
    /// Steps that failed since start.
    pub failed_steps_total: u64,
    /// Rows of steps since start that drew nothing because their constraint was not ready in time; each was run again.
    pub late_masks_total: u64,
    /// Sequences that gave up their blocks and were computed again.
    pub preemptions_total: u64,
    /// Generated tokens per second over the last reporting interval.
    pub gen_throughput_tokens_per_s: f64,
}

/// A request on its way to the engine thread.
pub enum Command {
    /// Run it; events go to `events`.
    Submit {
        /// Its id.
        id: SeqId,
        /// What to run.
        request: Request,
        /// Where its events go.
        events: EventSender,
    },
    /// Its client left.
    Abort(SeqId),
    /// Forget what the prefix cache holds; the number of blocks that became free goes here.
    FlushPrefixCache(mpsc::SyncSender<usize>),
    /// End the thread after failing whatever still runs.
    Stop,
}

/// The way of commands to the engine thread.
#[derive(Clone)]
struct Commands {
    sender: mpsc::Sender<Command>,
    bell: Arc<Bell>,
}

impl Commands {
    /// An engine that is gone takes nothing any more, which shows elsewhere.
    fn send(&self, command: Command) {
        let _ = self.sender.send(command);
        self.bell.ring();
    }
}

struct Shared {
    info: EngineInfo,
    status: Mutex<Status>,
    started: Instant,
    stats: Mutex<Stats>,
    /// Generations that were accepted and have not ended.
    in_flight: AtomicUsize,
    /// When the engine last ended a step, or got work after it had none: milliseconds since `started`.
    last_progress_ms: AtomicU64,
    next_id: AtomicU64,
}

impl Shared {
    fn progressed(&self) {
        self.last_progress_ms.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The guarded values are plain data that every holder replaces whole, so a panicking holder leaves them valid.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Submits requests and reads the engine's state; cheap to clone.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
    commands: Commands,
}

/// A running generation. Dropping it aborts the generation within two steps.
pub struct Generation {
    /// The sequence.
    pub id: SeqId,
    events: EventReceiver,
    commands: Commands,
    ended: bool,
}

impl Generation {
    /// The next event; `None` after the last one. A dead engine gives `Failed(Stopped)`.
    pub async fn next(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        let event = poll_fn(|context| self.events.poll(context)).await;
        self.ended = matches!(event, Event::Finished(_) | Event::Failed(_));
        Some(event)
    }

    /// As [`next`](Self::next), from a thread that may block.
    pub fn next_blocking(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        let event = self.events.wait();
        self.ended = matches!(event, Event::Finished(_) | Event::Failed(_));
        Some(event)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.ended {
            // An engine that is gone has nothing left to abort.
            self.commands.send(Command::Abort(self.id));
        }
    }
}

impl Handle {
    /// Both ends of an engine: the handle, and the inbox its thread reads. Status starts as `Loading`.
    pub fn channel(info: EngineInfo) -> (Self, Inbox) {
        let (sender, receiver) = mpsc::channel();
        let bell = Arc::<Bell>::default();
        let shared = Arc::new(Shared {
            info,
            status: Mutex::new(Status::Loading { progress: 0.0, elapsed: Duration::ZERO }),
            started: Instant::now(),
            stats: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            last_progress_ms: AtomicU64::new(0),
            next_id: AtomicU64::new(1),
        });
        let commands = Commands { sender, bell: bell.clone() };
        (Self { shared: shared.clone(), commands }, Inbox { shared, commands: receiver, bell })
    }

    /// Facts about the served model.
    pub fn info(&self) -> &EngineInfo {
        &self.shared.info
    }

    /// What the engine is at this moment.
    pub fn status(&self) -> Status {
        match lock(&self.shared.status).clone() {
            Status::Loading { progress, .. } => {
                Status::Loading { progress, elapsed: self.shared.started.elapsed() }
            }
            status => status,
        }
    }

    /// Counters and gauges as of the last step.
    pub fn stats(&self) -> Stats {
        let mut stats = lock(&self.shared.stats).clone();
        // Both are read at slightly different times, so the difference may miss by what a step changes.
        stats.waiting = self.shared.in_flight.load(Ordering::Relaxed).saturating_sub(stats.running);
        stats
    }

    /// For how long the engine has had work without ending a step; `None` while it has none or is not ready.
    pub fn silent_for(&self) -> Option<Duration> {
        // Whoever sees work also sees the progress that was noted before it.
        let busy = self.shared.in_flight.load(Ordering::Acquire) > 0;
        (busy && *lock(&self.shared.status) == Status::Ready).then(|| {
            let last = Duration::from_millis(self.shared.last_progress_ms.load(Ordering::Relaxed));
            self.shared.started.elapsed().saturating_sub(last)
        })
    }

    /// Refuses what [`submit`](Self::submit) would refuse whatever the request: for callers to whom making one is work.
    pub fn check_room(&self) -> Result<(), SubmitError> {
        if self.shared.in_flight.load(Ordering::Relaxed) >= self.shared.info.capacity() {
            return Err(SubmitError::QueueFull { max_queued: self.shared.info.max_queued });
        }
        Ok(())
    }

    fn check_ready(&self) -> Result<(), SubmitError> {
        match self.status() {
            Status::Ready => Ok(()),
            Status::Loading { .. } => Err(SubmitError::Loading),
            Status::Failed(why) => Err(SubmitError::NotRunning(why)),
            Status::Stopped => Err(SubmitError::NotRunning("it was asked to stop".into())),
        }
    }

    /// Hands a request to the engine.
    pub fn submit(&self, request: Request) -> Result<Generation, SubmitError> {
        let mut generations = self.submit_all(vec![request])?;
        Ok(generations.remove(0))
    }

    /// Hands requests to the engine, all or none.
    pub fn submit_all(&self, requests: Vec<Request>) -> Result<Vec<Generation>, SubmitError> {
        self.check_ready()?;
        for request in &requests {
            self.check(request)?;
        }
        let max_queued = self.shared.info.max_queued;
        let (choices, capacity) = (requests.len(), self.shared.info.capacity());
        if choices > capacity {
            return Err(SubmitError::TooManyChoices { choices, capacity });
        }
        if self.shared.in_flight.load(Ordering::Relaxed) == 0 {
            // Before anybody can see work: the time without any is no silence.
            self.shared.progressed();
        }
        let admitted = self.shared.in_flight.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |in_flight| {
            (in_flight + choices <= capacity).then_some(in_flight + choices)
        });
        if admitted.is_err() {
            return Err(SubmitError::QueueFull { max_queued });
        }
        let mut generations = Vec::with_capacity(choices);
        for request in requests {
            let id = SeqId(self.shared.next_id.fetch_add(1, Ordering::Relaxed));
            let (sender, events) = queue(self.shared.info.max_unread_tokens);
            // An engine that is gone lets go of the other end, so the generation fails at its first event.
            self.commands.send(Command::Submit { id, request, events: sender });
            generations.push(Generation { id, events, commands: self.commands.clone(), ended: false });
        }
        Ok(generations)
    }

    fn check(&self, request: &Request) -> Result<(), SubmitError> {
        let info = &self.shared.info;
        request.params.validate()?;
        if let Some(value) = request.prompt_logprobs.filter(|&n| n > SamplingParams::MAX_LOGPROBS) {
            let (param, value) = ("prompt_logprobs", f64::from(value));
            return Err(InvalidSampling { param, value, range: "at most 20" }.into());
        }
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        let params = &request.params;
        let named = params.logit_bias.iter().map(|(token, _)| token).chain(&params.stop_token_ids);
        if let Some(&token) = request.prompt.iter().chain(named).find(|t| t.0 as usize >= info.vocab_size) {
            return Err(SubmitError::UnknownToken { token, vocab_size: info.vocab_size });
        }
        let (prompt_tokens, max_tokens) = (request.prompt.len(), request.params.max_tokens as usize);
        if prompt_tokens + max_tokens > info.max_model_len {
            return Err(SubmitError::TooLong {
                prompt_tokens,
                max_tokens,
                max_model_len: info.max_model_len,
            });
        }
        Ok(())
    }

    /// Forgets every block of the prefix cache that could be hit, and gives the number of those that became free; blocks of
    /// running generations stay theirs. Waits for the engine thread, which looks between two steps.
    pub fn flush_prefix_cache(&self) -> Result<usize, SubmitError> {
        self.check_ready()?;
        let (answer, flushed) = mpsc::sync_channel(1);
        self.commands.send(Command::FlushPrefixCache(answer));
        flushed
            .recv()
            .map_err(|_| SubmitError::NotRunning("it stopped before it had flushed its cache".into()))
    }

    /// Asks the engine thread to end; whatever still runs gets `Failed(Stopped)`.
    pub fn stop(&self) {
        self.commands.send(Command::Stop);
    }
}

/// The engine thread's end of a [`Handle`]. When it is dropped, every handle sees the engine as failed or stopped
/// and every waiting generation gets `Failed(Stopped)`.
pub struct Inbox {
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    /// Rung with every command.
    bell: Arc<Bell>,
}

impl Inbox {
    /// Waits for a command; `None` when every handle and generation is gone.
    pub fn wait(&self) -> Option<Command> {
        self.commands.recv().ok()
    }

    /// A command that is there already.
    pub fn poll(&self) -> Option<Command> {
        self.commands.try_recv().ok()
    }

    /// What rings when a command is there.
    pub(crate) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    /// Publishes the engine's status.
    pub fn set_status(&self, status: Status) {
        *lock(&self.shared.status) = status;
    }

    /// Publishes the statistics of a step; `waiting` is counted by the handle.
    pub fn set_stats(&self, stats: Stats) {
        *lock(&self.shared.stats) = stats;
    }

    /// Says that a step has ended, well or not, or that the engine is able to run one and has a reason not to.
    pub fn step_ended(&self) {
        self.shared.progressed();
    }

    /// Says that `count` generations ended: finished, failed, or aborted. Each must be reported once.
    pub fn ended(&self, count: usize) {
        self.shared.in_flight.fetch_sub(count, Ordering::Relaxed);
    }

    /// Facts about the served model.
    pub fn info(&self) -> &EngineInfo {
        &self.shared.info
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let mut status = lock(&self.shared.status);
        if !matches!(*status, Status::Failed(_) | Status::Stopped) {
            *status = Status::Failed("the engine thread ended unexpectedly".into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        Request::new(vec![TokenId(1)], SamplingParams::default())
    }

    fn info() -> EngineInfo {
        EngineInfo { max_model_len: 32, vocab_size: 8, max_num_seqs: 1, max_queued: 1, max_unread_tokens: 64 }
    }

    #[test]
    fn submit_checks_before_the_engine_sees_anything() {
        let (handle, inbox) = Handle::channel(info());
        assert_eq!(handle.submit(request()).err(), Some(SubmitError::Loading));
        inbox.set_status(Status::Ready);
        assert_eq!(
            handle.submit(Request { prompt: vec![], ..request() }).err(),
            Some(SubmitError::EmptyPrompt)
        );
        let too_long = Request { prompt: vec![TokenId(1); 17], ..request() };
        assert!(matches!(
            handle.submit(too_long).err(),
            Some(SubmitError::TooLong { prompt_tokens: 17, .. })
        ));
        let unknown = Request { prompt: vec![TokenId(8)], ..request() };
        assert!(matches!(handle.submit(unknown).err(), Some(SubmitError::UnknownToken { .. })));
        let params = SamplingParams { logit_bias: vec![(TokenId(8), 1.0)], ..SamplingParams::default() };
        let unknown = Request { params, ..request() };
        assert!(matches!(handle.submit(unknown).err(), Some(SubmitError::UnknownToken { .. })));
        let too_many = Request { prompt_logprobs: Some(21), ..request() };
        let why = handle.submit(too_many).err().map(|error| error.to_string());
        assert_eq!(why.as_deref(), Some("prompt_logprobs is 21; it must be at most 20"));
        assert!(inbox.poll().is_none());

        let two = || vec![request(), request()];
        let too_many = vec![request(), request(), request()];
        let refused = handle.submit_all(too_many).err();
        assert_eq!(refused, Some(SubmitError::TooManyChoices { choices: 3, capacity: 2 }));
        let _first = handle.submit(request()).unwrap();
        assert_eq!(handle.submit_all(two()).err(), Some(SubmitError::QueueFull { max_queued: 1 }));
        assert_eq!(handle.check_room(), Ok(()));
        let _second = handle.submit(request()).unwrap();
        assert_eq!(handle.check_room(), Err(SubmitError::QueueFull { max_queued: 1 }));
        assert_eq!(handle.submit(request()).err(), Some(SubmitError::QueueFull { max_queued: 1 }));
        assert_eq!(handle.stats().waiting, 2);
        inbox.ended(2);
        assert_eq!(handle.submit_all(two()).unwrap().len(), 2);
    }

    #[test]
    fn silence_is_counted_from_the_last_step_and_only_while_there_is_work() {
        let (handle, inbox) = Handle::channel(info());
        inbox.set_status(Status::Ready);
        assert_eq!(handle.silent_for(), None);
        std::thread::sleep(Duration::from_millis(300));
        let _generation = handle.submit(request()).unwrap();
        let first = handle.silent_for().unwrap();
        assert!(first < Duration::from_millis(200), "time without work does not count: {first:?}");
        std::thread::sleep(Duration::from_millis(300));
        assert!(handle.silent_for().unwrap() >= Duration::from_millis(299));
        inbox.step_ended();
        assert!(handle.silent_for().unwrap() < Duration::from_millis(200));
        inbox.ended(1);
        assert_eq!(handle.silent_for(), None);
    }

    #[test]
    fn a_dropped_generation_is_aborted_and_a_dead_engine_fails_it() {
        let (handle, inbox) = Handle::channel(EngineInfo { max_queued: 9, ..info() });
        inbox.set_status(Status::Ready);
        let generation = handle.submit(request()).unwrap();
        let id = generation.id;
        drop(generation);
        assert!(matches!(inbox.poll(), Some(Command::Submit { .. })));
        assert!(matches!(inbox.poll(), Some(Command::Abort(aborted)) if aborted == id));

        let mut waiting = handle.submit(request()).unwrap();
        drop(inbox);
        assert!(matches!(waiting.next_blocking(), Some(Event::Failed(EngineError::Stopped))));
        assert!(waiting.next_blocking().is_none());
        assert!(matches!(handle.status(), Status::Failed(_)));
        assert!(matches!(handle.submit(request()).err(), Some(SubmitError::NotRunning(_))));
    }
}
