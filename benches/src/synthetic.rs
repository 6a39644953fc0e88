//! A random checkpoint of V3's shape, larger than any cache, made in memory: its decode step is bound by what its weights
//! weigh, as the real model's is.

use std::fmt::Write;
use std::sync::Arc;

use r1_weights::{Checkpoint, ModelConfig, TensorKind, expected_tensors};

use crate::Random;

/// V3's config.json with fewer layers, experts and heads: 0.5 GB in FP8.
const CONFIG: &str = r#"{
  "model_type": "deepseek_v3", "vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 5632,
  "moe_intermediate_size": 512, "num_hidden_layers": 6, "num_nextn_predict_layers": 0, "num_attention_heads": 16,
  "num_key_value_heads": 16, "n_shared_experts": 1, "n_routed_experts": 24, "num_experts_per_tok": 8, "n_group": 8,
  "topk_group": 4, "norm_topk_prob": true, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
  "topk_method": "noaux_tc", "first_k_dense_replace": 1, "moe_layer_freq": 1, "q_lora_rank": 768, "kv_lora_rank": 512,
  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-06,
  "rope_theta": 10000.0, "max_position_embeddings": 163840, "attention_bias": false, "tie_word_embeddings": false,
  "bos_token_id": 0, "eos_token_id": 1,
  "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
                   "original_max_position_embeddings": 4096},
  "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
                          "activation_scheme": "dynamic"}
}"#;

/// A model to measure.
pub struct Synthetic {
    /// What it is.
    pub config: ModelConfig,
    /// Random weights.
    pub checkpoint: Arc<Checkpoint>,
    /// Bytes that a decode step of one sequence reads: all but the embedding table and the experts not chosen.
    pub bytes_per_token: usize,
}

impl Synthetic {
    /// Makes the weights; takes seconds.
    ///
    /// # Panics
    /// When the configuration is not what the weights crate takes.
    pub fn make() -> Self {
        let config = ModelConfig::from_json(CONFIG.as_bytes()).expect("a sound configuration");
        let mut random = Random::new(5);
        let (mut header, mut data) = (String::from("{"), Vec::new());
        let (mut always, mut experts) = (0, 0);
        let mut add = |name: &str, dtype: &str, shape: &[usize], bytes: &[u8]| {
            let comma = if header.len() > 1 { "," } else { "" };
            let range = [data.len(), data.len() + bytes.len()];
            write!(
                header,
                "{comma}\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":{range:?}}}"
            )
            .expect("a string has room");
            data.extend_from_slice(bytes);
        };
        for tensor in expected_tensors(&config) {
            let (shape, n) = (&tensor.shape, tensor.shape.iter().product());
            // Small enough that nothing overflows over six layers, and no NaN among FP8 codes.
            let fp8 = matches!(tensor.kind, TensorKind::Linear | TensorKind::ExpertLinear);
            let size = if fp8 {
                let codes: Vec<u8> = (0..n).map(|_| random.next_u64() as u8 & 0xb7).collect();
                add(&tensor.name, "F8_E4M3", shape, &codes);
                let blocks = [shape[0].div_ceil(128), shape[1].div_ceil(128)];
                let scales: Vec<u8> =
                    (0..blocks[0] * blocks[1]).flat_map(|_| 0.01_f32.to_le_bytes()).collect();
                add(&format!("{}_scale_inv", tensor.name), "F32", &blocks, &scales);
                n + scales.len()
            } else {
                let values: Vec<u8> =
                    random.f32s(n).into_iter().flat_map(|x| (x / 16.0).to_le_bytes()).collect();
                // The upper half of an F32 is a BF16.
                let values: Vec<u8> = values.as_chunks::<4>().0.iter().flat_map(|b| [b[2], b[3]]).collect();
                add(&tensor.name, "BF16", shape, &values);
                values.len()
            };
            match tensor.kind {
                TensorKind::Embedding => {}
                TensorKind::ExpertLinear if !tensor.name.contains("shared_experts") => experts += size,
                _ => always += size,
            }
        }
        header.push('}');
        // The data begins at a multiple of 8, so that every tensor is aligned.
        header.push_str(&" ".repeat((8 - header.len() % 8) % 8));
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.append(&mut data);
        let checkpoint = Arc::new(Checkpoint::from_bytes("synthetic", Arc::new(file)).expect("a sound file"));
        let bytes_per_token = always + experts * config.moe.num_experts_per_tok / config.moe.n_routed_experts;
        Self { config, checkpoint, bytes_per_token }
    }
}
