//! The emulated GPU: device memory in host memory, a thread as the stream, the kernels compiled for the host. A test device:
//! it runs what a GPU would run, far slower.

mod blocks;
mod ranks;
mod stream;
#[cfg(test)]
mod tests;

pub(crate) use ranks::EmuRank;

use std::any::Any;
use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use super::{DeviceInfo, DevicePtr, Driver, DriverError, Launch, Mark, ReadOrder, RecordedGraph, Rows};
use crate::kernels;
use blocks::Blocks;
use stream::{Command, LaunchCommand, MAX_ARGS_BYTES, Stream};

/// Pages of the host that stand for device memory; lent untouched, so that a large arena costs what is used of it.
struct Reservation {
    at: *mut libc::c_void,
    size_bytes: usize,
}

// SAFETY: plain memory that no thread owns.
unsafe impl Send for Reservation {}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: mapped by `reserve` with this size, and unmapped once.
        unsafe { libc::munmap(self.at, self.size_bytes) };
    }
}

/// How an emulated device is set up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EmuOptions {
    /// OS threads that run thread blocks.
    pub(crate) threads: usize,
    /// Device memory.
    pub(crate) memory_bytes: usize,
}

/// One emulated device.
pub(crate) struct Emu {
    info: DeviceInfo,
    kernels: HashMap<&'static str, kernels::EmulatedKernel>,
    /// What is recorded instead of run, between `begin_capture` and `end_capture`.
    recording: Mutex<Option<Vec<Command>>>,
    // The stream ends before its memory goes.
    stream: Stream,
    reservations: Mutex<Vec<Reservation>>,
}

impl Emu {
    pub(crate) fn new(options: EmuOptions) -> Result<Self, DriverError> {
        let spawn =
            |error: std::io::Error| DriverError::Call { call: "start a thread", why: error.to_string() };
        let blocks = Blocks::new(options.threads).map_err(spawn)?;
        let stream = Stream::new(blocks).map_err(spawn)?;
        Ok(Self {
            info: DeviceInfo {
                driver: "emu",
                name: format!("emulated GPU ({} host threads)", options.threads),
                arch: "emu".into(),
                warp_size: 32,
                num_multiprocessors: options.threads as u32,
                max_shared_bytes: 160 << 10,
                total_bytes: options.memory_bytes,
                free_bytes: options.memory_bytes,
                fp8: true,
                fnuz: false,
            },
            kernels: kernels::emulated().into_iter().map(|kernel| (kernel.name, kernel)).collect(),
            recording: Mutex::new(None),
            stream,
            reservations: Mutex::new(Vec::new()),
        })
    }

    /// Enqueues or records.
    pub(crate) fn enqueue(&self, command: Command) {
        match &mut *self.recording.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(list) => list.push(command),
            None => self.stream.push(command),
        }
    }

    fn refuse_capture(&self, call: &'static str) -> Result<(), DriverError> {
        if self.recording.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Err(DriverError::Call { call, why: "traffic with the host cannot be captured".into() });
        }
        Ok(())
    }
}

impl Driver for Emu {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn reserve(&self, size_bytes: usize) -> Result<DevicePtr, DriverError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new private mapping; nothing is replaced.
        let at = unsafe {
            libc::mmap(ptr::null_mut(), size_bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if at == libc::MAP_FAILED {
            return Err(DriverError::OutOfMemory {
                requested_bytes: size_bytes,
                free_bytes: self.info.free_bytes,
                total_bytes: self.info.total_bytes,
            });
        }
        let mut reservations = self.reservations.lock().unwrap_or_else(PoisonError::into_inner);
        reservations.push(Reservation { at, size_bytes });
        Ok(DevicePtr(at as u64))
    }

    fn write(&self, src: &[u8], to: Rows) -> Result<(), DriverError> {
        self.refuse_capture("write")?;
        assert_eq!(src.len(), to.size_bytes(), "a write's bytes");
        self.stream.push(Command::Write { bytes: src.to_vec(), to });
        Ok(())
    }

    fn read(&self, from: Rows, dst: &mut [u8], order: ReadOrder) -> Result<(), DriverError> {
        self.refuse_capture("read")?;
        assert_eq!(dst.len(), from.size_bytes(), "a read's bytes");
        if order == ReadOrder::AfterAll {
            // A failure stays with the stream: it belongs to the step's own mark.
            self.stream.settle();
        }
        for (row, dst) in dst.chunks_exact_mut(from.width_bytes.max(1)).enumerate() {
            let at = from.at.offset(row * from.pitch_bytes).0 as *const u8;
            // SAFETY: the rows lie in this device's memory, and the work that writes them has ended.
            unsafe { ptr::copy_nonoverlapping(at, dst.as_mut_ptr(), dst.len()) };
        }
        Ok(())
    }

    fn fill(&self, at: DevicePtr, size_bytes: usize, byte: u8) -> Result<(), DriverError> {
        self.enqueue(Command::Fill { at, size_bytes, byte });
        Ok(())
    }

    fn copy(&self, from: DevicePtr, to: DevicePtr, size_bytes: usize) -> Result<(), DriverError> {
        self.enqueue(Command::Copy { from, to, size_bytes });
        Ok(())
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError> {
        let refuse = |why: String| Err(DriverError::Kernel { kernel: launch.kernel.into(), why });
        let Some(kernel) = self.kernels.get(launch.kernel) else {
            return refuse("there is no kernel of this name".into());
        };
        // A mistake of the code that launches it, which no driver would notice.
        assert_eq!(launch.args.len(), kernel.args_bytes, "{}: bytes of arguments", launch.kernel);
        assert!(launch.args.len() <= MAX_ARGS_BYTES, "{}: bytes of arguments", launch.kernel);
        if launch.warps == 0 || launch.warps > kernel.max_warps {
            return refuse(format!("{} warps, compiled for {} at most", launch.warps, kernel.max_warps));
        }
        // The limits of real devices.
        let limits = [0x7fff_ffff, 65_535, 65_535];
        if launch.grid.iter().zip(limits).any(|(&size, most)| size == 0 || size > most) {
            return refuse(format!("a grid of {:?} blocks", launch.grid));
        }
        if launch.shared_bytes > self.info.max_shared_bytes {
            return refuse(format!("{} bytes of shared memory, 160 KiB are there", launch.shared_bytes));
        }
        let mut args = [MaybeUninit::uninit(); MAX_ARGS_BYTES];
        args[..launch.args.len()].copy_from_slice(launch.args);
        self.enqueue(Command::Launch(Box::new(LaunchCommand {
            name: kernel.name,
            entry: kernel.entry,
            grid: launch.grid,
            threads: launch.warps * self.info.warp_size,
            shared_bytes: launch.shared_bytes as u32,
            args: stream::Args(args),
        })));
        Ok(())
    }

    fn mark(&self) -> Result<Box<dyn Mark>, DriverError> {
        self.refuse_capture("mark")?;
        Ok(Box::new(self.stream.mark()))
    }

    fn begin_capture(&self) -> Result<(), DriverError> {
        self.refuse_capture("begin_capture")?;
        *self.recording.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<RecordedGraph, DriverError> {
        let list = self.recording.lock().unwrap_or_else(PoisonError::into_inner).take();
        let list =
            list.ok_or(DriverError::Call { call: "end_capture", why: "nothing is captured".into() })?;
        Ok(Box::new(Arc::new(list)))
    }

    fn replay(&self, graph: &RecordedGraph) -> Result<(), DriverError> {
        let list: &Arc<Vec<Command>> = graph.downcast_ref().expect("a graph that this driver recorded");
        self.enqueue(Command::Replay(list.clone()));
        Ok(())
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}
