//! The paged cache of grouped-query attention. Knows no model and no scheduler.

use crate::{Backend, Tensor};

/// One layer's paged cache of what grouped-query attention keeps: keys after RoPE and values, per token and KV head.
///
/// Both tensors are without gaps, in buffers of their own, and of one dtype, F32 or BF16, whatever the activations'. A slot is
/// `block * block_size + offset`, as [`Batch`](crate::Batch) says.
pub struct KvCache<B: Backend> {
    /// `[num_blocks, block_size, G, Dh]`.
    pub k: Tensor<B>,
    /// `[num_blocks, block_size, G, Dv]`.
    pub v: Tensor<B>,
}

impl<B: Backend> KvCache<B> {
    /// Tokens per block.
    pub fn block_size(&self) -> usize {
        self.k.dim(1)
    }

    /// G, the KV heads that this rank holds.
    pub fn num_kv_heads(&self) -> usize {
        self.k.dim(2)
    }
}
