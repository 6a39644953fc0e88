//! Rows moved as they are: embedding, gather, token feedback, residual addition. Kernels: `kernels/rows.cu`.

use r1_backend::{Tensor, shape};

use crate::Gpu;
use crate::driver::DevicePtr;
use crate::launch::{Args, Geometry, dtype_code, ptr, stride};

#[derive(Clone, Copy)]
#[repr(C)]
struct EmbedArgs {
    ids: DevicePtr,
    table: DevicePtr,
    out: DevicePtr,
    table_stride: i64,
    out_stride: i64,
    first_row: u32,
    num_rows: u32,
    dim: u32,
    table_dtype: u32,
    out_dtype: u32,
}

// SAFETY: the twin of rows::EmbedArgs.
unsafe impl Args for EmbedArgs {}

pub(crate) fn embed(gpu: &Gpu, ids: &Tensor<Gpu>, table: &Tensor<Gpu>, first_row: usize, out: &Tensor<Gpu>) {
    shape::embed(ids, table, out);
    let args = EmbedArgs {
        ids: ptr(ids),
        table: ptr(table),
        out: ptr(out),
        table_stride: stride(table, 0),
        out_stride: stride(out, 0),
        first_row: first_row as u32,
        num_rows: table.dim(0) as u32,
        dim: table.dim(1) as u32,
        table_dtype: dtype_code(table.dtype()),
        out_dtype: dtype_code(out.dtype()),
    };
    gpu.launch("embed_rows", Geometry::blocks(ids.dim(0), 4), &args);
}

#[derive(Clone, Copy)]
#[repr(C)]
struct GatherRowsArgs {
    x: DevicePtr,
    rows: DevicePtr,
    out: DevicePtr,
    x_stride: i64,
    out_stride: i64,
    dim: u32,
    dtype: u32,
}

// SAFETY: the twin of rows::GatherRowsArgs.
unsafe impl Args for GatherRowsArgs {}

pub(crate) fn gather_rows(gpu: &Gpu, x: &Tensor<Gpu>, rows: &Tensor<Gpu>, out: &Tensor<Gpu>) {
    shape::gather_rows(x, rows, out);
    let args = GatherRowsArgs {
        x: ptr(x),
        rows: ptr(rows),
        out: ptr(out),
        x_stride: stride(x, 0),
        out_stride: stride(out, 0),
        dim: x.dim(1) as u32,
        dtype: dtype_code(x.dtype()),
    };
    gpu.launch("gather_rows", Geometry::blocks(rows.dim(0), 4), &args);
}

#[derive(Clone, Copy)]
#[repr(C)]
struct FeedTokensArgs {
    drawn: DevicePtr,
    from: DevicePtr,
    ids: DevicePtr,
    num_tokens: u32,
}

// SAFETY: the twin of rows::FeedTokensArgs.
unsafe impl Args for FeedTokensArgs {}

pub(crate) fn feed_tokens(gpu: &Gpu, drawn: &Tensor<Gpu>, from: &Tensor<Gpu>, ids: &Tensor<Gpu>) {
    const WARPS: u32 = 4;
    shape::feed_tokens(drawn, from, ids);
    let tokens = ids.dim(0);
    let args =
        FeedTokensArgs { drawn: ptr(drawn), from: ptr(from), ids: ptr(ids), num_tokens: tokens as u32 };
    let threads = (WARPS * gpu.warp_size()) as usize;
    gpu.launch("feed_tokens", Geometry::blocks(tokens.div_ceil(threads), WARPS), &args);
}

#[derive(Clone, Copy)]
#[repr(C)]
struct AddArgs {
    residual: DevicePtr,
    x: DevicePtr,
    residual_stride: i64,
    x_stride: i64,
    dim: u32,
    residual_dtype: u32,
    x_dtype: u32,
}

// SAFETY: the twin of rows::AddArgs.
unsafe impl Args for AddArgs {}

pub(crate) fn add(gpu: &Gpu, residual: &Tensor<Gpu>, x: &Tensor<Gpu>) {
    shape::add(residual, x);
    let args = AddArgs {
        residual: ptr(residual),
        x: ptr(x),
        residual_stride: stride(residual, 0),
        x_stride: stride(x, 0),
        dim: x.dim(1) as u32,
        residual_dtype: dtype_code(residual.dtype()),
        x_dtype: dtype_code(x.dtype()),
    };
    gpu.launch("add", Geometry::blocks(x.dim(0), 4), &args);
}

#[derive(Clone, Copy)]
#[repr(C)]
struct InterleaveArgs {
    x: DevicePtr,
    out: DevicePtr,
    out_stride: i64,
    num_ranks: u32,
    num_rows: u32,
    n: u32,
    dtype: u32,
}

// SAFETY: the twin of rows::InterleaveArgs.
unsafe impl Args for InterleaveArgs {}

/// `out [rows, ranks * n]` from `gathered [ranks, rows, n]`.
pub(crate) fn interleave(gpu: &Gpu, gathered: DevicePtr, [ranks, n]: [usize; 2], out: &Tensor<Gpu>) {
    let rows = out.dim(0);
    let args = InterleaveArgs {
        x: gathered,
        out: ptr(out),
        out_stride: stride(out, 0),
        num_ranks: ranks as u32,
        num_rows: rows as u32,
        n: n as u32,
        dtype: dtype_code(out.dtype()),
    };
    let geometry = Geometry { grid: [rows, ranks, 1], warps: 4, shared_bytes: 0 };
    gpu.launch("interleave", geometry, &args);
}
