//! What can go wrong while a model is laid out and loaded.

use r1_backend::{BackendError, CommError};
use r1_weights::WeightsError;

/// A model that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The checkpoint is missing something, or disagrees with its config.json.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The device refused.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The configuration is valid, but not built.
    #[error("{what} is not supported: {why}")]
    Unsupported {
        /// Field or combination.
        what: String,
        /// Why, and what would work.
        why: String,
    },
    /// The ranks do not divide the model.
    #[error(
        "{what} is {size}, which {world} tensor-parallel ranks do not divide evenly; choose another --tp"
    )]
    Indivisible {
        /// The dimension.
        what: &'static str,
        /// Its size.
        size: usize,
        /// Ranks.
        world: usize,
    },
}

/// A step that failed on the device or between the ranks.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum StepError {
    /// On the device.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// Between the ranks.
    #[error(transparent)]
    Comm(#[from] CommError),
}
