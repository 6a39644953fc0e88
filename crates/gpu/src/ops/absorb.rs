//! Between the projections and absorbed attention: cache, rotation and W_uk in one launch. Kernels: `kernels/absorb.cu`.

use r1_backend::{Batch, HeadWeight, LatentCache, RopeTable, Tensor, composite, shape};

use super::linear::{FEW_ROWS, FewRows, Form, GemmArgs, Kind};
use super::per_head;
use super::rope::{CacheArgs, cache_args, entry_warps, token_blocks};
use crate::Gpu;
use crate::launch::{Args, Geometry};

#[derive(Clone, Copy)]
#[repr(C)]
struct AbsorbArgs {
    gemm: GemmArgs,
    rope: CacheArgs,
    rope_blocks: u32,
    token_blocks: u32,
    norm_threads: u32,
    tiles_n: u32,
    tiles_t: u32,
}

// SAFETY: the twin of absorb::Args.
unsafe impl Args for AbsorbArgs {}

#[allow(clippy::too_many_arguments)] // the operation's
pub(crate) fn mla_absorb(
    gpu: &Gpu,
    q: &Tensor<Gpu>,
    kv_a: &Tensor<Gpu>,
    norm: &Tensor<Gpu>,
    eps: f32,
    rope: &RopeTable<Gpu>,
    batch: &Batch<Gpu>,
    cache: &LatentCache<Gpu>,
    w_uk: &HeadWeight<Gpu>,
    q_latent: &Tensor<Gpu>,
) {
    let nope = w_uk.rows.len();
    let rows = q_latent.dim(0);
    let launch = || {
        if rows == 0 || q.dim(0) > FEW_ROWS {
            return None;
        }
        let (q_rope, q_nope) = (q.narrow(2, nope..q.dim(2)), q.narrow(2, 0..nope).rows(0..rows));
        shape::rope_cache(&q_rope, kv_a, norm, rope, batch, cache);
        shape::per_head(&q_nope, w_uk, q_latent);
        let weights = [(&w_uk.weight, q_latent.clone())];
        let product = FewRows::new(gpu, &per_head::operand(&q_nope, w_uk), &weights, false)?;
        let (kernel, warps) = match (product.kind, product.form) {
            (Kind::W8, Form::Short) => ("mla_absorb_w8_short", 2),
            (Kind::W8, _) => ("mla_absorb_w8_middle", 4),
            (Kind::Bf16, Form::Short) => ("mla_absorb_bf16_short", 2),
            (Kind::Bf16, _) => ("mla_absorb_bf16_middle", 4),
            (Kind::Simt, _) => ("mla_absorb_simt", 8),
            (Kind::Fp8, _) => return None,
        };
        let norm_warps = entry_warps(gpu, cache).ok().filter(|&of_norm| of_norm <= warps)?;
        let token_blocks = token_blocks(gpu, &q_rope, warps);
        let rope_blocks = q.dim(0) * token_blocks;
        let args = AbsorbArgs {
            gemm: product.args,
            rope: cache_args(&q_rope, kv_a, norm, eps, rope, batch, cache),
            rope_blocks: rope_blocks as u32,
            token_blocks: token_blocks as u32,
            norm_threads: norm_warps * gpu.warp_size(),
            tiles_n: product.grid[0] as u32,
            tiles_t: product.grid[1] as u32,
        };
        let grid = [rope_blocks + product.grid.iter().product::<usize>(), 1, 1];
        gpu.launch(kernel, Geometry { grid, warps, shared_bytes: product.shared_bytes }, &args);
        Some(())
    };
    if launch().is_none() {
        composite::mla_absorb(gpu, q, kv_a, norm, eps, rope, batch, cache, w_uk, q_latent);
    }
}
