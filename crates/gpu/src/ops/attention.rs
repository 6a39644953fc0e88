//! Absorbed MLA over the paged latent cache. Kernels: `kernels/mla.cu`.
use std::ops::Range;
use r1_backend::{Batch, LatentCache, Tensor};
use crate::Gpu;
#[allow(clippy::too_many_arguments)]
pub(crate) fn mla_attention(_: &Gpu, _: &Tensor<Gpu>, _: &Tensor<Gpu>, _: &LatentCache<Gpu>, _: &Batch<Gpu>, _: &Range<usize>, _: f32, _: &Tensor<Gpu>) { panic!("to be written") }
