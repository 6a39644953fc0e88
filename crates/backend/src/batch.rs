//! What the attention of one step must know: which tokens, of which sequences, at which places of the paged cache.

use std::ops::Range;

use r1_core::DType;

use crate::weight::FP8_BLOCK;
use crate::{Backend, BackendError, Tensor};

/// The slot of a padding row: its KV goes nowhere.
pub const NO_SLOT: u32 = u32::MAX;

/// One step's metadata on the device; uploaded once per step, read by every layer. S sequences, T tokens.
///
/// The tokens of a sequence are consecutive rows, in order of position; sequences that decode come first.
///
/// The last of those that decode may be padding, so that a captured step runs with fewer sequences than it was captured for.
/// A padding sequence has one row, the slot [`NO_SLOT`], position 0 and a `context_len` of 0; its row of the block table is
/// never read. It writes nothing to a cache, attention gives zeros for it, and no other row's result depends on it. Its token id
/// is `u32::MAX`, which no table holds. It counts in `num_tokens`, `num_seqs` and `num_decodes`.
pub struct Batch<B: Backend> {
    /// `[T]` U32: absolute position of each token.
    pub positions: Tensor<B>,
    /// `[T]` U32: where each token's KV goes, `block * block_size + offset`, or [`NO_SLOT`].
    pub slots: Tensor<B>,
    /// `[S + 1]` U32: sequence `s` has the rows `query_start[s]..query_start[s + 1]`.
    pub query_start: Tensor<B>,
    /// `[S]` U32: tokens in the cache once this step's are written; the last row of a sequence sees all of them.
    pub context_len: Tensor<B>,
    /// `[S + 1]` U32: prefix sums of `context_len`.
    pub context_start: Tensor<B>,
    /// `[S, max_blocks]` U32, the last dimension contiguous, rows any stride apart: entries past the context are never read.
    pub block_table: Tensor<B>,
    /// T.
    pub num_tokens: usize,
    /// S.
    pub num_seqs: usize,
    /// Of these, the first ones, with one row each.
    pub num_decodes: usize,
    /// Host copy of the sum of `context_len` over the sequences that do not decode.
    pub prefill_context_tokens: usize,
    /// Host copy of the largest `context_len`, or more: a step that is captured says the longest context that a replay may
    /// have.
    pub max_context_len: usize,
}

impl<B: Backend> Batch<B> {
    /// Sequences that decode.
    pub fn decodes(&self) -> Range<usize> {
        0..self.num_decodes
    }

    /// Sequences that prefill.
    pub fn prefills(&self) -> Range<usize> {
        self.num_decodes..self.num_seqs
    }
}

/// One layer's paged cache of what MLA keeps: per token `kv_lora_rank` latent values after their norm and
/// `qk_rope_head_dim` key values after RoPE, shared by all heads.
///
/// Dense, an entry is these values side by side. In the FP8 form the latent is codes with a scale per 128 channels,
/// `scale = max(amax, 1e-4) / 448` of the values after the norm (in F32, before any other rounding), and the key values are
/// BF16: what DeepSeek's FlashMLA keeps of a token, 656 bytes for V3, in tensors of their own.
pub struct LatentCache<B: Backend> {
    /// Dense: `[num_blocks, block_size, C + R]` F32 or BF16. FP8: `[num_blocks, block_size, C]` F8E4M3.
    pub data: Tensor<B>,
    /// C = kv_lora_rank.
    pub latent_dim: usize,
    /// What the FP8 form keeps beside its codes; `None`: the cache is dense.
    pub fp8: Option<Fp8Latent<B>>,
}

/// What the FP8 form of a [`LatentCache`] keeps beside its codes.
pub struct Fp8Latent<B: Backend> {
    /// `[num_blocks, block_size, ceil(C / 128)]` F32; the last group of channels may be short.
    pub scales: Tensor<B>,
    /// `[num_blocks, block_size, R]` BF16.
    pub rope: Tensor<B>,
}

/// Bytes that one token takes in a cache that [`LatentCache::alloc`] makes.
pub fn latent_bytes_per_token(dtype: DType, latent_dim: usize, rope_dim: usize) -> usize {
    if dtype != DType::F8E4M3 {
        return (latent_dim + rope_dim) * dtype.size_bytes();
    }
    latent_dim * dtype.size_bytes()
        + latent_dim.div_ceil(FP8_BLOCK) * DType::F32.size_bytes()
        + rope_dim * DType::BF16.size_bytes()
}

impl<B: Backend> LatentCache<B> {
    /// A zeroed cache; `dtype` F8E4M3 asks for the FP8 form, which [`Capabilities::cache_dtypes`](crate::Capabilities) says
    /// whether a backend has.
    pub fn alloc(
        backend: &B,
        dtype: DType,
        [num_blocks, block_size]: [usize; 2],
        latent_dim: usize,
        rope_dim: usize,
    ) -> Result<Self, BackendError> {
        let part = |width, dtype| backend.alloc(&[num_blocks, block_size, width], dtype);
        if dtype != DType::F8E4M3 {
            return Ok(Self { data: part(latent_dim + rope_dim, dtype)?, latent_dim, fp8: None });
        }
        let scales = part(latent_dim.div_ceil(FP8_BLOCK), DType::F32)?;
        let fp8 = Fp8Latent { scales, rope: part(rope_dim, DType::BF16)? };
        Ok(Self { data: part(latent_dim, dtype)?, latent_dim, fp8: Some(fp8) })
    }

    /// Tokens per block.
    pub fn block_size(&self) -> usize {
        self.data.dim(1)
    }

    /// R = qk_rope_head_dim.
    pub fn rope_dim(&self) -> usize {
        match &self.fp8 {
            Some(fp8) => fp8.rope.dim(2),
            None => self.data.dim(2) - self.latent_dim,
        }
    }
}

/// Rotations of every position, YaRN and its attention scaling included.
pub struct RopeTable<B: Backend> {
    /// `[max_positions, R]` F32: R / 2 cosines, then R / 2 sines. What angle `i` rotates is the operation's: (2i, 2i + 1) in
    /// [`Backend::rope_cache`], (i, i + R / 2) in [`Backend::rope_cache_gqa`].
    pub cos_sin: Tensor<B>,
}
