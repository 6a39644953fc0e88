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
pub mod philox;
mod sampling;
pub mod shape;
mod tensor;
mod weight;

pub use backend::{Backend, Capabilities, HostSlice, HostSliceMut, Ticket};
pub use batch::{Batch, Fp8Latent, LatentCache, RopeTable};
pub use comm::{CommError, Communicator};
pub use error::BackendError;
pub use host::{HostBytes, HostTensor};
pub use sampling::{LogprobsOut, RowSampling, SamplingBatch, SeenToken};
pub use tensor::{Dims, Tensor};
pub use weight::{
    Activation, Experts, Fp8Activation, GroupScore, Groups, HeadForm, HeadWeight, MlpScratch, MlpWeights,
    MoeScratch, MoeWeights, QkvScratch, QkvWeights, QueryProjection, Routing, ScoreFunction, Weight,
};
