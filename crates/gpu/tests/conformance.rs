//! The conformance suite on the emulated GPU: the kernels that a real one runs, compiled for the host.

use r1_gpu::Gpu;

/// Two threads run blocks, so that blocks overlap.
fn emu() -> Gpu {
    Gpu::emulated(2, 1 << 30).expect("an emulated device")
}

r1_backend::conformance_tests!(&emu(), oracle: &r1_reference::Reference::new());
