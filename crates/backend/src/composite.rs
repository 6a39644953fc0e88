//! Default bodies of the composites, made of primitives: what a fused one is compared with.

use std::ops::Range;

use crate::{
    Activation, Backend, Batch, Communicator, HeadWeight, LatentCache, MlpScratch, MlpWeights, MoeScratch,
    MoeWeights, QkvScratch, QkvWeights, QueryProjection, RopeTable, Tensor, Weight, shape,
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

/// See [`Backend::mla_absorb`].
pub fn mla_absorb<B: Backend>(
    backend: &B,
    q: &Tensor<B>,
    kv_a: &Tensor<B>,
    norm: &Tensor<B>,
    eps: f32,
    rope: &RopeTable<B>,
    batch: &Batch<B>,
    cache: &LatentCache<B>,
    w_uk: &HeadWeight<B>,
    q_latent: &Tensor<B>,
) {
    let nope = w_uk.rows.len();
    backend.rope_cache(&q.narrow(2, nope..q.dim(2)), kv_a, norm, eps, rope, batch, cache);
    let rows = q_latent.dim(0);
    if rows > 0 {
        backend.per_head(&q.narrow(2, 0..nope).rows(0..rows), w_uk, q_latent);
    }
}

/// See [`Backend::mla_attend`].
///
/// # Panics
/// When `seqs` does not begin at 0, or is neither all sequences nor those that decode.
#[track_caller]
pub fn mla_attend<B: Backend>(
    backend: &B,
    q_latent: &Tensor<B>,
    q_rope: &Tensor<B>,
    cache: &LatentCache<B>,
    batch: &Batch<B>,
    seqs: Range<usize>,
    scale: f32,
    w_uv: &HeadWeight<B>,
    o_latent: &Tensor<B>,
    attended: &Activation<B>,
) {
    shape::mla_attend(batch, &seqs, w_uv, attended);
    backend.mla_attention(q_latent, q_rope, cache, batch, seqs, scale, o_latent);
    let rows = 0..attended.dense.dim(0);
    let by_head = attended.dense.split_last(&[o_latent.dim(1), w_uv.rows.len()]);
    backend.per_head(&o_latent.rows(rows), w_uv, &by_head);
    backend.quantize(attended);
}

/// See [`Backend::linear_add_norm`].
pub fn linear_add_norm<B: Backend>(
    backend: &B,
    comm: &dyn Communicator<B>,
    x: &Activation<B>,
    w: &Weight<B>,
    block_out: &Tensor<B>,
    residual: &Tensor<B>,
    norm: &Tensor<B>,
    eps: f32,
    out: &Activation<B>,
) {
    backend.linear(x, w, block_out);
    backend.all_reduce_add_norm(comm, residual, block_out, norm, eps, out);
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
