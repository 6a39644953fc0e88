//! Emulated GPUs: the GPU backend's kernels and launches, run on the host.

use std::sync::Arc;

use r1_gpu::Gpu;

/// Lent untouched: it costs what is used.
const MEMORY_BYTES: usize = 1 << 30;

/// So many emulated GPUs. One alone has two threads, so that thread blocks overlap; several overlap each other.
///
/// # Panics
/// When they do not start.
pub fn emulated(devices: usize) -> Vec<Arc<Gpu>> {
    let threads = if devices == 1 { 2 } else { 1 };
    let open = || Gpu::emulated(threads, MEMORY_BYTES).expect("an emulated device");
    (0..devices).map(|_| Arc::new(open())).collect()
}
