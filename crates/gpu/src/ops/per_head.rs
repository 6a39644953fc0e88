//! One matrix per head. Kernels: `kernels/per_head.cu`.
use r1_backend::{HeadWeight, Tensor};
use crate::Gpu;
pub(crate) fn per_head(_: &Gpu, _: &Tensor<Gpu>, _: &HeadWeight<Gpu>, _: &Tensor<Gpu>) { panic!("to be written") }
