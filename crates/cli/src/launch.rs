//! From arguments to a loaded model on a device: the one place that names backends.

use std::sync::Arc;

use anyhow::{Result, bail};
use r1_backend::Backend;
use r1_comm::Local;
use r1_core::{DType, Rank};
use r1_cpu::{Cpu, CpuOptions};
use r1_engine::EngineConfig;
use r1_model::{DeepSeek, Fp8Compute, MlaForm, ModelError, ModelOptions, WeightFormat};
use r1_reference::Reference;

use crate::args::{Device, Dtype, ModelArgs};
use crate::source::Source;

/// What runs a model; generic code goes through [`AnyDevice::with`].
pub(crate) enum AnyDevice {
    Cpu(Arc<Cpu>),
    Reference(Arc<Reference>),
}

/// Code that runs on whichever device was chosen.
pub(crate) trait OnDevice {
    /// What it gives.
    type Output;
    /// Runs on one backend.
    fn run<B: Backend>(self, backend: Arc<B>) -> Self::Output;
}

impl AnyDevice {
    /// The device that `--device` names.
    pub(crate) fn open(args: &ModelArgs) -> Result<Self> {
        match args.device {
            Device::Auto | Device::Cpu => {
                let threads = args.threads.map(usize::from);
                Ok(Self::Cpu(Arc::new(Cpu::new(CpuOptions { threads, isa: None })?)))
            }
            Device::Reference if args.threads.is_some() => {
                bail!("--threads does not bind --device reference; leave it out or take --device cpu")
            }
            Device::Reference => Ok(Self::Reference(Arc::new(Reference::new()))),
            Device::Cuda => bail!("--device cuda is not in this build yet; --device cpu runs everywhere"),
            Device::Rocm => bail!("--device rocm is not in this build yet; --device cpu runs everywhere"),
            Device::Emu => bail!("--device emu is not in this build yet; --device cpu runs everywhere"),
        }
    }

    /// One line about the device.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Cpu(backend) => backend.describe(),
            Self::Reference(backend) => backend.describe(),
        }
    }

    /// Runs generic code on the device.
    pub(crate) fn with<F: OnDevice>(self, code: F) -> F::Output {
        match self {
            Self::Cpu(backend) => code.run(backend),
            Self::Reference(backend) => code.run(backend),
        }
    }
}

/// The sizes and types a model runs with.
pub(crate) struct Launch {
    pub(crate) model: ModelOptions,
    pub(crate) engine: EngineConfig,
}

impl Launch {
    /// Checks the arguments against the model, for steps of at most that many sequences and tokens.
    pub(crate) fn new(
        args: &ModelArgs,
        source: &Source,
        max_num_seqs: usize,
        max_num_batched_tokens: usize,
    ) -> Result<Self> {
        let (activation_dtype, weights) = match args.dtype {
            Dtype::Auto | Dtype::Float32 => (DType::F32, WeightFormat::AsStored),
            Dtype::Bfloat16 => (DType::BF16, WeightFormat::WidenToBf16),
            Dtype::Float16 => {
                bail!("--dtype float16 is not supported; DeepSeek's activations overflow it: use bfloat16")
            }
            Dtype::Fp8 | Dtype::Fp8E5m2 => {
                bail!("--dtype is float32, bfloat16 or auto; FP8 weights are used as stored")
            }
        };
        let same = match args.kv_cache_dtype {
            Dtype::Auto => true,
            Dtype::Float32 => activation_dtype == DType::F32,
            Dtype::Bfloat16 => activation_dtype == DType::BF16,
            Dtype::Float16 | Dtype::Fp8 | Dtype::Fp8E5m2 => false,
        };
        if !same {
            bail!(
                "--kv-cache-dtype is not supported yet beside the activations' dtype ({activation_dtype}); use auto"
            );
        }
        let model_max = source.config.max_position_embeddings;
        let max_model_len = args.max_model_len.unwrap_or(model_max);
        if max_model_len > model_max {
            bail!(
                "--max-model-len {max_model_len} is more than the model's {model_max} (max_position_embeddings)"
            );
        }
        if max_model_len < 2 {
            bail!("--max-model-len {max_model_len} leaves no room for a prompt and a reply");
        }
        if max_num_seqs == 0 || max_num_batched_tokens < max_num_seqs {
            bail!(
                "--max-num-batched-tokens {max_num_batched_tokens} must be at least --max-num-seqs {max_num_seqs}, and that \
                 at least 1: each running sequence decodes one token per step"
            );
        }
        Ok(Self {
            model: ModelOptions {
                activation_dtype,
                weights,
                fp8: Fp8Compute::WeightOnly,
                mla_form: MlaForm::Auto,
                max_batched_tokens: max_num_batched_tokens,
                max_logit_rows: max_num_seqs,
                max_model_len,
                max_expanded_tokens: max_num_batched_tokens,
                layers: None,
                deterministic: false,
                rank: Rank(0),
                world_size: 1,
            },
            engine: EngineConfig {
                block_size: 64,
                max_num_seqs,
                max_num_batched_tokens,
                max_model_len,
                kv_memory_fraction: args.gpu_memory_utilization,
                log_every_steps: 40,
            },
        })
    }

    /// How weights and activations meet, for the ready line.
    pub(crate) fn precision(&self, source: &Source) -> String {
        let activations = self.model.activation_dtype;
        match (&source.config.quantization, self.model.weights) {
            (Some(_), WeightFormat::AsStored) => format!("FP8 weights, {activations} activations (W8)"),
            (Some(_), WeightFormat::WidenToBf16) => {
                format!("FP8 weights widened to BF16, {activations} activations")
            }
            (None, _) => format!("weights as stored, {activations} activations"),
        }
    }
}

/// Loads the model on one rank.
pub(crate) fn load<B: Backend>(
    backend: Arc<B>,
    source: &Source,
    options: ModelOptions,
    progress: &mut dyn FnMut(f32),
) -> Result<DeepSeek<B>, ModelError> {
    let comm = Arc::new(Local::single());
    DeepSeek::load(backend, comm, &source.checkpoint, &source.config, options, progress)
}
