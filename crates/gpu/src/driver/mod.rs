//! What a device's driver must do, and what the backend may ask of it: memory, one stream, launches, graphs. Knows no
//! operation and no tensor.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(any(feature = "cuda", feature = "rocm", test))]
pub(crate) mod device;
pub(crate) mod emu;
#[cfg(feature = "rocm")]
pub(crate) mod hip;
#[cfg(any(feature = "cuda", feature = "rocm"))]
pub(crate) mod nccl;

use std::any::Any;
use std::fmt;
use std::mem::MaybeUninit;
use std::sync::Arc;

use r1_backend::CommError;
use r1_core::DType;

/// A failure of a driver, in the user's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// A kernel that could not be launched, or that failed while it ran.
    #[error("kernel {kernel}: {why}")]
    Kernel {
        /// Its name.
        kernel: String,
        /// The driver's words.
        why: String,
    },
    /// Another call of the driver.
    #[error("{call}: {why}")]
    Call {
        /// What was called.
        call: &'static str,
        /// The driver's words.
        why: String,
    },
    /// The device has no room.
    #[error("no room for {requested_bytes} bytes, {free_bytes} of {total_bytes} are free")]
    OutOfMemory {
        /// What was to be reserved.
        requested_bytes: usize,
        /// What the device could still give.
        free_bytes: usize,
        /// All of it.
        total_bytes: usize,
    },
    /// The device cannot be used at all.
    #[error("{why}")]
    Unusable {
        /// Why, and the way out.
        why: String,
    },
}

/// An address in a device's memory. Arithmetic is the caller's; 0 is no address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct DevicePtr(pub(crate) u64);

impl DevicePtr {
    /// The address `bytes` further on.
    pub(crate) fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// Rows of bytes in device memory, dense on the host's side.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::struct_field_names)] // a number of rows is what it is
pub(crate) struct Rows {
    /// The first row.
    pub(crate) at: DevicePtr,
    pub(crate) num_rows: usize,
    pub(crate) width_bytes: usize,
    /// From row to row.
    pub(crate) pitch_bytes: usize,
}

impl Rows {
    /// Bytes without gaps.
    pub(crate) fn dense(at: DevicePtr, size_bytes: usize) -> Self {
        Self { at, num_rows: 1, width_bytes: size_bytes, pitch_bytes: size_bytes }
    }

    /// Bytes of all rows.
    pub(crate) fn size_bytes(self) -> usize {
        self.num_rows * self.width_bytes
    }
}

/// What a read waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadOrder {
    /// Everything enqueued before.
    AfterAll,
    /// Nothing: what is read was waited for.
    AtOnce,
}

/// One launch of a kernel. Threads per block are `warps` times the device's warp size.
#[derive(Clone, Copy)]
pub(crate) struct Launch<'a> {
    pub(crate) kernel: &'static str,
    pub(crate) grid: [u32; 3],
    pub(crate) warps: u32,
    pub(crate) shared_bytes: usize,
    /// The kernel's one argument struct.
    pub(crate) args: &'a [MaybeUninit<u8>],
}

impl fmt::Debug for Launch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {:?} blocks of {} warps", self.kernel, self.grid, self.warps)
    }
}

/// What a device is.
#[derive(Clone, Debug)]
pub(crate) struct DeviceInfo {
    /// `cuda`, `rocm` or `emu`.
    pub(crate) driver: &'static str,
    /// As the vendor calls it.
    pub(crate) name: String,
    /// `sm_90`, `gfx942`, `emu`.
    pub(crate) arch: String,
    /// Threads of a warp.
    pub(crate) warp_size: u32,
    /// Multiprocessors, for geometry that fills the device.
    pub(crate) num_multiprocessors: u32,
    /// Most shared memory that a block can have.
    pub(crate) max_shared_bytes: usize,
    /// Memory that is there, and of it what may be taken now.
    pub(crate) total_bytes: usize,
    pub(crate) free_bytes: usize,
    /// FP8 matrix instructions: W8A8.
    pub(crate) fp8: bool,
    /// FP8 is FNUZ: -0 must not reach it.
    pub(crate) fnuz: bool,
}

/// How many devices CUDA has.
pub(crate) fn cuda_devices() -> Result<usize, DriverError> {
    #[cfg(feature = "cuda")]
    return cuda::count();
    #[cfg(not(feature = "cuda"))]
    Err(not_built("cuda"))
}

/// How many devices HIP has.
pub(crate) fn hip_devices() -> Result<usize, DriverError> {
    #[cfg(feature = "rocm")]
    return hip::count();
    #[cfg(not(feature = "rocm"))]
    Err(not_built("rocm"))
}

#[cfg(not(all(feature = "cuda", feature = "rocm")))]
fn not_built(feature: &str) -> DriverError {
    let why = format!(
        "this program was built without the feature `{feature}`: build it with `cargo build --release --features {feature}`, \
         for which tools/gpu/toolchain.sh installs the compiler"
    );
    DriverError::Unusable { why }
}

/// A point of the stream that can be waited for.
pub(crate) trait Mark: Send {
    /// Waits until the stream has passed it; gives the first failure of what was enqueued before it and after the mark before.
    fn wait(self: Box<Self>) -> Result<(), DriverError>;
}

/// A recorded list of work.
pub(crate) type RecordedGraph = Box<dyn Any + Send>;

/// What ranks do together; as [`Communicator`](r1_backend::Communicator) has it, on dense ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Collective {
    /// `out` is `x`.
    AllReduce,
    /// `out` has world_size times the elements of `x`, rank by rank.
    AllGather,
    /// `x` has world_size times the elements of `out`.
    ReduceScatter,
    AllToAll,
    /// `out` is `x`.
    Broadcast {
        root: usize,
    },
    Send {
        to: usize,
    },
    /// `out` is `x`.
    Recv {
        from: usize,
    },
}

/// Dense ranges of a collective.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CollectiveArgs {
    pub(crate) what: Collective,
    pub(crate) x: DevicePtr,
    pub(crate) out: DevicePtr,
    /// Of `x`.
    pub(crate) elements: usize,
    pub(crate) dtype: DType,
}

/// One rank's end of a group: collectives enqueued on its device's stream, and captured like launches.
pub(crate) trait Collectives: Send + Sync {
    /// Enqueues one on `driver`, which is this rank's.
    fn enqueue(&self, driver: &dyn Driver, args: CollectiveArgs) -> Result<(), DriverError>;

    /// The first failure of a collective that has run, since the last call.
    fn failure(&self) -> Result<(), CommError>;

    /// Takes no further part: ranks that wait for this one stop waiting, and work that is still enqueued does nothing.
    fn leave(&self);
}

/// A group of one: its collectives are copies, which need nobody.
pub(crate) struct Alone;

impl Collectives for Alone {
    fn enqueue(&self, _driver: &dyn Driver, args: CollectiveArgs) -> Result<(), DriverError> {
        panic!("{:?} of a single rank", args.what)
    }

    fn failure(&self) -> Result<(), CommError> {
        Ok(())
    }

    fn leave(&self) {}
}

/// One device with one stream. Calls enqueue and return; a failure of what was enqueued surfaces from a [`Mark`] or a read.
pub(crate) trait Driver: Send + Sync + 'static {
    /// What it is.
    fn info(&self) -> &DeviceInfo;

    /// Device memory, zeroed or not, until the driver is dropped.
    fn reserve(&self, size_bytes: usize) -> Result<DevicePtr, DriverError>;

    /// Copies `src` to the device, in order with the stream; `src` may change as soon as the call returns.
    fn write(&self, src: &[u8], to: Rows) -> Result<(), DriverError>;

    /// Copies from the device.
    fn read(&self, from: Rows, dst: &mut [u8], order: ReadOrder) -> Result<(), DriverError>;

    /// Sets bytes.
    fn fill(&self, at: DevicePtr, size_bytes: usize, byte: u8) -> Result<(), DriverError>;

    /// Copies within the device.
    fn copy(&self, from: DevicePtr, to: DevicePtr, size_bytes: usize) -> Result<(), DriverError>;

    /// Runs a kernel.
    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError>;

    /// Marks the stream's end as it is now.
    fn mark(&self) -> Result<Box<dyn Mark>, DriverError>;

    /// From here to [`end_capture`](Driver::end_capture) launches, fills, copies and collectives are recorded and not run.
    fn begin_capture(&self) -> Result<(), DriverError>;

    /// What was recorded.
    fn end_capture(&self) -> Result<RecordedGraph, DriverError>;

    /// Enqueues what was recorded.
    fn replay(&self, graph: &RecordedGraph) -> Result<(), DriverError>;

    /// Itself, for who makes a group of several of a kind.
    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}
