//! Log-probabilities. Kernels: `kernels/logprobs.cu`.
use crate::Gpu;
use r1_backend::{LogprobsOut, Tensor};
pub(crate) fn logprobs(_: &Gpu, _: &Tensor<Gpu>, _: &Tensor<Gpu>, _: &LogprobsOut<Gpu>) {
    panic!("to be written")
}
