//! FP8 block weights as BF16, at load. Kernel: `kernels/widen.cu`.

use r1_backend::{Backend, BackendError, HostTensor, Tensor};
use r1_core::DType;

use crate::Gpu;
use crate::driver::DevicePtr;
use crate::launch::{Args, Geometry, ptr};

/// Columns of a block, in widen.cu.
const COLUMNS: usize = 1024;

#[derive(Clone, Copy)]
#[repr(C)]
struct WidenArgs {
    data: DevicePtr,
    scales: DevicePtr,
    out: DevicePtr,
    num_rows: u32,
    num_cols: u32,
    scale_cols: u32,
    block_n: u32,
    block_k: u32,
    offset_n: u32,
    offset_k: u32,
}

// SAFETY: the twin of widen::Args.
unsafe impl Args for WidenArgs {}

pub(crate) fn import_widened(
    gpu: &Gpu,
    data: &HostTensor,
    scales: &HostTensor,
    block: [usize; 2],
    offset: [usize; 2],
) -> Result<Tensor<Gpu>, BackendError> {
    let (rows, cols) = (data.shape()[0], data.shape()[1]);
    let out = gpu.alloc(&[rows, cols], DType::BF16)?;
    // The codes are on the device only until the stream has passed the launch: whoever gets their memory comes later.
    let (codes, factors) = (gpu.import(data)?, gpu.import(scales)?);
    let args = WidenArgs {
        data: ptr(&codes),
        scales: ptr(&factors),
        out: ptr(&out),
        num_rows: rows as u32,
        num_cols: cols as u32,
        scale_cols: scales.shape()[1] as u32,
        block_n: block[0] as u32,
        block_k: block[1] as u32,
        offset_n: offset[0] as u32,
        offset_k: offset[1] as u32,
    };
    let grid = [rows, cols.div_ceil(COLUMNS), 1];
    gpu.launch("widen_fp8", Geometry { grid, warps: 4, shared_bytes: 0 }, &args);
    Ok(out)
}
