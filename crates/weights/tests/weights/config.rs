//! config.json: the published models, both dialects, and every refusal.

use r1_core::{DType, TokenId};
use r1_weights::{
    Architecture, ConfigError, Fp8BlockConfig, ModelConfig, Rope, ScaleFmt, ScoringFunc, TopkMethod, Yarn,
};
use serde_json::{Value, json};

use crate::support::{kimi_k2, moonlight, toy, v2, v2_lite, v3, with, without};

fn parse(config: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_json(config.to_string().as_bytes())
}

#[test]
fn v3_as_published() {
    let c = parse(&v3()).unwrap();
    assert_eq!(c.architecture, Architecture::DeepseekV3);
    assert_eq!((c.hidden_size, c.intermediate_size, c.num_hidden_layers), (7168, 18432, 61));
    assert_eq!((c.q_lora_rank, c.kv_lora_rank, c.qk_head_dim(), c.v_head_dim), (Some(1536), 512, 192, 128));
    assert_eq!(c.kv_cache_dim(), 576);
    assert_eq!((c.moe.scoring_func, c.moe.topk_method), (ScoringFunc::Sigmoid, TopkMethod::NoauxTc));
    assert_eq!((c.moe.n_group, c.moe.topk_group, c.moe.num_experts_per_tok), (8, 4, 8));
    assert_eq!((c.moe.norm_topk_prob, c.moe.routed_scaling_factor), (true, 2.5));
    assert_eq!(c.shared_intermediate_size(), 2048);
    assert_eq!(c.quantization, Some(Fp8BlockConfig { block: [128, 128], scale_fmt: ScaleFmt::F32 }));
    assert_eq!((c.bos_token_id, &c.eos_token_ids[..]), (Some(TokenId(0)), &[TokenId(1)][..]));
    assert_eq!((c.num_nextn_predict_layers, c.tie_word_embeddings, c.dtype), (1, false, Some(DType::BF16)));
    let layers: Vec<_> = (0..62).filter(|&i| !c.is_moe_layer(i)).collect();
    assert_eq!(layers, [0, 1, 2]);
    assert_eq!(c.unknown_fields, [""; 0]);
    // 192^-0.5 · (0.1 ln 40 + 1)²
    assert!((f64::from(c.softmax_scale()) - 0.1352337789).abs() < 1e-7, "{}", c.softmax_scale());
    assert_eq!((c.attention_scaling(), c.inv_freq().len()), (1.0, 32));
}

/// Totals as the models' pages state them.
#[test]
fn parameters_are_as_many_as_published() {
    let billions = |n: u64| (n as f64 / 1e8).round() / 10.0;
    let counts = |config: &Value| {
        let c = parse(config).unwrap().param_counts();
        (billions(c.total), billions(c.active), billions(c.mtp))
    };
    assert_eq!(parse(&v2_lite()).unwrap().param_counts().total, 15_706_484_224);
    assert_eq!(parse(&v2()).unwrap().param_counts().total, 235_741_434_880);
    assert_eq!(counts(&v3()), (671.0, 37.6, 11.6));
    assert_eq!(counts(&moonlight()).0, 16.0);
    assert_eq!(counts(&kimi_k2()).0, 1026.4);
}

#[test]
fn the_family_reads_as_published() {
    let c = parse(&v2_lite()).unwrap();
    assert_eq!((c.architecture, c.q_lora_rank), (Architecture::DeepseekV2, None));
    assert_eq!(
        (c.moe.scoring_func, c.moe.topk_method, c.moe.n_group),
        (ScoringFunc::Softmax, TopkMethod::Greedy, 1)
    );
    assert!((f64::from(c.softmax_scale()) - 0.1147213868).abs() < 1e-7, "{}", c.softmax_scale());
    let c = parse(&v2()).unwrap();
    assert_eq!((c.moe.topk_method, c.moe.n_group, c.moe.topk_group), (TopkMethod::GroupLimitedGreedy, 8, 3));
    assert_eq!(c.quantization, None);
    let c = parse(&moonlight()).unwrap();
    assert_eq!(c.rope, Rope { theta: 50000.0, yarn: None });
    assert_eq!(c.softmax_scale(), 192f64.powf(-0.5) as f32);
    let c = parse(&kimi_k2()).unwrap();
    assert_eq!((c.architecture, c.moe.n_routed_experts), (Architecture::KimiK2, 384));
}

#[test]
fn both_dialects_mean_the_same() {
    let published = parse(&v3()).unwrap();
    let new = with(
        without(
            v3(),
            &["rope_scaling", "rope_theta", "torch_dtype", "scoring_func", "topk_method", "moe_layer_freq"],
        ),
        json!({
            "dtype": "bfloat16", "rope_interleave": true, "head_dim": 64, "qk_head_dim": 192,
            "rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 40.0, "mscale": 1.0,
                                "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                                "rope_theta": 10000.0, "rope_type": "yarn"}
        }),
    );
    assert_eq!(parse(&new).unwrap(), published);
    // Both at once are accepted as long as they agree.
    let both = with(v3(), json!({"rope_parameters": new["rope_parameters"], "dtype": "bfloat16"}));
    assert_eq!(parse(&both).unwrap(), published);
    let plain = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}});
    let plain = parse(&with(without(moonlight(), &["rope_theta"]), plain)).unwrap();
    assert_eq!(plain, parse(&moonlight()).unwrap());
    assert_eq!(parse(&with(moonlight(), json!({"rope_scaling": null}))).unwrap(), plain);
}

#[test]
fn yarn_without_magnitudes_is_1_and_0() {
    let mut config = v3();
    for field in ["mscale", "mscale_all_dim"] {
        config["rope_scaling"].as_object_mut().unwrap().remove(field);
    }
    let yarn = parse(&config).unwrap().rope.yarn.unwrap();
    let expected = Yarn {
        factor: 40.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: 1.0,
        mscale_all_dim: 0.0,
        original_max_position_embeddings: 4096,
    };
    assert_eq!(yarn, expected);
}

#[test]
fn v3_1_declares_its_scales() {
    let mut config = v3();
    config["quantization_config"]["scale_fmt"] = json!("ue8m0");
    assert_eq!(parse(&config).unwrap().quantization.unwrap().scale_fmt, ScaleFmt::Ue8m0);
}

#[test]
fn several_eos_tokens_and_no_bos() {
    let c = parse(&with(v3(), json!({"eos_token_id": [1, 5], "bos_token_id": null}))).unwrap();
    assert_eq!((c.eos_token_ids, c.bos_token_id), (vec![TokenId(1), TokenId(5)], None));
}

/// `field` may be `object.field`.
fn set(config: &mut Value, field: &str, value: Value) {
    match field.split_once('.') {
        Some((object, field)) => config[object][field] = value,
        None => config[field] = value,
    }
}

#[test]
fn values_that_change_the_result_are_refused_by_name() {
    for (field, value) in [
        ("model_type", json!("qwen2")),
        ("model_type", json!("llama")),
        ("model_type", json!("deepseek_v32")),
        ("index_topk", json!(2048)),
        ("architectures", json!(["DeepseekV3ForSequenceClassification"])),
        ("hidden_act", json!("gelu")),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("rope_interleave", json!(false)),
        ("use_mla", json!(false)),
        ("sliding_window", json!(4096)),
        ("compression_config", json!({"format": "pack-quantized"})),
        ("scoring_func", json!("sqrtsoftplus")),
        ("topk_method", json!("random")),
        ("topk_method", json!("greedy")),
        ("torch_dtype", json!("float64")),
        ("rope_scaling.type", json!("linear")),
        ("rope_scaling.attention_factor", json!(1.2)),
        ("rope_scaling.truncate", json!(false)),
        ("rope_scaling.partial_rotary_factor", json!(0.5)),
        ("quantization_config.quant_method", json!("awq")),
        ("quantization_config.fmt", json!("e5m2")),
        ("quantization_config.activation_scheme", json!("static")),
        ("quantization_config.scale_fmt", json!("e4m3")),
    ] {
        let mut config = v3();
        set(&mut config, field, value.clone());
        let error = parse(&config).unwrap_err();
        let ConfigError::Unsupported { field: named, supported, .. } = &error else {
            panic!("{field}: {error}")
        };
        assert_eq!(named, field);
        assert!(!supported.is_empty());
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        assert!(error.to_string().contains(&value), "{error}");
    }
}

#[test]
fn v2_with_both_norm_and_scaling_is_refused() {
    let ambiguous = with(v2(), json!({"norm_topk_prob": true}));
    assert!(
        matches!(parse(&ambiguous), Err(ConfigError::Unsupported { field, .. }) if field == "norm_topk_prob")
    );
    let clear = with(v2(), json!({"norm_topk_prob": true, "routed_scaling_factor": 1.0}));
    assert!(parse(&clear).unwrap().moe.norm_topk_prob);
}

#[test]
fn values_out_of_range_are_refused_by_name() {
    let huge = json!(u64::MAX);
    for (field, value) in [
        ("vocab_size", json!(0)),
        ("vocab_size", huge.clone()),
        ("hidden_size", json!(-1)),
        ("hidden_size", json!(7168.5)),
        ("hidden_size", json!("7168")),
        ("num_hidden_layers", json!(1_000_000)),
        ("n_routed_experts", huge.clone()),
        ("n_routed_experts", json!(0)),
        ("n_shared_experts", huge.clone()),
        ("num_nextn_predict_layers", huge.clone()),
        ("moe_layer_freq", json!(0)),
        ("moe_layer_freq", json!([0, 1])),
        ("num_experts_per_tok", json!(257)),
        ("num_experts_per_tok", json!(0)),
        ("n_group", json!(7)),
        ("n_group", json!(256)),
        ("topk_group", json!(9)),
        ("topk_group", json!(0)),
        ("kv_lora_rank", json!(0)),
        ("q_lora_rank", json!(0)),
        ("qk_rope_head_dim", json!(63)),
        ("head_dim", json!(56)),
        ("qk_head_dim", json!(128)),
        ("num_key_value_heads", json!(8)),
        ("rms_norm_eps", json!(0.0)),
        ("rope_theta", json!(1)),
        ("routed_scaling_factor", json!(0)),
        ("max_position_embeddings", json!(0)),
        ("eos_token_id", json!(129280)),
        ("eos_token_id", json!([1, null])),
        ("bos_token_id", json!([0, 1])),
        ("norm_topk_prob", json!(1)),
        ("rope_scaling", json!("yarn")),
        ("rope_parameters", json!({"rope_type": "default", "rope_theta": 10000})),
        ("dtype", json!("float32")),
        ("rope_scaling.rope_type", json!("default")),
        ("rope_scaling.factor", json!(0.5)),
        ("rope_scaling.beta_fast", json!(0)),
        ("rope_scaling.mscale", json!(-1)),
        ("rope_scaling.rope_theta", json!(5000)),
        ("rope_scaling.original_max_position_embeddings", json!(0)),
        ("quantization_config.weight_block_size", json!([128])),
        ("quantization_config.weight_block_size", json!([128, 0])),
        ("quantization_config.weight_block_size", json!([128, 128, 1])),
        ("quantization_config.weight_block_size", json!([128, 1u64 << 40])),
    ] {
        let mut config = v3();
        set(&mut config, field, value.clone());
        let error = parse(&config).unwrap_err();
        let ConfigError::Invalid { field: named, .. } = &error else { panic!("{field} {value}: {error}") };
        // One of a contradicting pair is named.
        let group: &[&str] = match field {
            "rope_parameters" => &["rope_scaling"],
            "rope_scaling.rope_type" => &["rope_scaling.type"],
            "dtype" => &["torch_dtype"],
            "num_experts_per_tok" => &["num_experts_per_tok", "topk_group"],
            same => &[same],
        };
        assert!(group.contains(&named.as_str()), "{field} {value}: {error}");
    }
    let few = with(v3(), json!({"topk_group": 1, "num_experts_per_tok": 33}));
    assert!(matches!(parse(&few), Err(ConfigError::Invalid { field, .. }) if field == "topk_group"));
    let mut split = v3();
    set(&mut split, "rope_scaling.mscale_all_dim", json!(0));
    set(&mut split, "rope_scaling.mscale", json!(0.707));
    assert!(
        matches!(parse(&split), Err(ConfigError::Invalid { field, .. }) if field == "rope_scaling.mscale_all_dim")
    );
}

/// The largest config that is accepted: no count overflows (the test profile checks), nothing large is allocated.
#[test]
fn the_sanity_limits_keep_every_count_in_range() {
    let c = parse(&with(
        v3(),
        json!({
            "vocab_size": 1 << 22, "hidden_size": 1 << 18, "intermediate_size": 1 << 18,
            "moe_intermediate_size": 1 << 18, "num_hidden_layers": 512, "num_nextn_predict_layers": 8,
            "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12, "q_lora_rank": 1 << 18,
            "kv_lora_rank": 1 << 18, "qk_nope_head_dim": 1 << 12, "qk_rope_head_dim": 1 << 12, "v_head_dim": 1 << 12,
            "n_routed_experts": 1 << 11, "n_shared_experts": 64, "max_position_embeddings": 1 << 27,
        }),
    ))
    .unwrap();
    let counts = c.param_counts();
    assert!(counts.active < counts.total && counts.total < 1 << 59, "{counts:?}");
    assert!(c.published_size_bytes() > counts.total);
}

/// What the published config states is never assumed.
#[test]
fn fields_that_are_missing_are_named() {
    for field in [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
        "first_k_dense_replace",
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
        "hidden_act",
    ] {
        let error = parse(&without(v3(), &[field])).unwrap_err();
        assert!(
            matches!(&error, ConfigError::Missing { field: named, .. } if named.ends_with(field)),
            "{error}"
        );
    }
    for (object, fields) in [
        (
            "rope_scaling",
            &[
                "type",
                "factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "original_max_position_embeddings",
            ][..],
        ),
        ("quantization_config", &["quant_method", "activation_scheme", "weight_block_size"]),
    ] {
        for field in fields {
            let mut config = v3();
            config[object].as_object_mut().unwrap().remove(*field).unwrap();
            let error = parse(&config).unwrap_err();
            let full = format!("{object}.{field}");
            assert!(
                matches!(&error, ConfigError::Missing { field, .. } if *field == full),
                "{full}: {error}"
            );
        }
    }
    assert!(matches!(parse(&without(v2(), &["topk_method"])), Err(ConfigError::Missing { .. })));
}

#[test]
fn unknown_fields_are_listed_and_harmless_ones_are_not() {
    let mut config = with(v3(), json!({"mystery": 1, "pad_token_id": 2, "_name_or_path": "x"}));
    set(&mut config, "rope_scaling.wobble", json!(true));
    set(&mut config, "quantization_config.modules_to_not_convert", json!(["lm_head"]));
    set(&mut config, "quantization_config.extra", json!(1));
    let unknown = parse(&config).unwrap().unknown_fields;
    assert_eq!(unknown, ["mystery", "rope_scaling.wobble", "quantization_config.extra"]);
}

#[test]
fn what_is_no_config_is_an_error() {
    for text in ["", "[]", "null", "{", "{\"a\": NaN}", "\u{feff}{}"] {
        assert!(matches!(ModelConfig::from_json(text.as_bytes()), Err(ConfigError::Json { .. })), "{text:?}");
    }
    assert!(matches!(ModelConfig::from_json(&[0xff, 0xfe]), Err(ConfigError::Json { .. })));
    let deep = "[".repeat(100_000);
    assert!(matches!(ModelConfig::from_json(deep.as_bytes()), Err(ConfigError::Json { .. })));
}

#[test]
fn a_folder_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let error = ModelConfig::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("config.json"), "{error}");
    std::fs::write(dir.path().join("config.json"), toy().to_string()).unwrap();
    assert_eq!(ModelConfig::open(dir.path()).unwrap().hidden_size, 160);
    std::fs::write(dir.path().join("config.json"), vec![b' '; (16 << 20) + 1]).unwrap();
    assert!(matches!(ModelConfig::open(dir.path()), Err(ConfigError::TooLarge { .. })));
}
