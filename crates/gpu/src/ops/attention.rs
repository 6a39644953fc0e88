//! Absorbed MLA over the paged latent cache. Kernels: `kernels/mla_decode.cu`.

use std::ops::Range;

use r1_backend::{Batch, LatentCache, Tensor, shape};
use r1_core::DType;

use crate::Gpu;
use crate::driver::DevicePtr;
use crate::launch::{Args, Geometry, dtype_code, is_vectorizable, ptr, stride};

/// Pairs of row and head per block.
const QUERIES: usize = 16;
const WARPS: u32 = 4;
/// A context is cut into pieces of so many tokens; a multiple of every kernel's tile.
pub(super) const SPLIT_TOKENS: usize = 256;
/// Absorbed MLA has longer pieces where there would be more.
const MAX_SPLITS: usize = 64;
/// Channels that share an FP8 scale.
pub(super) const FP8_GROUP: usize = 128;
/// Most blocks in a grid's second and third dimension.
pub(super) const MAX_GRID: usize = 65_535;

/// Which rows a launch is about; blocks find theirs on the device, since a captured step may not depend on it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Sequences {
    query_start: DevicePtr,
    context_len: DevicePtr,
    first: u32,
    end: u32,
    num_decodes: u32,
    rows_per_pack: u32,
    split_tokens: u32,
    split_limit: u32,
}

impl Sequences {
    pub(super) fn new(batch: &Batch<Gpu>, seqs: &Range<usize>, rows_per_pack: usize) -> Self {
        Self {
            query_start: ptr(&batch.query_start),
            context_len: ptr(&batch.context_len),
            first: seqs.start as u32,
            end: seqs.end as u32,
            num_decodes: batch.num_decodes.min(seqs.end).saturating_sub(seqs.start) as u32,
            rows_per_pack: rows_per_pack as u32,
            split_tokens: SPLIT_TOKENS as u32,
            split_limit: MAX_SPLITS as u32,
        }
    }

    /// At least as many packs as there are.
    pub(super) fn max_packs(&self, batch: &Batch<Gpu>) -> usize {
        let prefills = (self.end - self.first - self.num_decodes) as usize;
        let rows = if prefills == 0 { 0 } else { batch.num_tokens - batch.num_decodes };
        self.num_decodes as usize + rows / self.rows_per_pack as usize + prefills
    }
}

/// Where the tokens of a sequence lie.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Pages {
    block_table: DevicePtr,
    table_row: i64,
    block_size: u32,
}

impl Pages {
    pub(super) fn new(batch: &Batch<Gpu>, block_size: usize) -> Self {
        let table = &batch.block_table;
        Self { block_table: ptr(table), table_row: stride(table, 0), block_size: block_size as u32 }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct SplitArgs {
    q_latent: DevicePtr,
    q_rope: DevicePtr,
    cache: DevicePtr,
    scales: DevicePtr,
    rope: DevicePtr,
    out: DevicePtr,
    partials: DevicePtr,
    seqs: Sequences,
    pages: Pages,
    q_latent_row: i64,
    q_latent_head: i64,
    q_rope_row: i64,
    q_rope_head: i64,
    out_row: i64,
    out_head: i64,
    cache_block: i64,
    cache_token: i64,
    scales_block: i64,
    scales_token: i64,
    rope_block: i64,
    rope_token: i64,
    heads: u32,
    latent_dim: u32,
    rope_dim: u32,
    dtype: u32,
    cache_dtype: u32,
    first_pack: u32,
    max_splits: u32,
    q_vectors: u32,
    cache_vectors: u32,
    scale: f32,
}

// SAFETY: the twin of mla_decode::SplitArgs.
unsafe impl Args for SplitArgs {}

/// An instantiation of the kernel: its name, what it multiplies, the widths that it pads to, tokens per tile.
struct Form {
    kernel: &'static str,
    /// Of the tiles; F8E4M3 lie there as BF16, without their scales.
    dtype: DType,
    latent: usize,
    rope: usize,
    tile: usize,
}

const FORMS: [Form; 6] = [
    Form { kernel: "mla_split_bf16_128", dtype: DType::BF16, latent: 128, rope: 64, tile: 64 },
    Form { kernel: "mla_split_bf16_512", dtype: DType::BF16, latent: 512, rope: 64, tile: 32 },
    Form { kernel: "mla_split_fp8_128", dtype: DType::F8E4M3, latent: 128, rope: 64, tile: 64 },
    Form { kernel: "mla_split_fp8_512", dtype: DType::F8E4M3, latent: 512, rope: 64, tile: 32 },
    Form { kernel: "mla_split_f32_128", dtype: DType::F32, latent: 128, rope: 64, tile: 32 },
    Form { kernel: "mla_split_f32_512", dtype: DType::F32, latent: 512, rope: 64, tile: 8 },
];

impl Form {
    /// The narrowest that holds the entries. F32 where activations or cache are.
    ///
    /// # Panics
    /// When none is wide enough.
    fn of(q: &Tensor<Gpu>, cache: &LatentCache<Gpu>) -> &'static Self {
        let dtype = if q.dtype() == DType::F32 { DType::F32 } else { cache.data.dtype() };
        let (latent, rope) = (cache.latent_dim, cache.rope_dim());
        let fits = |form: &&Self| form.dtype == dtype && latent <= form.latent && rope <= form.rope;
        FORMS.iter().find(fits).unwrap_or_else(|| {
            panic!(
                "mla_attention: kv_lora_rank {latent} and qk_rope_head_dim {rope} are more than the kernels' 512 and 64"
            )
        })
    }

    /// Of a tile's elements.
    fn tile_dtype(&self) -> DType {
        if self.dtype == DType::F32 { DType::F32 } else { DType::BF16 }
    }

    /// `sizeof` of mla_decode::SplitShared.
    fn shared_bytes(&self) -> usize {
        let codes = self.dtype == DType::F8E4M3;
        let size = self.tile_dtype().size_bytes();
        let groups = if codes { self.latent / FP8_GROUP } else { 1 };
        let row = self.latent + self.rope + 16 / size;
        let weights = if codes { self.tile } else { self.tile + 16 / size };
        // A warp takes 16 keys at once.
        let k_parts = WARPS as usize / self.tile.div_ceil(16);
        let floats = k_parts * QUERIES * (self.tile + 8) + self.tile * groups + 3 * QUERIES;
        (QUERIES * row + self.tile * row + groups * QUERIES * weights) * size + floats * size_of::<f32>()
    }
}

/// Whether entries and queries can be brought to a tile of `dtype` 16 bytes at a time.
fn vectors(dtype: DType, cache: &LatentCache<Gpu>) -> bool {
    let whole = |width: usize, dtype: DType| (width * dtype.size_bytes()).is_multiple_of(16);
    match &cache.fp8 {
        None => {
            cache.data.dtype() == dtype
                && is_vectorizable(&cache.data)
                && whole(cache.latent_dim, dtype)
                && whole(cache.rope_dim(), dtype)
        }
        Some(fp8) => is_vectorizable(&cache.data) && is_vectorizable(&fp8.rope),
    }
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn mla_attention(
    gpu: &Gpu,
    q_latent: &Tensor<Gpu>,
    q_rope: &Tensor<Gpu>,
    cache: &LatentCache<Gpu>,
    batch: &Batch<Gpu>,
    seqs: &Range<usize>,
    scale: f32,
    out: &Tensor<Gpu>,
) {
    attend(gpu, q_latent, q_rope, cache, batch, seqs, scale, out, |part| {
        if part.splits > 1 {
            let grid = [
                QUERIES.min(part.heads * part.rows_per_pack),
                part.heads.div_ceil(QUERIES),
                part.packs.len(),
            ];
            gpu.launch("mla_combine", Geometry { grid, warps: WARPS, shared_bytes: 0 }, &part.args);
        }
    });
}

/// Packs whose splits one launch has taken: their partial sums are in scratch memory until the next launch.
pub(super) struct Part {
    pub(super) args: SplitArgs,
    /// Of sequences that decode these are rows.
    pub(super) packs: Range<usize>,
    splits: usize,
    heads: usize,
    rows_per_pack: usize,
}

/// Launches the splits, in as many parts as scratch memory has room for; `finish` adds a part's. Rows of one split are in `out` already.
#[allow(clippy::too_many_arguments)]
pub(super) fn attend(
    gpu: &Gpu,
    q_latent: &Tensor<Gpu>,
    q_rope: &Tensor<Gpu>,
    cache: &LatentCache<Gpu>,
    batch: &Batch<Gpu>,
    seqs: &Range<usize>,
    scale: f32,
    out: &Tensor<Gpu>,
    finish: impl Fn(&Part),
) {
    shape::mla_attention(q_latent, q_rope, cache, batch, seqs, out);
    let form = Form::of(q_latent, cache);
    let heads = q_latent.dim(1);
    let longest = batch.max_context_len;
    let splits = longest.div_ceil(SPLIT_TOKENS).clamp(1, MAX_SPLITS);
    // Rows of a pack share their splits, so no pack may lie across a length from which splits are longer.
    let rows_per_pack = if longest <= SPLIT_TOKENS * MAX_SPLITS { (QUERIES / heads).max(1) } else { 1 };
    let sequences = Sequences::new(batch, seqs, rows_per_pack);
    let groups = heads.div_ceil(QUERIES);
    let fp8 = cache.fp8.as_ref();
    let fp8_stride = |tensor: Option<&Tensor<Gpu>>, dim| tensor.map_or(0, |tensor| stride(tensor, dim));
    let (scales, rope) = (fp8.map(|fp8| &fp8.scales), fp8.map(|fp8| &fp8.rope));
    let q_vectors = [q_latent, q_rope].iter().all(|q| q.dtype() == form.tile_dtype() && is_vectorizable(q));
    let args = SplitArgs {
        q_latent: ptr(q_latent),
        q_rope: ptr(q_rope),
        cache: ptr(&cache.data),
        scales: scales.map_or(DevicePtr::default(), ptr),
        rope: rope.map_or(DevicePtr::default(), ptr),
        out: ptr(out),
        partials: DevicePtr::default(),
        seqs: sequences,
        pages: Pages::new(batch, cache.block_size()),
        q_latent_row: stride(q_latent, 0),
        q_latent_head: stride(q_latent, 1),
        q_rope_row: stride(q_rope, 0),
        q_rope_head: stride(q_rope, 1),
        out_row: stride(out, 0),
        out_head: stride(out, 1),
        cache_block: stride(&cache.data, 0),
        cache_token: stride(&cache.data, 1),
        scales_block: fp8_stride(scales, 0),
        scales_token: fp8_stride(scales, 1),
        rope_block: fp8_stride(rope, 0),
        rope_token: fp8_stride(rope, 1),
        heads: heads as u32,
        latent_dim: cache.latent_dim as u32,
        rope_dim: cache.rope_dim() as u32,
        dtype: dtype_code(q_latent.dtype()),
        cache_dtype: dtype_code(cache.data.dtype()),
        first_pack: 0,
        max_splits: splits as u32,
        q_vectors: u32::from(q_vectors),
        cache_vectors: u32::from(vectors(form.tile_dtype(), cache)),
        scale,
    };
    // Maximum, sum and C values of every query, of every split.
    let pack_bytes = groups * splits * QUERIES * (cache.latent_dim + 2) * size_of::<f32>();
    let packs = sequences.max_packs(batch);
    let at_once = if splits == 1 { packs } else { packs.min(gpu.scratch_bytes() / pack_bytes) }.min(MAX_GRID);
    assert!(at_once > 0 || packs == 0, "mla_attention: a row's splits need {pack_bytes} bytes of scratch");
    for first_pack in (0..packs).step_by(at_once.max(1)) {
        let packs = first_pack..packs.min(first_pack + at_once);
        let partials = if splits == 1 { DevicePtr::default() } else { gpu.scratch(packs.len() * pack_bytes) };
        let args = SplitArgs { first_pack: first_pack as u32, partials, ..args };
        let grid = [groups, splits, packs.len()];
        gpu.launch(form.kernel, Geometry { grid, warps: WARPS, shared_bytes: form.shared_bytes() }, &args);
        finish(&Part { args, packs, splits, heads, rows_per_pack });
    }
}
