//! Constraints off the engine's thread: a few worker threads take a drawn token in and work out which may come next, while
//! the step that will draw runs. Knows nothing of steps and of sampling.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use r1_core::{Allowed, ConstraintError, TokenConstraint, TokenId};

use crate::bell::Bell;
use crate::rank::panic_text;

/// A constraint and the mask that it fills, which go to and fro between the engine and a worker.
struct Work {
    constraint: Box<dyn TokenConstraint>,
    /// `ceil(vocab_size / 32)` words.
    mask: Vec<u32>,
}

/// Where a worker leaves what it has done; the engine's end is gone when its sequence has ended.
type Place = Arc<Mutex<Option<Result<(Work, Allowed), ConstraintError>>>>;

struct Job {
    work: Work,
    /// The token drawn; `None` before the first one.
    accept: Option<TokenId>,
    place: Place,
}

impl Job {
    /// The caller's code may return errors, panic, and do so again when it is dropped.
    fn run(self, vocab_size: usize, bell: &Bell) {
        let job = AssertUnwindSafe(move || {
            let Self { mut work, accept, place } = self;
            // Otherwise the engine does not wait for it any more.
            if Arc::strong_count(&place) > 1 {
                match work.advance(accept, vocab_size) {
                    Ok(allowed) => *lock(&place) = Some(Ok((work, allowed))),
                    Err(error) => *lock(&place) = Some(Err(error)),
                }
                bell.ring();
            }
        });
        let _ = catch_unwind(job);
    }
}

impl Work {
    fn advance(&mut self, accept: Option<TokenId>, vocab_size: usize) -> Result<Allowed, ConstraintError> {
        let advanced = catch_unwind(AssertUnwindSafe(|| {
            if let Some(token) = accept {
                self.constraint.accept(token)?;
            }
            self.mask.fill(0);
            self.constraint.fill_mask(&mut self.mask)
        }));
        let allowed = advanced.unwrap_or_else(|panic| Err(ConstraintError(panic_text(&*panic))))?;
        if allowed == Allowed::Masked {
            // Bits past the vocabulary are nobody's token.
            if let (Some(last), used @ 1..) = (self.mask.last_mut(), vocab_size % 32) {
                *last &= (1 << used) - 1;
            }
            if self.mask.iter().all(|&word| word == 0) {
                return Err(ConstraintError("it allows no token at all".into()));
            }
        }
        Ok(allowed)
    }
}

struct Queue {
    /// Of sequences that run.
    running: VecDeque<Job>,
    /// Of sequences that have drawn nothing, and may not run for long: behind the others.
    waiting: VecDeque<Job>,
    /// When a worker last began with something, or had nothing to begin with.
    last_begun: Instant,
    is_closed: bool,
}

impl Queue {
    fn pop(&mut self) -> Option<Job> {
        self.last_begun = Instant::now();
        self.running.pop_front().or_else(|| self.waiting.pop_front())
    }
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every holder leaves what it guards whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Most workers, however many are stuck.
const MAX_WORKERS: usize = 4;
/// How long all workers may be at one mask each, while others wait, before there is one more worker.
const STUCK: Duration = Duration::from_millis(20);

/// The workers. They are started with the first constraint, and one more when all of them are stuck with slow ones.
pub(crate) struct Masks {
    shared: Arc<Shared>,
    /// Rung when a worker has finished something.
    bell: Arc<Bell>,
    vocab_size: usize,
    num_workers: usize,
}

/// Workers to begin with on a machine of that many cores: few, since the forward pass may want the cores, too.
fn first_workers(cores: usize) -> usize {
    if cores <= 4 { 1 } else { (cores / 4).clamp(2, MAX_WORKERS) }
}

impl Masks {
    /// For masks of `vocab_size` bits.
    pub(crate) fn new(vocab_size: usize, bell: Arc<Bell>) -> Self {
        let queue = Queue {
            running: VecDeque::new(),
            waiting: VecDeque::new(),
            last_begun: Instant::now(),
            is_closed: false,
        };
        let shared = Shared { queue: Mutex::new(queue), changed: Condvar::new() };
        Self { shared: Arc::new(shared), bell, vocab_size, num_workers: 0 }
    }

    /// Begins to work out what the first token of a sequence may be.
    ///
    /// # Panics
    /// When the operating system cannot start a thread.
    pub(crate) fn constrain(&mut self, constraint: Box<dyn TokenConstraint>) -> Constrained {
        if self.num_workers == 0 {
            let cores = thread::available_parallelism().map_or(1, usize::from);
            for _ in 0..first_workers(cores) {
                self.start();
            }
        }
        let work = Work { constraint, mask: vec![0; self.vocab_size.div_ceil(32)] };
        let place = Place::default();
        lock(&self.shared.queue).waiting.push_back(Job { work, accept: None, place: place.clone() });
        self.shared.changed.notify_one();
        Constrained { state: State::Working, place }
    }

    fn advance(&self, work: Work, token: TokenId, place: &Place) {
        let job = Job { work, accept: Some(token), place: place.clone() };
        lock(&self.shared.queue).running.push_back(job);
        self.shared.changed.notify_one();
    }

    /// A step was there before the first mask of a sequence: it is not behind those of running ones any more.
    pub(crate) fn hurry(&self, constrained: &Constrained) {
        let mut queue = lock(&self.shared.queue);
        if let Some(at) = queue.waiting.iter().position(|job| Arc::ptr_eq(&job.place, &constrained.place)) {
            let job = queue.waiting.remove(at).expect("it was found there");
            queue.running.push_back(job);
        }
    }

    /// Adds a worker where all are stuck and somebody waits.
    ///
    /// # Panics
    /// When the operating system cannot start a thread.
    pub(crate) fn relieve(&mut self) {
        if self.num_workers == MAX_WORKERS {
            return;
        }
        let queue = lock(&self.shared.queue);
        let somebody_waits = !queue.running.is_empty() || !queue.waiting.is_empty();
        if somebody_waits && queue.last_begun.elapsed() >= STUCK {
            drop(queue);
            self.start();
        }
    }

    fn start(&mut self) {
        let (shared, bell, vocab_size) = (self.shared.clone(), self.bell.clone(), self.vocab_size);
        let run = move || {
            let mut queue = lock(&shared.queue);
            while !queue.is_closed {
                let Some(job) = queue.pop() else {
                    queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                    continue;
                };
                drop(queue);
                job.run(vocab_size, &bell);
                queue = lock(&shared.queue);
            }
        };
        let name = format!("masks-{}", self.num_workers);
        thread::Builder::new().name(name).spawn(run).expect("a thread can be started");
        self.num_workers += 1;
        lock(&self.shared.queue).last_begun = Instant::now();
    }
}

impl Drop for Masks {
    fn drop(&mut self) {
        // A worker ends when it has finished what it is at, which nobody waits for.
        lock(&self.shared.queue).is_closed = true;
        self.shared.changed.notify_all();
    }
}

enum State {
    /// A worker has it, or will.
    Working,
    Ready(Work, Allowed),
    Failed(ConstraintError),
}

/// The engine's end of a constraint. Dropped, it takes what a worker is at along.
pub(crate) struct Constrained {
    state: State,
    place: Place,
}

/// What is known of the next token.
pub(crate) enum Mask<'a> {
    /// Nothing yet.
    Unknown,
    /// It may be any.
    Any,
    /// One of these, of which there is at least one.
    Only(&'a [u32]),
    /// There is none: the constraint cannot go on.
    Failed(&'a ConstraintError),
}

impl Constrained {
    /// What is known of the next token by now.
    pub(crate) fn mask(&mut self) -> Mask<'_> {
        if let State::Working = self.state
            && let Some(done) = lock(&self.place).take()
        {
            self.state = done.map_or_else(State::Failed, |(work, allowed)| State::Ready(work, allowed));
        }
        match &self.state {
            State::Working => Mask::Unknown,
            State::Ready(_, Allowed::Any) => Mask::Any,
            State::Ready(work, Allowed::Masked) => Mask::Only(&work.mask),
            State::Failed(error) => Mask::Failed(error),
        }
    }

    /// Begins to work out what may follow a token that was drawn.
    ///
    /// # Panics
    /// When the mask that it was drawn by was not known.
    pub(crate) fn advance(&mut self, token: TokenId, masks: &Masks) {
        let State::Ready(work, _) = std::mem::replace(&mut self.state, State::Working) else {
            panic!("a token was drawn before its mask was known")
        };
        masks.advance(work, token, &self.place);
    }
}

impl Drop for Constrained {
    fn drop(&mut self) {
        // The caller's code is not to take the engine's thread along.
        let state = std::mem::replace(&mut self.state, State::Working);
        let left = lock(&self.place).take();
        let _ = catch_unwind(AssertUnwindSafe(|| drop((state, left))));
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// Allows the token after the last one; what it does is decided by who holds the other end.
    struct Led {
        next: u32,
        go: Receiver<Result<Allowed, &'static str>>,
        /// Told when it is dropped.
        dropped: Sender<()>,
    }

    impl TokenConstraint for Led {
        fn accept(&mut self, token: TokenId) -> Result<(), ConstraintError> {
            self.next = token.0 + 1;
            Ok(())
        }

        fn fill_mask(&mut self, mask: &mut [u32]) -> Result<Allowed, ConstraintError> {
            assert!(mask.iter().all(|&word| word == 0), "the mask arrives zeroed");
            match self.go.recv().expect("the test says what to do") {
                Ok(allowed) => {
                    mask[self.next as usize / 32] |= 1 << (self.next % 32);
                    Ok(allowed)
                }
                Err("panic") => panic!("this grammar is broken"),
                Err(why) => Err(ConstraintError(why.into())),
            }
        }
    }

    impl Drop for Led {
        fn drop(&mut self) {
            let _ = self.dropped.send(());
        }
    }

    type Led3 = (Sender<Result<Allowed, &'static str>>, Receiver<()>, Box<Led>);

    fn led() -> Led3 {
        let ((go, led), (dropped, is_dropped)) = (channel(), channel());
        (go, is_dropped, Box::new(Led { next: 0, go: led, dropped }))
    }

    /// Waits until a mask is known, and says which tokens it allows: `None` is any.
    pub(crate) fn tokens(
        constrained: &mut Constrained,
        bell: &Bell,
    ) -> Result<Option<Vec<u32>>, ConstraintError> {
        loop {
            match constrained.mask() {
                Mask::Unknown => {
                    assert!(bell.wait_until(Instant::now() + Duration::from_mins(1)), "no mask comes");
                }
                Mask::Any => return Ok(None),
                Mask::Failed(error) => return Err(error.clone()),
                Mask::Only(words) => {
                    let is_set = |&token: &u32| words[token as usize / 32] >> (token % 32) & 1 == 1;
                    return Ok(Some((0..words.len() as u32 * 32).filter(is_set).collect()));
                }
            }
        }
    }

    fn masks(vocab_size: usize) -> (Masks, Arc<Bell>) {
        let bell = Arc::new(Bell::default());
        (Masks::new(vocab_size, bell.clone()), bell)
    }

    #[test]
    fn masks_follow_the_tokens_drawn() {
        let (mut masks, bell) = masks(70);
        let (go, _dropped, led) = led();
        let mut constrained = masks.constrain(led);
        assert!(matches!(constrained.mask(), Mask::Unknown));
        go.send(Ok(Allowed::Masked)).unwrap();
        assert_eq!(tokens(&mut constrained, &bell), Ok(Some(vec![0])));
        constrained.advance(TokenId(68), &masks);
        go.send(Ok(Allowed::Masked)).unwrap();
        assert_eq!(tokens(&mut constrained, &bell), Ok(Some(vec![69])));
        constrained.advance(TokenId(3), &masks);
        go.send(Ok(Allowed::Any)).unwrap();
        assert_eq!(tokens(&mut constrained, &bell), Ok(None));
        constrained.advance(TokenId(69), &masks);
        go.send(Ok(Allowed::Masked)).unwrap();
        let nothing = tokens(&mut constrained, &bell).unwrap_err();
        assert_eq!(nothing.0, "it allows no token at all", "70 is outside the vocabulary");
    }

    #[test]
    fn errors_and_panics_fail_their_own_constraint() {
        let (mut masks, bell) = masks(64);
        for (outcome, why) in [("too deep", "too deep"), ("panic", "this grammar is broken")] {
            let (go, dropped, led) = led();
            let mut constrained = masks.constrain(led);
            go.send(Err(outcome)).unwrap();
            assert_eq!(tokens(&mut constrained, &bell), Err(ConstraintError(why.into())));
            dropped.recv_timeout(Duration::from_mins(1)).expect("it is dropped when it has failed");
        }
        let (go, _dropped, led) = led();
        go.send(Ok(Allowed::Any)).unwrap();
        assert_eq!(tokens(&mut masks.constrain(led), &bell), Ok(None), "the workers go on");
    }

    #[test]
    fn what_is_worked_out_for_a_sequence_that_has_ended_is_dropped() {
        let (mut masks, bell) = masks(64);
        let (go, dropped, led_) = led();
        drop(masks.constrain(led_));
        go.send(Ok(Allowed::Any)).unwrap();
        dropped.recv_timeout(Duration::from_mins(1)).expect("the result is dropped");
        let (go, dropped, led) = led();
        let mut ready = masks.constrain(led);
        go.send(Ok(Allowed::Any)).unwrap();
        assert_eq!(tokens(&mut ready, &bell), Ok(None));
        drop(ready);
        assert_eq!(dropped.try_recv(), Ok(()));
    }

    #[test]
    fn few_workers_whatever_the_machine() {
        assert_eq!([1, 2, 4, 5, 8, 12, 16, 192].map(first_workers), [1, 1, 1, 2, 2, 3, 4, 4]);
    }

    #[test]
    fn a_stuck_worker_gets_company() {
        let (mut masks, bell) = masks(64);
        // As many as there can be on any machine, but one.
        let (waits, stuck): (Vec<_>, Vec<_>) = (1..MAX_WORKERS)
            .map(|_| {
                let (go, dropped, led) = led();
                (masks.constrain(led), (go, dropped))
            })
            .unzip();
        let (go, _dropped, led) = led();
        go.send(Ok(Allowed::Any)).unwrap();
        let mut last = masks.constrain(led);
        let since = Instant::now();
        while matches!(last.mask(), Mask::Unknown) {
            masks.relieve();
            bell.wait_until(Instant::now() + Duration::from_millis(1));
            assert!(since.elapsed() < Duration::from_mins(1), "it waits for the others");
        }
        assert!(matches!(last.mask(), Mask::Any) && masks.num_workers <= MAX_WORKERS);
        drop((waits, stuck));
    }
}
