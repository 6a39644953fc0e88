//! Shapes without their checkpoints: dummy weights, overridden configurations, checkpoints that are made.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use r1_tests::server::Server;
use r1_tests::tiny_dir;
use r1_weights::{Checkpoint, ModelConfig, dummy_tensors};
use serde_json::{Value, json};

const BINARY: &str = env!("CARGO_BIN_EXE_r1-serve");

fn run(args: &[&str]) -> Result<String, String> {
    let output = Command::new(BINARY).args(args).output().expect("the binary runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

/// A V3 of 3 layers in a few hundred kilobytes, its sizes no multiples of a block.
fn small(vocab_size: usize) -> Value {
    let config = fs::read(tiny_dir().join("config.json")).expect("config.json");
    let mut config: Value = serde_json::from_slice(&config).expect("JSON");
    let sizes = json!({
        "vocab_size": vocab_size, "hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 96,
        "num_hidden_layers": 3, "num_nextn_predict_layers": 0
    });
    config.as_object_mut().expect("an object").extend(sizes.as_object().expect("an object").clone());
    config
}

fn write_config(folder: &Path, config: &Value) -> PathBuf {
    let path = folder.join("config.json");
    fs::write(&path, config.to_string()).expect("it can be written");
    path
}

const BATCH: [&str; 8] =
    ["bench", "one-batch", "--input-len", "8", "--output-len", "4", "--max-model-len", "64"];

#[test]
fn a_shape_runs_without_its_weights() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = small(600);
    for format in ["FP8 weights", "weights as stored"] {
        let path = write_config(folder.path(), &config);
        for model in [folder.path(), &path] {
            let model = model.to_str().expect("text");
            let said =
                run(&[&BATCH[..], &["--load-format", "dummy", "--model", model]].concat()).expect("it runs");
            let announced = format!("random weights (--load-format dummy), {format}");
            assert!(said.contains(&announced) && said.contains("Total. latency"), "{said}");
        }
        config["quantization_config"] = Value::Null;
    }
    let model = folder.path().to_str().expect("text");
    let error = run(&[&BATCH[..], &["--model", model]].concat()).unwrap_err();
    assert!(error.contains("model.safetensors"), "without dummy, weights are needed: {error}");
    let path = folder.path().join("config.json");
    let error = run(&[&BATCH[..], &["--model", path.to_str().expect("text")]].concat()).unwrap_err();
    assert!(error.contains("give the folder"), "{error}");
}

#[test]
fn a_dummy_is_served_with_a_tokenizer_that_stands_in() {
    let folder = tempfile::tempdir().expect("a folder");
    write_config(folder.path(), &small(600));
    let model = folder.path().to_str().expect("text");
    let log = tempfile::NamedTempFile::new().expect("a file");
    let args = ["--load-format", "dummy", "--model", model, "--max-model-len", "128"];
    let server = Server::start_with_log(BINARY, &args, log.path());
    let body = json!({"prompt": "Oslo", "max_tokens": 24, "ignore_eos": true, "temperature": 1, "seed": 1});
    let ask = || -> Value {
        let reply = server.post("/v1/completions", &body.to_string());
        assert_eq!(reply.status, 200, "{}", reply.body);
        serde_json::from_str(&reply.body).expect("JSON")
    };
    let reply = ask();
    assert_eq!(reply["usage"]["completion_tokens"], 24);
    let text = reply["choices"][0]["text"].as_str().expect("text");
    assert!(text.contains(" w5"), "ids beyond the bundled tokenizer's are words: {text}");
    assert_eq!(ask()["choices"][0]["text"], text);
    let said = fs::read_to_string(log.path()).expect("a log");
    assert!(said.contains("--load-format dummy: the weights are random"), "{said}");
}

#[test]
fn a_dummy_whose_vocabulary_is_too_small_names_the_way_out() {
    let folder = tempfile::tempdir().expect("a folder");
    write_config(folder.path(), &small(300));
    let error =
        run(&["--load-format", "dummy", "--model", folder.path().to_str().expect("text")]).unwrap_err();
    assert!(error.contains("vocab_size is 300") && error.contains("--tokenizer PATH"), "{error}");
}

#[test]
fn values_of_the_configuration_can_be_replaced() {
    // Without a model: the bundled one's shape.
    for flag in ["--json-model-override-args", "--hf-overrides"] {
        let four_experts =
            r#"{"num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 2, "rope_scaling": {"factor": 8}}"#;
        let said = run(&[&BATCH[..], &["--load-format", "dummy", flag, four_experts]].concat());
        assert!(said.expect("it runs").contains("Total. latency"));
    }
    // Fewer layers than the checkpoint has are a model, other sizes are none.
    assert!(
        run(&[&BATCH[..], &["--hf-overrides", r#"{"num_hidden_layers": 2, "num_nextn_predict_layers": 0}"#]]
            .concat())
        .is_ok()
    );
    for (overrides, needles) in [
        (
            r#"{"num_hidden_layers": "four"}"#,
            &["--json-model-override-args", "num_hidden_layers is four"][..],
        ),
        (
            r#"{"rope_scaling": {"factor": true}}"#,
            &["--json-model-override-args", "rope_scaling.factor is true"],
        ),
        (r#"{"rope_scaling": 4}"#, &["--json-model-override-args", "rope_scaling is 4"]),
        ("[1]", &["--json-model-override-args", "a JSON object"]),
        (r#"{"moe_intermediate_size": 128}"#, &["[256, 256]", "config.json implies [128, 256]"]),
    ] {
        let error = run(&[&BATCH[..], &["--json-model-override-args", overrides]].concat()).unwrap_err();
        for needle in needles {
            assert!(error.contains(needle), "{overrides}: {error}");
        }
    }
}

/// What is written is what `--load-format dummy` makes in memory, in either format, and it is served.
#[test]
fn a_checkpoint_is_made() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        fs::copy(tiny_dir().join(name), folder.path().join(name)).expect("it can be copied");
    }
    write_config(folder.path(), &small(600));
    let config = folder.path().to_str().expect("text");
    for (format, quantized) in [("bf16", false), ("fp8", true)] {
        let out = folder.path().join(format);
        let out = out.to_str().expect("text");
        let args = ["bench", "make-model", "--config", config, "--out", out, "--format", format];
        let said = run(&[&args[..], &["--shard-size", "1000000"]].concat()).expect("it is written");
        assert!(said.contains("random weights of 0.00 B parameters"), "{said}");
        assert!(Path::new(out).join("tokenizer.json").exists());
        let model = ModelConfig::open(Path::new(out)).expect("config.json");
        assert_eq!(model.quantization.is_some(), quantized);
        let checkpoint = Checkpoint::open(Path::new(out)).expect("weights");
        checkpoint.verify(&model).expect("they are those of config.json");
        assert!(checkpoint.num_files() > 1);
        for tensor in dummy_tensors(&model, 0) {
            let mut expected = vec![0; tensor.size_bytes()];
            tensor.write_to(&mut expected);
            assert!(
                checkpoint.tensor(tensor.name()).expect("it is there").bytes() == expected,
                "{}",
                tensor.name()
            );
        }
        run(&[&BATCH[..], &["--model", out]].concat()).expect("it runs");
        let error = run(&args).unwrap_err();
        assert!(error.contains("is not empty"), "{error}");
    }
    let out = folder.path().join("none");
    let error = run(&[
        "bench",
        "make-model",
        "--config",
        config,
        "--out",
        out.to_str().expect("text"),
        "--format",
        "fp8",
        "--json-model-override-args",
        r#"{"hidden_size": 0}"#,
    ])
    .unwrap_err();
    assert!(error.contains("--json-model-override-args") && error.contains("hidden_size is 0"), "{error}");
    assert!(!out.exists());
}

/// The shapes that figures speak of are models.
#[test]
fn shapes_of_the_benches_are_models() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../benches/shapes");
    let mut count = 0;
    for entry in fs::read_dir(&folder).expect("the shapes").map(|entry| entry.expect("an entry")) {
        let text = fs::read(entry.path()).expect("a file");
        let config =
            ModelConfig::from_json(&text).unwrap_or_else(|error| panic!("{:?}: {error}", entry.path()));
        assert_eq!(config.unknown_fields, Vec::<String>::new());
        count += 1;
    }
    assert!(count > 0);
    let mid = ModelConfig::from_json(&fs::read(folder.join("mid.json")).expect("mid")).expect("a model");
    assert_eq!(mid.param_counts().total / 1_000_000, 1918);
}
