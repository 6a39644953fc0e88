//! Shapes of the operations over a cache of keys and values per KV head.

use std::ops::Range;

use r1_core::DType;

use super::{ACTIVATION, Check};
use crate::{Backend, Batch, KvCache, RopeTable, Tensor};

impl Check {
    #[track_caller]
    fn kv_cache<B: Backend>(self, cache: &KvCache<B>) -> Self {
        let op = self.op;
        assert!(
            cache.k.is_contiguous() && cache.v.is_contiguous(),
            "{op}: cache.k {:?} or cache.v {:?} has gaps",
            cache.k,
            cache.v
        );
        self.arg("cache.k", &cache.k, &["num_blocks", "block_size", "G", "Dh"], ACTIVATION)
            .arg("cache.v", &cache.v, &["num_blocks", "block_size", "G", "Dv"], ACTIVATION)
            .same_dtype(["cache.k", "cache.v"], &cache.k, &cache.v)
    }

    /// `q` `[T, H, Dh]` after the cache, whose KV heads its heads share.
    #[track_caller]
    fn queries<B: Backend>(self, q: &Tensor<B>) -> Self {
        let check = self.arg("q", q, &["T", "H", "Dh"], ACTIVATION);
        let (heads, kv_heads) = (check.get("H").unwrap_or(0), check.get("G").unwrap_or(0));
        assert!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "{}: q has {heads} heads, no multiple of the cache's {kv_heads} KV heads",
            check.op
        );
        check
    }
}

/// See [`Backend::rope_cache_gqa`].
#[track_caller]
pub fn rope_cache_gqa<B: Backend>(
    q: &Tensor<B>,
    k: &Tensor<B>,
    v: &Tensor<B>,
    rope: &RopeTable<B>,
    batch: &Batch<B>,
    cache: &KvCache<B>,
) {
    let check = Check::new("rope_cache_gqa")
        .batch(batch)
        .kv_cache(cache)
        .queries(q)
        .arg("k", k, &["T", "G", "Dh"], ACTIVATION)
        .arg("v", v, &["T", "G", "Dv"], ACTIVATION)
        .arg("rope.cos_sin", &rope.cos_sin, &["max_positions", "Dh"], &[DType::F32]);
    let head_dim = cache.k.dim(3);
    assert!(head_dim.is_multiple_of(2), "{}: cache.k has an odd head size of {head_dim}", check.op);
}

/// See [`Backend::gqa_attention`].
#[track_caller]
pub fn gqa_attention<B: Backend>(
    q: &Tensor<B>,
    cache: &KvCache<B>,
    batch: &Batch<B>,
    seqs: &Range<usize>,
    out: &Tensor<B>,
) {
    Check::new("gqa_attention")
        .batch(batch)
        .seqs(seqs, batch)
        .kv_cache(cache)
        .queries(q)
        .arg("out", out, &["T", "H", "Dv"], ACTIVATION)
        .same_dtype(["q", "out"], q, out);
}
