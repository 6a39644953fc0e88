//! How a model is to run: the decisions that config.json does not make.

use std::ops::Range;

use r1_core::{DType, Rank};
use r1_weights::{ModelConfig, QuantizedFormat};

use crate::load::LM_HEAD;

/// Which form of MLA a prefill takes. Decode is always absorbed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MlaForm {
    /// Whichever does less arithmetic for the chunk, as far as the workspace holds the expanded keys and values.
    #[default]
    Auto,
    /// Absorbed everywhere: a row's result does not depend on how its prompt was cut into chunks.
    Absorbed,
    /// Expanded for every prefill; needs a workspace for the whole context.
    Expanded,
}

/// How linear weights lie in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightFormat {
    /// As the checkpoint stores them.
    #[default]
    AsStored,
    /// FP8 widened to BF16 once, at load.
    WidenToBf16,
    /// Linears, shared and routed experts, and the head quantised to int8 at load; the router, norms and embedding (with a head
    /// that is tied to it) as the checkpoint stores them.
    Int8,
    /// As `Int8`, to int4; the head and `kv_b_proj`, which absorbed MLA reads head by head, to int8.
    Int4,
}

impl WeightFormat {
    /// What the linear `{prefix}.weight` is quantised to.
    pub(crate) fn quantized(self, prefix: &str) -> Option<QuantizedFormat> {
        let keeps_int8 = prefix == LM_HEAD || prefix.ends_with(".kv_b_proj");
        match self {
            Self::AsStored | Self::WidenToBf16 => None,
            Self::Int4 if !keeps_int8 => Some(QuantizedFormat::Int4),
            Self::Int8 | Self::Int4 => Some(QuantizedFormat::Int8),
        }
    }

    /// The formats of a quantised model's linears.
    pub(crate) fn needs(self) -> &'static [r1_backend::WeightFormat] {
        use r1_backend::WeightFormat::{Int4Group, Int8Group};
        match self {
            Self::AsStored | Self::WidenToBf16 => &[],
            Self::Int8 => &[Int8Group],
            Self::Int4 => &[Int4Group, Int8Group],
        }
    }

    /// As `--quantization` names it.
    pub(crate) fn flag(self) -> &'static str {
        match self {
            Self::AsStored | Self::WidenToBf16 => "none",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }
}

/// How FP8 weights meet activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fp8Compute {
    /// Weights only: activations keep their dtype (W8).
    #[default]
    WeightOnly,
    /// Activations are quantised per token and 128 channels (W8A8).
    WeightsAndActivations,
}

/// How the KV cache keeps what it is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvCacheFormat {
    /// In the activations' dtype.
    #[default]
    Activations,
    /// Latents as E4M3 with an F32 scale per token and 128 channels, rotated keys in BF16: see [`LatentCache`].
    ///
    /// [`LatentCache`]: r1_backend::LatentCache
    Fp8,
}

/// How a model is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelOptions {
    /// Of activations: F32 or BF16.
    pub activation_dtype: DType,
    /// What the KV cache holds.
    pub kv_cache: KvCacheFormat,
    /// How weights are held.
    pub weights: WeightFormat,
    /// W8 or W8A8.
    pub fp8: Fp8Compute,
    /// Prefill's form of attention.
    pub mla_form: MlaForm,
    /// Most tokens in one step.
    pub max_batched_tokens: usize,
    /// Most rows of logits in one step.
    pub max_logit_rows: usize,
    /// Longest context, for the table of rotations.
    pub max_model_len: usize,
    /// Context tokens of one step's prefills that the expanded form has room for.
    pub max_expanded_tokens: usize,
    /// Layers of this pipeline stage; `None` is all of them.
    pub layers: Option<Range<usize>>,
    /// A row's result depends on its own sequence alone, bit for bit: not on the other rows of a step, nor on how its prompt
    /// is cut. Asks for [`MlaForm::Absorbed`] and for a backend that is `batch_invariant`; others are refused.
    pub deterministic: bool,
    /// This tensor-parallel rank.
    pub rank: Rank,
    /// Tensor-parallel ranks.
    pub world_size: usize,
}

impl ModelOptions {
    /// Bytes of KV cache per token over so many layers.
    pub(crate) fn kv_bytes_per_token(&self, config: &ModelConfig, num_layers: usize) -> usize {
        let (latent, rope) = (config.kv_lora_rank, config.qk_rope_head_dim);
        num_layers * r1_backend::latent_bytes_per_token(self.kv_cache_dtype(), latent, rope)
    }

    /// Element type of the latent cache, as [`LatentCache::alloc`](r1_backend::LatentCache::alloc) takes it.
    pub fn kv_cache_dtype(&self) -> DType {
        match self.kv_cache {
            KvCacheFormat::Activations => self.activation_dtype,
            KvCacheFormat::Fp8 => DType::F8E4M3,
        }
    }

    /// Elements of the largest tensor that the ranks sum or gather in one step: the room that a communicator needs.
    pub fn max_collective_elements(&self, config: &ModelConfig) -> usize {
        (self.max_batched_tokens * config.hidden_size).max(self.max_logit_rows * config.vocab_size)
    }
}
