//! What the scheduler refuses. Broken invariants are panics and are not here.

use r1_core::SeqId;

/// A configuration or a sequence that the scheduler does not take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SchedError {
    /// A configuration value outside its range.
    #[error("{field} is {value}; it must be {range}")]
    InvalidConfig {
        /// The field's name.
        field: &'static str,
        /// What was given.
        value: usize,
        /// What is allowed.
        range: &'static str,
    },
    /// As many sequences wait as may wait.
    #[error("{max} sequences are waiting already, which is the limit; try again later")]
    QueueFull {
        /// `max_queued`.
        max: usize,
    },
    /// A prompt without tokens.
    #[error("the prompt is empty; it must hold at least one token")]
    EmptyPrompt,
    /// A request for no tokens at all.
    #[error("max_new_tokens is 0; it must be at least 1")]
    NoNewTokens,
    /// A prompt that leaves no room for a new token.
    #[error("the prompt has {prompt} tokens; with at least one new token it must fit in {max_model_len}")]
    PromptTooLong {
        /// Length of the prompt in tokens.
        prompt: usize,
        /// `max_model_len`.
        max_model_len: usize,
    },
    /// A sequence that the KV cache could not hold even alone.
    #[error(
        "the sequence may need {needs_blocks} KV cache blocks, but there are {num_blocks}; \
         shorten the prompt, ask for fewer new tokens or enlarge the cache"
    )]
    NeverFits {
        /// Blocks at full length.
        needs_blocks: usize,
        /// Blocks in the cache.
        num_blocks: usize,
    },
    /// An id that is in use. An id is free again when the last step that holds its sequence has been committed.
    #[error("sequence {id} exists already")]
    DuplicateId {
        /// The id.
        id: SeqId,
    },
}
