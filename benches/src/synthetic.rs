//! A random checkpoint of V3's shape, larger than any cache, made in memory: its decode step is bound by what its weights
//! weigh, as the real model's is.

use std::sync::Arc;

use r1_weights::{Checkpoint, ModelConfig, dummy_tensors};

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
    /// Says what the weights are; they are made when they are loaded, in seconds.
    ///
    /// # Panics
    /// When the configuration is not what the weights crate takes.
    pub fn make() -> Self {
        let config = ModelConfig::from_json(CONFIG.as_bytes()).expect("a sound configuration");
        let checkpoint = Checkpoint::dummy(&config, 5);
        let (mut always, mut experts) = (0, 0);
        for tensor in dummy_tensors(&config, 5) {
            let (name, size) = (tensor.name(), tensor.size_bytes());
            if name.contains(".mlp.experts.") {
                experts += size;
            } else if name != "model.embed_tokens.weight" {
                always += size;
            }
        }
        let bytes_per_token = always + experts * config.moe.num_experts_per_tok / config.moe.n_routed_experts;
        Self { config, checkpoint: Arc::new(checkpoint), bytes_per_token }
    }
}
