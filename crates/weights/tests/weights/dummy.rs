//! Random checkpoints: what a config.json says, the same for the same seed, and the same weights in either format.

use std::collections::HashMap;

use r1_core::DType;
use r1_weights::{
    Checkpoint, ConfigJson, DummyTensor, ModelConfig, Partition, WeightsError, dummy_tensors, widen_to_f32,
    write_dummy,
};
use serde_json::{Value, json};

use crate::support::{moonlight, toy, v2_lite, v3, with};

fn config(value: &Value) -> ModelConfig {
    ModelConfig::from_json(value.to_string().as_bytes()).unwrap()
}

/// A shape whose last blocks are ragged.
fn small() -> Value {
    with(toy(), json!({"hidden_size": 200, "intermediate_size": 300, "moe_intermediate_size": 130}))
}

fn bytes(tensor: &DummyTensor) -> Vec<u8> {
    let mut bytes = vec![0; tensor.size_bytes()];
    tensor.write_to(&mut bytes);
    bytes
}

#[test]
fn a_dummy_is_a_checkpoint_in_the_published_layout() {
    for value in [v3(), v2_lite(), moonlight(), small(), with(toy(), json!({"tie_word_embeddings": true}))] {
        let config = config(&value);
        let dummy = Checkpoint::dummy(&config, 0);
        let verified = dummy.verify(&config).unwrap();
        assert_eq!(verified.mtp_layers, config.num_nextn_predict_layers);
        assert_eq!(verified.unexpected, Vec::<String>::new());
        assert_eq!(dummy.size_bytes(), config.published_size_bytes());
    }
}

#[test]
fn a_tensor_is_a_function_of_seed_and_name() {
    let config = config(&small());
    let of = |seed| -> HashMap<String, Vec<u8>> {
        dummy_tensors(&config, seed).map(|tensor| (tensor.name().to_owned(), bytes(&tensor))).collect()
    };
    let (first, second) = (of(7), of(8));
    assert_eq!(first, of(7));
    for (name, bytes) in &first {
        // Scales of large blocks seldom differ.
        assert!(*bytes != second[name] || name.ends_with("_scale_inv"), "{name} does not depend on the seed");
    }
    let (a, b) =
        ("model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.mlp.experts.1.up_proj.weight");
    assert_ne!(first[a], first[b]);
    // What the MTP layer repeats.
    let mtp = format!("model.layers.{}", config.num_hidden_layers);
    assert_eq!(first[&format!("{mtp}.embed_tokens.weight")], first["model.embed_tokens.weight"]);
    assert_eq!(first[&format!("{mtp}.shared_head.head.weight")], first["lm_head.weight"]);
}

#[test]
fn fp8_and_bf16_hold_the_same_weights() {
    let fp8 = json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]});
    let quantized = config(&with(small(), json!({"quantization_config": fp8})));
    let plain = config(&with(small(), json!({"quantization_config": null})));
    let (coded, dense) = (Checkpoint::dummy(&quantized, 5), Checkpoint::dummy(&plain, 5));
    let mut linears = 0;
    for tensor in dummy_tensors(&plain, 5) {
        let (name, shape) = (tensor.name(), tensor.shape());
        let expected = dense.tensor(name).unwrap();
        let found = coded.tensor(name).unwrap();
        if found.dtype() != DType::F8E4M3 {
            assert_eq!(found.bytes(), expected.bytes(), "{name}");
            continue;
        }
        linears += 1;
        let prefix = name.strip_suffix(".weight").unwrap();
        let quant = quantized.quantization.as_ref();
        let found = coded.linear(prefix, shape[0], shape[1], quant, Partition::Replicated).unwrap();
        let (expected, found) = (widen_to_f32(&expected), found.to_f32());
        let largest = expected.iter().fold(0_f32, |largest, x| largest.max(x.abs()));
        for (x, y) in expected.iter().zip(&found) {
            // Three bits of mantissa, and the smallest step of a block's scale.
            assert!((x - y).abs() <= x.abs() / 16.0 + largest / 448.0 / 1024.0 * 1.01, "{name}: {x} {y}");
        }
    }
    assert!(linears > 20, "{linears}");
}

/// Linears keep the size of what they are applied to, norms are near 1, the router's bias is small.
#[test]
fn values_have_the_sizes_of_a_model() {
    let config = config(&with(small(), json!({"quantization_config": null})));
    let dummy = Checkpoint::dummy(&config, 1);
    let moments = |name: &str| {
        let values = widen_to_f32(&dummy.tensor(name).unwrap());
        let n = values.len() as f32;
        let mean = values.iter().sum::<f32>() / n;
        (mean, (values.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n).sqrt())
    };
    let near = |(mean, deviation): (f32, f32), expected: (f32, f32)| {
        assert!((mean - expected.0).abs() < 0.25 * expected.1, "{mean} is not {}", expected.0);
        assert!((deviation / expected.1 - 1.0).abs() < 0.25, "{deviation} is not {}", expected.1);
    };
    near(moments("model.embed_tokens.weight"), (0.0, 1.0));
    near(moments("model.layers.0.input_layernorm.weight"), (1.0, 0.1));
    near(moments("model.layers.1.mlp.experts.0.down_proj.weight"), (0.0, 130_f32.sqrt().recip()));
    near(moments("model.layers.1.mlp.gate.weight"), (0.0, 200_f32.sqrt().recip()));
    let (mean, deviation) = moments("model.layers.1.mlp.gate.e_score_correction_bias");
    assert!(mean.abs() < 0.2 && deviation < 0.2, "{mean} {deviation}");
}

/// Whoever asks while somebody holds a tensor gets the same memory, which begins on a cache line; afterwards it is free.
#[test]
fn a_tensor_is_shared_while_it_is_held() {
    let config = config(&small());
    let dummy = Checkpoint::dummy(&config, 1);
    let name = "model.layers.0.mlp.up_proj.weight";
    let first = dummy.tensor(name).unwrap();
    let second = dummy.tensor(name).unwrap();
    assert_eq!(first.bytes().as_ptr(), second.bytes().as_ptr());
    assert!(first.bytes().as_ptr().addr().is_multiple_of(64));
    let expected = first.bytes().to_vec();
    let owner = std::sync::Arc::downgrade(first.owner().0);
    drop((first, second));
    assert_eq!(owner.strong_count(), 0);
    assert_eq!(dummy.tensor(name).unwrap().bytes(), expected);
}

/// What is written is read as what is made in memory, whatever the shards.
#[test]
fn files_hold_what_is_made_in_memory() {
    let json = ConfigJson::parse(small().to_string().as_bytes()).unwrap();
    let config = json.model().unwrap();
    let expected: HashMap<String, Vec<u8>> =
        dummy_tensors(&config, 3).map(|tensor| (tensor.name().to_owned(), bytes(&tensor))).collect();
    for (shard_bytes, shards) in [(u64::MAX, 1..2), (300_000, 4..20), (1, expected.len()..expected.len() + 1)]
    {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("new");
        let mut seen = 0;
        let written = write_dummy(&json, 3, &dir, shard_bytes, &mut |bytes| seen = bytes).unwrap();
        assert!(shards.contains(&written.shards), "{written:?}");
        assert_eq!(
            (written.size_bytes, seen),
            (config.published_size_bytes(), config.published_size_bytes())
        );
        assert_eq!(ConfigJson::open(&dir.join("config.json")).unwrap(), json);
        let checkpoint = Checkpoint::open(&dir).unwrap();
        assert_eq!(checkpoint.num_files(), written.shards);
        assert_eq!(checkpoint.verify(&config).unwrap().unexpected, Vec::<String>::new());
        assert_eq!(checkpoint.names().count(), expected.len());
        for (name, bytes) in &expected {
            let tensor = checkpoint.tensor(name).unwrap();
            assert!(tensor.bytes() == bytes, "{name}");
            assert!(tensor.bytes().as_ptr().addr().is_multiple_of(tensor.dtype().size_bytes()), "{name}");
        }
        // The format's own crate takes the files too.
        for entry in std::fs::read_dir(&dir).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                safetensors::SafeTensors::deserialize(&std::fs::read(path).unwrap()).unwrap();
            }
        }
        let error = write_dummy(&json, 3, &dir, 1, &mut |_| {}).unwrap_err();
        assert!(matches!(error, WeightsError::NotEmpty { .. }), "{error}");
    }
}

#[test]
fn nothing_is_written_for_a_shape_that_is_none() {
    let json = ConfigJson::parse(br#"{"model_type": "deepseek_v3"}"#).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let error = write_dummy(&json, 0, &dir.path().join("new"), 1, &mut |_| {}).unwrap_err();
    assert!(matches!(error, WeightsError::Config(_)), "{error}");
    assert!(!dir.path().join("new").exists());
}

/// A table of 2 TiB, by the largest sizes that a config.json may state, is an error and no abort.
#[test]
fn a_tensor_that_cannot_be_held_is_an_error() {
    let sizes = json!({"vocab_size": 1 << 22, "hidden_size": 1 << 18});
    let dummy = Checkpoint::dummy(&config(&with(small(), sizes)), 0);
    // Some systems promise any memory and give it when it is written; only what they refuse can be an error.
    let mut probe: Vec<u8> = Vec::new();
    if probe.try_reserve_exact(1 << 41).is_ok() {
        return;
    }
    let error = dummy.tensor("model.embed_tokens.weight").unwrap_err();
    assert!(matches!(error, WeightsError::NoRoom { .. }), "{error}");
}
