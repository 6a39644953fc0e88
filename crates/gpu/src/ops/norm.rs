//! Norms, SiLU, quantisation. Kernels: `kernels/norm.cu`.

use r1_backend::{Activation, Fp8Activation, Tensor, shape};

use crate::Gpu;
use crate::driver::{DevicePtr, DriverError};
use crate::launch::{Args, Geometry, dtype_code, is_vectorizable, ptr, stride};

/// Columns that a thread takes at once, `EIGHT` in eight.cuh.
pub(super) const EIGHT: usize = 8;
/// Eights that a thread of a norm keeps, `HELD` in norm.cuh.
const HELD: usize = 4;
/// Most threads of a norm's block.
pub(super) const MAX_THREADS: usize = 1024;

/// The twin of `Fp8Out` in eight.cuh.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Fp8Out {
    codes: DevicePtr,
    scales: DevicePtr,
    codes_stride: i64,
    scales_stride: i64,
    power_of_two: u32,
    vectors: u32,
}

impl Fp8Out {
    pub(super) fn of(fp8: Option<&Fp8Activation<Gpu>>) -> Self {
        fp8.map_or_else(Self::default, |fp8| Self {
            codes: ptr(&fp8.data),
            scales: ptr(&fp8.scales),
            codes_stride: stride(&fp8.data, 0),
            scales_stride: stride(&fp8.scales, 0),
            power_of_two: fp8.power_of_two_scales.into(),
            vectors: is_vectorizable(&fp8.data).into(),
        })
    }
}

/// Warps for a row of `dim` columns of which each thread holds [`HELD`] eights at most; they depend on nothing else.
///
/// # Errors
/// A row that is too long for a block of `max_threads`.
pub(super) fn norm_warps(
    gpu: &Gpu,
    kernel: &'static str,
    dim: usize,
    max_threads: usize,
) -> Result<u32, DriverError> {
    // More threads than these would shorten no wait for memory.
    const USUAL_THREADS: usize = 256;
    let warp = gpu.warp_size() as usize;
    let eights = dim.div_ceil(EIGHT).max(1);
    let usual_warps = USUAL_THREADS.min(max_threads) / warp;
    let warps = eights.div_ceil(HELD * warp).max(eights.div_ceil(warp).min(usual_warps));
    if warps * warp > max_threads {
        let why =
            format!("rows of {dim} values are too long, it takes {} at most", max_threads * HELD * EIGHT);
        return Err(DriverError::Kernel { kernel: kernel.to_owned(), why });
    }
    Ok(warps as u32)
}

/// `sizeof(BlockScratch)` in gpu.cuh.
pub(super) const BLOCK_SCRATCH_BYTES: usize = 32 * size_of::<f32>();

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct NormArgs {
    x: DevicePtr,
    residual: DevicePtr,
    weight: DevicePtr,
    out: DevicePtr,
    fp8: Fp8Out,
    x_stride: i64,
    residual_stride: i64,
    out_stride: i64,
    dim: u32,
    x_dtype: u32,
    residual_dtype: u32,
    weight_dtype: u32,
    out_dtype: u32,
    x_vectors: u32,
    residual_vectors: u32,
    weight_vectors: u32,
    out_vectors: u32,
    eps: f32,
}

// SAFETY: the twin of norms::Args.
unsafe impl Args for NormArgs {}

pub(crate) fn rms_norm(gpu: &Gpu, x: &Tensor<Gpu>, weight: &Tensor<Gpu>, eps: f32, out: &Activation<Gpu>) {
    shape::rms_norm(x, weight, out);
    launch_norm(gpu, "rms_norm", None, x, weight, eps, out);
}

pub(crate) fn add_rms_norm(
    gpu: &Gpu,
    residual: &Tensor<Gpu>,
    x: &Tensor<Gpu>,
    weight: &Tensor<Gpu>,
    eps: f32,
    out: &Activation<Gpu>,
) {
    shape::add(residual, x);
    shape::rms_norm(residual, weight, out);
    launch_norm(gpu, "add_rms_norm", Some(residual), x, weight, eps, out);
}

fn launch_norm(
    gpu: &Gpu,
    kernel: &'static str,
    residual: Option<&Tensor<Gpu>>,
    x: &Tensor<Gpu>,
    weight: &Tensor<Gpu>,
    eps: f32,
    out: &Activation<Gpu>,
) {
    let warps = match norm_warps(gpu, kernel, x.dim(1), MAX_THREADS) {
        Ok(warps) => warps,
        Err(error) => return gpu.note(kernel, Err(error)),
    };
    let geometry = Geometry { grid: [x.dim(0), 1, 1], warps, shared_bytes: BLOCK_SCRATCH_BYTES };
    gpu.launch(kernel, geometry, &norm_args(residual, x, weight, eps, out));
}

pub(super) fn norm_args(
    residual: Option<&Tensor<Gpu>>,
    x: &Tensor<Gpu>,
    weight: &Tensor<Gpu>,
    eps: f32,
    out: &Activation<Gpu>,
) -> NormArgs {
    NormArgs {
        x: ptr(x),
        residual: residual.map_or(DevicePtr(0), ptr),
        weight: ptr(weight),
        out: ptr(&out.dense),
        fp8: Fp8Out::of(out.fp8.as_ref()),
        x_stride: stride(x, 0),
        residual_stride: residual.map_or(0, |residual| stride(residual, 0)),
        out_stride: stride(&out.dense, 0),
        dim: x.dim(1) as u32,
        x_dtype: dtype_code(x.dtype()),
        residual_dtype: residual.map_or(0, |residual| dtype_code(residual.dtype())),
        weight_dtype: dtype_code(weight.dtype()),
        out_dtype: dtype_code(out.dense.dtype()),
        x_vectors: is_vectorizable(x).into(),
        residual_vectors: residual.is_some_and(is_vectorizable).into(),
        weight_vectors: is_vectorizable(weight).into(),
        out_vectors: is_vectorizable(&out.dense).into(),
        eps,
    }
}

/// Blocks for `rows` rows of `cols` columns, eight per thread.
fn by_eights(gpu: &Gpu, rows: usize, cols: usize) -> Geometry {
    const MAX_WARPS: usize = 4;
    let warp = gpu.warp_size() as usize;
    let eights = cols.div_ceil(EIGHT);
    let warps = eights.div_ceil(warp).clamp(1, MAX_WARPS);
    Geometry { grid: [rows, eights.div_ceil(warps * warp), 1], warps: warps as u32, shared_bytes: 0 }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct SiluMulArgs {
    gate_up: DevicePtr,
    out: DevicePtr,
    fp8: Fp8Out,
    gate_up_stride: i64,
    out_stride: i64,
    width: u32,
    gate_up_dtype: u32,
    out_dtype: u32,
    gate_up_vectors: u32,
    out_vectors: u32,
}

// SAFETY: the twin of norms::SiluMulArgs.
unsafe impl Args for SiluMulArgs {}

pub(crate) fn silu_mul(gpu: &Gpu, gate_up: &Tensor<Gpu>, out: &Activation<Gpu>) {
    shape::silu_mul(gate_up, out);
    let (rows, width) = (out.dense.dim(0), out.dense.dim(1));
    let halves_are_vectors = (width * gate_up.dtype().size_bytes()).is_multiple_of(16);
    let args = SiluMulArgs {
        gate_up: ptr(gate_up),
        out: ptr(&out.dense),
        fp8: Fp8Out::of(out.fp8.as_ref()),
        gate_up_stride: stride(gate_up, 0),
        out_stride: stride(&out.dense, 0),
        width: width as u32,
        gate_up_dtype: dtype_code(gate_up.dtype()),
        out_dtype: dtype_code(out.dense.dtype()),
        gate_up_vectors: (halves_are_vectors && is_vectorizable(gate_up)).into(),
        out_vectors: is_vectorizable(&out.dense).into(),
    };
    gpu.launch("silu_mul", by_eights(gpu, rows, width), &args);
}

#[derive(Clone, Copy)]
#[repr(C)]
struct QuantizeArgs {
    x: DevicePtr,
    fp8: Fp8Out,
    x_stride: i64,
    dim: u32,
    x_dtype: u32,
    x_vectors: u32,
}

// SAFETY: the twin of norms::QuantizeArgs.
unsafe impl Args for QuantizeArgs {}

pub(crate) fn quantize(gpu: &Gpu, x: &Activation<Gpu>) {
    shape::quantize(x);
    if x.fp8.is_none() {
        return;
    }
    let args = QuantizeArgs {
        x: ptr(&x.dense),
        fp8: Fp8Out::of(x.fp8.as_ref()),
        x_stride: stride(&x.dense, 0),
        dim: x.dense.dim(1) as u32,
        x_dtype: dtype_code(x.dense.dtype()),
        x_vectors: is_vectorizable(&x.dense).into(),
    };
    gpu.launch("quantize", by_eights(gpu, x.dense.dim(0), x.dense.dim(1)), &args);
}
