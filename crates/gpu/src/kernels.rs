//! The kernels as the build found them in `kernels/`.

use std::ffi::c_void;

/// A kernel compiled for the host.
#[derive(Clone, Copy)]
pub(crate) struct EmulatedKernel {
    pub(crate) name: &'static str,
    pub(crate) entry: unsafe extern "C" fn(*const c_void),
    /// Size of its argument struct.
    pub(crate) args_bytes: usize,
    pub(crate) max_warps: u32,
}

/// A kernel file compiled for GPUs.
#[cfg(any(feature = "cuda", feature = "rocm"))]
pub(crate) struct Image {
    /// `rows.cu`.
    pub(crate) file: &'static str,
    /// `gfx942`; `fatbin` where it holds several.
    pub(crate) arch: &'static str,
    /// Names of its kernels.
    pub(crate) kernels: &'static [&'static str],
    pub(crate) bytes: &'static Aligned<[u8]>,
}

/// Drivers read images in words.
#[cfg(any(feature = "cuda", feature = "rocm"))]
#[repr(C, align(64))]
pub(crate) struct Aligned<B: ?Sized>(pub(crate) B);

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
