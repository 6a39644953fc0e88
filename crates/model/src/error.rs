//! What can go wrong while a model is laid out and loaded.

use r1_backend::{BackendError, CommError};
use r1_core::Rank;
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
    /// The device has no room for a rank's weights and one context.
    #[error(
        "{device}: rank {rank} of {world} holds {:.2} GiB of weights, and one context of --max-model-len {max_model_len} takes \
         {:.2} GiB of KV cache, but only {:.2} GiB are free; raise --tp to spread the weights over more devices, lower \
         --max-model-len, or take a smaller model",
        gib(*.weight_bytes), gib(*.context_bytes), gib(*.free_bytes)
    )]
    TooLarge {
        /// The device.
        device: &'static str,
        /// Which rank.
        rank: Rank,
        /// Ranks.
        world: usize,
        /// Bytes of the rank's weights.
        weight_bytes: usize,
        /// Longest context, tokens.
        max_model_len: usize,
        /// Bytes of KV cache of one such context.
        context_bytes: usize,
        /// Bytes that the device can still give.
        free_bytes: usize,
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

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
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
