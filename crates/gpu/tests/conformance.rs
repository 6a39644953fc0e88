//! The conformance suite on the emulated GPU: the kernels that a real one runs, compiled for the host. With `R1_GPU_DEVICE` the
//! same binary runs it on a real one.

mod device;

use device::device;

r1_backend::conformance_tests!(&*device(), oracle: &r1_reference::Reference::new());
