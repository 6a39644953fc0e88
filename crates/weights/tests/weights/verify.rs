//! A checkpoint against its config: the list of tensors, and everything that can be wrong with it.

use r1_weights::{Checkpoint, ModelConfig, Presence, TensorKind, WeightsError, expected_tensors};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::{
    Tensor, Tensors, at, file, moonlight, toy, toy_layout, toy_tensors, v2_lite, v3, with, without,
};

fn config(value: &Value) -> ModelConfig {
    ModelConfig::from_json(value.to_string().as_bytes()).unwrap()
}

fn checkpoint(tensors: &Tensors) -> Checkpoint {
    Checkpoint::from_bytes("test", std::sync::Arc::new(file(tensors))).unwrap()
}

/// The toy's tensors after a change.
fn changed(change: impl FnOnce(&mut Tensors)) -> Checkpoint {
    let mut tensors = toy_tensors();
    change(&mut tensors);
    checkpoint(&tensors)
}

#[test]
fn the_list_is_the_published_layout() {
    let sorted = |mut list: Vec<(String, Vec<usize>)>| {
        list.sort();
        list
    };
    let found = expected_tensors(&config(&toy())).map(|t| (t.name, t.shape)).collect();
    assert_eq!(sorted(found), sorted(toy_layout()));
}

#[test]
fn variants_of_the_layout() {
    let names = |value: &Value| expected_tensors(&config(value)).map(|t| t.name).collect::<Vec<_>>();
    let lite = names(&v2_lite());
    assert!(lite.contains(&"model.layers.26.self_attn.q_proj.weight".to_owned()));
    assert!(!lite.iter().any(|n| n.contains("q_a_") || n.contains("e_score") || n.contains("layers.27.")));
    assert!(names(&moonlight()).contains(&"model.layers.1.mlp.gate.e_score_correction_bias".to_owned()));
    let no_shared = names(&with(toy(), json!({"n_shared_experts": null})));
    assert!(!no_shared.iter().any(|n| n.contains("shared_experts")));
    let every_other = names(&with(toy(), json!({"num_hidden_layers": 5, "moe_layer_freq": 2})));
    let moe: Vec<_> = every_other.iter().filter(|n| n.ends_with("mlp.gate.weight")).collect();
    assert_eq!(moe, ["model.layers.2.mlp.gate.weight", "model.layers.4.mlp.gate.weight"]);
    let copies = expected_tensors(&config(&with(toy(), json!({"tie_word_embeddings": true}))))
        .filter(|t| t.presence == Presence::Copy)
        .map(|t| (t.name, t.kind))
        .collect::<Vec<_>>();
    let copy = |name: &str, kind| (name.to_owned(), kind);
    let expected = [
        copy("lm_head.weight", TensorKind::Head),
        copy("model.layers.2.embed_tokens.weight", TensorKind::Embedding),
        copy("model.layers.2.shared_head.head.weight", TensorKind::Head),
    ];
    assert_eq!(copies, expected);
}

#[test]
fn a_whole_checkpoint_passes_and_its_size_is_known_before() {
    let config = config(&toy());
    let checkpoint = checkpoint(&toy_tensors());
    let verified = checkpoint.verify(&config).unwrap();
    assert_eq!((verified.mtp_layers, &verified.unexpected[..]), (1, &[][..]));
    assert_eq!(config.published_size_bytes(), checkpoint.size_bytes());
    // 689 GB on the hub, MTP included.
    let v3 = ModelConfig::from_json(v3().to_string().as_bytes()).unwrap();
    assert_eq!(v3.published_size_bytes() / 1_000_000_000, 688);
}

#[test]
fn an_unquantised_checkpoint_passes() {
    let dense =
        toy_layout().into_iter().map(|(name, shape)| (name, Tensor::zeros(Dtype::BF16, &shape))).collect();
    let config = config(&without(toy(), &["quantization_config"]));
    let checkpoint = checkpoint(&dense);
    assert_eq!(checkpoint.verify(&config).unwrap().unexpected, [""; 0]);
    assert_eq!(config.published_size_bytes() - 2 * 2 * 4, checkpoint.size_bytes(), "two F32 biases of 4");
}

#[test]
fn copies_may_be_absent_and_mtp_layers_too() {
    let config = config(&toy());
    let few =
        changed(|t| t.retain(|(n, _)| !n.contains("2.embed_tokens") && !n.contains("2.shared_head.head")));
    assert_eq!(few.verify(&config).unwrap().mtp_layers, 1);
    let none = changed(|t| t.retain(|(n, _)| !n.starts_with("model.layers.2.")));
    assert_eq!(none.verify(&config).unwrap().mtp_layers, 0);
    let half = changed(|t| t.retain(|(n, _)| !n.contains("layers.2.eh_proj")));
    let error = half.verify(&config).unwrap_err();
    assert!(
        matches!(&error, WeightsError::Missing { tensor, .. } if tensor == "model.layers.2.eh_proj.weight"),
        "{error}"
    );
}

#[test]
fn extra_tensors_are_listed() {
    let extra = changed(|t| {
        t.push(("vision.weight".to_owned(), Tensor::zeros(Dtype::I64, &[2])));
        t.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), Tensor::zeros(Dtype::F32, &[2])));
        t.push(("lm_head.weight_scale_inv".to_owned(), Tensor::zeros(Dtype::F32, &[1, 2])));
        t.push(("model.layers.3.enorm.weight".to_owned(), Tensor::zeros(Dtype::BF16, &[160])));
    });
    let unexpected = extra.verify(&config(&toy())).unwrap().unexpected;
    assert_eq!(unexpected, ["lm_head.weight_scale_inv", "model.layers.3.enorm.weight", "vision.weight"]);
}

#[test]
fn one_wrong_tensor_is_named() {
    let config = config(&toy());
    let q_a = "model.layers.0.self_attn.q_a_proj.weight";
    let verify = |change: &dyn Fn(&mut Tensors)| changed(change).verify(&config).unwrap_err();
    let error = verify(&|t| *at(t, q_a) = Tensor::zeros(Dtype::F8_E4M3, &[160, 24]));
    let text = error.to_string();
    assert!(["[160, 24]", "[24, 160]", q_a, "test"].iter().all(|part| text.contains(part)), "{text}");
    let error = verify(&|t| *at(t, q_a) = Tensor::zeros(Dtype::U8, &[24, 160]));
    assert!(matches!(error, WeightsError::DTypeMismatch { .. }));
    let error = verify(&|t| t.retain(|(n, _)| *n != format!("{q_a}_scale_inv")));
    assert!(matches!(error, WeightsError::Missing { tensor, .. } if tensor.ends_with("_scale_inv")));
    let error = verify(&|t| *at(t, &format!("{q_a}_scale_inv")) = Tensor::zeros(Dtype::F32, &[2, 2]));
    assert!(matches!(error, WeightsError::ShapeMismatch { .. }));
    let error = verify(&|t| *at(t, "lm_head.weight") = Tensor::zeros(Dtype::F8_E4M3, &[40, 160]));
    assert!(matches!(error, WeightsError::DTypeMismatch { tensor, .. } if tensor == "lm_head.weight"));
}

#[test]
fn many_wrong_tensors_are_counted_and_the_first_are_shown() {
    let config = config(&toy());
    let error = changed(|t| t.truncate(1)).verify(&config).unwrap_err();
    let WeightsError::Disagrees { problems, total } = &error else { panic!("{error}") };
    // 3 outside the layers less the one that is there, 12 of the dense layer, 26 of the other; MTP is not demanded.
    assert_eq!((problems.len(), *total), (20, 40));
    let text = error.to_string();
    assert_eq!(text.lines().count(), 22);
    assert!(text.contains("and 20 more"), "{text}");
    // FP8 weights under a config that declares none.
    let undeclared =
        ModelConfig::from_json(without(toy(), &["quantization_config"]).to_string().as_bytes()).unwrap();
    let error = checkpoint(&toy_tensors()).verify(&undeclared).unwrap_err();
    let WeightsError::Disagrees { problems, .. } = &error else { panic!("{error}") };
    assert!(problems.iter().all(|p| matches!(p, WeightsError::Fp8WithoutConfig { .. })));
}
