//! RoPE, the paged latent cache, and MLA in both forms. Knows sequences and blocks, no scheduler.

use std::ops::Range;

use candle_core::{D, DType, Device, Result, Tensor};
use r1_backend::{Batch, LatentCache, NO_SLOT, RopeTable};

use crate::Reference;
use crate::storage::{View, read, read_stored, read_u32, write};
use crate::weights::{latent_codes, latent_values};

/// Rotates `x` `[T, H, R]` by the angles of `positions` `[T]`; pairs are (2i, 2i + 1).
fn rotate(x: &Tensor, rope: &RopeTable<Reference>, positions: &View) -> Result<Tensor> {
    let angles = read(&rope.cos_sin)?.index_select(&read_stored(positions)?, 0)?;
    let half = angles.dim(1)? / 2;
    let cos = angles.narrow(1, 0, half)?.contiguous()?;
    let sin = angles.narrow(1, half, half)?.contiguous()?;
    // candle wants [batch, heads, tokens, R].
    let x = x.transpose(0, 1)?.unsqueeze(0)?.contiguous()?;
    candle_nn::rotary_emb::rope_i(&x, &cos, &sin)?.squeeze(0)?.transpose(0, 1)?.contiguous()
}

pub(crate) fn rope_cache(
    q_rope: &View,
    kv_a: &View,
    norm: &View,
    eps: f32,
    rope: &RopeTable<Reference>,
    batch: &Batch<Reference>,
    cache: &LatentCache<Reference>,
) -> Result<()> {
    write(q_rope, &rotate(&read(q_rope)?, rope, &batch.positions)?)?;

    let kv_a = read(kv_a)?;
    let latent = kv_a.narrow(1, 0, cache.latent_dim)?.contiguous()?;
    let latent = crate::normed(&latent, &read(norm)?, eps)?;
    let k_rope = kv_a.narrow(1, cache.latent_dim, cache.rope_dim())?.unsqueeze(1)?;
    let k_rope = rotate(&k_rope, rope, &batch.positions)?.squeeze(1)?;
    let parts = match &cache.fp8 {
        None => vec![(&cache.data, Tensor::cat(&[latent, k_rope], 1)?)],
        Some(fp8) => {
            let [codes, scales] = latent_codes(&latent)?;
            vec![(&cache.data, codes), (&fp8.scales, scales), (&fp8.rope, k_rope)]
        }
    };

    let slots = read_u32(&batch.slots)?.into_iter().enumerate();
    for (token, slot) in slots.filter(|&(_, slot)| slot != NO_SLOT) {
        let (block, place) = (slot as usize / cache.block_size(), slot as usize % cache.block_size());
        for (part, values) in &parts {
            let entry = part.narrow(0, block..block + 1).narrow(1, place..place + 1);
            write(&entry, &values.narrow(0, token, 1)?.unsqueeze(0)?)?;
        }
    }
    Ok(())
}

/// Where one sequence's rows and context lie.
pub(crate) struct Sequence {
    /// Its rows of the batch.
    pub(crate) rows: Range<usize>,
    /// Tokens it has in the cache.
    pub(crate) context_len: usize,
    /// Its row of the block table.
    pub(crate) blocks: View,
    /// Its rows of what `gather_latent` makes of the requested sequences.
    gathered: Range<usize>,
}

pub(crate) fn sequences(batch: &Batch<Reference>, seqs: Range<usize>) -> Result<Vec<Sequence>> {
    let query_start = read_u32(&batch.query_start)?;
    let context_len = read_u32(&batch.context_len)?;
    let context_start = read_u32(&batch.context_start)?;
    let first = context_start[seqs.start] as usize;
    let sequence = |s: usize| {
        let context_len = context_len[s] as usize;
        let gathered = context_start[s] as usize - first;
        Sequence {
            rows: query_start[s] as usize..query_start[s + 1] as usize,
            context_len,
            blocks: batch.block_table.rows(s..s + 1),
            gathered: gathered..gathered + context_len,
        }
    };
    Ok(seqs.map(sequence).collect())
}

/// A sequence's cached entries in order of position, `[context_len, C + R]` in the cache's dtype, F32 where that is FP8.
fn cached(cache: &LatentCache<Reference>, seq: &Sequence) -> Result<Tensor> {
    let block_size = cache.block_size();
    let blocks = read_u32(&seq.blocks.narrow(1, 0..seq.context_len.div_ceil(block_size)))?;
    let slot = |p: usize| blocks[p / block_size] * block_size as u32 + (p % block_size) as u32;
    let slots = Tensor::from_iter((0..seq.context_len).map(slot), &Device::Cpu)?;
    let rows = |part: &View| read_stored(part)?.flatten(0, 1)?.index_select(&slots, 0);
    let data = rows(&cache.data)?;
    let Some(fp8) = &cache.fp8 else { return Ok(data) };
    let latent = latent_values(&data.to_dtype(DType::F32)?, &rows(&fp8.scales)?)?;
    Tensor::cat(&[latent, rows(&fp8.rope)?.to_dtype(DType::F32)?], 1)
}

pub(crate) fn gather_latent(
    cache: &LatentCache<Reference>,
    batch: &Batch<Reference>,
    seqs: Range<usize>,
    out: &View,
) -> Result<()> {
    for seq in sequences(batch, seqs)?.into_iter().filter(|seq| seq.context_len > 0) {
        let entries = cached(cache, &seq)?;
        write(&out.rows(seq.gathered), &entries)?;
    }
    Ok(())
}

/// What the last `n` of `context_len` tokens may see, `[n, context_len]`: 0 where they may, -inf where not.
fn causal_mask(n: usize, context_len: usize) -> Result<Tensor> {
    let sees = |i: usize, p: usize| p < context_len - n + 1 + i;
    let mask = (0..n)
        .flat_map(|i| (0..context_len).map(move |p| if sees(i, p) { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    Tensor::from_vec(mask, (n, context_len), &Device::Cpu)
}

/// `softmax(q kᵀ scale) v` under the causal mask. `q` `[H, n, D]`, `k` `[H, context, D]`, `v` `[H, context, U]`; gives `[n, H, U]`.
pub(crate) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32) -> Result<Tensor> {
    let mask = causal_mask(q.dim(1)?, k.dim(1)?)?;
    let scores = (q.contiguous()?.matmul(&k.transpose(1, 2)?.contiguous()?)? * f64::from(scale))?;
    let probabilities = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
    probabilities.matmul(&v.contiguous()?)?.transpose(0, 1)?.contiguous()
}

pub(crate) fn absorbed(
    q_latent: &View,
    q_rope: &View,
    cache: &LatentCache<Reference>,
    batch: &Batch<Reference>,
    seqs: Range<usize>,
    scale: f32,
    out: &View,
) -> Result<()> {
    let heads = out.dim(1);
    for seq in sequences(batch, seqs)? {
        if seq.context_len == 0 {
            let out = out.rows(seq.rows);
            write(&out, &Tensor::zeros(out.shape(), DType::F32, &Device::Cpu)?)?;
            continue;
        }
        let q_latent = read(&q_latent.rows(seq.rows.clone()))?;
        let q_rope = read(&q_rope.rows(seq.rows.clone()))?;
        let q = Tensor::cat(&[q_latent, q_rope], 2)?.transpose(0, 1)?;
        // Keys and values are the same for every head.
        let entries = cached(cache, &seq)?.to_dtype(DType::F32)?.unsqueeze(0)?;
        let k = entries.repeat((heads, 1, 1))?;
        let v = k.narrow(2, 0, cache.latent_dim)?;
        write(&out.rows(seq.rows), &attend(&q, &k, &v, scale)?)?;
    }
    Ok(())
}

pub(crate) fn expanded(
    q: &View,
    kv: &View,
    k_rope: &View,
    batch: &Batch<Reference>,
    seqs: Range<usize>,
    scale: f32,
    out: &View,
) -> Result<()> {
    let (heads, v_dim) = (out.dim(1), out.dim(2));
    let nope = kv.dim(2) - v_dim;
    for seq in sequences(batch, seqs)? {
        let q = read(&q.rows(seq.rows.clone()))?.transpose(0, 1)?;
        let kv = read(&kv.rows(seq.gathered.clone()))?.transpose(0, 1)?;
        let k_rope = read(&k_rope.rows(seq.gathered))?.unsqueeze(0)?.repeat((heads, 1, 1))?;
        let k = Tensor::cat(&[kv.narrow(2, 0, nope)?, k_rope], 2)?;
        write(&out.rows(seq.rows), &attend(&q, &k, &kv.narrow(2, nope, v_dim)?, scale)?)?;
    }
    Ok(())
}
