//! What CUDA and HIP have in common, which is nearly everything: the driver's contract over a vendor's calls. Writes go through
//! pinned memory, reads through a second stream where they may overtake, marks are events, captures are graphs. Knows no vendor.

mod staging;

use std::any::Any;
use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{DeviceInfo, DevicePtr, Driver, DriverError, Launch, Mark, ReadOrder, RecordedGraph, Rows};
use crate::kernels::EmulatedKernel;
use staging::{Ring, pieces};

/// Pinned memory that writes are copied to before their call returns.
const WRITE_BYTES: usize = 64 << 20;
/// Pinned memory that a read passes through, of each of the two streams.
const READ_BYTES: usize = 4 << 20;

/// A vendor's stream, event, function or graph. What it stands for belongs to the [`Api`] that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Handle(pub(crate) *mut c_void);

// SAFETY: a name for something of the driver's, which may be used from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// A vendor's calls on one device. Handles are ones that it gave and that were not given back; device addresses lie in memory
/// that it reserved, as everywhere in this crate. Every call but [`enter`](Api::enter) wants the device current.
pub(crate) trait Api: Send + Sync + 'static {
    /// The variable that makes a launch wait for its end, for who looks for the kernel that failed.
    const BLOCKING_VARIABLE: &'static str;

    /// Makes the device current on this thread.
    fn enter(&self) -> Result<(), DriverError>;
    fn reserve(&self, size_bytes: usize) -> Result<DevicePtr, DriverError>;
    fn release(&self, at: DevicePtr);
    /// Host memory that the device can reach.
    fn reserve_pinned(&self, size_bytes: usize) -> Result<*mut u8, DriverError>;
    /// # Safety
    /// `at` is from `reserve_pinned`, and no copy of it is under way.
    unsafe fn release_pinned(&self, at: *mut u8);
    /// A stream that waits for no other.
    fn stream(&self) -> Result<Handle, DriverError>;
    fn release_stream(&self, stream: Handle);
    fn synchronize(&self, stream: Handle) -> Result<(), DriverError>;
    /// # Safety
    /// `from` has all rows, one after the other, until the stream has passed the copy.
    unsafe fn copy_in(&self, from: *const u8, to: Rows, stream: Handle) -> Result<(), DriverError>;
    /// # Safety
    /// `to` has room for all rows, one after the other, until the stream has passed the copy.
    unsafe fn copy_out(&self, from: Rows, to: *mut u8, stream: Handle) -> Result<(), DriverError>;
    fn copy(
        &self,
        from: DevicePtr,
        to: DevicePtr,
        size_bytes: usize,
        stream: Handle,
    ) -> Result<(), DriverError>;
    fn fill(&self, at: DevicePtr, size_bytes: usize, byte: u8, stream: Handle) -> Result<(), DriverError>;
    /// # Safety
    /// `launch.args` is the argument struct of that function.
    unsafe fn launch(
        &self,
        function: Handle,
        threads: u32,
        launch: &Launch<'_>,
        stream: Handle,
    ) -> Result<(), DriverError>;
    fn event(&self) -> Result<Handle, DriverError>;
    fn release_event(&self, event: Handle);
    fn record(&self, event: Handle, stream: Handle) -> Result<(), DriverError>;
    fn wait(&self, event: Handle) -> Result<(), DriverError>;
    fn begin_capture(&self, stream: Handle) -> Result<(), DriverError>;
    /// Ends a capture whether or not it went well; gives a graph that can be enqueued.
    fn end_capture(&self, stream: Handle) -> Result<Handle, DriverError>;
    fn replay(&self, graph: Handle, stream: Handle) -> Result<(), DriverError>;
    fn release_graph(&self, graph: Handle);
}

/// A kernel that can be launched.
struct Function {
    handle: Handle,
    args_bytes: usize,
    max_warps: u32,
}

/// A pinned buffer that reads pass through, with its stream.
struct Reader {
    stream: Handle,
    buffer: *mut u8,
}

// SAFETY: memory of the host that only the holder of the lock around it touches.
unsafe impl Send for Reader {}

/// The vendor's side, shared with marks and graphs, which may live longer than the device.
struct Shared<A: Api> {
    api: A,
    stream: Handle,
    /// Events that no mark uses.
    events: Mutex<Vec<Handle>>,
}

/// One GPU with one stream.
pub(crate) struct Device<A: Api> {
    shared: Arc<Shared<A>>,
    info: DeviceInfo,
    functions: HashMap<&'static str, Function>,
    is_capturing: AtomicBool,
    ring: Mutex<Ring>,
    after_all: Mutex<Reader>,
    at_once: Mutex<Reader>,
    reservations: Mutex<Vec<DevicePtr>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<A: Api> Device<A> {
    /// `functions` are the kernels as the vendor loaded them; the emulator's table says what each takes.
    pub(crate) fn new(
        api: A,
        info: DeviceInfo,
        functions: Vec<(&'static str, Handle)>,
        table: &[EmulatedKernel],
    ) -> Result<Self, DriverError> {
        api.enter()?;
        let stream = api.stream()?;
        let reader = |stream| Ok(Mutex::new(Reader { stream, buffer: api.reserve_pinned(READ_BYTES)? }));
        let after_all = reader(stream)?;
        let at_once = reader(api.stream()?)?;
        let ring = Mutex::new(Ring::new(&api, WRITE_BYTES)?);
        let of = |name| {
            table
                .iter()
                .find(|kernel| kernel.name == name)
                .expect("a kernel that was compiled for the host too")
        };
        let function = |(name, handle)| {
            let EmulatedKernel { args_bytes, max_warps, .. } = *of(name);
            (name, Function { handle, args_bytes, max_warps })
        };
        Ok(Self {
            info,
            functions: functions.into_iter().map(function).collect(),
            is_capturing: AtomicBool::new(false),
            ring,
            after_all,
            at_once,
            reservations: Mutex::default(),
            shared: Arc::new(Shared { api, stream, events: Mutex::default() }),
        })
    }

    /// Makes the device current on this thread, for calls of others.
    #[cfg(any(feature = "cuda", feature = "rocm"))]
    pub(crate) fn enter(&self) -> Result<(), DriverError> {
        self.shared.api.enter()
    }

    #[cfg(any(feature = "cuda", feature = "rocm"))]
    pub(crate) fn stream(&self) -> Handle {
        self.shared.stream
    }

    #[cfg(any(feature = "cuda", feature = "rocm"))]
    pub(crate) fn vendor(&self) -> &A {
        &self.shared.api
    }

    /// The vendor's calls, with the device current.
    fn api(&self) -> Result<&A, DriverError> {
        self.shared.api.enter()?;
        Ok(&self.shared.api)
    }

    fn refuse_capture(&self, call: &'static str) -> Result<(), DriverError> {
        if self.is_capturing.load(Ordering::Relaxed) {
            return Err(DriverError::Call { call, why: "traffic with the host cannot be captured".into() });
        }
        Ok(())
    }
}

impl<A: Api> Driver for Device<A> {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn reserve(&self, size_bytes: usize) -> Result<DevicePtr, DriverError> {
        let at = self.api()?.reserve(size_bytes)?;
        lock(&self.reservations).push(at);
        Ok(at)
    }

    fn write(&self, src: &[u8], to: Rows) -> Result<(), DriverError> {
        self.refuse_capture("write")?;
        assert_eq!(src.len(), to.size_bytes(), "a write's bytes");
        let api = self.api()?;
        let mut ring = lock(&self.ring);
        for (range, rows) in pieces(to, ring.segment_bytes()) {
            ring.write(api, &src[range], rows, self.shared.stream)?;
        }
        Ok(())
    }

    fn read(&self, from: Rows, dst: &mut [u8], order: ReadOrder) -> Result<(), DriverError> {
        self.refuse_capture("read")?;
        assert_eq!(dst.len(), from.size_bytes(), "a read's bytes");
        let api = self.api()?;
        let reader = lock(if order == ReadOrder::AfterAll { &self.after_all } else { &self.at_once });
        for (range, rows) in pieces(from, READ_BYTES) {
            // SAFETY: a piece is at most the buffer; the copy is waited for while the lock is held.
            unsafe { api.copy_out(rows, reader.buffer, reader.stream)? };
            api.synchronize(reader.stream)?;
            let dst = &mut dst[range];
            // SAFETY: as long as the piece, and the copy to it has ended.
            dst.copy_from_slice(unsafe { std::slice::from_raw_parts(reader.buffer, dst.len()) });
        }
        Ok(())
    }

    fn fill(&self, at: DevicePtr, size_bytes: usize, byte: u8) -> Result<(), DriverError> {
        if size_bytes == 0 {
            return Ok(());
        }
        self.api()?.fill(at, size_bytes, byte, self.shared.stream)
    }

    fn copy(&self, from: DevicePtr, to: DevicePtr, size_bytes: usize) -> Result<(), DriverError> {
        if size_bytes == 0 {
            return Ok(());
        }
        self.api()?.copy(from, to, size_bytes, self.shared.stream)
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError> {
        let refuse = |why: String| Err(DriverError::Kernel { kernel: launch.kernel.into(), why });
        let Some(function) = self.functions.get(launch.kernel) else {
            return refuse("there is no kernel of this name".into());
        };
        assert_eq!(launch.args.len(), function.args_bytes, "{}: bytes of arguments", launch.kernel);
        if launch.warps == 0 || launch.warps > function.max_warps {
            return refuse(format!("{} warps, compiled for {} at most", launch.warps, function.max_warps));
        }
        if launch.shared_bytes > self.info.max_shared_bytes {
            let room = self.info.max_shared_bytes;
            return refuse(format!(
                "{} bytes of shared memory, a block has {room} on {}",
                launch.shared_bytes, self.info.arch
            ));
        }
        let threads = launch.warps * self.info.warp_size;
        // SAFETY: the struct's size is the one that the kernel was compiled with; its fields are the launcher's business.
        unsafe { self.api()?.launch(function.handle, threads, launch, self.shared.stream) }
    }

    fn mark(&self) -> Result<Box<dyn Mark>, DriverError> {
        self.refuse_capture("mark")?;
        let api = self.api()?;
        let idle = lock(&self.shared.events).pop();
        let event = idle.map_or_else(|| api.event(), Ok)?;
        let mark = Box::new(EventMark { shared: self.shared.clone(), event });
        api.record(event, self.shared.stream)?;
        Ok(mark)
    }

    fn begin_capture(&self) -> Result<(), DriverError> {
        self.refuse_capture("begin_capture")?;
        self.api()?.begin_capture(self.shared.stream)?;
        self.is_capturing.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn end_capture(&self) -> Result<RecordedGraph, DriverError> {
        if !self.is_capturing.swap(false, Ordering::Relaxed) {
            return Err(DriverError::Call { call: "end_capture", why: "nothing is captured".into() });
        }
        let handle = self.api()?.end_capture(self.shared.stream)?;
        Ok(Box::new(CapturedGraph { shared: self.shared.clone(), handle }))
    }

    fn replay(&self, graph: &RecordedGraph) -> Result<(), DriverError> {
        let graph: &CapturedGraph<A> = graph.downcast_ref().expect("a graph that this driver recorded");
        self.api()?.replay(graph.handle, self.shared.stream)
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

impl<A: Api> Drop for Device<A> {
    fn drop(&mut self) {
        let Ok(api) = self.api() else { return };
        // What failed was told to who waited; here it only has to have ended.
        let _ = api.synchronize(self.shared.stream);
        for reader in [&self.after_all, &self.at_once].map(lock) {
            let _ = api.synchronize(reader.stream);
            // SAFETY: this device's, and its stream has ended.
            unsafe { api.release_pinned(reader.buffer) };
        }
        api.release_stream(lock(&self.at_once).stream);
        lock(&self.ring).release(api);
        lock(&self.reservations).drain(..).for_each(|at| api.release(at));
    }
}

impl<A: Api> Drop for Shared<A> {
    fn drop(&mut self) {
        if self.api.enter().is_ok() {
            lock(&self.events).drain(..).for_each(|event| self.api.release_event(event));
            self.api.release_stream(self.stream);
        }
    }
}

/// A mark as an event.
struct EventMark<A: Api> {
    shared: Arc<Shared<A>>,
    event: Handle,
}

impl<A: Api> Mark for EventMark<A> {
    fn wait(self: Box<Self>) -> Result<(), DriverError> {
        self.shared.api.enter()?;
        self.shared.api.wait(self.event).map_err(|error| match error {
            DriverError::Call { call, why } => {
                let why =
                    format!("{why} (run once more with {}=1 to learn which kernel)", A::BLOCKING_VARIABLE);
                DriverError::Call { call, why }
            }
            other => other,
        })
    }
}

impl<A: Api> Drop for EventMark<A> {
    fn drop(&mut self) {
        // Recorded anew by the next mark, whether or not the stream has passed it.
        lock(&self.shared.events).push(self.event);
    }
}

/// A graph that can be enqueued.
struct CapturedGraph<A: Api> {
    shared: Arc<Shared<A>>,
    handle: Handle,
}

impl<A: Api> Drop for CapturedGraph<A> {
    fn drop(&mut self) {
        let Shared { api, stream, .. } = &*self.shared;
        if api.enter().is_ok() {
            // It may be on its way.
            let _ = api.synchronize(*stream);
            api.release_graph(self.handle);
        }
    }
}

#[cfg(any(feature = "cuda", feature = "rocm"))]
/// A launch's arguments as both vendors take them: a list of pointers to each; here there is one.
pub(super) fn params(args: &[MaybeUninit<u8>]) -> [*mut c_void; 1] {
    [args.as_ptr().cast_mut().cast()]
}

/// Why a device without memory to spare is refused, and how much to take of it otherwise: `fraction` of all of it, but never
/// the last gigabyte that is free, which the driver, captured graphs and collectives need.
pub(crate) fn usable_bytes(info: &DeviceInfo, fraction: f64) -> Result<usize, DriverError> {
    const KEPT_BYTES: usize = 1 << 30;
    /// Device memory is handed out in pages of this size.
    const PAGE_BYTES: usize = 2 << 20;
    if !(fraction > 0.0 && fraction <= 1.0) {
        let why = format!("{fraction} is no share of a GPU's memory: give one above 0 and up to 1");
        return Err(DriverError::Unusable { why });
    }
    let wanted = (info.total_bytes as f64 * fraction) as usize;
    let bytes = wanted.min(info.free_bytes.saturating_sub(KEPT_BYTES)) / PAGE_BYTES * PAGE_BYTES;
    if bytes == 0 {
        let requested_bytes = KEPT_BYTES + PAGE_BYTES;
        return Err(DriverError::OutOfMemory {
            requested_bytes,
            free_bytes: info.free_bytes,
            total_bytes: info.total_bytes,
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
