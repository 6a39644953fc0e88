//! A linear and the norm of its result, with what is added between them, in one launch. Kernels: `kernels/linear_norm.cu`.

use r1_backend::{Activation, Communicator, Tensor, Weight, composite, shape};

use super::linear::{FEW_ROWS, FewRows, Form, GemmArgs, Kind, Operand, SHORT_ROWS};
use super::norm::{BLOCK_SCRATCH_BYTES, MAX_THREADS, NormArgs, norm_args, norm_warps};
use crate::Gpu;
use crate::driver::DevicePtr;
use crate::launch::{Args, Geometry};

#[derive(Clone, Copy)]
#[repr(C)]
struct LinearNormArgs {
    gemm: GemmArgs,
    norm: NormArgs,
    counters: DevicePtr,
    norm_threads: u32,
    finishers: u32,
}

// SAFETY: the twin of linear_norm::Args.
unsafe impl Args for LinearNormArgs {}

/// Warps of a block, `WARPS` in linear_norm.cu.
const WARPS: u32 = 8;

/// One linear of `x`, or two; then the norm of the first one's result, or of what `residual` becomes with it. False, and nothing is done, where
/// that takes more launches.
pub(super) fn linear_norm(
    gpu: &Gpu,
    x: &Activation<Gpu>,
    linears: &[(&Weight<Gpu>, &Tensor<Gpu>)],
    residual: Option<&Tensor<Gpu>>,
    norm: &Tensor<Gpu>,
    eps: f32,
    out: &Activation<Gpu>,
) -> bool {
    const FLAG_BYTES: usize = 16;
    for (w, out) in linears {
        shape::linear(x, w, out);
    }
    let normed = linears[0].1;
    if let Some(residual) = residual {
        shape::add(residual, normed);
    }
    shape::rms_norm(residual.unwrap_or(normed), norm, out);
    let Ok(norm_warps) = norm_warps(gpu, "linear_norm", normed.dim(1), MAX_THREADS) else { return false };
    let tokens = normed.dim(0);
    if norm_warps > WARPS || tokens > FEW_ROWS {
        return false;
    }
    let weights: Vec<_> = linears.iter().map(|(w, out)| (*w, out.split_last(&[1, out.dim(1)]))).collect();
    let Some(product) = FewRows::new(gpu, &Operand::of_linear(x, weights[0].0), &weights, false) else {
        return false;
    };
    let kernel = match (product.kind, product.form) {
        (Kind::Fp8, Form::Short) => "linear_norm_fp8_short",
        (Kind::Fp8, _) => "linear_norm_fp8_middle",
        (Kind::W8, Form::Short) => "linear_norm_w8_short",
        (Kind::W8, _) => "linear_norm_w8_middle",
        (Kind::Bf16, Form::Short) => "linear_norm_bf16_short",
        (Kind::Bf16, _) => "linear_norm_bf16_middle",
        (Kind::Simt, _) => "linear_norm_simt",
    };
    let grid = product.grid;
    if grid[1] > product.num_counters {
        return false;
    }
    let blocks = product.first_columns();
    let args = LinearNormArgs {
        norm: norm_args(residual, normed, norm, eps, out),
        counters: product.counters,
        norm_threads: norm_warps * gpu.warp_size(),
        finishers: product.finishers(
            gpu,
            blocks,
            if product.form == Form::Middle { tokens } else { tokens.min(SHORT_ROWS) },
        ),
        gemm: product.args,
    };
    let shared_bytes = product.shared_bytes + BLOCK_SCRATCH_BYTES + FLAG_BYTES;
    gpu.launch(kernel, Geometry { grid, warps: WARPS, shared_bytes }, &args);
    true
}

#[allow(clippy::too_many_arguments)] // the operation's
pub(crate) fn linear_add_norm(
    gpu: &Gpu,
    comm: &dyn Communicator<Gpu>,
    x: &Activation<Gpu>,
    w: &Weight<Gpu>,
    block_out: &Tensor<Gpu>,
    residual: &Tensor<Gpu>,
    norm: &Tensor<Gpu>,
    eps: f32,
    out: &Activation<Gpu>,
) {
    let is_alone = comm.world_size() == 1;
    if !(is_alone && linear_norm(gpu, x, &[(w, block_out)], Some(residual), norm, eps, out)) {
        composite::linear_add_norm(gpu, comm, x, w, block_out, residual, norm, eps, out);
    }
}
