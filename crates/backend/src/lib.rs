//! What a device must offer: the [`Backend`] and [`Communicator`] traits, tensors, shapes, and `conformance`,
//! the one test suite that every backend runs. Knows no device.
#![forbid(unsafe_code)]

mod host;

pub use host::{HostBytes, HostTensor};
