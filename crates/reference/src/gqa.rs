//! Grouped-query attention and its paged cache. Knows sequences and blocks, no scheduler.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};
use r1_backend::{Batch, KvCache, RopeTable};

use crate::Reference;
use crate::attention::{Sequence, attend, sequences};
use crate::storage::{View, read, read_stored, read_u32, write};

/// The slot of a row that is padding.
const NO_SLOT: u32 = u32::MAX;

/// Rotates `x` `[T, heads, Dh]` by the angles of `positions` `[T]`; pairs are (i, i + Dh / 2).
fn rotate(x: &Tensor, rope: &RopeTable<Reference>, positions: &View) -> Result<Tensor> {
    let angles = read(&rope.cos_sin)?.index_select(&read_stored(positions)?, 0)?;
    let half = angles.dim(1)? / 2;
    let cos = angles.narrow(1, 0, half)?.unsqueeze(1)?;
    let sin = angles.narrow(1, half, half)?.unsqueeze(1)?;
    let (low, high) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let rotated_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
    let rotated_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
    Tensor::cat(&[rotated_low, rotated_high], 2)
}

pub(crate) fn rope_cache(
    q: &View,
    k: &View,
    v: &View,
    rope: &RopeTable<Reference>,
    batch: &Batch<Reference>,
    cache: &KvCache<Reference>,
) -> Result<()> {
    write(q, &rotate(&read(q)?, rope, &batch.positions)?)?;
    let keys = rotate(&read(k)?, rope, &batch.positions)?;
    let values = read(v)?;
    for (token, slot) in read_u32(&batch.slots)?.into_iter().enumerate().filter(|(_, slot)| *slot != NO_SLOT)
    {
        let (block, place) = (slot as usize / cache.block_size(), slot as usize % cache.block_size());
        for (cache, rows) in [(&cache.k, &keys), (&cache.v, &values)] {
            let entry = cache.narrow(0, block..block + 1).narrow(1, place..place + 1);
            write(&entry, &rows.narrow(0, token, 1)?.unsqueeze(0)?)?;
        }
    }
    Ok(())
}

/// A sequence's cached keys or values in order of position, repeated for the query heads that share them:
/// `[H, context_len, D]` F32.
fn cached(cache: &View, seq: &Sequence, heads: usize) -> Result<Tensor> {
    let (block_size, kv_heads) = (cache.dim(1), cache.dim(2));
    let blocks = read_u32(&seq.blocks.narrow(1, 0..seq.context_len.div_ceil(block_size)))?;
    let slot = |p: usize| blocks[p / block_size] * block_size as u32 + (p % block_size) as u32;
    let slots = Tensor::from_iter((0..seq.context_len).map(slot), &Device::Cpu)?;
    let entries = read_stored(cache)?.flatten(0, 1)?.index_select(&slots, 0)?.to_dtype(DType::F32)?;
    let kv_head_of =
        Tensor::from_iter((0..heads).map(|head| (head / (heads / kv_heads)) as u32), &Device::Cpu)?;
    entries.transpose(0, 1)?.contiguous()?.index_select(&kv_head_of, 0)
}

pub(crate) fn attention(
    q: &View,
    cache: &KvCache<Reference>,
    batch: &Batch<Reference>,
    seqs: Range<usize>,
    scale: f32,
    out: &View,
) -> Result<()> {
    let heads = out.dim(1);
    for seq in sequences(batch, seqs)? {
        let out = out.rows(seq.rows.clone());
        if seq.context_len == 0 {
            write(&out, &Tensor::zeros(out.shape(), DType::F32, &Device::Cpu)?)?;
            continue;
        }
        let q = read(&q.rows(seq.rows.clone()))?.transpose(0, 1)?;
        let (k, v) = (cached(&cache.k, &seq, heads)?, cached(&cache.v, &seq, heads)?);
        write(&out, &attend(&q, &k, &v, scale)?)?;
    }
    Ok(())
}
