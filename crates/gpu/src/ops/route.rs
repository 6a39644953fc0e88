//! The choice of experts. Kernels: `kernels/route.cu`.
use crate::Gpu;
use r1_backend::{Routing, Tensor};
pub(crate) fn route(
    _: &Gpu,
    _: &Tensor<Gpu>,
    _: Option<&Tensor<Gpu>>,
    _: &Routing,
    _: &Tensor<Gpu>,
    _: &Tensor<Gpu>,
) {
    panic!("to be written")
}
