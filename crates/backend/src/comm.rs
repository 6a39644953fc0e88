//! What ranks say to each other.

use crate::{Backend, BackendError, Tensor};

/// A collective that could not complete.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CommError {
    /// The group never came to be: a transport is missing, or the devices do not reach each other.
    #[error("{transport}: the ranks cannot be connected: {why}")]
    Connect {
        /// What was to connect them.
        transport: &'static str,
        /// Its words, and the way out.
        why: String,
    },
    /// Another rank left the group, so the collective can never complete.
    #[error("{op}: rank {rank} left the group")]
    PeerGone {
        /// The collective.
        op: &'static str,
        /// Who left.
        rank: usize,
    },
    /// Ranks called different collectives, or with different sizes.
    #[error("{op}: rank {rank} called {found} with {found_elements} elements, this rank has {elements}")]
    Mismatch {
        /// The collective.
        op: &'static str,
        /// Who differs.
        rank: usize,
        /// What it called.
        found: &'static str,
        /// With how many elements.
        found_elements: usize,
        /// Elements here.
        elements: usize,
    },
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// A group of ranks, seen from one of them. Every rank calls the same operations in the same order; each is enqueued
/// on the backend's own stream, so that it can be captured with the step. A failure surfaces from
/// [`Communicator::check`].
pub trait Communicator<B: Backend>: Send + Sync {
    /// This rank.
    fn rank(&self) -> usize;
    /// Ranks in the group.
    fn world_size(&self) -> usize;
    /// `x = Σ_r x_r`, summed in rank order so that every rank has the same bits.
    fn all_reduce(&self, backend: &B, x: &Tensor<B>);
    /// `out [world_size * n, …]` = every rank's `x [n, …]`, in rank order.
    fn all_gather(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>);
    /// `out [L, world_size * n]`: row `l` is row `l` of every rank's `x [L, n]`, one after the other in rank order. It puts
    /// together what column-parallel linears gave.
    fn all_gather_last(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>);
    /// `out [n, …]` = this rank's part of `Σ_r x_r [world_size * n, …]`.
    fn reduce_scatter(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>);
    /// Part `r` of `x [world_size * n, …]` goes to rank `r`; part `r` of `out` comes from rank `r`.
    fn all_to_all(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>);
    /// `x` of rank `root` replaces everyone's.
    fn broadcast(&self, backend: &B, x: &Tensor<B>, root: usize);
    /// Sends `x` to rank `to`, which receives it.
    fn send(&self, backend: &B, x: &Tensor<B>, to: usize);
    /// Receives into `x` what rank `from` sends.
    fn recv(&self, backend: &B, x: &Tensor<B>, from: usize);
    /// The first failure since the last call.
    fn check(&self) -> Result<(), CommError>;
}
