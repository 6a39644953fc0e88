//! Un-absorbed MLA. Kernels: `kernels/mla_expanded.cu`.
use std::ops::Range;
use r1_backend::{Batch, Tensor};
use crate::Gpu;
#[allow(clippy::too_many_arguments)]
pub(crate) fn mla_attention_expanded(_: &Gpu, _: &Tensor<Gpu>, _: &Tensor<Gpu>, _: &Tensor<Gpu>, _: &Batch<Gpu>, _: &Range<usize>, _: f32, _: &Tensor<Gpu>) { panic!("to be written") }
