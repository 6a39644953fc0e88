//! Host memory of the CPU backend, and who may look at it.
//!
//! Tensors are shared handles that operations write through, so every buffer keeps a borrow state as a `RefCell` does:
//! many readers or one writer. An operation borrows its arguments; a clash is a bug of the caller and panics, so that
//! overlapping arguments, or two threads, are never undefined behaviour.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use r1_backend::HostTensor;

use crate::numa::Interleave;
use crate::pool::Pool;

/// Alignment of owned memory: a cache line, so that rows of common sizes start on one.
const ALIGN: usize = 64;
/// Size and alignment of huge pages; large buffers ask for them.
const HUGE_PAGE: usize = 2 << 20;

/// Bytes that all buffers of one backend own.
pub(crate) type Meter = Arc<AtomicUsize>;

/// Memory of a tensor: owned, or a checkpoint's bytes where they lie.
pub struct Buffer {
    storage: Storage,
    read_only: bool,
    /// Number of readers, or `WRITER`.
    borrows: AtomicUsize,
}

const WRITER: usize = usize::MAX;

enum Storage {
    Owned {
        region: Region,
        len: usize,
        meter: Meter,
    },
    /// Part of a region that others share.
    Part {
        region: Arc<Region>,
        offset: usize,
        len: usize,
        meter: Meter,
    },
    Host(HostTensor),
    Empty,
}

// SAFETY: owned memory is reached only through borrows, which the atomic state makes exclusive or shared.
unsafe impl Send for Buffer {}
// SAFETY: as for `Send`.
unsafe impl Sync for Buffer {}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match &self.storage {
            Storage::Owned { len, .. } | Storage::Part { len, .. } => format!("{len} bytes"),
            Storage::Host(host) => format!("{host:?} in place"),
            Storage::Empty => "empty".to_owned(),
        };
        f.debug_tuple("Buffer").field(&kind).finish()
    }
}

impl Buffer {
    /// `size_bytes` zeros; `None` when the allocator has no room.
    pub(crate) fn zeroed(size_bytes: usize, numa: Option<&Interleave>, meter: &Meter) -> Option<Self> {
        let storage = if size_bytes == 0 {
            Storage::Empty
        } else {
            let region = Region::zeroed(size_bytes, Pages::Huge, numa)?;
            meter.fetch_add(size_bytes, Ordering::Relaxed);
            Storage::Owned { region, len: size_bytes, meter: meter.clone() }
        };
        Some(Self { storage, read_only: false, borrows: AtomicUsize::new(0) })
    }

    /// A read-only copy of `bytes`; `None` when the allocator has no room.
    pub(crate) fn copied(bytes: &[u8], numa: Option<&Interleave>, meter: &Meter) -> Option<Self> {
        let mut buffer = Self::zeroed(bytes.len(), numa, meter)?;
        if let Storage::Owned { region, .. } = &buffer.storage {
            // SAFETY: the new region has room for `bytes` and nobody else knows it.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), region.start.as_ptr(), bytes.len()) };
        }
        buffer.read_only = true;
        Some(buffer)
    }

    /// A read-only copy of `bytes` in huge pages, made by all threads of `pool`; `None` when the system has no room.
    pub(crate) fn in_huge_pages(
        bytes: &[u8],
        slabs: &mut Slabs,
        pool: &mut Pool,
        numa: Option<&Interleave>,
        meter: &Meter,
    ) -> Option<Self> {
        /// What a thread copies before it takes more.
        const TASK_BYTES: usize = 1 << 20;
        let (region, offset) = slabs.take(bytes.len(), numa)?;
        let to = Shared(region.start.as_ptr().wrapping_add(offset));
        pool.run(bytes.len().div_ceil(TASK_BYTES), &|task, _| {
            let part = &bytes[task * TASK_BYTES..bytes.len().min((task + 1) * TASK_BYTES)];
            // SAFETY: `take` gave a range of that length to this call alone, and tasks write disjoint parts of it.
            unsafe {
                std::ptr::copy_nonoverlapping(part.as_ptr(), to.at(task * TASK_BYTES), part.len());
            }
        });
        meter.fetch_add(bytes.len(), Ordering::Relaxed);
        let storage = Storage::Part { region, offset, len: bytes.len(), meter: meter.clone() };
        Some(Self { storage, read_only: true, borrows: AtomicUsize::new(0) })
    }

    /// The host's bytes in place, read-only.
    pub(crate) fn host(host: HostTensor) -> Self {
        Self { storage: Storage::Host(host), read_only: true, borrows: AtomicUsize::new(0) }
    }

    /// Start and length in bytes. Asked for anew at each borrow, since a host owner's word holds only for the slice it gives.
    fn memory(&self) -> (*mut u8, usize) {
        match &self.storage {
            Storage::Owned { region, len, .. } => (region.start.as_ptr(), *len),
            Storage::Part { region, offset, len, .. } => (region.start.as_ptr().wrapping_add(*offset), *len),
            Storage::Host(host) => (host.bytes().as_ptr().cast_mut(), host.bytes().len()),
            Storage::Empty => (std::ptr::without_provenance_mut(HUGE_PAGE), 0),
        }
    }

    /// Borrows for reading; `None` while somebody writes.
    pub(crate) fn read(&self) -> Option<ReadGuard<'_>> {
        let free = |count: usize| (count < WRITER - 1).then(|| count + 1);
        self.borrows.fetch_update(Ordering::Acquire, Ordering::Relaxed, free).ok()?;
        let (ptr, len) = self.memory();
        Some(ReadGuard { buffer: self, ptr, len })
    }

    /// Borrows for writing.
    pub(crate) fn write(&self) -> Result<WriteGuard<'_>, WriteRefused> {
        if self.read_only {
            return Err(WriteRefused::ReadOnly);
        }
        self.borrows
            .compare_exchange(0, WRITER, Ordering::Acquire, Ordering::Relaxed)
            .map_err(|_| WriteRefused::Borrowed)?;
        let (ptr, len) = self.memory();
        Ok(WriteGuard { buffer: self, ptr, len })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Storage::Owned { len, meter, .. } | Storage::Part { len, meter, .. } = &self.storage {
            meter.fetch_sub(*len, Ordering::Relaxed);
        }
    }
}

/// A pointer that several threads write behind, each its own range.
struct Shared(*mut u8);

// SAFETY: whoever follows the pointer says why nobody else writes there.
unsafe impl Sync for Shared {}

impl Shared {
    fn at(&self, offset: usize) -> *mut u8 {
        self.0.wrapping_add(offset)
    }
}

/// Regions of huge pages that many weights share: most weights are smaller than a huge page.
#[derive(Default)]
pub(crate) struct Slabs {
    /// The region that is being filled, its size, and how much of it is taken.
    open: Option<(Arc<Region>, usize, usize)>,
}

impl Slabs {
    /// Sizes of a region; a larger weight gets one of its own.
    const SLAB_BYTES: usize = 32 * HUGE_PAGE;

    /// Bytes that nobody else gets: a region and where in it they begin, a multiple of `ALIGN`.
    fn take(&mut self, size_bytes: usize, numa: Option<&Interleave>) -> Option<(Arc<Region>, usize)> {
        let fits = |taken: usize, len: usize| taken.checked_add(size_bytes).is_some_and(|end| end <= len);
        if let Some((region, len, taken)) = &mut self.open
            && fits(*taken, *len)
        {
            let offset = *taken;
            *taken = (offset + size_bytes).next_multiple_of(ALIGN);
            return Some((region.clone(), offset));
        }
        let len = size_bytes.max(Self::SLAB_BYTES);
        // A region's memory is touched, by the threads that copy, not before it is filled.
        let region = Arc::new(Region::zeroed(len, Pages::Huge, numa)?);
        if size_bytes < Self::SLAB_BYTES {
            self.open = Some((region.clone(), len, size_bytes.next_multiple_of(ALIGN)));
        }
        Some((region, 0))
    }
}

/// Pages that a mapping asks the system for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Huge ones, where there are any.
    Huge,
    /// The smallest.
    Small,
    /// What the system gives by itself.
    Any,
}

/// Asks for the pages. The system need not follow.
///
/// # Safety
/// The range lies inside one mapping.
#[cfg(unix)]
pub(crate) unsafe fn advise_pages(start: NonNull<u8>, len: usize, pages: Pages) {
    #[cfg(target_os = "linux")]
    if let Some(advice) = match pages {
        Pages::Huge => Some(libc::MADV_HUGEPAGE),
        Pages::Small => Some(libc::MADV_NOHUGEPAGE),
        Pages::Any => None,
    } {
        // SAFETY: the caller says that the range is a mapping's; the call is advice and changes no content.
        unsafe { libc::madvise(start.as_ptr().cast(), len, advice) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, len, pages);
}

/// Owned bytes, zeroed when made.
pub(crate) struct Region {
    pub(crate) start: NonNull<u8>,
    origin: Origin,
}

// SAFETY: a region is an address range of its own; what is done with the memory is said where it is reached.
unsafe impl Send for Region {}
// SAFETY: as for `Send`.
unsafe impl Sync for Region {}

enum Origin {
    Heap(Layout),
    /// Pages of their own, of which `start` is the first multiple of a huge page.
    #[cfg(unix)]
    Pages {
        base: NonNull<u8>,
        len: usize,
    },
}

impl Region {
    /// Large regions are mapped: pages come zeroed when first touched, huge ones where the system has them, and interleaved over
    /// the nodes of `numa`.
    pub(crate) fn zeroed(size_bytes: usize, pages: Pages, numa: Option<&Interleave>) -> Option<Self> {
        #[cfg(unix)]
        if size_bytes >= HUGE_PAGE {
            let len = size_bytes.checked_add(HUGE_PAGE)?;
            let (access, kind) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: a fresh mapping touches no memory that exists.
            let base = unsafe { libc::mmap(std::ptr::null_mut(), len, access, kind, -1, 0) };
            if base == libc::MAP_FAILED {
                return None;
            }
            let base = NonNull::new(base.cast::<u8>())?;
            let origin = Origin::Pages { base, len };
            // SAFETY: the mapping is one huge page longer than what is used of it.
            let start = unsafe { base.add(base.align_offset(HUGE_PAGE)) };
            // SAFETY: the range lies inside the new mapping.
            unsafe { advise_pages(start, size_bytes, pages) };
            let region = Self { start, origin };
            if let Some(numa) = numa {
                // What an allowed call still fails for is room: for the policy, or on the nodes that it names.
                // SAFETY: the range is the new mapping.
                unsafe { numa.bind(base, len) }.ok()?;
            }
            return Some(region);
        }
        #[cfg(not(unix))]
        let _ = (pages, numa);
        let layout = Layout::from_size_align(size_bytes, ALIGN).ok()?;
        // SAFETY: the size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { start, origin: Origin::Heap(layout) })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        match self.origin {
            // SAFETY: allocated with this layout, and no borrow outlives the buffer.
            Origin::Heap(layout) => unsafe { dealloc(self.start.as_ptr(), layout) },
            #[cfg(unix)]
            Origin::Pages { base, len } => {
                // SAFETY: mapped with this length, and no borrow outlives the buffer.
                unsafe { libc::munmap(base.as_ptr().cast(), len) };
            }
        }
    }
}

/// Why a buffer cannot be written now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteRefused {
    ReadOnly,
    Borrowed,
}

/// Bytes that nobody writes while this lives.
pub(crate) struct ReadGuard<'a> {
    buffer: &'a Buffer,
    pub(crate) ptr: *const u8,
    pub(crate) len: usize,
}

// SAFETY: the bytes do not change while the guard lives, whoever looks at them.
unsafe impl Send for ReadGuard<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for ReadGuard<'_> {}

impl Drop for ReadGuard<'_> {
    fn drop(&mut self) {
        self.buffer.borrows.fetch_sub(1, Ordering::Release);
    }
}

/// Bytes that nobody else touches while this lives.
pub(crate) struct WriteGuard<'a> {
    buffer: &'a Buffer,
    pub(crate) ptr: *mut u8,
    pub(crate) len: usize,
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        self.buffer.borrows.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_readers_or_one_writer() {
        let buffer = Buffer::zeroed(100, None, &Meter::default()).expect("room");
        let readers = (buffer.read(), buffer.read());
        assert!(readers.0.is_some() && readers.1.is_some());
        assert_eq!(buffer.write().err(), Some(WriteRefused::Borrowed));
        drop(readers);
        let writer = buffer.write().expect("free again");
        assert!(buffer.read().is_none());
        assert_eq!(buffer.write().err(), Some(WriteRefused::Borrowed));
        drop(writer);
        assert!(buffer.read().is_some());
    }

    #[test]
    fn memory_is_zeroed_aligned_and_metered() {
        let meter = Meter::default();
        for size in [0, 1, 100, 3 * HUGE_PAGE + 5] {
            let buffer = Buffer::zeroed(size, None, &meter).expect("room");
            assert_eq!(meter.load(Ordering::Relaxed), size);
            let guard = buffer.read().expect("free");
            assert!(guard.ptr.addr().is_multiple_of(ALIGN) && guard.len == size);
            // SAFETY: the guard allows reading `len` bytes.
            assert!(unsafe { std::slice::from_raw_parts(guard.ptr, size) }.iter().all(|&b| b == 0));
        }
        assert_eq!(meter.load(Ordering::Relaxed), 0);
        assert!(Buffer::zeroed(usize::MAX / 2, None, &meter).is_none());
    }

    #[test]
    fn imported_memory_cannot_be_written() {
        let host = HostTensor::from_f32(&[1.0, 2.0], &[2]);
        assert_eq!(Buffer::host(host).write().err(), Some(WriteRefused::ReadOnly));
        let copied = Buffer::copied(&[1, 2, 3], None, &Meter::default()).expect("room");
        assert_eq!(copied.write().err(), Some(WriteRefused::ReadOnly));
        assert_eq!(copied.read().expect("free").len, 3);
    }

    #[test]
    fn weights_share_huge_pages_without_overlap() {
        let (meter, mut slabs) = (Meter::default(), Slabs::default());
        let mut pool = Pool::new(3).expect("threads start");
        let sizes = [1, 63, 64, 5 << 20, 3, (1 << 20) + 1, 70 << 20, 60 << 20, 8];
        let of = |i: usize, size: usize| -> Vec<u8> { (0..size).map(|at| (at % 251 + i) as u8).collect() };
        let buffers: Vec<Buffer> = sizes
            .iter()
            .enumerate()
            .map(|(i, &size)| {
                Buffer::in_huge_pages(&of(i, size), &mut slabs, &mut pool, None, &meter).expect("room")
            })
            .collect();
        assert_eq!(meter.load(Ordering::Relaxed), sizes.iter().sum::<usize>());
        for (i, (buffer, size)) in buffers.iter().zip(sizes).enumerate() {
            assert_eq!(buffer.write().err(), Some(WriteRefused::ReadOnly));
            let guard = buffer.read().expect("free");
            assert!(guard.ptr.addr().is_multiple_of(ALIGN) && guard.len == size);
            // SAFETY: the guard allows reading `len` bytes.
            assert!(unsafe { std::slice::from_raw_parts(guard.ptr, size) } == of(i, size), "weight {i}");
        }
        drop(buffers);
        assert_eq!(meter.load(Ordering::Relaxed), 0);
    }
}
