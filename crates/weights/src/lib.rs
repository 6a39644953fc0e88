//! Checkpoint to weights for the DeepSeek V2/V3 architecture: config.json, generation_config.json, memory-mapped
//! safetensors, FP8 blocks, quantisation at load, sharding, and finding a model in the Hugging Face cache.
//!
//! The order of use: [`resolve_model`] gives a folder, [`ModelConfig::open`] reads what the model is,
//! [`Checkpoint::open`] maps the weights, [`Checkpoint::verify`] holds every tensor against the config before a byte
//! of weights is read, and [`Checkpoint::linear`] and [`Checkpoint::take`] hand out each rank's shard.
//!
//! Knows no forward pass and no device.
#![deny(unsafe_code)]

mod awq;
mod checkpoint;
mod config;
mod dummy;
mod error;
mod f8;
mod generation;
mod header;
mod hub;
mod json;
mod linear;
// Mapping files and advising the kernel about them cannot be done without.
#[allow(unsafe_code)]
mod mapping;
mod quantize;
mod shapes;
mod writer;

pub use awq::{HostInt4, repack_awq};
pub use checkpoint::{Checkpoint, TensorInfo};
pub use config::{
    Architecture, ConfigError, ConfigJson, Fp8BlockConfig, ModelConfig, MoeConfig, ParamCounts, Rope,
    ScaleFmt, ScoringFunc, TopkMethod, Yarn,
};
pub use dummy::{DummyTensor, dummy_tensors};
pub use error::WeightsError;
pub use f8::f8e4m3_to_f32;
pub use generation::GenerationDefaults;
pub use hub::{HubEnv, HubError, resolve_model};
pub use linear::{HostLinear, Partition, widen_to_f32};
pub use quantize::{HostQuantized, QUANTIZED_GROUP, QuantizedFormat, quantize, quantizing_threads};
pub use shapes::{ExpectedTensor, Presence, TensorKind, Verified, expected_tensors};
pub use writer::{Written, write_dummy};
