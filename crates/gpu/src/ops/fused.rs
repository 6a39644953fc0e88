//! Composites in fewer launches than their default bodies, with the same numbers. Kernels: `kernels/mlp.cu`, and those of the primitives.

use r1_backend::{
    Activation, MlpScratch, MlpWeights, QkvScratch, QkvWeights, QueryProjection, Tensor, shape,
};

use super::linear::{GemmArgs, PairLaunch, linear, linear_pair, pair_launch};
use super::linear_norm::linear_norm;
use super::norm::{Fp8Out, rms_norm, silu_mul};
use crate::Gpu;
use crate::driver::DevicePtr;
use crate::launch::{Args, dtype_code, is_vectorizable, ptr, stride};

/// The two projections of the hidden state in one launch, with the norm of the first one's result where rows are few.
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
            let pair = [(a, &scratch.q_a), (&w.kv_a, kv_a)];
            if !linear_norm(gpu, x, &pair, None, norm, w.eps, &scratch.q_a_normed) {
                linear_pair(gpu, x, pair);
                rms_norm(gpu, &scratch.q_a, norm, w.eps, &scratch.q_a_normed);
            }
            linear(gpu, &scratch.q_a_normed, b, q);
        }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct MlpArgs {
    gemm: GemmArgs,
    hidden: DevicePtr,
    fp8: Fp8Out,
    hidden_stride: i64,
    gate_up_dtype: u32,
    hidden_dtype: u32,
    hidden_vectors: u32,
}

// SAFETY: the twin of mlp::Args.
unsafe impl Args for MlpArgs {}

/// Few tokens: gate, up, SiLU and the FP8 form in one launch.
pub(crate) fn mlp(
    gpu: &Gpu,
    x: &Activation<Gpu>,
    w: &MlpWeights<Gpu>,
    scratch: &MlpScratch<Gpu>,
    out: &Tensor<Gpu>,
) {
    let width = w.gate.out_features();
    let (gate, up) = (scratch.gate_up.narrow(1, 0..width), scratch.gate_up.narrow(1, width..2 * width));
    shape::linear(x, &w.gate, &gate);
    shape::linear(x, &w.up, &up);
    shape::silu_mul(&scratch.gate_up, &scratch.hidden);
    let Some(PairLaunch { kernel, geometry, args }) = pair_launch(gpu, x, [&w.gate, &w.up], &gate) else {
        linear_pair(gpu, x, [(&w.gate, &gate), (&w.up, &up)]);
        silu_mul(gpu, &scratch.gate_up, &scratch.hidden);
        return linear(gpu, &scratch.hidden, &w.down, out);
    };
    let hidden = &scratch.hidden.dense;
    let args = MlpArgs {
        gemm: args,
        hidden: ptr(hidden),
        fp8: Fp8Out::of(scratch.hidden.fp8.as_ref()),
        hidden_stride: stride(hidden, 0),
        gate_up_dtype: dtype_code(scratch.gate_up.dtype()),
        hidden_dtype: dtype_code(hidden.dtype()),
        hidden_vectors: is_vectorizable(hidden).into(),
    };
    gpu.launch(kernel, geometry, &args);
    linear(gpu, &scratch.hidden, &w.down, out);
}
