//! RoPE, the latent norm, the paged cache. Kernels: `kernels/rope.cu`.
use crate::Gpu;
use r1_backend::{Batch, LatentCache, RopeTable, Tensor};
use std::ops::Range;
#[allow(clippy::too_many_arguments)]
pub(crate) fn rope_cache(
    _: &Gpu,
    _: &Tensor<Gpu>,
    _: &Tensor<Gpu>,
    _: &Tensor<Gpu>,
    _: f32,
    _: &RopeTable<Gpu>,
    _: &Batch<Gpu>,
    _: &LatentCache<Gpu>,
) {
    panic!("to be written")
}
pub(crate) fn gather_latent(
    _: &Gpu,
    _: &LatentCache<Gpu>,
    _: &Batch<Gpu>,
    _: &Range<usize>,
    _: &Tensor<Gpu>,
) {
    panic!("to be written")
}
