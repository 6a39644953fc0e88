//! A persistent thread pool: the caller and N - 1 workers take numbered tasks from one counter.
//! Knows nothing of tensors. Starting a job allocates nothing.

use std::any::Any;
use std::cell::UnsafeCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{JoinHandle, Thread};

use crate::scratch::Scratch;

/// Turns of the waiting loops before a thread parks: some tens of microseconds, the gap between two operations of a step.
const SPINS: u32 = 2000;

const OPEN: u64 = 1 << 32;
const EPOCH: u64 = 1 << 33;

type Task<'a> = dyn Fn(usize, &mut Scratch) + Sync + 'a;

#[derive(Clone)]
struct Job {
    task: *const Task<'static>,
    num_tasks: usize,
    caller: Thread,
}

struct Shared {
    /// Bits 0..32: workers inside the job; bit 32: the job takes workers; above: the job's number. A worker that wakes late
    /// finds the gate closed and never touches a job whose caller is gone.
    gate: AtomicU64,
    next: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

// SAFETY: `job` is written only while the gate is closed and no worker is inside, and read only by workers that entered
// through the open gate; entering acquires what opening released. The task it points to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as for `Sync`; the pointer is only followed while its job runs.
unsafe impl Send for Shared {}

impl Shared {
    /// Runs tasks until none is left. The first panic is kept for the caller and stops the hand-out.
    fn work(&self, task: &Task<'_>, num_tasks: usize, scratch: &mut Scratch) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= num_tasks {
                return;
            }
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| task(index, scratch))) {
                self.next.store(num_tasks, Ordering::Relaxed);
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
                return;
            }
        }
    }

    fn worker(&self) {
        let mut scratch = Scratch::default();
        let mut last = 0;
        while let Some(epoch) = self.enter(last) {
            last = epoch;
            // SAFETY: this worker entered through the open gate, so the job is written and stays until it leaves.
            let job = unsafe { (*self.job.get()).clone() }.expect("an open gate has a job");
            // SAFETY: the caller waits inside `run`, where the task lives, until every worker has left.
            self.work(unsafe { &*job.task }, job.num_tasks, &mut scratch);
            if self.gate.fetch_sub(1, Ordering::AcqRel) & (OPEN | (OPEN - 1)) == 1 {
                job.caller.unpark();
            }
        }
    }

    /// Waits for a job other than `last` and enters it; `None` when the pool stops.
    fn enter(&self, last: u64) -> Option<u64> {
        let mut spins = 0;
        loop {
            if self.stop.load(Ordering::Acquire) {
                return None;
            }
            let gate = self.gate.load(Ordering::Acquire);
            let epoch = gate / EPOCH;
            if gate & OPEN != 0 && epoch != last {
                if self
                    .gate
                    .compare_exchange_weak(gate, gate + 1, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
                {
                    return Some(epoch);
                }
            } else if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                std::thread::park();
            }
        }
    }
}

/// The threads and the caller's own scratch.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    scratch: Scratch,
}

impl Pool {
    /// `threads` counts the caller.
    #[cfg(test)]
    pub(crate) fn new(threads: usize) -> io::Result<Self> {
        Self::with_setup(threads, |_| Ok(()))
    }

    /// As `new`; each worker, numbered from 1 on, begins with `setup`, and the first that fails there ends the pool.
    pub(crate) fn with_setup(
        threads: usize,
        setup: impl Fn(usize) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self { shared, workers: Vec::new(), scratch: Scratch::default() };
        let setup = Arc::new(setup);
        let (sender, ready) = mpsc::channel();
        for index in 1..threads {
            let (shared, setup, sender) = (pool.shared.clone(), setup.clone(), sender.clone());
            let spawned = std::thread::Builder::new().name(format!("cpu-{index}")).spawn(move || {
                let result = setup(index);
                let is_ready = result.is_ok();
                // Nobody listens any more when another worker has failed; the pool ends then.
                let _ended = sender.send(result);
                drop((setup, sender));
                if is_ready {
                    shared.worker();
                }
            })?;
            pool.workers.push(spawned);
        }
        drop(sender);
        ready.iter().collect::<io::Result<()>>()?;
        Ok(pool)
    }

    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(0..num_tasks)`, each once, on all threads; returns when all are done. A panic in a task is passed on.
    pub(crate) fn run(&mut self, num_tasks: usize, task: &Task<'_>) {
        let shared = &*self.shared;
        shared.next.store(0, Ordering::Relaxed);
        if num_tasks <= 1 || self.workers.is_empty() {
            shared.work(task, num_tasks, &mut self.scratch);
        } else {
            #[allow(clippy::transmute_ptr_to_ptr)] // a cast cannot lengthen the lifetime
            // SAFETY: only the lifetime changes; `run` does not return before every worker has left the job.
            let erased = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
            let job = Job { task: erased, num_tasks, caller: std::thread::current() };
            // SAFETY: the gate is closed and nobody is inside: the last `run` waited for that, and `&mut self` admits one.
            unsafe { *shared.job.get() = Some(job) };
            let epoch = shared.gate.load(Ordering::Relaxed) / EPOCH;
            shared.gate.store(epoch.wrapping_add(1).wrapping_mul(EPOCH) | OPEN, Ordering::Release);
            for worker in &self.workers {
                worker.thread().unpark();
            }
            shared.work(task, num_tasks, &mut self.scratch);
            shared.gate.fetch_and(!OPEN, Ordering::AcqRel);
            let mut spins = 0;
            while shared.gate.load(Ordering::Acquire) & (OPEN - 1) != 0 {
                if spins < SPINS {
                    spins += 1;
                    std::hint::spin_loop();
                } else {
                    std::thread::park();
                }
            }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches what its tasks throw, so there is nothing to learn from its end.
            drop(worker.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads).expect("threads start");
            for num_tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(num_tasks, &|task, _| {
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} threads");
            }
        }
    }

    #[test]
    fn many_short_jobs_see_their_own_closures() {
        let mut pool = Pool::new(3).expect("threads start");
        for round in 0..20_000usize {
            let sum = AtomicUsize::new(0);
            pool.run(4, &|task, _| {
                sum.fetch_add(round + task, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4 * round + 6);
        }
    }

    #[test]
    fn workers_are_set_up_before_the_first_job_and_failures_end_the_pool() {
        use std::cell::Cell;
        thread_local!(static NUMBER: Cell<usize> = const { Cell::new(0) });
        let mut pool = Pool::with_setup(3, |index| {
            NUMBER.set(index);
            Ok(())
        })
        .expect("threads start");
        for _ in 0..100 {
            pool.run(12, &|_, _| assert!(NUMBER.get() < 3 && (NUMBER.get() != 0) == is_worker()));
        }
        let failed = Pool::with_setup(4, |index| match index {
            2 => Err(io::Error::other("no room on 2")),
            _ => Ok(()),
        });
        assert_eq!(failed.err().expect("the second fails").to_string(), "no room on 2");
    }

    fn is_worker() -> bool {
        std::thread::current().name().is_some_and(|name| name.starts_with("cpu-"))
    }

    #[test]
    fn a_parked_pool_wakes() {
        let mut pool = Pool::new(2).expect("threads start");
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let done = AtomicUsize::new(0);
            pool.run(8, &|_, _| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 8);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let mut pool = Pool::new(3).expect("threads start");
        for bad in [0, 5, 63] {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(64, &|task, _| assert!(task != bad, "task {bad}"));
            }));
            let payload = caught.expect_err("the panic is passed on");
            assert_eq!(payload.downcast_ref::<String>(), Some(&format!("task {bad}")));
            let done = AtomicUsize::new(0);
            pool.run(64, &|_, _| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 64);
        }
    }
}
