//! One matrix per head. Kernels: `kernels/per_head.cu`.
use crate::Gpu;
use r1_backend::{HeadWeight, Tensor};
pub(crate) fn per_head(_: &Gpu, _: &Tensor<Gpu>, _: &HeadWeight<Gpu>, _: &Tensor<Gpu>) {
    panic!("to be written")
}
