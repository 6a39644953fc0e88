//! Shared vocabulary of r1-serve, without I/O: ids, dtypes, sampling parameters, token constraints, parallel
//! topology and finish reasons. Knows nothing of tensors, devices, schedulers, text or HTTP.
#![forbid(unsafe_code)]

mod constraint;
mod dtype;
mod finish;
mod ids;
mod sampling;
mod topology;

pub use constraint::{Allowed, ConstraintError, TokenConstraint};
pub use dtype::{DType, UnknownDType};
pub use finish::FinishReason;
pub use ids::{BlockId, Rank, SeqId, TokenId};
pub use sampling::{InvalidSampling, SamplingParams};
pub use topology::{InvalidTopology, Topology};
