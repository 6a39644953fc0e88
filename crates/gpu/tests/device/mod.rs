//! The device that a test binary runs on: emulated, or what `R1_GPU_DEVICE` names (`cuda`, `rocm`). A real one is shared by all
//! tests of the binary, which then run with `--test-threads=1`.

use std::env;
use std::ops::Deref;
use std::sync::OnceLock;

use r1_gpu::Gpu;

static SHARED: OnceLock<Gpu> = OnceLock::new();

/// A device for one test.
pub(crate) enum Device {
    /// Its own.
    Own(Box<Gpu>),
    /// Everybody's.
    Shared(&'static Gpu),
}

impl Deref for Device {
    type Target = Gpu;

    fn deref(&self) -> &Gpu {
        match self {
            Self::Own(gpu) => gpu,
            Self::Shared(gpu) => gpu,
        }
    }
}

/// The device.
///
/// # Panics
/// When there is no such device.
pub(crate) fn device() -> Device {
    let allow_ptx = env::var_os("R1_GPU_ALLOW_PTX").is_some_and(|value| !value.is_empty());
    let open = || match env::var("R1_GPU_DEVICE").as_deref() {
        Ok("cuda") => Gpu::cuda(0, 0.3, allow_ptx).unwrap_or_else(|error| panic!("{error}")),
        Ok("rocm") => Gpu::rocm(0, 0.3).unwrap_or_else(|error| panic!("{error}")),
        other => panic!("R1_GPU_DEVICE is {other:?}; there are cuda, rocm and emu"),
    };
    match env::var("R1_GPU_DEVICE").as_deref() {
        // Two threads run blocks, so that blocks overlap.
        Err(_) | Ok("emu") => Device::Own(Box::new(Gpu::emulated(2, 1 << 30).expect("an emulated device"))),
        _ => Device::Shared(SHARED.get_or_init(open)),
    }
}
