//! Absorbed attention up to what the output projection reads, in fewer launches than the default body and with the same bits. Kernels:
//! `kernels/mla_decode.cu`.

use std::ops::Range;

use r1_backend::{Activation, Batch, HeadWeight, LatentCache, Tensor, composite, shape};

use super::attention::{FP8_GROUP, SplitArgs, attend};
use super::linear::{GemmArgs, HeadLaunch, head_launch};
use super::norm::{Fp8Out, quantize};
use super::per_head::operand;
use crate::Gpu;
use crate::launch::{Args, Geometry, is_vectorizable};

#[derive(Clone, Copy)]
#[repr(C)]
struct FinishArgs {
    split: SplitArgs,
    gemm: GemmArgs,
    fp8: Fp8Out,
    rows_per_block: u32,
    dense_vectors: u32,
}

// SAFETY: the twin of mla_decode::FinishArgs.
unsafe impl Args for FinishArgs {}

/// Most rows of a block, the height of its tile.
const TILE_ROWS: usize = 16;
/// Blocks that keep a large GPU busy; rows share a block, and what it reads of the weight, from there on.
const ENOUGH_BLOCKS: usize = 256;

/// Rows that decode: the splits, then one launch for their sums, W_uv and the FP8 form. All else takes the default body.
#[allow(clippy::too_many_arguments)]
pub(crate) fn mla_attend(
    gpu: &Gpu,
    q_latent: &Tensor<Gpu>,
    q_rope: &Tensor<Gpu>,
    cache: &LatentCache<Gpu>,
    batch: &Batch<Gpu>,
    seqs: &Range<usize>,
    scale: f32,
    w_uv: &HeadWeight<Gpu>,
    o_latent: &Tensor<Gpu>,
    attended: &Activation<Gpu>,
) {
    shape::mla_attend(batch, seqs, w_uv, attended);
    let (heads, value) = (o_latent.dim(1), w_uv.rows.len());
    let rows = attended.dense.dim(0);
    let latent = o_latent.rows(0..rows);
    let by_head = attended.dense.split_last(&[heads, value]);
    shape::per_head(&latent, w_uv, &by_head);
    let only_decodes = seqs.end <= batch.num_decodes;
    let launch = head_launch(gpu, &operand(&latent, w_uv), &w_uv.weight, &by_head);
    let Some(HeadLaunch { kernel, geometry, args: gemm }) = launch.filter(|_| only_decodes) else {
        let seqs = seqs.clone();
        return composite::mla_attend(
            gpu, q_latent, q_rope, cache, batch, seqs, scale, w_uv, o_latent, attended,
        );
    };
    let [tiles, _, _] = geometry.grid;
    let rows_per_block = (rows * tiles * heads).div_ceil(ENOUGH_BLOCKS).clamp(1, TILE_ROWS);
    let counters = rows.div_ceil(rows_per_block) * heads * value.div_ceil(FP8_GROUP);
    let quantizes = value.is_multiple_of(FP8_GROUP) && counters <= crate::COUNTERS;
    attend(gpu, q_latent, q_rope, cache, batch, seqs, scale, o_latent, |part| {
        // What the part's rows give.
        let attended = attended.rows(part.packs.clone());
        let args = FinishArgs {
            split: part.args,
            gemm: gemm.of_rows(&attended.dense),
            fp8: Fp8Out::of(attended.fp8.as_ref().filter(|_| quantizes)),
            rows_per_block: rows_per_block as u32,
            dense_vectors: is_vectorizable(&attended.dense).into(),
        };
        let grid = [tiles, part.packs.len().div_ceil(rows_per_block), heads];
        gpu.launch(kernel, Geometry { grid, ..geometry }, &args);
    });
    if !quantizes {
        quantize(gpu, attended);
    }
}
