//! Which tensors a model's checkpoint must hold, and of what shape: from the config alone, before a byte of weights
//! is read. Knows the published names, and no values.

use r1_core::DType;

use crate::checkpoint::Checkpoint;
use crate::config::{ModelConfig, ParamCounts};
use crate::error::WeightsError;
use crate::linear::{DENSE, LINEAR, SCALE_SUFFIX, SCALES, scale_shape};

/// What a tensor is for; decides its dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorKind {
    /// Table of token embeddings `[vocab_size, hidden_size]`, dense.
    Embedding,
    /// Output head `[vocab_size, hidden_size]`, dense.
    Head,
    /// RMSNorm weight, dense.
    Norm,
    /// Router `[n_routed_experts, hidden_size]`, dense.
    Router,
    /// `e_score_correction_bias` `[n_routed_experts]`, dense; F32 as published.
    CorrectionBias,
    /// Linear `[N, K]`: FP8 with scales when the config declares it, or dense.
    Linear,
    /// Linear of an expert `[N, K]`, as `Linear`.
    ExpertLinear,
    /// `eh_proj` `[hidden_size, 2 · hidden_size]`: dense as published, FP8 accepted.
    MtpProjection,
}

/// Whether a checkpoint without the tensor is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It is.
    Required,
    /// The tensor is a copy of another: embedding and head in MTP layers, and the head when it is tied.
    Copy,
}

/// A tensor that a checkpoint should hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Full name, `.weight` included.
    pub name: String,
    /// Sizes of the dimensions.
    pub shape: Vec<usize>,
    /// What it is for.
    pub kind: TensorKind,
    /// Whether it must be there.
    pub presence: Presence,
}

/// What [`Checkpoint::verify`] found besides what it demands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Multi-token-prediction layers that the checkpoint holds: all that the config states, or 0. Resaved
    /// checkpoints often keep the config's number and drop the layers.
    pub mtp_layers: usize,
    /// Tensors that the config does not account for, sorted: for a line in the log.
    pub unexpected: Vec<String>,
}

/// Collects tensors under a prefix.
struct List {
    tensors: Vec<ExpectedTensor>,
}

impl List {
    fn add(&mut self, name: String, shape: &[usize], kind: TensorKind) {
        self.tensors.push(ExpectedTensor { name, shape: shape.to_vec(), kind, presence: Presence::Required });
    }

    fn norm(&mut self, prefix: &str, name: &str, size: usize) {
        self.add(format!("{prefix}.{name}.weight"), &[size], TensorKind::Norm);
    }

    fn linear(&mut self, prefix: &str, name: &str, n: usize, k: usize) {
        self.add(format!("{prefix}.{name}.weight"), &[n, k], TensorKind::Linear);
    }

    fn mlp(&mut self, prefix: &str, hidden: usize, intermediate: usize, kind: TensorKind) {
        self.add(format!("{prefix}.gate_proj.weight"), &[intermediate, hidden], kind);
        self.add(format!("{prefix}.up_proj.weight"), &[intermediate, hidden], kind);
        self.add(format!("{prefix}.down_proj.weight"), &[hidden, intermediate], kind);
    }

    fn copy(&mut self, name: String, shape: &[usize], kind: TensorKind) {
        self.add(name, shape, kind);
        self.tensors.last_mut().expect("just added").presence = Presence::Copy;
    }
}

/// Every tensor of the model, MTP layers included, layer by layer (a layer's list is made when it is reached).
pub fn expected_tensors(config: &ModelConfig) -> impl Iterator<Item = ExpectedTensor> + '_ {
    let layers = config.num_hidden_layers + config.num_nextn_predict_layers;
    top_level(config).into_iter().chain((0..layers).flat_map(|layer| layer_tensors(config, layer)))
}

fn top_level(config: &ModelConfig) -> Vec<ExpectedTensor> {
    let table = [config.vocab_size, config.hidden_size];
    let mut list = List { tensors: Vec::new() };
    list.add("model.embed_tokens.weight".to_owned(), &table, TensorKind::Embedding);
    list.norm("model", "norm", config.hidden_size);
    if config.tie_word_embeddings {
        list.copy("lm_head.weight".to_owned(), &table, TensorKind::Head);
    } else {
        list.add("lm_head.weight".to_owned(), &table, TensorKind::Head);
    }
    list.tensors
}

fn layer_tensors(config: &ModelConfig, layer: usize) -> Vec<ExpectedTensor> {
    let c = config;
    let hidden = c.hidden_size;
    let heads = c.num_attention_heads;
    let prefix = format!("model.layers.{layer}");
    let mut list = List { tensors: Vec::new() };

    if layer >= c.num_hidden_layers {
        let table = [c.vocab_size, hidden];
        list.norm(&prefix, "enorm", hidden);
        list.norm(&prefix, "hnorm", hidden);
        list.add(format!("{prefix}.eh_proj.weight"), &[hidden, 2 * hidden], TensorKind::MtpProjection);
        list.norm(&prefix, "shared_head.norm", hidden);
        list.copy(format!("{prefix}.embed_tokens.weight"), &table, TensorKind::Embedding);
        list.copy(format!("{prefix}.shared_head.head.weight"), &table, TensorKind::Head);
    }

    list.norm(&prefix, "input_layernorm", hidden);
    list.norm(&prefix, "post_attention_layernorm", hidden);
    let attn = format!("{prefix}.self_attn");
    if let Some(rank) = c.q_lora_rank {
        list.linear(&attn, "q_a_proj", rank, hidden);
        list.norm(&attn, "q_a_layernorm", rank);
        list.linear(&attn, "q_b_proj", heads * c.qk_head_dim(), rank);
    } else {
        list.linear(&attn, "q_proj", heads * c.qk_head_dim(), hidden);
    }
    list.linear(&attn, "kv_a_proj_with_mqa", c.kv_cache_dim(), hidden);
    list.norm(&attn, "kv_a_layernorm", c.kv_lora_rank);
    list.linear(&attn, "kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank);
    list.linear(&attn, "o_proj", hidden, heads * c.v_head_dim);

    let mlp = format!("{prefix}.mlp");
    if !c.is_moe_layer(layer) {
        list.mlp(&mlp, hidden, c.intermediate_size, TensorKind::Linear);
        return list.tensors;
    }
    let experts = c.moe.n_routed_experts;
    list.add(format!("{mlp}.gate.weight"), &[experts, hidden], TensorKind::Router);
    if c.moe.topk_method == crate::config::TopkMethod::NoauxTc {
        list.add(format!("{mlp}.gate.e_score_correction_bias"), &[experts], TensorKind::CorrectionBias);
    }
    for expert in 0..experts {
        let prefix = format!("{mlp}.experts.{expert}");
        list.mlp(&prefix, hidden, c.moe.moe_intermediate_size, TensorKind::ExpertLinear);
    }
    if c.moe.n_shared_experts > 0 {
        list.mlp(&format!("{mlp}.shared_experts"), hidden, c.shared_intermediate_size(), TensorKind::Linear);
    }
    list.tensors
}

impl ModelConfig {
    /// Parameters, counted over [`expected_tensors`].
    pub fn param_counts(&self) -> ParamCounts {
        let mut counts = ParamCounts { total: 0, active: 0, mtp: 0 };
        let experts = self.moe.n_routed_experts as u64;
        let chosen = self.moe.num_experts_per_tok as u64;
        let count = |tensors: Vec<ExpectedTensor>, total: &mut u64, active: &mut u64| {
            let mut expert_params = 0;
            for tensor in tensors.iter().filter(|t| t.presence == Presence::Required) {
                let params = tensor.shape.iter().map(|&d| d as u64).product::<u64>();
                *total += params;
                match tensor.kind {
                    TensorKind::ExpertLinear => expert_params += params,
                    _ => *active += params,
                }
            }
            *active += expert_params / experts * chosen;
        };
        count(top_level(self), &mut counts.total, &mut counts.active);
        for layer in 0..self.num_hidden_layers {
            count(layer_tensors(self, layer), &mut counts.total, &mut counts.active);
        }
        for layer in self.num_hidden_layers..self.num_hidden_layers + self.num_nextn_predict_layers {
            count(layer_tensors(self, layer), &mut counts.mtp, &mut 0);
        }
        counts
    }

    /// Bytes of the checkpoint in the published layout: FP8 and F32 scales where the config declares blocks, F32 for
    /// the correction bias, 2 bytes for all else. A checkpoint's true size is [`Checkpoint::size_bytes`].
    pub fn published_size_bytes(&self) -> u64 {
        let size = |t: ExpectedTensor| {
            let values = t.shape.iter().map(|&d| d as u64).product::<u64>();
            match (t.kind, self.quantization) {
                (TensorKind::Linear | TensorKind::ExpertLinear, Some(fp8)) => {
                    let [rows, columns] = scale_shape(t.shape[0], t.shape[1], fp8.block);
                    values + 4 * (rows * columns) as u64
                }
                (TensorKind::CorrectionBias, _) => 4 * values,
                _ => 2 * values,
            }
        };
        expected_tensors(self)
            .filter(|t| !(self.tie_word_embeddings && t.name == "lm_head.weight"))
            .map(size)
            .sum()
    }
}

impl Checkpoint {
    /// Holds every tensor's presence, shape and dtype against the config, FP8 scales included; reads no weights.
    ///
    /// # Errors
    /// The one disagreement, or [`WeightsError::Disagrees`] with the first of them and their number.
    pub fn verify(&self, config: &ModelConfig) -> Result<Verified, WeightsError> {
        const SHOWN: usize = 20;
        let mut problems = Vec::new();
        let mut total = 0;
        let mut complain = |problem| {
            total += 1;
            if problems.len() < SHOWN {
                problems.push(problem);
            }
        };
        let mtp_layers = self.mtp_layers(config);
        let main_tensors = top_level(config).into_iter();
        let layers =
            (0..config.num_hidden_layers + mtp_layers).flat_map(|layer| layer_tensors(config, layer));
        let mut accounted = std::collections::HashSet::new();
        for tensor in main_tensors.chain(layers) {
            if tensor.presence == Presence::Copy && self.info(&tensor.name).is_none() {
                continue;
            }
            match self.verify_tensor(config, &tensor) {
                Ok(DType::F8E4M3) => {
                    accounted.insert(format!("{}{SCALE_SUFFIX}", tensor.name));
                }
                Ok(_) => {}
                Err(problem) => complain(problem),
            }
            accounted.insert(tensor.name);
        }
        match (total, problems.pop()) {
            (0, _) => {}
            (1, Some(only)) => return Err(only),
            (_, last) => {
                problems.extend(last);
                return Err(WeightsError::Disagrees { problems, total });
            }
        }
        // Older files carry RoPE's frequencies, which follow from the config.
        let mut unexpected: Vec<String> = self
            .names()
            .filter(|name| !accounted.contains(*name) && !name.ends_with(".rotary_emb.inv_freq"))
            .chain(self.unindexed().iter().map(String::as_str))
            .map(str::to_owned)
            .collect();
        unexpected.sort();
        Ok(Verified { mtp_layers, unexpected })
    }

    /// Checks one tensor, and its scales when it is FP8; gives its dtype.
    fn verify_tensor(&self, config: &ModelConfig, tensor: &ExpectedTensor) -> Result<DType, WeightsError> {
        let allowed = match tensor.kind {
            TensorKind::Linear | TensorKind::ExpertLinear | TensorKind::MtpProjection => LINEAR,
            _ => DENSE,
        };
        let dtype = self.check(&tensor.name, &tensor.shape, allowed)?;
        if dtype == DType::F8E4M3 {
            let fp8 = config.quantization.ok_or_else(|| self.fp8_without_config(&tensor.name))?;
            let shape = scale_shape(tensor.shape[0], tensor.shape[1], fp8.block);
            self.check(&format!("{}{SCALE_SUFFIX}", tensor.name), &shape, SCALES)?;
        }
        Ok(dtype)
    }

    /// The MTP layers to demand: those of the config if the checkpoint has any tensor of them.
    fn mtp_layers(&self, config: &ModelConfig) -> usize {
        let stated = config.num_hidden_layers..config.num_hidden_layers + config.num_nextn_predict_layers;
        let layer_of =
            |name: &str| name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
        let held = self.names().filter_map(layer_of).any(|layer| stated.contains(&layer));
        if held { stated.len() } else { 0 }
    }
}
