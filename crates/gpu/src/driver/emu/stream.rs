//! The emulated device's stream: one thread that does what was enqueued, in order.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::blocks::Blocks;
use crate::driver::{DevicePtr, DriverError, Mark, Rows};

/// More than any kernel takes.
pub(super) const MAX_ARGS_BYTES: usize = 1024;

/// An argument struct, aligned as one.
#[repr(align(16))]
pub(crate) struct Args(pub(super) [MaybeUninit<u8>; MAX_ARGS_BYTES]);

/// A launch as it is recorded.
pub(crate) struct LaunchCommand {
    pub(super) name: &'static str,
    pub(super) entry: unsafe extern "C" fn(*const c_void),
    pub(super) grid: [u32; 3],
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
    pub(super) args: Args,
}

/// Something that the host does in the stream's order, such as a collective. May be replayed.
pub(crate) type HostWork = Arc<dyn Fn() -> Result<(), DriverError> + Send + Sync>;

/// What the stream does.
pub(crate) enum Command {
    Write { bytes: Vec<u8>, to: Rows },
    Fill { at: DevicePtr, size_bytes: usize, byte: u8 },
    Copy { from: DevicePtr, to: DevicePtr, size_bytes: usize },
    Launch(Box<LaunchCommand>),
    Host(HostWork),
    Replay(Arc<Vec<Command>>),
    Mark(Arc<MarkState>),
}

/// A failure or success, once known.
#[derive(Default)]
pub(crate) struct MarkState {
    result: Mutex<Option<Result<(), DriverError>>>,
    passed: Condvar,
}

/// A mark of this stream.
pub(super) struct EmuMark(Arc<MarkState>);

impl Mark for EmuMark {
    fn wait(self: Box<Self>) -> Result<(), DriverError> {
        let mut result = self.0.result.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match result.take() {
                Some(result) => return result,
                None => result = self.0.passed.wait(result).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

#[derive(Default)]
struct Queue {
    commands: VecDeque<Command>,
    /// The thread does one of them.
    busy: bool,
    ends: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    pushed: Condvar,
    idle: Condvar,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The stream.
pub(super) struct Stream {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Stream {
    pub(super) fn new(blocks: Blocks) -> io::Result<Self> {
        let shared =
            Arc::new(Shared { queue: Mutex::default(), pushed: Condvar::new(), idle: Condvar::new() });
        let run = {
            let shared = shared.clone();
            move || work(&shared, &blocks)
        };
        let thread = thread::Builder::new().name("emu".into()).spawn(run)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub(super) fn push(&self, command: Command) {
        self.shared.queue().commands.push_back(command);
        self.shared.pushed.notify_one();
    }

    pub(super) fn mark(&self) -> EmuMark {
        let state = Arc::new(MarkState::default());
        self.push(Command::Mark(state.clone()));
        EmuMark(state)
    }

    /// Waits until nothing is left to do.
    pub(super) fn settle(&self) {
        let mut queue = self.shared.queue();
        while queue.busy || !queue.commands.is_empty() {
            queue = self.shared.idle.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.queue().ends = true;
        self.shared.pushed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Does what is enqueued. What was enqueued before the end is still done: somebody may wait for a mark.
fn work(shared: &Shared, blocks: &Blocks) {
    let mut failure = None;
    let mut queue = shared.queue();
    loop {
        if let Some(command) = queue.commands.pop_front() {
            queue.busy = true;
            drop(queue);
            run(&command, blocks, &mut failure);
            queue = shared.queue();
            queue.busy = false;
            if queue.commands.is_empty() {
                shared.idle.notify_all();
            }
        } else if queue.ends {
            return;
        } else {
            queue = shared.pushed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Runs one command. After a failure nothing runs until a mark has told it.
fn run(command: &Command, blocks: &Blocks, failure: &mut Option<DriverError>) {
    if let Command::Mark(state) = command {
        let result = failure.take().map_or(Ok(()), Err);
        *state.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        state.passed.notify_all();
        return;
    }
    if failure.is_some() {
        return;
    }
    match command {
        Command::Write { bytes, to } => {
            for (row, bytes) in bytes.chunks_exact(to.width_bytes.max(1)).enumerate() {
                let at = to.at.offset(row * to.pitch_bytes).0 as *mut u8;
                // SAFETY: the rows lie in this device's memory, which lives longer than the stream.
                unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
            }
        }
        // SAFETY: bytes of this device's memory, which lives longer than the stream.
        Command::Fill { at, size_bytes, byte } => unsafe {
            ptr::write_bytes(at.0 as *mut u8, *byte, *size_bytes)
        },
        Command::Copy { from, to, size_bytes } => {
            // SAFETY: bytes of this device's memory, which lives longer than the stream; they may overlap.
            unsafe { ptr::copy(from.0 as *const u8, to.0 as *mut u8, *size_bytes) };
        }
        Command::Launch(launch) => {
            if let Err(why) = blocks.run(launch) {
                *failure = Some(DriverError::Kernel { kernel: launch.name.into(), why });
            }
        }
        Command::Host(work) => *failure = work().err(),
        Command::Replay(list) => list.iter().for_each(|command| run(command, blocks, failure)),
        Command::Mark(_) => unreachable!("handled above"),
    }
}
