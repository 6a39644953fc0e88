//! Small safetensors files, written with the format's own crate or byte by byte, and published configs.

use std::borrow::Cow;
use std::path::Path;

use half::bf16;
use safetensors::{Dtype, View};
use serde_json::{Value, json};

/// A tensor to be written.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

impl Tensor {
    pub(crate) fn f32(values: &[f32], shape: &[usize]) -> Self {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { dtype: Dtype::F32, shape: shape.to_vec(), data }
    }

    pub(crate) fn bf16(values: &[f32], shape: &[usize]) -> Self {
        let data = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
        Self { dtype: Dtype::BF16, shape: shape.to_vec(), data }
    }

    /// Zeros of any dtype.
    pub(crate) fn zeros(dtype: Dtype, shape: &[usize]) -> Self {
        let data = vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8];
        Self { dtype, shape: shape.to_vec(), data }
    }

    pub(crate) fn f8(codes: Vec<u8>, shape: &[usize]) -> Self {
        Self { dtype: Dtype::F8_E4M3, shape: shape.to_vec(), data: codes }
    }
}

impl View for Tensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// A list of named tensors.
pub(crate) type Tensors = Vec<(String, Tensor)>;

/// A whole safetensors file.
pub(crate) fn file(tensors: &Tensors) -> Vec<u8> {
    let views = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.clone()));
    safetensors::serialize(views, None).unwrap()
}

/// A file with the header as given, however wrong it is.
pub(crate) fn raw_file(header: &str, data_len: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data_len, 0);
    bytes
}

/// Writes `shards` of tensors and their index.
pub(crate) fn write_sharded(dir: &Path, shards: &[(&str, Tensors)]) {
    let mut weight_map = serde_json::Map::new();
    for (name, tensors) in shards {
        std::fs::write(dir.join(name), file(tensors)).unwrap();
        weight_map.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
    }
    write_index(dir, &Value::Object(weight_map));
}

/// Writes an index with the weight_map as given.
pub(crate) fn write_index(dir: &Path, weight_map: &Value) {
    let index = json!({"metadata": {"total_size": 0}, "weight_map": weight_map});
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// DeepSeek-V3's published config.json.
pub(crate) fn v3() -> Value {
    let text = r#"{
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001,
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
        "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
        "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280
    }"#;
    serde_json::from_str(text).unwrap()
}

/// `base` with some fields replaced; `null` removes nothing, it is a value.
pub(crate) fn with(base: Value, fields: Value) -> Value {
    let mut base = base;
    let (Some(map), Value::Object(fields)) = (base.as_object_mut(), fields) else { panic!("objects") };
    map.extend(fields);
    base
}

/// `base` without `fields`.
pub(crate) fn without(mut base: Value, fields: &[&str]) -> Value {
    for field in fields {
        base.as_object_mut().unwrap().remove(*field).unwrap_or_else(|| panic!("{field} is not there"));
    }
    base
}

/// DeepSeek-V2's published values.
pub(crate) fn v2() -> Value {
    let base = without(v3(), &["num_nextn_predict_layers", "quantization_config"]);
    with(
        base,
        json!({
            "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "bos_token_id": 100000,
            "eos_token_id": 100001, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
            "num_hidden_layers": 60, "first_k_dense_replace": 1, "n_routed_experts": 160, "n_shared_experts": 2,
            "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "norm_topk_prob": false,
            "routed_scaling_factor": 16.0, "scoring_func": "softmax", "topk_method": "group_limited_greedy",
            "vocab_size": 102400,
            "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                             "original_max_position_embeddings": 4096, "type": "yarn"}
        }),
    )
}

/// DeepSeek-V2-Lite's published values.
pub(crate) fn v2_lite() -> Value {
    with(
        v2(),
        json!({
            "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
            "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "q_lora_rank": null,
            "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "topk_method": "greedy"
        }),
    )
}

/// Moonlight-16B-A3B's published values.
pub(crate) fn moonlight() -> Value {
    with(
        without(v3(), &["quantization_config", "rope_scaling", "num_nextn_predict_layers"]),
        json!({
            "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
            "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
            "num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": null, "n_group": 1, "topk_group": 1,
            "routed_scaling_factor": 2.446, "rope_theta": 50000.0, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-05, "vocab_size": 163840, "bos_token_id": 163584, "eos_token_id": 163585
        }),
    )
}

/// Kimi-K2's published values.
pub(crate) fn kimi_k2() -> Value {
    with(
        v3(),
        json!({
            "model_type": "kimi_k2", "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
            "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "max_position_embeddings": 131072,
            "vocab_size": 163840, "bos_token_id": 163584, "eos_token_id": 163585,
            "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0,
                             "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"}
        }),
    )
}

/// A model of V3's shape with two layers, two experts and MTP, whose sizes are no multiples of 128.
pub(crate) fn toy() -> Value {
    with(
        v3(),
        json!({
            "vocab_size": 40, "hidden_size": 160, "intermediate_size": 200, "moe_intermediate_size": 72,
            "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
            "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
            "max_position_embeddings": 512
        }),
    )
}

/// The toy's whole checkpoint, written down by hand in the published layout: name, shape.
pub(crate) fn toy_layout() -> Vec<(String, Vec<usize>)> {
    let mut list = vec![
        ("model.embed_tokens.weight".to_owned(), vec![40, 160]),
        ("model.norm.weight".to_owned(), vec![160]),
        ("lm_head.weight".to_owned(), vec![40, 160]),
    ];
    for layer in 0..3 {
        let mut add =
            |name: &str, shape: &[usize]| list.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        add("input_layernorm.weight", &[160]);
        add("post_attention_layernorm.weight", &[160]);
        add("self_attn.q_a_proj.weight", &[24, 160]);
        add("self_attn.q_a_layernorm.weight", &[24]);
        add("self_attn.q_b_proj.weight", &[24, 24]);
        add("self_attn.kv_a_proj_with_mqa.weight", &[20, 160]);
        add("self_attn.kv_a_layernorm.weight", &[16]);
        add("self_attn.kv_b_proj.weight", &[28, 16]);
        add("self_attn.o_proj.weight", &[160, 12]);
        if layer == 0 {
            add("mlp.gate_proj.weight", &[200, 160]);
            add("mlp.up_proj.weight", &[200, 160]);
            add("mlp.down_proj.weight", &[160, 200]);
        } else {
            add("mlp.gate.weight", &[4, 160]);
            add("mlp.gate.e_score_correction_bias", &[4]);
            for expert in ["experts.0", "experts.1", "experts.2", "experts.3", "shared_experts"] {
                add(&format!("mlp.{expert}.gate_proj.weight"), &[72, 160]);
                add(&format!("mlp.{expert}.up_proj.weight"), &[72, 160]);
                add(&format!("mlp.{expert}.down_proj.weight"), &[160, 72]);
            }
        }
        if layer == 2 {
            add("enorm.weight", &[160]);
            add("hnorm.weight", &[160]);
            add("eh_proj.weight", &[160, 320]);
            add("shared_head.norm.weight", &[160]);
            add("embed_tokens.weight", &[40, 160]);
            add("shared_head.head.weight", &[40, 160]);
        }
    }
    list
}

/// The toy's tensors, quantised as published: projections of attention and MLPs, nothing else.
pub(crate) fn toy_tensors() -> Tensors {
    let mut tensors = Tensors::new();
    for (name, shape) in toy_layout() {
        if name.contains("_proj") && !name.contains("eh_proj") {
            let scales: Vec<usize> = shape.iter().map(|d| d.div_ceil(128)).collect();
            tensors.push((format!("{name}_scale_inv"), Tensor::zeros(Dtype::F32, &scales)));
            tensors.push((name, Tensor::zeros(Dtype::F8_E4M3, &shape)));
        } else {
            let dtype = if name.ends_with("bias") { Dtype::F32 } else { Dtype::BF16 };
            tensors.push((name, Tensor::zeros(dtype, &shape)));
        }
    }
    tensors
}

/// The tensor of that name.
pub(crate) fn at<'a>(tensors: &'a mut Tensors, name: &str) -> &'a mut Tensor {
    &mut tensors.iter_mut().find(|(n, _)| n == name).unwrap_or_else(|| panic!("{name}")).1
}

/// Pseudo-random bytes, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e3779b97f4a7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}
