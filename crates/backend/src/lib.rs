//! What a device must offer: the [`Backend`] and [`Communicator`] traits, tensors, shapes, and `conformance`,
//! the one test suite that every backend runs. Knows no device.
#![forbid(unsafe_code)]

mod backend;
mod batch;
mod comm;
pub mod composite;
pub mod conformance;
mod error;
mod host;
mod int4;
mod kv_cache;
pub mod philox;
mod sampling;
pub mod shape;
mod tensor;
mod weight;

pub use backend::{AttentionKind, Backend, Capabilities, HostSlice, HostSliceMut, MemoryUse, Ticket};
pub use batch::{Batch, Fp8Latent, LatentCache, NO_SLOT, RopeTable, latent_bytes_per_token};
pub use comm::{CommError, Communicator};
pub use error::BackendError;
pub use host::{HostBytes, HostTensor};
pub use int4::Int4Group;
pub use kv_cache::KvCache;
pub use sampling::{LogprobsOut, RowSampling, SamplingBatch, SeenToken};
pub use tensor::{Dims, Tensor};
pub use weight::{
    Activation, Experts, Fp8Activation, GroupScore, Groups, HeadForm, HeadWeight, INT8_BLOCK, LocalExperts,
    MlpScratch, MlpWeights, MoeScratch, MoeWeights, QkvScratch, QkvWeights, QueryProjection, Routing,
    ScoreFunction, Weight, WeightFormat,
};
