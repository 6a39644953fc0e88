//! Composites in fewer launches than their default bodies, with the same numbers.

use r1_backend::{Activation, MlpScratch, MlpWeights, QkvScratch, QkvWeights, QueryProjection, Tensor, composite};

use super::linear::{linear, linear_pair};
use super::norm::rms_norm;
use crate::Gpu;

/// The two projections of the hidden state in one launch.
pub(crate) fn mla_qkv(
    gpu: &Gpu,
    x: &Activation<Gpu>,
    w: &QkvWeights<Gpu>,
    scratch: &QkvScratch<Gpu>,
    q: &Tensor<Gpu>,
    kv_a: &Tensor<Gpu>,
) {
    match &w.q {
        QueryProjection::Direct(direct) => linear_pair(gpu, x, [(direct, q), (&w.kv_a, kv_a)]),
        QueryProjection::LowRank { a, norm, b } => {
            linear_pair(gpu, x, [(a, &scratch.q_a), (&w.kv_a, kv_a)]);
            rms_norm(gpu, &scratch.q_a, norm, w.eps, &scratch.q_a_normed);
            linear(gpu, &scratch.q_a_normed, b, q);
        }
    }
}

pub(crate) fn mlp(
    gpu: &Gpu,
    x: &Activation<Gpu>,
    w: &MlpWeights<Gpu>,
    scratch: &MlpScratch<Gpu>,
    out: &Tensor<Gpu>,
) {
    composite::mlp(gpu, x, w, scratch, out);
}
