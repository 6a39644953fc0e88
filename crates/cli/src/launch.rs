//! From arguments to a loaded model on a device: the one place that names backends.

use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use r1_backend::Backend;
use r1_core::{DType, Rank};
use r1_cpu::Cpu;
use r1_engine::{Connect, EngineConfig, PROMPT_LOGIT_ROWS, connect_in_host_memory};
use r1_gpu::{DriverError, Gpu};
use r1_model::{Fp8Compute, KvCacheFormat, MlaForm, ModelOptions, WeightFormat};
use r1_reference::Reference;
use r1_weights::QUANTIZED_GROUP;

use crate::args::{Device, Dtype, Int8Activations, ModelArgs, Quantization, WeightMemory};
use crate::log::Said;
use crate::numa;
use crate::source::Source;

/// What runs a model, one device per rank; generic code goes through [`AnyDevice::with`].
pub(crate) enum AnyDevice {
    Cpu(Vec<Arc<Cpu>>),
    Gpu(Vec<Arc<Gpu>>),
    Reference(Vec<Arc<Reference>>),
}

/// Code that runs on whichever device was chosen.
pub(crate) trait OnDevice {
    /// What it gives.
    type Output;
    /// Runs on one kind of backend, with a device per rank and what connects them.
    fn run<B: Backend>(self, devices: Vec<Arc<B>>, connect: Connect<B>) -> Self::Output;
}

impl AnyDevice {
    /// The device that `--device` names, once for each of `--tp` ranks, and what there is to say: for auto, which one was taken
    /// and why.
    pub(crate) fn open(args: &ModelArgs) -> Result<(Self, Vec<Said>)> {
        let mut said = Vec::new();
        if args.device != Device::Auto {
            return Ok((Self::open_one(args, args.device, &mut said)?, said));
        }
        let mut absent = Vec::new();
        for found in r1_gpu::devices() {
            match found.devices {
                Ok(count) => {
                    let device = if found.driver == "cuda" { Device::Cuda } else { Device::Rocm };
                    absent
                        .insert(0, format!("--device auto takes {}, which shows {count} GPUs", found.driver));
                    said.push(Said::Note(absent.join("; ")));
                    return Ok((Self::open_one(args, device, &mut said)?, said));
                }
                Err(why) => absent.push(format!("{}: {why}", found.driver)),
            }
        }
        absent.insert(0, "--device auto takes the CPU".into());
        said.push(Said::Note(absent.join("; ")));
        Ok((Self::open_one(args, Device::Cpu, &mut said)?, said))
    }

    fn open_one(args: &ModelArgs, device: Device, said: &mut Vec<Said>) -> Result<Self> {
        let ranks = args.tp;
        let for_cpus = [
            (args.weight_memory.is_some(), "--weight-memory"),
            (args.numa.is_some(), "--numa"),
            (args.int8_activations.is_some(), "--int8-activations"),
        ];
        if let Some((_, flag)) = for_cpus.into_iter().find(|(given, _)| *given && device != Device::Cpu) {
            bail!("{flag} is for --device cpu; leave it out or take --device cpu");
        }
        match device {
            Device::Auto => unreachable!("auto was decided"),
            Device::Cpu => {
                let cores = thread::available_parallelism().map_or(1, usize::from);
                let threads = args.threads.map_or(cores, usize::from);
                if args.threads.is_some() && threads < ranks {
                    bail!("--threads {threads} is less than one thread for each of --tp {ranks} ranks");
                }
                // Ranks wait for each other, so they get equal shares.
                let threads = (ranks > 1 || args.threads.is_some()).then_some((threads / ranks).max(1));
                let weights = match args.weight_memory {
                    None | Some(WeightMemory::InPlace) => r1_cpu::WeightMemory::InPlace,
                    Some(WeightMemory::HugePages) => r1_cpu::WeightMemory::HugePages,
                };
                let int8 = int8_activations(args)?;
                let (cpus, placement) =
                    numa::open_cpus(args.numa.unwrap_or_default(), ranks, threads, weights)?;
                said.extend(placement);
                let finish = |cpu: Cpu| -> Result<_> {
                    let cpu = cpu.sharing_memory(ranks).with_weights(weights);
                    let quantizes = match int8 {
                        Int8Activations::Auto => cpu.multiplies_int8(),
                        Int8Activations::On => true,
                        Int8Activations::Off => false,
                    };
                    if !quantizes {
                        return Ok(Arc::new(cpu));
                    }
                    let way_out = "--int8-activations on; off leaves activations as they are";
                    Ok(Arc::new(cpu.with_int8_activations().context(way_out)?))
                };
                Ok(Self::Cpu(cpus.into_iter().map(finish).collect::<Result<_>>()?))
            }
            Device::Reference if args.threads.is_some() => {
                bail!("--threads does not bind --device reference; leave it out or take --device cpu")
            }
            Device::Reference => {
                Ok(Self::Reference((0..ranks).map(|_| Arc::new(Reference::new())).collect()))
            }
            Device::Cuda | Device::Rocm if args.threads.is_some() => {
                bail!("--threads binds no GPU; leave it out or take --device cpu")
            }
            Device::Cuda => Self::open_gpus(args, "cuda", |i, share| Gpu::cuda(i, share, args.allow_ptx)),
            Device::Rocm => Self::open_gpus(args, "rocm", Gpu::rocm),
            Device::Emu => {
                let devices = Gpu::emulated_on_host(args.threads.map(usize::from), ranks)?;
                Ok(Self::Gpu(devices.into_iter().map(Arc::new).collect()))
            }
        }
    }

    /// A GPU of that driver for each rank.
    fn open_gpus(
        args: &ModelArgs,
        driver: &str,
        open: impl Fn(usize, f64) -> Result<Gpu, DriverError>,
    ) -> Result<Self> {
        let found = r1_gpu::devices().into_iter().find(|found| found.driver == driver);
        let count = found.expect("a driver that is listed").devices;
        let count = count.with_context(|| format!("--device {driver}; --device cpu runs everywhere"))?;
        if count < args.tp {
            bail!("--tp {} needs a GPU for each rank, and {driver} shows {count}", args.tp);
        }
        let share = args.gpu_memory_utilization.unwrap_or(GPU_MEMORY_SHARE);
        let open = |i| open(i, share).with_context(|| format!("--device {driver}, GPU {i}"));
        Ok(Self::Gpu((0..args.tp).map(|i| Ok(Arc::new(open(i)?))).collect::<Result<_>>()?))
    }

    /// Of what is free after loading, what the KV cache takes: a GPU's memory is bounded as a whole.
    fn kv_memory_fraction(&self, asked: Option<f64>) -> f64 {
        match self {
            Self::Gpu(devices) if devices[0].name() != "emu" => GPU_KV_SHARE,
            _ => asked.unwrap_or(HOST_KV_SHARE),
        }
    }

    /// What activations are where nobody says: BF16 where the device multiplies it.
    fn activation_dtype(&self) -> DType {
        match self {
            Self::Cpu(devices) if devices[0].multiplies_bf16() => DType::BF16,
            Self::Gpu(_) => DType::BF16,
            Self::Cpu(_) | Self::Reference(_) => DType::F32,
        }
    }

    /// Whether quantized weights are applied to int8 activations.
    fn has_int8_activations(&self) -> bool {
        match self {
            Self::Cpu(devices) => devices[0].capabilities().int8_activations,
            Self::Gpu(_) | Self::Reference(_) => false,
        }
    }

    /// Whether it has FP8 arithmetic; `None` for what is no GPU.
    fn gpu_fp8(&self) -> Option<bool> {
        match self {
            Self::Gpu(devices) => Some(devices[0].capabilities().fp8_activations),
            Self::Cpu(_) | Self::Reference(_) => None,
        }
    }

    /// One line about the device.
    pub(crate) fn describe(&self) -> String {
        let (device, ranks) = match self {
            Self::Cpu(devices) => (devices[0].describe(), devices.len()),
            Self::Gpu(devices) => (devices[0].describe(), devices.len()),
            Self::Reference(devices) => (devices[0].describe(), devices.len()),
        };
        if ranks == 1 { device } else { format!("{ranks} tensor-parallel ranks, each on {device}") }
    }

    /// Runs generic code on the device.
    pub(crate) fn with<F: OnDevice>(self, code: F) -> F::Output {
        match self {
            Self::Cpu(devices) => code.run(devices, connect_in_host_memory()),
            Self::Gpu(devices) => code.run(devices, Arc::new(Gpu::connect)),
            Self::Reference(devices) => code.run(devices, connect_in_host_memory()),
        }
    }
}

/// Whether int8 activations are wanted: what `--int8-activations` comes to beside the other flags.
fn int8_activations(args: &ModelArgs) -> Result<Int8Activations> {
    let quantizes = matches!(args.quantization, Some(Quantization::Int8 | Quantization::Int4));
    Ok(match args.int8_activations.unwrap_or_default() {
        Int8Activations::On if !quantizes => {
            bail!(
                "--int8-activations on is for --quantization int8 or int4; other weights are applied to activations as they are"
            )
        }
        Int8Activations::Auto if !quantizes || args.dtype == Dtype::Float32 => Int8Activations::Off,
        asked => asked,
    })
}

/// What a GPU's process takes of its memory.
const GPU_MEMORY_SHARE: f64 = 0.9;
/// Of what is left of that after loading, what the KV cache takes: the rest is for a step's inputs and logits, and for sampling
/// parameters that outgrow their room.
const GPU_KV_SHARE: f64 = 0.97;
/// Of the host's free memory, what the KV cache takes.
const HOST_KV_SHARE: f64 = 0.5;

/// Tokens per block of the KV cache; what two prompts have in common is shared in whole blocks.
const BLOCK_SIZE: usize = 64;

/// The sizes and types a model runs with.
pub(crate) struct Launch {
    /// Quantized weights are applied to int8 activations.
    int8_activations: bool,
    pub(crate) model: ModelOptions,
    pub(crate) engine: EngineConfig,
}

impl Launch {
    /// Checks the arguments against the model and the device, for steps of at most that many sequences and tokens.
    pub(crate) fn new(
        args: &ModelArgs,
        source: &Source,
        device: &AnyDevice,
        max_num_seqs: usize,
        max_num_batched_tokens: usize,
    ) -> Result<Self> {
        let (activation_dtype, weights) = match args.dtype {
            Dtype::Auto => (device.activation_dtype(), WeightFormat::AsStored),
            Dtype::Float32 => (DType::F32, WeightFormat::AsStored),
            Dtype::Bfloat16 => (DType::BF16, WeightFormat::WidenToBf16),
            Dtype::Float16 => {
                bail!("--dtype float16 is not supported; DeepSeek's activations overflow it: use bfloat16")
            }
            Dtype::Fp8 | Dtype::Fp8E5m2 => {
                bail!("--dtype is float32, bfloat16 or auto; FP8 weights are used as stored")
            }
            Dtype::Int8 => {
                bail!(
                    "--dtype is float32, bfloat16 or auto: activations are never whole numbers; --quantization int8 or int4 is for weights"
                )
            }
        };
        let weights = match args.quantization {
            Some(Quantization::Int8) => WeightFormat::Int8,
            Some(Quantization::Int4) => WeightFormat::Int4,
            Some(Quantization::Fp8 | Quantization::Awq | Quantization::Gptq) | None => weights,
        };
        let kv_cache =
            kv_cache_format(args.kv_cache_dtype, activation_dtype, args.dtype, &device.describe())?;
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
            int8_activations: device.has_int8_activations(),
            model: ModelOptions {
                activation_dtype,
                kv_cache,
                weights,
                fp8: if args.dtype == Dtype::Auto && device.gpu_fp8() == Some(true) {
                    Fp8Compute::WeightsAndActivations
                } else {
                    Fp8Compute::WeightOnly
                },
                mla_form: if args.deterministic { MlaForm::Absorbed } else { MlaForm::Auto },
                deterministic: args.deterministic,
                max_batched_tokens: max_num_batched_tokens,
                max_logit_rows: max_num_seqs + PROMPT_LOGIT_ROWS,
                max_model_len,
                max_expanded_tokens: max_num_batched_tokens,
                layers: None,
                rank: Rank(0),
                world_size: args.tp,
            },
            engine: EngineConfig {
                block_size: BLOCK_SIZE,
                max_num_seqs,
                max_num_batched_tokens,
                max_model_len,
                kv_memory_fraction: device.kv_memory_fraction(args.gpu_memory_utilization),
                num_blocks: args.max_total_tokens.map(|tokens| tokens.div_ceil(BLOCK_SIZE)),
                prefix_cache: !args.no_prefix_cache,
                depth: None,
                max_captured_seqs: args.peers.max_captured_seqs(),
                pad_decodes: false,
                log_every_steps: 40,
            },
        })
    }

    /// How weights and activations meet and what the KV cache holds, for the ready line.
    pub(crate) fn precision(&self, source: &Source) -> String {
        let activations = self.model.activation_dtype;
        let cache = match self.model.kv_cache {
            KvCacheFormat::Activations => activations.name(),
            KvCacheFormat::Fp8 => "FP8",
        };
        let arithmetic = match (&source.config.quantization, self.model.weights) {
            (_, format @ (WeightFormat::Int8 | WeightFormat::Int4)) => {
                let weights = match format {
                    WeightFormat::Int8 => format!("int8 weights (groups of {QUANTIZED_GROUP})"),
                    _ => format!("int4 weights (groups of {QUANTIZED_GROUP}; int8 head)"),
                };
                if self.int8_activations {
                    format!("{weights} and int8 activations, {activations} between")
                } else {
                    format!("{weights}, {activations} activations")
                }
            }
            (Some(_), WeightFormat::AsStored) if self.model.fp8 == Fp8Compute::WeightsAndActivations => {
                format!("FP8 weights and activations (W8A8), {activations} between")
            }
            (Some(_), WeightFormat::AsStored) => format!("FP8 weights, {activations} activations (W8)"),
            (Some(_), WeightFormat::WidenToBf16) => {
                format!("FP8 weights widened to BF16, {activations} activations")
            }
            (None, _) => format!("weights as stored, {activations} activations"),
        };
        let weights = if source.is_dummy { "random weights (--load-format dummy), " } else { "" };
        format!("{weights}{arithmetic}, {cache} KV cache")
    }
}

/// What `--kv-cache-dtype` asks for beside activations of that type, which `--dtype` came to on the device.
fn kv_cache_format(asked: Dtype, activations: DType, dtype: Dtype, device: &str) -> Result<KvCacheFormat> {
    let (dense, flag) = match asked {
        Dtype::Auto => return Ok(KvCacheFormat::Activations),
        Dtype::Fp8 => return Ok(KvCacheFormat::Fp8),
        Dtype::Fp8E5m2 => {
            bail!(
                "--kv-cache-dtype fp8_e5m2 is not supported; take fp8 (E4M3), whose scales per 128 channels need no wider range"
            )
        }
        Dtype::Float16 => bail!("--kv-cache-dtype float16 is not supported; take auto, fp8, or bfloat16"),
        Dtype::Int8 => bail!(
            "--kv-cache-dtype is auto, float32, bfloat16 or fp8: latents are not kept as whole numbers; --quantization int8 or \
             int4 is for weights"
        ),
        Dtype::Float32 => (DType::F32, "float32"),
        Dtype::Bfloat16 => (DType::BF16, "bfloat16"),
    };
    if dense != activations {
        let why = match dtype {
            Dtype::Auto => format!(", which --dtype auto takes on this device ({device})"),
            _ => String::new(),
        };
        bail!(
            "--kv-cache-dtype {flag} is not supported beside {activations} activations{why}; take --dtype {flag} with it, or \
             --kv-cache-dtype auto or fp8"
        );
    }
    Ok(KvCacheFormat::Activations)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dense_cache_is_of_the_activations_type_however_that_was_decided() {
        let format =
            |asked, activations, dtype| kv_cache_format(asked, activations, dtype, "cpu: AVX2, 2 threads");
        for (asked, activations) in [(Dtype::Float32, DType::F32), (Dtype::Bfloat16, DType::BF16)] {
            for dtype in [Dtype::Auto, asked] {
                let got = format(asked, activations, dtype).expect("the same type");
                assert_eq!(got, KvCacheFormat::Activations, "{asked:?} {dtype:?}");
            }
        }
        let said =
            |asked, activations, dtype| format(asked, activations, dtype).expect_err("refused").to_string();
        assert_eq!(
            said(Dtype::Bfloat16, DType::F32, Dtype::Auto),
            "--kv-cache-dtype bfloat16 is not supported beside F32 activations, which --dtype auto takes on this device (cpu: AVX2, \
             2 threads); take --dtype bfloat16 with it, or --kv-cache-dtype auto or fp8"
        );
        assert_eq!(
            said(Dtype::Float32, DType::BF16, Dtype::Bfloat16),
            "--kv-cache-dtype float32 is not supported beside BF16 activations; take --dtype float32 with it, or --kv-cache-dtype \
             auto or fp8"
        );
        assert!(said(Dtype::Float16, DType::F32, Dtype::Auto).contains("float16 is not supported"));
        assert!(said(Dtype::Int8, DType::F32, Dtype::Auto).contains("--quantization int8"));
    }
}
