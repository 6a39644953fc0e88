//! A communicator that fails on purpose.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use r1_backend::{Backend, CommError, Communicator, Tensor};

/// Calls until one of them panics; 0 is never.
pub type Fuse = Arc<AtomicUsize>;

/// A rank that panics in the call at which a fuse has burnt down.
pub struct Faulty<B: Backend> {
    /// Does the work.
    pub inner: Arc<dyn Communicator<B>>,
    /// How many sums it lasts.
    pub fuse: Fuse,
    /// How many checks, which are what is left of a communicator on the host where a step was captured.
    pub checks: Fuse,
}

fn burn(fuse: &Fuse) {
    let burnt = fuse.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
    assert!(burnt != Ok(1), "injected");
}

impl<B: Backend> Communicator<B> for Faulty<B> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce(&self, backend: &B, x: &Tensor<B>) {
        burn(&self.fuse);
        self.inner.all_reduce(backend, x);
    }

    fn all_gather(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>) {
        self.inner.all_gather(backend, x, out);
    }

    fn all_gather_last(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>) {
        self.inner.all_gather_last(backend, x, out);
    }

    fn reduce_scatter(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>) {
        self.inner.reduce_scatter(backend, x, out);
    }

    fn all_to_all(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>) {
        self.inner.all_to_all(backend, x, out);
    }

    fn broadcast(&self, backend: &B, x: &Tensor<B>, root: usize) {
        self.inner.broadcast(backend, x, root);
    }

    fn send(&self, backend: &B, x: &Tensor<B>, to: usize) {
        self.inner.send(backend, x, to);
    }

    fn recv(&self, backend: &B, x: &Tensor<B>, from: usize) {
        self.inner.recv(backend, x, from);
    }

    fn check(&self) -> Result<(), CommError> {
        burn(&self.checks);
        self.inner.check()
    }
}
