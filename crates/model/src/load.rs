//! Checkpoint to model: which tensor becomes which weight, and which part of it this rank holds.
//!
//! Attention is cut by heads, MLPs and experts by their intermediate size: the first linear of each pair is column
//! parallel, the second row parallel, and one all-reduce follows. Embedding and head are cut by the vocabulary: the rows
//! that the ranks look up are summed, the logits that they compute are gathered. Replicated is what every rank needs
//! whole: norms, the router with its bias, and the projections to the latents (`q_a_proj`, `kv_a_proj_with_mqa`), whose
//! outputs all heads share.

use std::sync::Arc;
use std::time::Instant;

use r1_backend::{
    Backend, Capabilities, Communicator, Experts, GroupScore, Groups, HostTensor, Int4Group, MlpWeights,
    MoeWeights, QkvWeights, QueryProjection, RopeTable, Routing, ScoreFunction, Tensor, Weight,
};
use r1_core::DType;
use r1_weights::{
    Checkpoint, HostInt4, HostLinear, HostQuantized, ModelConfig, Partition, QuantizedFormat, ScoringFunc,
    TopkMethod, quantizing_threads,
};

use crate::deepseek::{DeepSeek, Embedding, FeedForward, Head, Layer, Workspace};
use crate::mla::Mla;
use crate::{MlaForm, ModelError, ModelOptions, WeightFormat, shard};

pub(crate) const LM_HEAD: &str = "lm_head";
const FLOAT: &[DType] = &[DType::F32, DType::BF16, DType::F16];

impl<B: Backend> DeepSeek<B> {
    /// Loads a stage. Every tensor is checked against the configuration before the first weight is read; `progress` is told
    /// the share of the stage's layers that is done, 0 to 1.
    ///
    /// # Panics
    /// When `comm` is another rank, or of another group size, than `options` say.
    pub fn load(
        backend: Arc<B>,
        comm: Arc<dyn Communicator<B>>,
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        options: ModelOptions,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Self, ModelError> {
        options.assert_rank(&*comm);
        check(&*backend, config, &options)?;
        let verified = checkpoint.verify(config)?;
        if !verified.unexpected.is_empty() {
            tracing::warn!(tensors = ?verified.unexpected, "the checkpoint holds tensors that the model does not use");
        }
        let stage = options.layers.clone().unwrap_or(0..config.num_hidden_layers);
        check_room(&*backend, checkpoint, config, &options, stage.len())?;
        let started = Instant::now();
        let mut loader = Loader { backend: &*backend, checkpoint, config, options: &options, size_bytes: 0 };
        let embedding = match stage.start {
            0 => Some(loader.embedding()?),
            _ => None,
        };
        let mut layers = Vec::with_capacity(stage.len());
        for index in stage.clone() {
            layers.push(loader.layer(index)?);
            progress(layers.len() as f32 / stage.len() as f32);
        }
        let head = if stage.end == config.num_hidden_layers {
            Some(Head {
                norm: loader.vector("model.norm.weight", config.hidden_size)?,
                lm_head: loader.lm_head(embedding.as_ref())?,
            })
        } else {
            None
        };
        let weight_bytes = loader.size_bytes;
        // What is copied behind the caller's back has arrived here, or failed.
        backend.flush().wait()?;
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(
            weight_bytes,
            seconds,
            "rank {} has its weights: {:.2} GiB in {seconds:.1} s, {:.2} GB/s",
            options.rank.0,
            weight_bytes as f64 / f64::from(1 << 30),
            weight_bytes as f64 / 1e9 / seconds.max(1e-9),
        );
        let rope = rope_table(&*backend, config, options.max_model_len)?;
        let workspace = Workspace::alloc(&*backend, config, &options, &layers, head.as_ref())?;
        let config = config.clone();
        let comm = Some(comm);
        Ok(Self { backend, comm, config, options, embedding, layers, head, rope, workspace, weight_bytes })
    }
}

/// Refuses, before a weight is read, what the device has no room for.
fn check_room<B: Backend>(
    backend: &B,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    options: &ModelOptions,
    num_layers: usize,
) -> Result<(), ModelError> {
    let Some(free_bytes) = backend.free_bytes() else { return Ok(()) };
    let weight_bytes = shard::weight_bytes(checkpoint, config, options);
    let max_model_len = options.max_model_len;
    let context_bytes = options.kv_bytes_per_token(config, num_layers).saturating_mul(max_model_len);
    if weight_bytes.saturating_add(context_bytes) > free_bytes {
        let (device, rank, world) = (backend.name(), options.rank, options.world_size);
        return Err(ModelError::TooLarge {
            device,
            rank,
            world,
            weight_bytes,
            max_model_len,
            context_bytes,
            free_bytes,
        });
    }
    Ok(())
}

/// Refuses what is valid but not built.
fn check<B: Backend>(backend: &B, config: &ModelConfig, options: &ModelOptions) -> Result<(), ModelError> {
    let capabilities = backend.capabilities();
    let dtype = options.activation_dtype;
    if !capabilities.activation_dtypes.contains(&dtype) {
        let names: Vec<_> = capabilities.activation_dtypes.iter().map(|dtype| dtype.name()).collect();
        let why = format!("the device {} computes in {}", backend.name(), names.join(" or "));
        return Err(ModelError::Unsupported { what: format!("--dtype {dtype}"), why });
    }
    check_cache(backend.name(), &capabilities.cache_dtypes, options.kv_cache_dtype())?;
    if options.activation_fp8(config).is_some() && !capabilities.fp8_activations {
        let why = format!(
            "the device {} has no FP8 arithmetic; FP8 weights run with {dtype} activations",
            backend.name()
        );
        return Err(ModelError::Unsupported { what: "FP8 activations (W8A8)".into(), why });
    }
    check_quantization(backend.name(), &capabilities, config, options)?;
    if config.num_hidden_layers > config.first_k_dense_replace && config.moe.n_shared_experts == 0 {
        let why = "every published model of this architecture has shared experts".into();
        return Err(ModelError::Unsupported { what: "n_shared_experts 0".into(), why });
    }
    if options.deterministic {
        check_deterministic(backend.name(), capabilities.batch_invariant, options)?;
    }
    let world = options.world_size;
    let widths = [
        ("num_attention_heads", config.num_attention_heads),
        ("intermediate_size", config.intermediate_size),
        ("moe_intermediate_size", config.moe.moe_intermediate_size),
        ("vocab_size", config.vocab_size),
    ];
    for (what, size) in widths {
        if !size.is_multiple_of(world) {
            return Err(ModelError::Indivisible { what, size, world });
        }
    }
    Ok(())
}

/// Refuses weights in groups where the device, or the model's sizes, do not have them.
fn check_quantization(
    device: &str,
    capabilities: &Capabilities,
    config: &ModelConfig,
    options: &ModelOptions,
) -> Result<(), ModelError> {
    let taken = [&capabilities.weight_formats, &capabilities.expert_formats];
    let is_taken = |format| taken.iter().all(|formats| formats.contains(format));
    if !options.weights.needs().iter().all(is_taken) {
        let flag = options.weights.flag();
        return Err(ModelError::Unsupported {
            what: format!("--quantization {flag}"),
            why: format!(
                "the device {device} does not multiply {flag} weights in linears and experts; --quantization {flag} runs on --device cpu"
            ),
        });
    }
    shard::check_quantized(config, options)?;
    // Once, not by every rank.
    if options.rank.0 == 0
        && let Some(warning) = shard::cut_groups_warning(config, options)
    {
        tracing::warn!("{warning}");
    }
    Ok(())
}

/// Refuses a KV cache that the device does not have.
fn check_cache(device: &str, cache_dtypes: &[DType], dtype: DType) -> Result<(), ModelError> {
    if cache_dtypes.contains(&dtype) {
        return Ok(());
    }
    let names: Vec<_> = cache_dtypes.iter().map(|dtype| dtype.name()).collect();
    let why = format!("the device {device} has caches of {} only; use auto", names.join(" or "));
    Err(ModelError::Unsupported { what: format!("a KV cache of {dtype} (--kv-cache-dtype)"), why })
}

/// Refuses what would let a row's result depend on the step around it.
fn check_deterministic(
    device: &str,
    batch_invariant: bool,
    options: &ModelOptions,
) -> Result<(), ModelError> {
    if options.mla_form != MlaForm::Absorbed {
        return Err(ModelError::Unsupported {
            what: format!("--deterministic with MLA form {:?}", options.mla_form),
            why: "attention's form would change with the cut of a prompt into steps; the absorbed form does not"
                .into(),
        });
    }
    if !batch_invariant {
        return Err(ModelError::Unsupported {
            what: "--deterministic".into(),
            why: format!(
                "the device {device} sums in an order that depends on the batch; use --device cpu, which does not"
            ),
        });
    }
    Ok(())
}

/// Rotations of every position: cosines, then sines, times YaRN's attention scaling.
fn rope_table<B: Backend>(
    backend: &B,
    config: &ModelConfig,
    max_positions: usize,
) -> Result<RopeTable<B>, ModelError> {
    let (inv_freq, scaling) = (config.inv_freq(), config.attention_scaling());
    let mut table = Vec::with_capacity(max_positions * 2 * inv_freq.len());
    for position in 0..max_positions {
        // The angle is rounded to F32 as the reference implementations do.
        let angles = inv_freq.iter().map(|freq| position as f32 * freq);
        table.extend(angles.clone().map(|angle| angle.cos() * scaling));
        table.extend(angles.map(|angle| angle.sin() * scaling));
    }
    let host = HostTensor::from_f32(&table, &[max_positions, 2 * inv_freq.len()]);
    Ok(RopeTable { cos_sin: backend.import(&host)? })
}

struct Loader<'a, B: Backend> {
    backend: &'a B,
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    options: &'a ModelOptions,
    size_bytes: usize,
}

impl<B: Backend> Loader<'_, B> {
    fn column(&self) -> Partition {
        Partition::Column { rank: self.options.rank.0, world: self.options.world_size }
    }

    fn row(&self) -> Partition {
        Partition::Row { rank: self.options.rank.0, world: self.options.world_size }
    }

    fn import(&mut self, host: &HostTensor) -> Result<Tensor<B>, ModelError> {
        self.size_bytes += host.bytes().len();
        Ok(self.backend.import(host)?)
    }

    /// This rank's rows of the table `[V, D]`.
    fn embedding(&mut self) -> Result<Embedding<B>, ModelError> {
        let (vocab, hidden) = (self.config.vocab_size, self.config.hidden_size);
        let rows = vocab / self.options.world_size;
        let first_row = self.options.rank.0 * rows;
        let host = self.checkpoint.take("model.embed_tokens.weight", &[vocab, hidden], FLOAT)?;
        Ok(Embedding { table: self.import(&host.rows(first_row, rows))?, first_row })
    }

    /// `[n]`.
    fn vector(&mut self, name: &str, n: usize) -> Result<Tensor<B>, ModelError> {
        let host = self.checkpoint.take(name, &[n], FLOAT)?;
        self.import(&host)
    }

    /// `{prefix}.weight` `[n, k]`, or this rank's part of it, quantised where the options say so.
    fn linear(
        &mut self,
        prefix: &str,
        n: usize,
        k: usize,
        partition: Partition,
    ) -> Result<Weight<B>, ModelError> {
        match self.options.weights.quantized(prefix) {
            Some(format) => self.quantized(prefix, n, k, partition, format),
            None => self.stored(prefix, n, k, partition),
        }
    }

    fn quantized(
        &mut self,
        prefix: &str,
        n: usize,
        k: usize,
        partition: Partition,
        format: QuantizedFormat,
    ) -> Result<Weight<B>, ModelError> {
        let quant = self.config.quantization.as_ref();
        let ranks = self.options.world_size;
        let threads = self.backend.host_threads().unwrap_or_else(|| quantizing_threads(ranks));
        let host = self.checkpoint.quantized(prefix, n, k, quant, partition, format, threads)?;
        self.size_bytes += host.size_bytes();
        Ok(match host {
            HostQuantized::Int8 { data, scales, group, offset } => Weight::Int8Group {
                data: self.backend.import_matrix(&data)?,
                scales: self.backend.import(&scales)?,
                group,
                offset,
            },
            HostQuantized::Int4(HostInt4 { codes, zeros, scales, group }) => Weight::Int4Group(Int4Group {
                codes: self.backend.import_matrix(&codes)?,
                zeros: self.backend.import(&zeros)?,
                scales: self.backend.import(&scales)?,
                group,
            }),
        })
    }

    /// As [`linear`](Loader::linear), never quantised.
    fn stored(
        &mut self,
        prefix: &str,
        n: usize,
        k: usize,
        partition: Partition,
    ) -> Result<Weight<B>, ModelError> {
        let host = self.checkpoint.linear(prefix, n, k, self.config.quantization.as_ref(), partition)?;
        let host = match (self.options.weights, host) {
            (WeightFormat::WidenToBf16, fp8 @ HostLinear::Fp8Block { .. }) => {
                if let Some(data) = self.widened(&fp8)? {
                    return Ok(Weight::Dense { data });
                }
                let bytes =
                    fp8.to_f32().into_iter().flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect();
                let dense = HostTensor::from_vec(bytes, &fp8.shape(), DType::BF16);
                fp8.discard();
                HostLinear::Dense(dense)
            }
            (_, host) => host,
        };
        self.size_bytes += host.size_bytes();
        Ok(match host {
            HostLinear::Dense(data) => Weight::Dense { data: self.backend.import_matrix(&data)? },
            HostLinear::Fp8Block { data, scales, block, offset } => Weight::Fp8Block {
                data: self.backend.import_matrix(&data)?,
                scales: self.backend.import(&scales)?,
                block,
                offset,
            },
        })
    }

    /// FP8 blocks widened on the device, where it does that.
    fn widened(&mut self, fp8: &HostLinear) -> Result<Option<Tensor<B>>, ModelError> {
        let HostLinear::Fp8Block { data, scales, block, offset } = fp8 else { return Ok(None) };
        let dense = self.backend.import_widened(data, scales, *block, *offset)?;
        if let Some(dense) = &dense {
            self.size_bytes += dense.num_elements() * DType::BF16.size_bytes();
        }
        Ok(dense)
    }

    fn lm_head(&mut self, embedding: Option<&Embedding<B>>) -> Result<Weight<B>, ModelError> {
        let (vocab, hidden) = (self.config.vocab_size, self.config.hidden_size);
        if !self.config.tie_word_embeddings {
            return self.linear(LM_HEAD, vocab, hidden, self.column());
        }
        // The embedding's own memory where this stage has it; a later stage needs the table for its head alone.
        let data = match embedding {
            Some(embedding) => embedding.table.clone(),
            None => self.embedding()?.table,
        };
        Ok(Weight::Dense { data })
    }

    fn mlp(&mut self, prefix: &str, width: usize) -> Result<MlpWeights<B>, ModelError> {
        let hidden = self.config.hidden_size;
        Ok(MlpWeights {
            gate: self.linear(&format!("{prefix}.gate_proj"), width, hidden, self.column())?,
            up: self.linear(&format!("{prefix}.up_proj"), width, hidden, self.column())?,
            down: self.linear(&format!("{prefix}.down_proj"), hidden, width, self.row())?,
        })
    }

    fn moe(&mut self, prefix: &str) -> Result<MoeWeights<B>, ModelError> {
        let moe = &self.config.moe;
        let total = moe.n_routed_experts;
        let biased = moe.topk_method == TopkMethod::NoauxTc;
        let groups = |score| Groups { n_group: moe.n_group, topk_group: moe.topk_group, score };
        let routing = Routing {
            score: match moe.scoring_func {
                ScoringFunc::Softmax => ScoreFunction::Softmax,
                ScoringFunc::Sigmoid => ScoreFunction::Sigmoid,
            },
            groups: match moe.topk_method {
                TopkMethod::Greedy => None,
                TopkMethod::GroupLimitedGreedy => Some(groups(GroupScore::Max)),
                TopkMethod::NoauxTc => Some(groups(GroupScore::TopTwoSum)),
            },
            top_k: moe.num_experts_per_tok,
            norm_topk_prob: moe.norm_topk_prob,
            routed_scaling_factor: moe.routed_scaling_factor as f32,
        };
        let router =
            self.stored(&format!("{prefix}.gate"), total, self.config.hidden_size, Partition::Replicated)?;
        let bias = if biased {
            Some(self.bias(&format!("{prefix}.gate.e_score_correction_bias"), total)?)
        } else {
            None
        };
        let local = (0..total)
            .map(|expert| self.mlp(&format!("{prefix}.experts.{expert}"), moe.moe_intermediate_size))
            .collect::<Result<_, _>>()?;
        let shared = self.mlp(&format!("{prefix}.shared_experts"), self.config.shared_intermediate_size())?;
        let experts = Experts::new(self.backend, local, 0, total)?;
        Ok(MoeWeights { router, bias, routing, experts, shared })
    }

    /// The router's correction bias as F32, which is how it is published; other floats are widened.
    fn bias(&mut self, name: &str, n: usize) -> Result<Tensor<B>, ModelError> {
        let host = self.checkpoint.take(name, &[n], FLOAT)?;
        let host = match host.dtype() {
            DType::F32 => host,
            _ => HostTensor::from_f32(&r1_weights::widen_to_f32(&host), &[n]),
        };
        self.import(&host)
    }

    fn layer(&mut self, index: usize) -> Result<Layer<B>, ModelError> {
        let c = self.config;
        let prefix = format!("model.layers.{index}");
        let attn = format!("{prefix}.self_attn");
        let (hidden, heads, q_width) =
            (c.hidden_size, c.num_attention_heads, c.num_attention_heads * c.qk_head_dim());
        let eps = c.rms_norm_eps as f32;
        let q = match c.q_lora_rank {
            None => QueryProjection::Direct(self.linear(
                &format!("{attn}.q_proj"),
                q_width,
                hidden,
                self.column(),
            )?),
            Some(rank) => QueryProjection::LowRank {
                a: self.linear(&format!("{attn}.q_a_proj"), rank, hidden, Partition::Replicated)?,
                norm: self.vector(&format!("{attn}.q_a_layernorm.weight"), rank)?,
                b: self.linear(&format!("{attn}.q_b_proj"), q_width, rank, self.column())?,
            },
        };
        let kv_a = format!("{attn}.kv_a_proj_with_mqa");
        let kv_a = self.linear(&kv_a, c.kv_cache_dim(), hidden, Partition::Replicated)?;
        let kv_width = heads * (c.qk_nope_head_dim + c.v_head_dim);
        let kv_b = self.linear(&format!("{attn}.kv_b_proj"), kv_width, c.kv_lora_rank, self.column())?;
        let (w_uk, w_uv) = Mla::absorbed(&kv_b, c.qk_nope_head_dim, c.v_head_dim);
        let mla = Mla {
            qkv: QkvWeights { q, kv_a, eps },
            kv_norm: self.vector(&format!("{attn}.kv_a_layernorm.weight"), c.kv_lora_rank)?,
            w_uk,
            w_uv,
            kv_b,
            o_proj: self.linear(&format!("{attn}.o_proj"), hidden, heads * c.v_head_dim, self.row())?,
            num_heads: heads / self.options.world_size,
            nope_dim: c.qk_nope_head_dim,
            eps,
            scale: c.softmax_scale(),
            form: self.options.mla_form,
        };
        let feed_forward = if c.is_moe_layer(index) {
            FeedForward::Moe(self.moe(&format!("{prefix}.mlp"))?)
        } else {
            FeedForward::Dense(self.mlp(&format!("{prefix}.mlp"), c.intermediate_size)?)
        };
        Ok(Layer {
            input_norm: self.vector(&format!("{prefix}.input_layernorm.weight"), hidden)?,
            mla,
            post_attention_norm: self.vector(&format!("{prefix}.post_attention_layernorm.weight"), hidden)?,
            feed_forward,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_that_the_device_lacks_is_refused_with_the_way_out() {
        let dense = [DType::F32, DType::BF16];
        assert!(check_cache("x", &dense, DType::BF16).is_ok());
        assert_eq!(
            check_cache("x", &dense, DType::F8E4M3).expect_err("refused").to_string(),
            "a KV cache of F8_E4M3 (--kv-cache-dtype) is not supported: the device x has caches of F32 or BF16 only; use auto"
        );
    }
}
