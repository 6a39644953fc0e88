//! Sampling. Kernels: `kernels/sample.cu`.
use r1_backend::{SamplingBatch, Tensor};
use crate::Gpu;
pub(crate) fn sample(_: &Gpu, _: &Tensor<Gpu>, _: &SamplingBatch, _: &Tensor<Gpu>) { panic!("to be written") }
