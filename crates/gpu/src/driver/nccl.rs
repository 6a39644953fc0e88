//! Collectives between GPUs of one process: NCCL and RCCL, which have the same functions, found at run time. Sums are in the
//! library's order, with the same bits on every rank. Knows no tensor.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use libloading::Library;
use r1_backend::{BackendError, CommError};
use r1_core::DType;

use super::device::{Api, Device, Handle};
use super::{Collective, CollectiveArgs, Collectives, Driver, DriverError};

/// How long a rank that leaves waits for what its peers have under way, before it is taken for stuck.
const PATIENCE: Duration = Duration::from_secs(5);
const SUM: c_int = 0;

/// A vendor with such a library.
pub(crate) trait Connected: Api {
    /// Its file names, the first one as users know it.
    const LIBRARIES: &'static [&'static str];
    /// Where it comes from.
    const SOURCE: &'static str;

    /// Whether a stream has nothing left to do, or has failed.
    fn is_idle(&self, stream: Handle) -> bool;
}

type Comm = *mut c_void;
type Stream = *mut c_void;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([c_char; 128]);

macro_rules! functions {
    ($($name:ident($($arg:ty),*) -> $result:ty;)*) => {
        #[allow(non_snake_case)]
        struct Functions {
            $($name: unsafe extern "C" fn($($arg),*) -> $result,)*
            // Holds the addresses above.
            _library: Library,
        }

        impl Functions {
            fn find(library: Library) -> Result<Self, libloading::Error> {
                // SAFETY: the functions have these types in every NCCL 2 and RCCL.
                unsafe { Ok(Self { $($name: *library.get(concat!(stringify!($name), "\0").as_bytes())?,)* _library: library }) }
            }
        }
    };
}

functions! {
    ncclGetUniqueId(*mut UniqueId) -> c_int;
    ncclCommInitRank(*mut Comm, c_int, UniqueId, c_int) -> c_int;
    ncclCommAbort(Comm) -> c_int;
    ncclCommGetAsyncError(Comm, *mut c_int) -> c_int;
    ncclGetErrorString(c_int) -> *const c_char;
    ncclGroupStart() -> c_int;
    ncclGroupEnd() -> c_int;
    ncclAllReduce(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
    ncclAllGather(*const c_void, *mut c_void, usize, c_int, Comm, Stream) -> c_int;
    ncclReduceScatter(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
    ncclBroadcast(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
    ncclSend(*const c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
    ncclRecv(*mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
}

impl Functions {
    fn load<A: Connected>() -> Result<Self, DriverError> {
        let unusable = |why: String| DriverError::Unusable { why };
        // SAFETY: the library's initialisers run, as in every program that uses it.
        let library = A::LIBRARIES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
        let library = library.ok_or_else(|| {
            unusable(format!(
                "several ranks need {}, which is not there: {}; or take --tp 1",
                A::LIBRARIES[0],
                A::SOURCE
            ))
        })?;
        Self::find(library).map_err(|error| unusable(format!("{} is too old: {error}", A::LIBRARIES[0])))
    }

    fn words(&self, code: c_int) -> String {
        // SAFETY: gives a constant that ends with a zero, for every code.
        unsafe { CStr::from_ptr((self.ncclGetErrorString)(code)) }.to_string_lossy().into_owned()
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), DriverError> {
        if code == 0 { Ok(()) } else { Err(DriverError::Call { call, why: self.words(code) }) }
    }

    /// What `enqueue` enqueues happens as one, in whatever order the ranks come.
    fn grouped(&self, enqueue: impl FnOnce() -> Result<(), DriverError>) -> Result<(), DriverError> {
        // SAFETY: ended below, on the same thread.
        self.check("ncclGroupStart", unsafe { (self.ncclGroupStart)() })?;
        let result = enqueue();
        // SAFETY: begun above.
        let ended = self.check("ncclGroupEnd", unsafe { (self.ncclGroupEnd)() });
        result.and(ended)
    }
}

/// A rank's communicator, until somebody leaves.
struct End<A: Api> {
    device: Arc<Device<A>>,
    comm: Mutex<Option<Handle>>,
}

impl<A: Api> End<A> {
    fn comm(&self) -> MutexGuard<'_, Option<Handle>> {
        self.comm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Group<A: Api> {
    functions: Functions,
    ends: Vec<End<A>>,
    /// The first rank that left.
    left: Mutex<Option<usize>>,
}

/// One rank's end.
pub(crate) struct NcclRank<A: Connected> {
    rank: usize,
    group: Arc<Group<A>>,
}

impl<A: Connected> NcclRank<A> {
    /// A group with one rank per device.
    pub(crate) fn group(devices: Vec<Arc<Device<A>>>) -> Result<Vec<Self>, DriverError> {
        let functions = Functions::load::<A>()?;
        let world_size = devices.len();
        let mut id = UniqueId([0; 128]);
        // SAFETY: writes one id.
        functions.check("ncclGetUniqueId", unsafe { (functions.ncclGetUniqueId)(&raw mut id) })?;
        let mut comms = vec![ptr::null_mut(); world_size];
        functions.grouped(|| {
            for (rank, (device, comm)) in devices.iter().zip(&mut comms).enumerate() {
                device.enter()?;
                // SAFETY: writes one handle, by the end of the group, on the device that is current.
                let code =
                    unsafe { (functions.ncclCommInitRank)(comm, world_size as c_int, id, rank as c_int) };
                functions.check("ncclCommInitRank", code)?;
            }
            Ok(())
        })?;
        let end = |(device, comm)| End { device, comm: Mutex::new(Some(Handle(comm))) };
        let ends = devices.into_iter().zip(comms).map(end).collect();
        let group = Arc::new(Group { functions, ends, left: Mutex::default() });
        Ok((0..world_size).map(|rank| Self { rank, group: group.clone() }).collect())
    }
}

/// `ncclDataType_t`; what is only moved may be bytes.
fn data_type(dtype: DType, is_summed: bool) -> Result<c_int, DriverError> {
    match dtype {
        DType::F32 => Ok(7),
        DType::BF16 => Ok(9),
        DType::F16 => Ok(6),
        DType::U32 => Ok(3),
        DType::F8E4M3 | DType::I8 if !is_summed => Ok(1),
        DType::F8E4M3 | DType::I8 => {
            Err(DriverError::Call { call: "a sum over ranks", why: format!("{dtype} is not summed") })
        }
    }
}

impl<A: Connected> Collectives for NcclRank<A> {
    fn enqueue(&self, _driver: &dyn Driver, args: CollectiveArgs) -> Result<(), DriverError> {
        let Group { functions, ends, .. } = &*self.group;
        let End { device, .. } = &ends[self.rank];
        let comm = ends[self.rank].comm();
        // Somebody has left, which `failure` tells.
        let Some(Handle(comm)) = *comm else { return Ok(()) };
        device.enter()?;
        let CollectiveArgs { what, x, out, elements, dtype } = args;
        let is_summed = matches!(what, Collective::AllReduce | Collective::ReduceScatter);
        let (kind, stream, world_size) = (data_type(dtype, is_summed)?, device.stream().0, ends.len());
        let (from, to) = (x.0 as *const c_void, out.0 as *mut c_void);
        let peer = |rank: usize| rank as c_int;
        // Of both calls of an exchange.
        let part = |rank: usize| rank * (elements / world_size) * dtype.size_bytes();
        // SAFETY: dense ranges of this device's memory, as large as the collective says; each call only enqueues.
        unsafe {
            match what {
                Collective::AllReduce => {
                    let code = (functions.ncclAllReduce)(from, to, elements, kind, SUM, comm, stream);
                    functions.check("ncclAllReduce", code)
                }
                Collective::AllGather => functions.check(
                    "ncclAllGather",
                    (functions.ncclAllGather)(from, to, elements, kind, comm, stream),
                ),
                Collective::ReduceScatter => {
                    let each = elements / world_size;
                    let code = (functions.ncclReduceScatter)(from, to, each, kind, SUM, comm, stream);
                    functions.check("ncclReduceScatter", code)
                }
                Collective::AllToAll => functions.grouped(|| {
                    for rank in 0..world_size {
                        let (each, from, to) =
                            (elements / world_size, from.byte_add(part(rank)), to.byte_add(part(rank)));
                        let sent = (functions.ncclSend)(from, each, kind, peer(rank), comm, stream);
                        functions.check("ncclSend", sent)?;
                        let received = (functions.ncclRecv)(to, each, kind, peer(rank), comm, stream);
                        functions.check("ncclRecv", received)?;
                    }
                    Ok(())
                }),
                Collective::Broadcast { root } => {
                    let code = (functions.ncclBroadcast)(from, to, elements, kind, peer(root), comm, stream);
                    functions.check("ncclBroadcast", code)
                }
                Collective::Send { to } => functions
                    .check("ncclSend", (functions.ncclSend)(from, elements, kind, peer(to), comm, stream)),
                Collective::Recv { from } => functions
                    .check("ncclRecv", (functions.ncclRecv)(to, elements, kind, peer(from), comm, stream)),
            }
        }
    }

    fn failure(&self) -> Result<(), CommError> {
        let Group { functions, ends, left } = &*self.group;
        if let Some(rank) = *left.lock().unwrap_or_else(PoisonError::into_inner) {
            return Err(CommError::PeerGone { op: "collective", rank });
        }
        let End { device, .. } = &ends[self.rank];
        let failed = |why: String| {
            let device = device.info().name.clone();
            CommError::Backend(BackendError::Failed { device, op: "collective", why })
        };
        let comm = ends[self.rank].comm();
        let Some(Handle(comm)) = *comm else { return Ok(()) };
        let mut code = 0;
        // SAFETY: writes one number.
        let asked = unsafe { (functions.ncclCommGetAsyncError)(comm, &raw mut code) };
        functions.check("ncclCommGetAsyncError", asked).map_err(|error| failed(error.to_string()))?;
        functions.check("collective", code).map_err(|error| failed(error.to_string()))
    }

    /// Ends the whole group: a rank alone can neither release its peers from a collective nor be replaced. A captured step with
    /// collectives must not be replayed after it.
    ///
    /// Does not wait: NCCL keeps a communicator until the graphs that captured it are gone, and a peer drops its graphs only once its
    /// collective has been released.
    fn leave(&self) {
        self.group.left.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(self.rank);
        for rank in 0..self.group.ends.len() {
            let Some(comm) = self.group.ends[rank].comm().take() else { continue };
            let group = self.group.clone();
            let abort = move || group.abort(rank, comm);
            if let Err(error) = thread::Builder::new().name("leave".into()).spawn(abort) {
                tracing::error!(
                    "rank {rank} stays in its group: no thread can be started to end it: {error}"
                );
            }
        }
    }
}

impl<A: Connected> Group<A> {
    /// Ends one rank's communicator, which was taken out of everybody's reach, after what runs has had time to end.
    fn abort(&self, rank: usize, Handle(comm): Handle) {
        let device = &self.ends[rank].device;
        if device.enter().is_err() {
            return;
        }
        let deadline = Instant::now() + PATIENCE;
        while !device.is_idle() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: a whole communicator that nobody else has.
        unsafe { (self.functions.ncclCommAbort)(comm) };
    }
}

impl<A: Connected> Device<A> {
    fn is_idle(&self) -> bool {
        self.vendor().is_idle(self.stream())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_summed_moves_as_bytes() {
        assert_eq!(data_type(DType::F8E4M3, false), Ok(1));
        let error = data_type(DType::F8E4M3, true).expect_err("no sum").to_string();
        assert!(error.contains("not summed"), "{error}");
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_missing_library_is_named_with_the_way_out() {
        // Where it is installed, the group's devices decide.
        if let Err(error) = Functions::load::<crate::driver::cuda::Cuda>() {
            let error = error.to_string();
            assert!(error.contains("libnccl.so.2") && error.contains("--tp 1"), "{error}");
        }
    }
}
