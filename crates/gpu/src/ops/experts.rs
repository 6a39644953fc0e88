//! Routed experts. Kernels: `kernels/experts.cu`.
use crate::Gpu;
use r1_backend::{Activation, BackendError, Experts, MlpWeights, Tensor};
pub(crate) fn expert_table(_: &Gpu, _: &[MlpWeights<Gpu>]) -> Result<Tensor<Gpu>, BackendError> {
    panic!("to be written")
}
pub(crate) fn experts(
    _: &Gpu,
    _: &Activation<Gpu>,
    _: &Tensor<Gpu>,
    _: &Tensor<Gpu>,
    _: &Experts<Gpu>,
    _: &Tensor<Gpu>,
) {
    panic!("to be written")
}
