//! Grouped-query attention and its cache. Kernels: `kernels/gqa.cu`.

use std::ops::Range;

use r1_backend::{Batch, KvCache, RopeTable, Tensor, shape};
use r1_core::DType;

use super::attention::{MAX_GRID, Pages, SPLIT_TOKENS, Sequences};
use crate::Gpu;
use crate::driver::DevicePtr;
use crate::launch::{Args, Geometry, dtype_code, is_vectorizable, ptr, stride};

/// Pairs of row and head per warp.
const QUERIES: usize = 16;
/// Of keys and values, what the kernels pad to.
const HEAD_DIM: usize = 128;

#[derive(Clone, Copy)]
#[repr(C)]
struct GqaArgs {
    q: DevicePtr,
    k: DevicePtr,
    v: DevicePtr,
    out: DevicePtr,
    partials: DevicePtr,
    seqs: Sequences,
    pages: Pages,
    q_row: i64,
    q_head: i64,
    out_row: i64,
    out_head: i64,
    heads: u32,
    kv_heads: u32,
    key_dim: u32,
    value_dim: u32,
    dtype: u32,
    cache_dtype: u32,
    first_pack: u32,
    max_splits: u32,
    q_vectors: u32,
    cache_vectors: u32,
    scale: f32,
}

// SAFETY: the twin of gqa::GqaArgs.
unsafe impl Args for GqaArgs {}

/// What tiles hold, and tokens per tile.
#[derive(Clone, Copy)]
struct Form {
    dtype: DType,
    tile: usize,
}

impl Form {
    /// `sizeof` of gqa::GqaShared.
    fn shared_bytes(self, warps: usize) -> usize {
        let size = self.dtype.size_bytes();
        let (pad, queries) = (16 / size, warps * QUERIES);
        let rows = queries + 2 * self.tile;
        (rows * (HEAD_DIM + pad) + queries * (self.tile + pad)) * size
            + queries * (self.tile + 4 + 3) * size_of::<f32>()
    }
}

pub(crate) fn gqa_attention(
    gpu: &Gpu,
    q: &Tensor<Gpu>,
    cache: &KvCache<Gpu>,
    batch: &Batch<Gpu>,
    seqs: &Range<usize>,
    scale: f32,
    out: &Tensor<Gpu>,
) {
    shape::gqa_attention(q, cache, batch, seqs, out);
    let (heads, kv_heads) = (q.dim(1), cache.num_kv_heads());
    let (key, value) = (q.dim(2), out.dim(2));
    assert!(
        key <= HEAD_DIM && value <= HEAD_DIM,
        "gqa_attention: heads of {key} and {value} are wider than the kernels' {HEAD_DIM}"
    );
    let all_bf16 = [q, &cache.k].iter().all(|input| input.dtype() == DType::BF16);
    let form =
        if all_bf16 { Form { dtype: DType::BF16, tile: 32 } } else { Form { dtype: DType::F32, tile: 16 } };
    let vectors = |tensor: &Tensor<Gpu>| tensor.dtype() == form.dtype && is_vectorizable(tensor);
    let args = GqaArgs {
        q: ptr(q),
        k: ptr(&cache.k),
        v: ptr(&cache.v),
        out: ptr(out),
        partials: DevicePtr::default(),
        seqs: Sequences::new(batch, seqs, 1),
        pages: Pages::new(batch, cache.block_size()),
        q_row: stride(q, 0),
        q_head: stride(q, 1),
        out_row: stride(out, 0),
        out_head: stride(out, 1),
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        key_dim: key as u32,
        value_dim: value as u32,
        dtype: dtype_code(q.dtype()),
        cache_dtype: dtype_code(cache.k.dtype()),
        first_pack: 0,
        max_splits: 0,
        q_vectors: u32::from(vectors(q)),
        cache_vectors: u32::from(vectors(&cache.k) && vectors(&cache.v)),
        scale,
    };
    let middle = batch.num_decodes.clamp(seqs.start, seqs.end);
    decode(gpu, form, batch, &(seqs.start..middle), args);
    prefill(gpu, form, batch, &(middle..seqs.end), args);
}

/// A block of one warp per row, KV head and split.
fn decode(gpu: &Gpu, form: Form, batch: &Batch<Gpu>, seqs: &Range<usize>, args: GqaArgs) {
    let (kv_heads, sharing) = (args.kv_heads as usize, (args.heads / args.kv_heads) as usize);
    let groups = kv_heads * sharing.div_ceil(QUERIES);
    let splits = batch.max_context_len.div_ceil(SPLIT_TOKENS).max(1);
    let kernel = if form.dtype == DType::BF16 { "gqa_decode_bf16" } else { "gqa_decode_f32" };
    // Maximum, sum and Dv values of every query, of every split.
    let pack_bytes = groups * splits * QUERIES * (args.value_dim as usize + 2) * size_of::<f32>();
    let at_once =
        if splits == 1 { seqs.len() } else { seqs.len().min(gpu.scratch_bytes() / pack_bytes) }.min(MAX_GRID);
    assert!(
        splits <= MAX_GRID && groups <= MAX_GRID && (at_once > 0 || seqs.is_empty()),
        "gqa_attention: a row's splits need {pack_bytes} bytes of scratch"
    );
    for first_pack in (0..seqs.len()).step_by(at_once.max(1)) {
        let packs = at_once.min(seqs.len() - first_pack);
        let partials = if splits == 1 { DevicePtr::default() } else { gpu.scratch(packs * pack_bytes) };
        let args = GqaArgs {
            partials,
            seqs: Sequences::new(batch, seqs, 1),
            first_pack: first_pack as u32,
            max_splits: splits as u32,
            ..args
        };
        let grid = [groups, splits, packs];
        gpu.launch(kernel, Geometry { grid, warps: 1, shared_bytes: form.shared_bytes(1) }, &args);
        if splits > 1 {
            let grid = [QUERIES.min(sharing), groups, packs];
            gpu.launch("gqa_combine", Geometry { grid, warps: 1, shared_bytes: 0 }, &args);
        }
    }
}

/// A block per KV head and so many rows as its warps have queries for.
fn prefill(gpu: &Gpu, form: Form, batch: &Batch<Gpu>, seqs: &Range<usize>, args: GqaArgs) {
    if seqs.is_empty() {
        return;
    }
    let (kernel, warps) =
        if form.dtype == DType::BF16 { ("gqa_prefill_bf16", 4) } else { ("gqa_prefill_f32", 2) };
    let (kv_heads, sharing) = (args.kv_heads as usize, (args.heads / args.kv_heads) as usize);
    let queries = warps * QUERIES;
    let sequences = Sequences::new(batch, seqs, (queries / sharing).max(1));
    let packs = sequences.max_packs(batch);
    for first_pack in (0..packs).step_by(MAX_GRID) {
        let args = GqaArgs { seqs: sequences, first_pack: first_pack as u32, ..args };
        let grid = [kv_heads * sharing.div_ceil(queries), 1, MAX_GRID.min(packs - first_pack)];
        let shared_bytes = form.shared_bytes(warps);
        gpu.launch(kernel, Geometry { grid, warps: warps as u32, shared_bytes }, &args);
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RopeArgs {
    q: DevicePtr,
    k: DevicePtr,
    v: DevicePtr,
    cos_sin: DevicePtr,
    positions: DevicePtr,
    slots: DevicePtr,
    k_cache: DevicePtr,
    v_cache: DevicePtr,
    q_row: i64,
    q_head: i64,
    k_row: i64,
    k_head: i64,
    v_row: i64,
    v_head: i64,
    rope_row: i64,
    heads: u32,
    kv_heads: u32,
    key_dim: u32,
    value_dim: u32,
    q_dtype: u32,
    k_dtype: u32,
    v_dtype: u32,
    cache_dtype: u32,
}

// SAFETY: the twin of gqa::RopeArgs.
unsafe impl Args for RopeArgs {}

pub(crate) fn rope_cache_gqa(
    gpu: &Gpu,
    q: &Tensor<Gpu>,
    k: &Tensor<Gpu>,
    v: &Tensor<Gpu>,
    rope: &RopeTable<Gpu>,
    batch: &Batch<Gpu>,
    cache: &KvCache<Gpu>,
) {
    shape::rope_cache_gqa(q, k, v, rope, batch, cache);
    let args = RopeArgs {
        q: ptr(q),
        k: ptr(k),
        v: ptr(v),
        cos_sin: ptr(&rope.cos_sin),
        positions: ptr(&batch.positions),
        slots: ptr(&batch.slots),
        k_cache: ptr(&cache.k),
        v_cache: ptr(&cache.v),
        q_row: stride(q, 0),
        q_head: stride(q, 1),
        k_row: stride(k, 0),
        k_head: stride(k, 1),
        v_row: stride(v, 0),
        v_head: stride(v, 1),
        rope_row: stride(&rope.cos_sin, 0),
        heads: q.dim(1) as u32,
        kv_heads: k.dim(1) as u32,
        key_dim: k.dim(2) as u32,
        value_dim: v.dim(2) as u32,
        q_dtype: dtype_code(q.dtype()),
        k_dtype: dtype_code(k.dtype()),
        v_dtype: dtype_code(v.dtype()),
        cache_dtype: dtype_code(cache.k.dtype()),
    };
    gpu.launch("rope_cache_gqa", Geometry::blocks(q.dim(0), 4), &args);
}
