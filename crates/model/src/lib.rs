//! Forward passes, written once, generic over [`Backend`](r1_backend::Backend): MLA, mixture of experts, DeepSeek, and the
//! registry of known models. Knows nothing of the device it runs on, of scheduling or of text.
#![forbid(unsafe_code)]

mod deepseek;
mod error;
mod load;
mod mla;
mod options;
mod registry;
mod shard;

pub use deepseek::{DeepSeek, StageInput, StageOutput};
pub use error::{ModelError, StepError};
pub use options::{Fp8Compute, KvCacheFormat, MlaForm, ModelOptions, WeightFormat};
pub use registry::{
    Family, KnownModel, ModelStatus, ReasoningEffort, Registry, ThinkingBudgets, ToolSyntaxKind,
    ToolsBlockKind,
};
