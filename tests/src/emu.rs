//! GPUs for tests: emulated ones, which run the GPU backend's kernels on the host, or a real one where the environment names it.

use std::env;
use std::sync::{Arc, OnceLock};

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

/// The GPU that `R1_GPU_DEVICE` names (`cuda` or `rocm`), which all tests of a binary share (`--test-threads=1`), and otherwise an
/// emulated one.
///
/// # Panics
/// When there is no such device.
pub fn gpu() -> Arc<Gpu> {
    static SHARED: OnceLock<Arc<Gpu>> = OnceLock::new();
    let allow_ptx = env::var_os("R1_GPU_ALLOW_PTX").is_some_and(|value| !value.is_empty());
    let name = env::var("R1_GPU_DEVICE").unwrap_or_else(|_| "emu".into());
    let open = || match name.as_str() {
        "cuda" => Gpu::cuda(0, 0.3, allow_ptx),
        "rocm" => Gpu::rocm(0, 0.3),
        _ => panic!("R1_GPU_DEVICE is {name:?}; there are cuda, rocm and emu"),
    };
    match name.as_str() {
        "emu" => emulated(1).remove(0),
        _ => SHARED.get_or_init(|| Arc::new(open().unwrap_or_else(|error| panic!("{error}")))).clone(),
    }
}
