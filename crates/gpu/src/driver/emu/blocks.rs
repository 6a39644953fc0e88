//! OS threads that run a launch's blocks. Blocks are taken from a counter, so any order and any overlap of blocks happens, as
//! on a GPU.

use std::ffi::{CStr, c_char, c_void};
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::stream::LaunchCommand;

// SAFETY: as kernels/common/emu.cpp defines it.
unsafe extern "C" {
    fn r1_emu_run_block(
        kernel: unsafe extern "C" fn(*const c_void),
        args: *const c_void,
        block: *const u32,
        grid: *const u32,
        threads: u32,
        shared_bytes: u32,
        seed: u64,
    ) -> *const c_char;
}

/// A launch that runs; the threads share it by address.
struct Work {
    launch: *const LaunchCommand,
    next: AtomicUsize,
    seed: u64,
}

#[derive(Default)]
struct State {
    /// The launch that runs, and how many of the threads may still join it.
    work: Option<usize>,
    /// Counts launches, so that a thread joins each once.
    generation: u64,
    /// Helpers that are inside the launch.
    busy: usize,
    trouble: Option<String>,
    ends: bool,
}

struct Shared {
    state: Mutex<State>,
    begun: Condvar,
    ended: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads.
pub(super) struct Blocks {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Launches so far: the order in which a block's threads run differs from launch to launch.
    launches: AtomicU64,
}

impl Work {
    /// Runs blocks until none is left; gives the first trouble.
    fn run(&self) -> Option<String> {
        // SAFETY: whoever started the launch waits until every thread has left it.
        let launch = unsafe { &*self.launch };
        let [x, y, z] = launch.grid.map(|size| size as usize);
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= x * y * z {
                return None;
            }
            let block = [(index % x) as u32, (index / x % y) as u32, (index / x / y) as u32];
            let seed = self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index as u64);
            // SAFETY: the entry is that kernel's, and `args` has its struct, whose pointers lie in device memory that lives
            // as long as the stream. What the kernel reads and writes there is its launcher's business, as on a GPU.
            let trouble = unsafe {
                r1_emu_run_block(
                    launch.entry,
                    launch.args.0.as_ptr().cast(),
                    block.as_ptr(),
                    launch.grid.as_ptr(),
                    launch.threads,
                    launch.shared_bytes,
                    seed,
                )
            };
            if !trouble.is_null() {
                self.next.store(x * y * z, Ordering::Relaxed);
                // SAFETY: words that end with a zero and live until this thread's next block.
                let words = unsafe { CStr::from_ptr(trouble) };
                return Some(words.to_string_lossy().into_owned());
            }
        }
    }
}

impl Blocks {
    /// As many threads as that, the stream's own included.
    pub(super) fn new(threads: usize) -> io::Result<Self> {
        let shared =
            Arc::new(Shared { state: Mutex::default(), begun: Condvar::new(), ended: Condvar::new() });
        let helpers = (1..threads)
            .map(|i| {
                let shared = shared.clone();
                thread::Builder::new().name(format!("emu-{i}")).spawn(move || help(&shared))
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { shared, helpers, launches: AtomicU64::new(0) })
    }

    /// Runs all blocks of a launch.
    pub(super) fn run(&self, launch: &LaunchCommand) -> Result<(), String> {
        let seed = self.launches.fetch_add(1, Ordering::Relaxed);
        let work = Work { launch, next: AtomicUsize::new(0), seed };
        let alone = launch.grid.iter().all(|&size| size == 1) || self.helpers.is_empty();
        if !alone {
            let mut state = self.shared.state();
            state.work = Some(ptr_of(&work));
            state.generation += 1;
            self.shared.begun.notify_all();
        }
        let mut trouble = work.run();
        if !alone {
            let mut state = self.shared.state();
            state.work = None;
            while state.busy > 0 {
                state = self.shared.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            trouble = trouble.or(state.trouble.take());
            state.trouble = None;
        }
        trouble.map_or(Ok(()), Err)
    }
}

fn ptr_of(work: &Work) -> usize {
    std::ptr::from_ref(work).addr()
}

impl Drop for Blocks {
    fn drop(&mut self) {
        self.shared.state().ends = true;
        self.shared.begun.notify_all();
        for helper in self.helpers.drain(..) {
            let _ = helper.join();
        }
    }
}

fn help(shared: &Shared) {
    let mut seen = 0;
    let mut state = shared.state();
    loop {
        if state.ends {
            return;
        }
        if let Some(work) = state.work
            && state.generation != seen
        {
            seen = state.generation;
            state.busy += 1;
            drop(state);
            // SAFETY: the launcher's `Work`, which it keeps until no thread is busy with it.
            let trouble = unsafe { &*(work as *const Work) }.run();
            state = shared.state();
            state.busy -= 1;
            if state.trouble.is_none() {
                state.trouble = trouble;
            }
            shared.ended.notify_all();
        } else {
            state = shared.begun.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
