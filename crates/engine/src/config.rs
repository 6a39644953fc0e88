//! How an engine runs: what the model's options do not say.

use r1_backend::{Backend, BackendError, CommError};
use r1_core::Rank;
use r1_model::{DeepSeek, ModelError};
use r1_sched::{PrefixKey, SchedConfig, SchedError};

use crate::buckets::Buckets;
use crate::rank::panic_text;

/// Tokens of KV cache on a device that cannot say how much memory it has; one full context where that is more.
const UNKNOWN_MEMORY_TOKENS: usize = 65_536;

/// Rows of logits that a model should have room for beyond one per sequence
/// ([`ModelOptions::max_logit_rows`](r1_model::ModelOptions::max_logit_rows)): a prompt whose log-probabilities are wanted
/// advances by so many tokens a step. At 129,280 tokens of vocabulary they take 32 MiB.
pub const PROMPT_LOGIT_ROWS: usize = 64;

/// How an engine runs.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// Tokens per block of the KV cache.
    pub block_size: usize,
    /// Most sequences in the running batch.
    pub max_num_seqs: usize,
    /// Most tokens in one step.
    pub max_num_batched_tokens: usize,
    /// Most tokens of prompt and reply together.
    pub max_model_len: usize,
    /// Share of the memory still free once the weights are loaded that the KV cache may take, 0 to 1. It never takes more
    /// than `max_num_seqs` full contexts.
    pub kv_memory_fraction: f64,
    /// Blocks of the KV cache; `None` takes what is useful and fits.
    pub num_blocks: Option<usize>,
    /// Whether prompts that begin alike share the blocks of what they have in common.
    pub prefix_cache: bool,
    /// Steps in flight: 1 waits for each step, 2 runs one step ahead of the device. `None`: 2 where the device works behind
    /// the host's back.
    pub depth: Option<usize>,
    /// Most sequences of a decode step that is captured, where the device captures; larger steps run eagerly, and 0 captures
    /// none. More than `max_num_seqs` is as good as that.
    pub max_captured_seqs: usize,
    /// Pads decode steps to the sizes that would be captured, and runs them eagerly, where nothing is captured. It costs time
    /// and gives the same tokens: a test of padding on any device.
    pub pad_decodes: bool,
    /// Steps between two lines in the log.
    pub log_every_steps: u64,
}

/// Why an engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The model could not be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The ranks do not reach each other.
    #[error(transparent)]
    Connect(#[from] CommError),
    /// A decode step could not be captured, or does not run.
    #[error(
        "rank {rank} cannot capture its decode steps: {why}; --enforce-eager runs without, --cuda-graph-max-bs with fewer"
    )]
    Capture {
        /// Which.
        rank: Rank,
        /// What went wrong.
        why: String,
    },
    /// The device refused.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A limit is out of range.
    #[error(transparent)]
    Sched(#[from] SchedError),
    /// A rank panicked.
    #[error("rank {rank} panicked while it loaded: {why}")]
    Panic {
        /// Which.
        rank: Rank,
        /// Its message.
        why: String,
    },
    /// A rank's thread is gone.
    #[error("the thread of a rank ended while the model was loaded")]
    RankEnded,
    /// The system gave no random key for the prefix cache.
    #[error(
        "no random numbers from the operating system for the prefix cache's key: {why}; --no-prefix-cache needs none"
    )]
    NoRandomness {
        /// What it said.
        why: String,
    },
    /// One full context does not fit into the blocks that were asked for.
    #[error(
        "--max-total-tokens gives the KV cache room for {have_tokens} tokens, but one context of --max-model-len takes \
         {max_model_len}; raise the one or lower the other"
    )]
    TooFewBlocks {
        /// Tokens of the blocks.
        have_tokens: usize,
        /// Tokens of one context.
        max_model_len: usize,
    },
    /// One full context does not fit.
    #[error(
        "the KV cache has room for {have_tokens} tokens ({have_bytes} bytes of {free_bytes} free), but one context of \
         --max-model-len {max_model_len} takes {need_bytes} bytes; lower --max-model-len or raise --gpu-memory-utilization"
    )]
    KvCacheTooSmall {
        /// Tokens that fit.
        have_tokens: usize,
        /// Bytes the cache may take.
        have_bytes: usize,
        /// Bytes free after loading.
        free_bytes: usize,
        /// Tokens of one context.
        max_model_len: usize,
        /// Bytes of one context.
        need_bytes: usize,
    },
}

impl StartError {
    /// What a rank said when it panicked.
    pub(crate) fn panic(rank: Rank, panic: &(dyn std::any::Any + Send)) -> Self {
        Self::Panic { rank, why: panic_text(panic) }
    }
}

/// A fresh secret, so that nobody outside can make two prompts collide.
fn prefix_key() -> Result<PrefixKey, StartError> {
    let random = || getrandom::u64().map_err(|error| StartError::NoRandomness { why: error.to_string() });
    Ok(PrefixKey::new([random()?, random()?]))
}

impl EngineConfig {
    /// The sizes that decode steps are padded to, on a device that captures them or does not.
    pub(crate) fn buckets(&self, captures: bool) -> Buckets {
        let largest = if captures || self.pad_decodes { self.max_captured_seqs } else { 0 };
        Buckets::up_to(largest.min(self.max_num_seqs))
    }

    /// The scheduler's configuration for a model on its device, with as many KV blocks as are useful and fit.
    pub fn sched<B: Backend>(&self, model: &DeepSeek<B>) -> Result<SchedConfig, StartError> {
        let useful = self.max_num_seqs.saturating_mul(self.max_model_len.div_ceil(self.block_size));
        let block_bytes = model.kv_bytes_per_token() * self.block_size;
        // Slots are counted in 32 bits.
        let useful = useful.min(u32::MAX as usize / self.block_size);
        let needed = self.max_model_len.div_ceil(self.block_size);
        let num_blocks = match (self.num_blocks, model.backend().free_bytes()) {
            (Some(num_blocks), _) if num_blocks < needed => {
                let have_tokens = num_blocks * self.block_size;
                return Err(StartError::TooFewBlocks { have_tokens, max_model_len: self.max_model_len });
            }
            (Some(num_blocks), _) => num_blocks,
            (None, None) => {
                useful.min(UNKNOWN_MEMORY_TOKENS.max(self.max_model_len).div_ceil(self.block_size))
            }
            (None, Some(free_bytes)) => {
                let have_bytes = (free_bytes as f64 * self.kv_memory_fraction) as usize;
                let fits = have_bytes / block_bytes;
                if fits < needed {
                    return Err(StartError::KvCacheTooSmall {
                        have_tokens: fits * self.block_size,
                        have_bytes,
                        free_bytes,
                        max_model_len: self.max_model_len,
                        need_bytes: needed * block_bytes,
                    });
                }
                fits.min(useful)
            }
        };
        let depth = self.depth.unwrap_or(if model.backend().capabilities().asynchronous { 2 } else { 1 });
        let config = SchedConfig {
            block_size: self.block_size,
            num_blocks,
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_model_len: self.max_model_len,
            max_prompt_logits: model.options().max_logit_rows.saturating_sub(self.max_num_seqs),
            // The handle bounds the queue before a request gets here; preempted sequences come on top.
            max_queued: usize::MAX,
            depth,
            prefix_cache: self.prefix_cache.then(prefix_key).transpose()?,
            ..SchedConfig::default()
        };
        config.validate()?;
        Ok(config)
    }
}
