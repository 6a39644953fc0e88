//! Sampling. Kernels: `kernels/sample.cu`.
use crate::Gpu;
use r1_backend::{SamplingBatch, Tensor};
pub(crate) fn sample(_: &Gpu, _: &Tensor<Gpu>, _: &SamplingBatch, _: &Tensor<Gpu>) {
    panic!("to be written")
}
