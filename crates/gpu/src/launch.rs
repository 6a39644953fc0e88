//! From tensors to kernels: argument structs, addresses, scratch memory.

use std::mem::MaybeUninit;
use std::sync::PoisonError;

use r1_backend::Tensor;
use r1_core::DType;

use crate::Gpu;
use crate::driver::{DevicePtr, Launch};

/// The one argument of a kernel: the twin of the struct in its `.cu` file.
///
/// # Safety
/// `repr(C)`, with the fields of the kernel's struct in their order; every address in it that the kernel reads or writes lies in
/// the device memory of tensors or scratch that live until the stream has passed the launch.
pub(crate) unsafe trait Args: Copy {}

/// Blocks in x, y and z, and what each of them has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) grid: [usize; 3],
    pub(crate) warps: u32,
    /// `sizeof` of the kernel's shared struct; the emulator checks it.
    pub(crate) shared_bytes: usize,
}

impl Geometry {
    /// One row of blocks without shared memory.
    pub(crate) fn blocks(blocks: usize, warps: u32) -> Self {
        Self { grid: [blocks, 1, 1], warps, shared_bytes: 0 }
    }
}

/// An element type as `DTypeCode` in gpu.cuh names it.
pub(crate) fn dtype_code(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::BF16 => 1,
        DType::F16 => 2,
        DType::F8E4M3 => 3,
        DType::I8 | DType::U32 => panic!("{dtype} has no dtype code"),
    }
}

/// Where a view's first element lies.
pub(crate) fn ptr(tensor: &Tensor<Gpu>) -> DevicePtr {
    tensor.buffer().at().offset(tensor.offset() * tensor.dtype().size_bytes())
}

/// The distance between neighbours of dimension `dim`, in elements.
pub(crate) fn stride(tensor: &Tensor<Gpu>, dim: usize) -> i64 {
    tensor.strides()[dim] as i64
}

/// Whether rows of a view can be read 16 bytes at a time: address, strides and width are multiples of it.
pub(crate) fn is_vectorizable(tensor: &Tensor<Gpu>) -> bool {
    let size = tensor.dtype().size_bytes();
    let (last, outer) = tensor.strides().split_last().expect("a dimension");
    let width = tensor.shape()[tensor.shape().len() - 1];
    *last == 1
        && ptr(tensor).0.is_multiple_of(16)
        && (width * size).is_multiple_of(16)
        && outer.iter().all(|stride| (stride * size).is_multiple_of(16))
}

impl Gpu {
    /// Enqueues a kernel; nothing where the grid is empty.
    pub(crate) fn launch<A: Args>(&self, kernel: &'static str, geometry: Geometry, args: &A) {
        if geometry.grid.contains(&0) {
            return;
        }
        let grid = geometry.grid.map(|size| u32::try_from(size).expect("a grid of fewer than 2^32 blocks"));
        // SAFETY: the struct's own bytes, padding among them, as bytes that may hold anything.
        let args = unsafe {
            std::slice::from_raw_parts(std::ptr::from_ref(args).cast::<MaybeUninit<u8>>(), size_of::<A>())
        };
        let launch =
            Launch { kernel, grid, warps: geometry.warps, shared_bytes: geometry.shared_bytes, args };
        self.settle_weights();
        if let Some(names) = &mut *self.recorded.lock().unwrap_or_else(PoisonError::into_inner) {
            names.push(kernel);
        }
        self.note(kernel, self.driver.launch(&launch));
    }

    /// Scratch memory for the launches of one operation: what the operation before left there is gone. 256-byte aligned.
    ///
    /// # Panics
    /// When it is larger than [`scratch_bytes`](Gpu::scratch_bytes): the operation has to do its work in parts.
    pub(crate) fn scratch(&self, size_bytes: usize) -> DevicePtr {
        let room = self.scratch_bytes();
        assert!(size_bytes <= room, "an operation asks for {size_bytes} bytes of scratch, {room} are there");
        self.scratch.at()
    }

    /// Threads of a warp.
    pub(crate) fn warp_size(&self) -> u32 {
        self.driver.info().warp_size
    }

    /// Multiprocessors: blocks that the device runs at once at least.
    pub(crate) fn num_multiprocessors(&self) -> usize {
        self.driver.info().num_multiprocessors as usize
    }

    /// Counters that are zero before and after each launch, for kernels whose last block finishes the work: 16,384 of them.
    pub(crate) fn counters(&self) -> DevicePtr {
        self.counters.at()
    }
}
