//! Default bodies of the composites, made of primitives: what a fused one is compared with.

use crate::{
    Activation, Backend, Communicator, MlpScratch, MlpWeights, MoeScratch, MoeWeights, QkvScratch,
    QkvWeights, QueryProjection, Tensor,
};

/// See [`Backend::add_rms_norm`].
pub fn add_rms_norm<B: Backend>(
    backend: &B,
    residual: &Tensor<B>,
    x: &Tensor<B>,
    weight: &Tensor<B>,
    eps: f32,
    out: &Activation<B>,
) {
    backend.add(residual, x);
    backend.rms_norm(residual, weight, eps, out);
}

/// See [`Backend::all_reduce_add_norm`].
pub fn all_reduce_add_norm<B: Backend>(
    backend: &B,
    comm: &dyn Communicator<B>,
    residual: &Tensor<B>,
    x: &Tensor<B>,
    weight: &Tensor<B>,
    eps: f32,
    out: &Activation<B>,
) {
    comm.all_reduce(backend, x);
    backend.add_rms_norm(residual, x, weight, eps, out);
}

/// See [`Backend::mla_qkv`].
pub fn mla_qkv<B: Backend>(
    backend: &B,
    x: &Activation<B>,
    w: &QkvWeights<B>,
    scratch: &QkvScratch<B>,
    q: &Tensor<B>,
    kv_a: &Tensor<B>,
) {
    match &w.q {
        QueryProjection::Direct(proj) => backend.linear(x, proj, q),
        QueryProjection::LowRank { a, norm, b } => {
            backend.linear(x, a, &scratch.q_a);
            backend.rms_norm(&scratch.q_a, norm, w.eps, &scratch.q_a_normed);
            backend.linear(&scratch.q_a_normed, b, q);
        }
    }
    backend.linear(x, &w.kv_a, kv_a);
}

/// See [`Backend::mlp`].
pub fn mlp<B: Backend>(
    backend: &B,
    x: &Activation<B>,
    w: &MlpWeights<B>,
    scratch: &MlpScratch<B>,
    out: &Tensor<B>,
) {
    let width = w.gate.out_features();
    backend.linear(x, &w.gate, &scratch.gate_up.narrow(1, 0..width));
    backend.linear(x, &w.up, &scratch.gate_up.narrow(1, width..2 * width));
    backend.silu_mul(&scratch.gate_up, &scratch.hidden);
    backend.linear(&scratch.hidden, &w.down, out);
}

/// See [`Backend::moe_layer`].
pub fn moe_layer<B: Backend>(
    backend: &B,
    x: &Activation<B>,
    w: &MoeWeights<B>,
    scratch: &MoeScratch<B>,
    out: &Tensor<B>,
) {
    let router_input = Activation::dense(x.dense.clone());
    backend.linear(&router_input, &w.router, &scratch.logits);
    backend.route(&scratch.logits, w.bias.as_ref(), &w.routing, &scratch.ids, &scratch.weights);
    backend.mlp(x, &w.shared, &scratch.shared, out);
    backend.experts(x, &scratch.ids, &scratch.weights, &w.experts, out);
}
