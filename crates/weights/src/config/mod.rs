//! What a model is, as its config.json states it. Knows no tensor names and no files but config.json.

mod fields;
mod json;
mod parse;
mod rope;

use std::fmt;
use std::path::{Path, PathBuf};

use r1_core::{DType, TokenId};

pub(crate) use fields::Fields;
pub use json::ConfigJson;
pub use rope::{Rope, Yarn};

/// A config.json or generation_config.json that cannot be used. Every message names the field.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is larger than any real one.
    #[error("{} has more than {limit_bytes} bytes, which no {} has", path.display(), path.file_name().unwrap_or_default().display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit.
        limit_bytes: u64,
    },
    /// Not JSON, or not a JSON object.
    #[error("{file} is not a JSON object: {reason}")]
    Json {
        /// Name of the file.
        file: &'static str,
        /// What the parser said.
        reason: String,
    },
    /// A field that the architecture needs is absent or null.
    #[error("{file}: {field} is missing")]
    Missing {
        /// Name of the file.
        file: &'static str,
        /// Name of the field, with the object it lies in.
        field: String,
    },
    /// A value that changes the computation in a way that is not built.
    #[error("{file}: {field} is {value}, which is not supported; supported: {supported}")]
    Unsupported {
        /// Name of the file.
        file: &'static str,
        /// Name of the field, with the object it lies in.
        field: String,
        /// What the file says.
        value: String,
        /// What is built.
        supported: String,
    },
    /// A value of the wrong type, out of range, or in contradiction with another.
    #[error("{file}: {field} is {value}: {reason}")]
    Invalid {
        /// Name of the file.
        file: &'static str,
        /// Name of the field, with the object it lies in.
        field: String,
        /// What the file says.
        value: String,
        /// What it must be.
        reason: String,
    },
}

/// Which member of the family this is. They share every formula; the config's values differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// DeepSeek-V2 and V2-Lite.
    DeepseekV2,
    /// DeepSeek-V3, R1, V3.1, Moonlight.
    DeepseekV3,
    /// Kimi-K2: V3's architecture under another name.
    KimiK2,
}

impl Architecture {
    const ALL: [Self; 3] = [Self::DeepseekV2, Self::DeepseekV3, Self::KimiK2];

    /// `model_type` in config.json.
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::DeepseekV2 => "deepseek_v2",
            Self::DeepseekV3 => "deepseek_v3",
            Self::KimiK2 => "kimi_k2",
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model_type())
    }
}

/// How router logits become scores, in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoringFunc {
    /// Over all experts (V2).
    Softmax,
    /// Each expert alone (V3).
    Sigmoid,
}

/// How experts are chosen from scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopkMethod {
    /// The best of all experts.
    Greedy,
    /// The best of the `topk_group` best groups; a group's score is its maximum.
    GroupLimitedGreedy,
    /// As `GroupLimitedGreedy` by biased scores (`e_score_correction_bias`); a group's score is the sum of its top
    /// two. Weights come from the unbiased scores.
    NoauxTc,
}

/// The mixture-of-experts layers.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Experts to choose from.
    pub n_routed_experts: usize,
    /// Width of the shared expert in units of `moe_intermediate_size`; 0 is no shared expert.
    pub n_shared_experts: usize,
    /// Experts chosen per token.
    pub num_experts_per_tok: usize,
    /// Width of one expert's MLP.
    pub moe_intermediate_size: usize,
    /// Scores from router logits.
    pub scoring_func: ScoringFunc,
    /// Experts from scores.
    pub topk_method: TopkMethod,
    /// Groups the experts are divided into; 1 for [`TopkMethod::Greedy`].
    pub n_group: usize,
    /// Groups that stay in the choice; 1 for [`TopkMethod::Greedy`].
    pub topk_group: usize,
    /// Whether the chosen weights are divided by their sum (plus 1e-20).
    pub norm_topk_prob: bool,
    /// What the chosen weights are multiplied by, last.
    pub routed_scaling_factor: f64,
}

/// How the scales of FP8 blocks came to be; they are stored as F32 and read as stored either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleFmt {
    /// Any value.
    F32,
    /// Declared as powers of two (V3.1): activation scales on the W8A8 path are rounded up to a power of two.
    Ue8m0,
}

/// FP8 (e4m3) weights with one scale per block, activations quantised on the fly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fp8BlockConfig {
    /// Rows and columns of a block of `weight [N, K]`.
    pub block: [usize; 2],
    /// How scales are formed.
    pub scale_fmt: ScaleFmt,
}

/// A model of the DeepSeek V2/V3 family, under the checkpoint's own names. Every value was read, none assumed.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which member of the family.
    pub architecture: Architecture,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of a dense layer's MLP.
    pub intermediate_size: usize,
    /// Layers of the main model.
    pub num_hidden_layers: usize,
    /// Multi-token-prediction layers after them, as the config states; a checkpoint may lack their tensors
    /// (see [`crate::Verified::mtp_layers`]).
    pub num_nextn_predict_layers: usize,
    /// The first layers that have a dense MLP.
    pub first_k_dense_replace: usize,
    /// Past those, every n-th layer has experts; 1 in every published model.
    pub moe_layer_freq: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Rank of the query's low-rank projection; `None` is one full `q_proj`.
    pub q_lora_rank: Option<usize>,
    /// Rank of the latent that the KV cache holds.
    pub kv_lora_rank: usize,
    /// Part of a head's query and key without RoPE.
    pub qk_nope_head_dim: usize,
    /// Part of a head's query and key with RoPE; even.
    pub qk_rope_head_dim: usize,
    /// Size of a head's value.
    pub v_head_dim: usize,
    /// Experts.
    pub moe: MoeConfig,
    /// Rotary embedding.
    pub rope: Rope,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding table (then `lm_head.weight` may be absent).
    pub tie_word_embeddings: bool,
    /// How FP8 linears are stored; `None` when the checkpoint declares none. Single layers may be unquantised.
    pub quantization: Option<Fp8BlockConfig>,
    /// The dtype the model was made for. Each tensor's own dtype is what counts when it is read.
    pub dtype: Option<DType>,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<TokenId>,
    /// Tokens that end a sequence; generation_config.json may name more.
    pub eos_token_ids: Vec<TokenId>,
    /// Fields of config.json that mean nothing here and are not known to be harmless: for a warning in the log.
    pub unknown_fields: Vec<String>,
}

/// Numbers of parameters, counted from the config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamCounts {
    /// The main model, embedding and head included.
    pub total: u64,
    /// Those that take part in one token, embedding and head included.
    pub active: u64,
    /// The multi-token-prediction layers without their copies of embedding and head.
    pub mtp: u64,
}

impl ModelConfig {
    /// Reads `config.json` in `dir`.
    pub fn open(dir: &Path) -> Result<Self, ConfigError> {
        ConfigJson::open(&dir.join("config.json"))?.model()
    }

    /// Reads the text of a config.json.
    pub fn from_json(text: &[u8]) -> Result<Self, ConfigError> {
        ConfigJson::parse(text)?.model()
    }

    /// Whether layer `layer` has experts; MTP layers count on from `num_hidden_layers`.
    pub const fn is_moe_layer(&self, layer: usize) -> bool {
        layer >= self.first_k_dense_replace && layer.is_multiple_of(self.moe_layer_freq)
    }

    /// Size of a head's query and key: `qk_nope_head_dim + qk_rope_head_dim`.
    pub const fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Values the KV cache holds per token and layer: `kv_lora_rank + qk_rope_head_dim`.
    pub const fn kv_cache_dim(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    /// Width of the shared expert's MLP; 0 without one.
    pub const fn shared_intermediate_size(&self) -> usize {
        self.moe.n_shared_experts * self.moe.moe_intermediate_size
    }

    /// What attention logits are multiplied by: `qk_head_dim^-0.5`, times mscale² with YaRN.
    pub fn softmax_scale(&self) -> f32 {
        ((self.qk_head_dim() as f64).powf(-0.5) * self.rope.logit_scaling()) as f32
    }

    /// `qk_rope_head_dim / 2` inverse frequencies, one per interleaved pair; see [`Rope::inv_freq`].
    pub fn inv_freq(&self) -> Vec<f32> {
        self.rope.inv_freq(self.qk_rope_head_dim)
    }

    /// What cos and sin are multiplied by.
    pub fn attention_scaling(&self) -> f32 {
        self.rope.attention_scaling()
    }
}

/// Reads a metadata file, refusing one that is absurdly large before reading it.
pub(crate) fn read_small(path: &Path) -> Result<Vec<u8>, ConfigError> {
    use std::io::Read as _;
    const LIMIT_BYTES: u64 = 16 << 20;
    let read = || {
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(LIMIT_BYTES + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    if bytes.len() as u64 > LIMIT_BYTES {
        return Err(ConfigError::TooLarge { path: path.to_owned(), limit_bytes: LIMIT_BYTES });
    }
    Ok(bytes)
}

/// The JSON object in `text`.
pub(crate) fn json_object(
    file: &'static str,
    text: &[u8],
) -> Result<serde_json::Map<String, serde_json::Value>, ConfigError> {
    serde_json::from_slice(text).map_err(|e| ConfigError::Json { file, reason: e.to_string() })
}
