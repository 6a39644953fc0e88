//! Linears. Kernels: `kernels/gemm.cu`.
use crate::Gpu;
use r1_backend::{Activation, Tensor, Weight};
pub(crate) fn linear(_: &Gpu, _: &Activation<Gpu>, _: &Weight<Gpu>, _: &Tensor<Gpu>) {
    panic!("to be written")
}
