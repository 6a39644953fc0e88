//! RoPE, the latent norm, the paged cache. Kernels: `kernels/rope.cu`.

use std::ops::Range;

use r1_backend::{Batch, LatentCache, RopeTable, Tensor, shape};

use super::norm::{BLOCK_SCRATCH_BYTES, EIGHT, norm_warps};
use crate::Gpu;
use crate::driver::{DevicePtr, DriverError};
use crate::launch::{Args, Geometry, dtype_code, is_vectorizable, ptr, stride};

/// The twin of `rope::Cache`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Cache {
    data: DevicePtr,
    codes: DevicePtr,
    scales: DevicePtr,
    data_strides: [i64; 2],
    codes_strides: [i64; 2],
    scales_strides: [i64; 2],
    num_slots: u32,
    block_size: u32,
    latent_dim: u32,
    rope_dim: u32,
    dtype: u32,
    data_vectors: u32,
    codes_vectors: u32,
    unused: u32,
}

impl Cache {
    fn of(cache: &LatentCache<Gpu>) -> Self {
        let strides = |part: &Tensor<Gpu>| [stride(part, 0), stride(part, 1)];
        // Where the entries that are not codes lie.
        let data = cache.fp8.as_ref().map_or(&cache.data, |fp8| &fp8.rope);
        let mut twin = Self {
            data: ptr(data),
            codes: DevicePtr(0),
            scales: DevicePtr(0),
            data_strides: strides(data),
            codes_strides: [0; 2],
            scales_strides: [0; 2],
            num_slots: (cache.data.dim(0) * cache.block_size()) as u32,
            block_size: cache.block_size() as u32,
            latent_dim: cache.latent_dim as u32,
            rope_dim: cache.rope_dim() as u32,
            dtype: dtype_code(data.dtype()),
            data_vectors: is_vectorizable(data).into(),
            codes_vectors: 0,
            unused: 0,
        };
        if let Some(fp8) = &cache.fp8 {
            twin.codes = ptr(&cache.data);
            twin.codes_strides = strides(&cache.data);
            twin.codes_vectors = is_vectorizable(&cache.data).into();
            twin.scales = ptr(&fp8.scales);
            twin.scales_strides = strides(&fp8.scales);
        }
        twin
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct CacheArgs {
    q_rope: DevicePtr,
    kv_a: DevicePtr,
    norm: DevicePtr,
    cos_sin: DevicePtr,
    positions: DevicePtr,
    slots: DevicePtr,
    cache: Cache,
    q_token_stride: i64,
    q_head_stride: i64,
    kv_stride: i64,
    cos_sin_stride: i64,
    heads: u32,
    q_dtype: u32,
    kv_dtype: u32,
    norm_dtype: u32,
    q_vectors: u32,
    kv_vectors: u32,
    norm_vectors: u32,
    eps: f32,
}

// SAFETY: the twin of rope::CacheArgs.
unsafe impl Args for CacheArgs {}

#[allow(clippy::too_many_arguments)] // the operation's
pub(crate) fn rope_cache(
    gpu: &Gpu,
    q_rope: &Tensor<Gpu>,
    kv_a: &Tensor<Gpu>,
    norm: &Tensor<Gpu>,
    eps: f32,
    rope: &RopeTable<Gpu>,
    batch: &Batch<Gpu>,
    cache: &LatentCache<Gpu>,
) {
    const OP: &str = "rope_cache";
    shape::rope_cache(q_rope, kv_a, norm, rope, batch, cache);
    let warps = match entry_warps(gpu, cache) {
        Ok(warps) => warps,
        Err(error) => return gpu.note(OP, Err(error)),
    };
    let args = cache_args(q_rope, kv_a, norm, eps, rope, batch, cache);
    let grid = [q_rope.dim(0), token_blocks(gpu, q_rope, warps), 1];
    gpu.launch(OP, Geometry { grid, warps, shared_bytes: BLOCK_SCRATCH_BYTES }, &args);
}

/// Warps that norm a latent.
pub(super) fn entry_warps(gpu: &Gpu, cache: &LatentCache<Gpu>) -> Result<u32, DriverError> {
    const MAX_THREADS: usize = 128;
    norm_warps(gpu, "rope_cache", cache.latent_dim, MAX_THREADS)
}

/// Blocks of so many warps that a token takes: one for its entry, the others for its queries.
pub(super) fn token_blocks(gpu: &Gpu, q_rope: &Tensor<Gpu>, warps: u32) -> usize {
    let threads = (warps * gpu.warp_size()) as usize;
    1 + (q_rope.dim(1) * q_rope.dim(2).div_ceil(EIGHT)).div_ceil(threads)
}

pub(super) fn cache_args(
    q_rope: &Tensor<Gpu>,
    kv_a: &Tensor<Gpu>,
    norm: &Tensor<Gpu>,
    eps: f32,
    rope: &RopeTable<Gpu>,
    batch: &Batch<Gpu>,
    cache: &LatentCache<Gpu>,
) -> CacheArgs {
    CacheArgs {
        q_rope: ptr(q_rope),
        kv_a: ptr(kv_a),
        norm: ptr(norm),
        cos_sin: ptr(&rope.cos_sin),
        positions: ptr(&batch.positions),
        slots: ptr(&batch.slots),
        cache: Cache::of(cache),
        q_token_stride: stride(q_rope, 0),
        q_head_stride: stride(q_rope, 1),
        kv_stride: stride(kv_a, 0),
        cos_sin_stride: stride(&rope.cos_sin, 0),
        heads: q_rope.dim(1) as u32,
        q_dtype: dtype_code(q_rope.dtype()),
        kv_dtype: dtype_code(kv_a.dtype()),
        norm_dtype: dtype_code(norm.dtype()),
        q_vectors: is_vectorizable(q_rope).into(),
        kv_vectors: is_vectorizable(kv_a).into(),
        norm_vectors: is_vectorizable(norm).into(),
        eps,
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct GatherArgs {
    cache: Cache,
    block_table: DevicePtr,
    context_start: DevicePtr,
    out: DevicePtr,
    table_stride: i64,
    out_stride: i64,
    first_seq: u32,
    end_seq: u32,
    out_dtype: u32,
    out_vectors: u32,
}

// SAFETY: the twin of rope::GatherArgs.
unsafe impl Args for GatherArgs {}

pub(crate) fn gather_latent(
    gpu: &Gpu,
    cache: &LatentCache<Gpu>,
    batch: &Batch<Gpu>,
    seqs: &Range<usize>,
    out: &Tensor<Gpu>,
) {
    const MAX_WARPS: usize = 4;
    shape::gather_latent(cache, batch, seqs, out);
    let args = GatherArgs {
        cache: Cache::of(cache),
        block_table: ptr(&batch.block_table),
        context_start: ptr(&batch.context_start),
        out: ptr(out),
        table_stride: stride(&batch.block_table, 0),
        out_stride: stride(out, 0),
        first_seq: seqs.start as u32,
        end_seq: seqs.end as u32,
        out_dtype: dtype_code(out.dtype()),
        out_vectors: is_vectorizable(out).into(),
    };
    let warps = out.dim(1).div_ceil(EIGHT * gpu.warp_size() as usize).clamp(1, MAX_WARPS);
    gpu.launch("gather_latent", Geometry::blocks(out.dim(0), warps as u32), &args);
}
