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

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
