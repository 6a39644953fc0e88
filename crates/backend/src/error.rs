//! What can go wrong on a device.

use r1_core::DType;

/// A failure of a backend. Wrong shapes are not among them: those are bugs of the caller, and panic.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BackendError {
    /// The device has no room.
    #[error("{device}: no room for {requested_bytes} bytes ({what}); {hint}")]
    OutOfMemory {
        /// The device.
        device: String,
        /// What was to be allocated.
        what: String,
        /// Its size.
        requested_bytes: usize,
        /// What the user can do.
        hint: String,
    },
    /// The device cannot hold or compute this element type here.
    #[error("{device}: {what} in {dtype} is not supported (supported: {supported})")]
    UnsupportedDType {
        /// The device.
        device: String,
        /// Operation or tensor.
        what: String,
        /// The element type.
        dtype: DType,
        /// What would work.
        supported: String,
    },
    /// An operation enqueued earlier failed.
    #[error("{device}: {op} failed: {why}")]
    Failed {
        /// The device.
        device: String,
        /// The operation.
        op: &'static str,
        /// The driver's words.
        why: String,
    },
}
