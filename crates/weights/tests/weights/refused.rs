//! Bad checkpoints, as a table: what is wrong, how it is made, and what the error must say. Every row starts from a
//! folder that loads; the errors name the file and the tensor or field. At the end, damage by brute force: every
//! truncation and every bit of a header.
//!
//! What is not refused, and why, are the rows without words.

use std::path::Path;
use std::sync::Arc;

use r1_weights::{Checkpoint, GenerationDefaults, ModelConfig, Partition, TensorKind, expected_tensors};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::{
    Tensor, Tensors, at, file, toy, toy_tensors, with, without, write_index, write_sharded,
};

/// How a good folder becomes a bad one.
enum Bad {
    /// The bytes of model.safetensors.
    Bytes(fn(&mut Vec<u8>)),
    /// The header's JSON; the length before it is kept true.
    Header(fn(&mut Value)),
    /// As `Header`, in its text: for what no JSON value can express.
    Text(fn(&str) -> String),
    /// The tensors that the file is written of.
    Tensors(fn(&mut Tensors)),
    /// A folder of two shards and their index.
    Shards(fn(&Path)),
    /// The index of that folder.
    Index(fn(&str) -> String),
    /// config.json.
    Config(fn(&mut Value)),
    /// As `Config`, in its text.
    ConfigText(fn(&str) -> String),
    /// generation_config.json, which is `{}` in the good folder.
    Generation(&'static str),
}

use Bad::{Bytes, Config, ConfigText, Generation, Header, Index, Shards, Text};

/// Name, damage, and the parts that the error must have: none if the folder still loads.
type Row = (&'static str, Bad, &'static [&'static str]);

const FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const NORM: &str = "model.norm.weight";
const Q_A: &str = "model.layers.0.self_attn.q_a_proj.weight";
const SCALE: &str = "model.layers.0.self_attn.q_a_proj.weight_scale_inv";
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// Replaces the header's length, given it and the file's.
fn set_length(bytes: &mut [u8], change: fn(u64, u64) -> u64) {
    let changed = change(length(bytes) as u64, bytes.len() as u64);
    bytes[..8].copy_from_slice(&changed.to_le_bytes());
}

fn length(bytes: &[u8]) -> usize {
    u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

/// Shifts both ends of a tensor's range.
fn shift(entry: &mut Value, by: i64) {
    for end in entry["data_offsets"].as_array_mut().unwrap() {
        *end = json!(end.as_i64().unwrap() + by);
    }
}

fn set_scale(tensors: &mut Tensors, value: f32) {
    let shape = at(tensors, SCALE).shape.clone();
    let mut scales = vec![1.0; shape.iter().product()];
    scales[1] = value;
    *at(tensors, SCALE) = Tensor::f32(&scales, &shape);
}

const FILES: &[Row] = &[
    ("nothing wrong", Bytes(|_| ()), &[]),
    // The file as a whole.
    ("empty", Bytes(Vec::clear), &[FILE, "0 bytes"]),
    ("ends inside the header's length", Bytes(|b| b.truncate(7)), &[FILE, "7 bytes"]),
    ("ends behind the header's length", Bytes(|b| b.truncate(8)), &[FILE, "in a file of 8", "truncated"]),
    ("ends inside the header", Bytes(|b| b.truncate(100)), &[FILE, "in a file of 100", "truncated"]),
    (
        "ends behind the header",
        Bytes(|b| b.truncate(8 + length(b))),
        &[FILE, "truncated", "download it again"],
    ),
    ("lacks the last byte", Bytes(|b| b.truncate(b.len() - 1)), &[FILE, "truncated", "download it again"]),
    ("has one byte more", Bytes(|b| b.push(0)), &[FILE, "1 bytes after the last tensor"]),
    (
        "is a Git LFS pointer",
        Bytes(|b| *b = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n".to_vec()),
        &[FILE, "git lfs pull"],
    ),
    (
        "is a web page",
        Bytes(|b| *b = b"<!DOCTYPE html><html><title>401 Unauthorized</title>".to_vec()),
        &[FILE, "no safetensors file"],
    ),
    ("is a zip file", Bytes(|b| b[..4].copy_from_slice(b"PK\x03\x04")), &[FILE, "no safetensors file"]),
    // The header's length.
    ("length 0", Bytes(|b| set_length(b, |_, _| 0)), &[FILE, "bad safetensors header"]),
    ("length 1", Bytes(|b| set_length(b, |_, _| 1)), &[FILE, "bad safetensors header"]),
    (
        "length one less",
        Bytes(|b| set_length(b, |header, _| header - 1)),
        &[FILE, "1 bytes after the last tensor"],
    ),
    ("length one more", Bytes(|b| set_length(b, |header, _| header + 1)), &[FILE, "bad safetensors header"]),
    ("length of the file", Bytes(|b| set_length(b, |_, file| file)), &[FILE, "header of"]),
    ("length 2^63", Bytes(|b| set_length(b, |_, _| 1 << 63)), &[FILE, "header of 9223372036854775808 bytes"]),
    ("length 2^64 - 1", Bytes(|b| set_length(b, |_, _| u64::MAX)), &[FILE, "at most 100000000 are read"]),
    // The header's text.
    ("no object", Text(|_| "[]".to_owned()), &[FILE, "bad safetensors header", "an object"]),
    ("no tensors, though data", Text(|_| "{}".to_owned()), &[FILE, "bytes after the last tensor"]),
    ("nested 10,000 deep", Text(|_| format!("{{\"a\":{}", "[".repeat(10_000))), &[FILE, "recursion limit"]),
    ("more behind the object", Text(|t| format!("{t}}}")), &[FILE, "trailing characters"]),
    ("a control character in a name", Text(|t| t.replace("norm", "no\u{1}m")), &[FILE, "control character"]),
    ("half a surrogate in a name", Text(|t| t.replace("norm", "\\ud800")), &[FILE, "bad safetensors header"]),
    ("not UTF-8", Bytes(|b| b[12] = 0xff), &[FILE, "bad safetensors header", "unicode"]),
    ("a byte-order mark", Text(|t| format!("\u{feff}{t}")), &[FILE, "bad safetensors header"]),
    (
        "a name twice",
        Text(|t| t.replace("model.layers.0.self_attn.kv_a_layernorm.weight", NORM)),
        &[FILE, NORM, "twice"],
    ),
    ("free text twice", Text(|t| t.replacen('{', r#"{"__metadata__":{},"__metadata__":{},"#, 1)), &["twice"]),
    (
        "free text of numbers",
        Header(|h| h["__metadata__"] = json!({"a": 1})),
        &[FILE, "__metadata__", "strings"],
    ),
    ("free text", Header(|h| h["__metadata__"] = json!({"format": "pt"})), &[]),
    // One entry.
    (
        "shape overflows in elements",
        Header(|h| h[NORM]["shape"] = json!([1u64 << 63, 4])),
        &[FILE, NORM, "no whole"],
    ),
    (
        "shape overflows in bits",
        Header(|h| h[NORM]["shape"] = json!([1u64 << 60])),
        &[FILE, NORM, "no whole"],
    ),
    (
        "huge shape",
        Header(|h| h[NORM]["shape"] = json!([1u64 << 40])),
        &[FILE, NORM, "takes 2199023255552 bytes"],
    ),
    ("shape of 0", Header(|h| h[NORM]["shape"] = json!([0])), &[FILE, NORM, "takes 0 bytes"]),
    ("shape of 0 and overflow", Header(|h| h[NORM]["shape"] = json!([0, u64::MAX, 2])), &[FILE, NORM]),
    (
        "shape beyond 64 bits",
        Text(|t| t.replacen("[160]", "[18446744073709551616]", 1)),
        &[FILE, "must have dtype"],
    ),
    ("negative shape", Header(|h| h[NORM]["shape"] = json!([-160])), &[FILE, NORM, "must have dtype"]),
    ("fractional shape", Header(|h| h[NORM]["shape"] = json!([160.0])), &[FILE, NORM, "must have dtype"]),
    ("shape as text", Header(|h| h[NORM]["shape"] = json!("[160]")), &[FILE, NORM, "must have dtype"]),
    (
        "nine dimensions",
        Header(|h| h[NORM]["shape"] = json!([1, 1, 1, 1, 1, 1, 1, 1, 160])),
        &[FILE, NORM, "more than 8"],
    ),
    ("unknown dtype", Header(|h| h[NORM]["dtype"] = json!("Q4_K")), &[FILE, NORM, "\"Q4_K\" is unknown"]),
    (
        "dtype in lower case",
        Header(|h| h[NORM]["dtype"] = json!("bf16")),
        &[FILE, NORM, "\"bf16\" is unknown"],
    ),
    ("dtype as number", Header(|h| h[NORM]["dtype"] = json!(16)), &[FILE, NORM, "must have dtype"]),
    ("no dtype", Header(|h| *h = drop_field(h, "dtype")), &[FILE, NORM, "must have dtype"]),
    ("no shape", Header(|h| *h = drop_field(h, "shape")), &[FILE, NORM, "must have dtype"]),
    ("no offsets", Header(|h| *h = drop_field(h, "data_offsets")), &[FILE, NORM, "must have dtype"]),
    ("entry is null", Header(|h| h[NORM] = Value::Null), &[FILE, NORM, "must have dtype"]),
    (
        "three offsets",
        Header(|h| h[NORM]["data_offsets"] = json!([0, 1, 2])),
        &[FILE, NORM, "must have dtype"],
    ),
    ("end before start", Header(|h| h[NORM]["data_offsets"] = json!([320, 0])), &[FILE, NORM, "320..0"]),
    (
        "negative offset",
        Header(|h| h[NORM]["data_offsets"] = json!([-320, 0])),
        &[FILE, NORM, "must have dtype"],
    ),
    (
        "offsets overflow",
        Header(|h| h[NORM]["data_offsets"] = json!([u64::MAX - 320, u64::MAX])),
        &[FILE, NORM, "overflow"],
    ),
    ("range too short", Header(|h| h[NORM]["data_offsets"][1] = json!(1)), &[FILE, NORM, "takes 320 bytes"]),
    // All entries together.
    ("overlap", Header(|h| shift(&mut h[NORM], -2)), &[FILE, "overlaps the tensor before it"]),
    ("hole", Header(|h| shift(&mut h[NORM], 2)), &[FILE, "hole before it"]),
    ("past the end", Header(|h| shift(&mut h[NORM], 1 << 40)), &[FILE, "hole before it"]),
    ("entries in another order than the data", Header(reverse), &[]),
    (
        "an empty tensor besides",
        Header(|h| h["empty"] = json!({"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]})),
        &[],
    ),
];

const TENSORS: &[Row] = &[
    ("missing", Bad::Tensors(|t| t.retain(|(n, _)| n != NORM)), &[NORM, "missing", FILE]),
    ("other shape", Bad::Tensors(|t| at(t, NORM).shape = vec![16, 10]), &[FILE, NORM, "[16, 10]", "[160]"]),
    ("transposed", Bad::Tensors(|t| at(t, Q_A).shape.reverse()), &[FILE, Q_A, "[160, 24]", "[24, 160]"]),
    ("no dimensions", Bad::Tensors(|t| *at(t, NORM) = Tensor::zeros(Dtype::BF16, &[])), &[FILE, NORM, "[]"]),
    ("empty", Bad::Tensors(|t| *at(t, NORM) = Tensor::zeros(Dtype::BF16, &[0])), &[FILE, NORM, "[0]"]),
    (
        "integers",
        Bad::Tensors(|t| at(t, NORM).dtype = Dtype::I16),
        &[FILE, NORM, "I16", "supported here: F32"],
    ),
    ("another FP8", Bad::Tensors(|t| at(t, Q_A).dtype = Dtype::F8_E5M2), &[FILE, Q_A, "F8_E5M2"]),
    (
        "FP8 where it is never scaled",
        Bad::Tensors(|t| *at(t, NORM) = Tensor::zeros(Dtype::F8_E4M3, &[160])),
        &[FILE, NORM, "F8_E4M3"],
    ),
    (
        "FP8 and no quantization_config",
        Config(|c| *c = without(c.clone(), &["quantization_config"])),
        &[Q_A, FILE, "quantization_config"],
    ),
    (
        "blocks of another size",
        Config(|c| c["quantization_config"]["weight_block_size"] = json!([64, 64])),
        &[SCALE, FILE, "[1, 2]", "[1, 3]"],
    ),
    // Scales, which are read as a rank takes its shard.
    ("no scales", Bad::Tensors(|t| t.retain(|(n, _)| n != SCALE)), &[SCALE, "missing", FILE]),
    (
        "scales of another shape",
        Bad::Tensors(|t| *at(t, SCALE) = Tensor::f32(&[1.0; 2], &[2, 1])),
        &[FILE, SCALE, "[2, 1]", "[1, 2]"],
    ),
    (
        "scales in E8M0",
        Bad::Tensors(|t| *at(t, SCALE) = Tensor::zeros(Dtype::F8_E8M0, &[1, 2])),
        &[FILE, SCALE, "F8_E8M0"],
    ),
    ("scale NaN", Bad::Tensors(|t| set_scale(t, f32::NAN)), &[FILE, SCALE, "NaN at [0, 1]"]),
    ("scale infinite", Bad::Tensors(|t| set_scale(t, f32::INFINITY)), &[FILE, SCALE, "inf at [0, 1]"]),
    (
        "scale minus infinite",
        Bad::Tensors(|t| set_scale(t, f32::NEG_INFINITY)),
        &[FILE, SCALE, "-inf at [0, 1]"],
    ),
    ("scale negative", Bad::Tensors(|t| set_scale(t, -1e-3)), &[FILE, SCALE, "-0.001 at [0, 1]"]),
    ("scale that overflows its weights", Bad::Tensors(|t| set_scale(t, 1e36)), &[FILE, SCALE, "at [0, 1]"]),
    (
        "scale NaN in BF16",
        Bad::Tensors(|t| *at(t, SCALE) = Tensor::bf16(&[1.0, f32::NAN], &[1, 2])),
        &[FILE, SCALE, "NaN at [0, 1]"],
    ),
    // A block of zeros has any scale, a quantiser's 0 among them; small is not wrong.
    ("scale 0", Bad::Tensors(|t| set_scale(t, 0.0)), &[]),
    ("scale minus 0", Bad::Tensors(|t| set_scale(t, -0.0)), &[]),
    ("scale denormal", Bad::Tensors(|t| set_scale(t, f32::from_bits(1))), &[]),
    ("scale as large as its weights allow", Bad::Tensors(|t| set_scale(t, 7.5e35)), &[]),
    // The config does not know it, so it is a line in the log.
    (
        "a tensor besides",
        Bad::Tensors(|t| t.push(("vision.weight".to_owned(), Tensor::zeros(Dtype::I64, &[2])))),
        &[],
    ),
    ("a large name", Bad::Tensors(|t| t.push(("x".repeat(1 << 20), Tensor::zeros(Dtype::F32, &[2])))), &[]),
];

const INDEXES: &[Row] = &[
    ("nothing wrong", Index(str::to_owned), &[]),
    ("empty", Index(|_| String::new()), &[INDEX, "EOF"]),
    ("no JSON", Index(|_| "<html>".to_owned()), &[INDEX, "expected value"]),
    ("cut in half", Index(|t| t[..t.len() / 2].to_owned()), &[INDEX, "EOF"]),
    (
        "nested 10,000 deep",
        Index(|_| format!("{{\"weight_map\":{}", "{\"a\":".repeat(10_000))),
        &[INDEX, "\"a\"", "string"],
    ),
    ("nested elsewhere", Index(|_| format!("{{\"metadata\":{}", "[".repeat(10_000))), &[INDEX, "EOF"]),
    ("no weight_map", Index(|_| "{\"metadata\":{}}".to_owned()), &[INDEX, "weight_map"]),
    ("weight_map is a list", Index(|_| "{\"weight_map\":[]}".to_owned()), &[INDEX, "object"]),
    ("weight_map is empty", Index(|_| "{\"weight_map\":{}}".to_owned()), &[INDEX, "empty"]),
    (
        "weight_map is there twice",
        Index(|t| t.replacen('{', "{\"weight_map\":{},", 1)),
        &[INDEX, "duplicate field `weight_map`"],
    ),
    (
        "a file is a number",
        Index(|t| t.replacen(&format!("{:?}", SHARDS[0]), "1", 1)),
        &[INDEX, "model.embed_tokens.weight", "string"],
    ),
    (
        "a tensor twice",
        Index(|t| t.replacen("model.layers.0.self_attn.kv_a_layernorm.weight", NORM, 1)),
        &[INDEX, NORM, "twice"],
    ),
    (
        "a path out of the folder",
        Index(|t| t.replacen(SHARDS[0], "../../x.safetensors", 1)),
        &[INDEX, "../../x.safetensors", "plain names"],
    ),
    (
        "a file that is not there",
        Index(|t| t.replace(SHARDS[1], "model-3.safetensors")),
        &["model-3.safetensors", "does not exist"],
    ),
    (
        "a tensor that its file lacks",
        Index(|t| t.replacen(NORM, "model.nrom.weight", 1)),
        &["model.nrom.weight", SHARDS[0], "does not hold it"],
    ),
    (
        "a tensor that the index lacks",
        Index(|t| t.replacen(&format!("{NORM:?}:{:?},", SHARDS[0]), "", 1)),
        &[NORM, "missing", "2 shards"],
    ),
    (
        "a shard is a folder",
        Shards(|dir| {
            std::fs::remove_file(dir.join(SHARDS[1])).unwrap();
            std::fs::create_dir(dir.join(SHARDS[1])).unwrap();
        }),
        &[SHARDS[1], "not a regular file"],
    ),
    (
        "a shard is not there",
        Shards(|dir| std::fs::remove_file(dir.join(SHARDS[1])).unwrap()),
        &[SHARDS[1], "does not exist"],
    ),
    (
        "a shard is empty",
        Shards(|dir| std::fs::write(dir.join(SHARDS[1]), "").unwrap()),
        &[SHARDS[1], "0 bytes"],
    ),
    ("a shard is cut short", Shards(|dir| cut_file(&dir.join(SHARDS[1]))), &[SHARDS[1], "truncated"]),
    (
        "both shards are the same",
        Shards(|dir| {
            std::fs::copy(dir.join(SHARDS[0]), dir.join(SHARDS[1])).unwrap();
        }),
        &[SHARDS[1], "does not hold it"],
    ),
    (
        "the index is a folder",
        Shards(|dir| {
            std::fs::remove_file(dir.join(INDEX)).unwrap();
            std::fs::create_dir(dir.join(INDEX)).unwrap();
        }),
        &[INDEX],
    ),
    (
        "nothing but a config",
        Shards(|dir| std::fs::remove_file(dir.join(INDEX)).unwrap()),
        &["neither", FILE, INDEX],
    ),
    // The index decides which copy counts; the other is listed with the tensors that nobody expects.
    (
        "a tensor in two files",
        Shards(|dir| {
            let tensors = toy_tensors();
            let (first, second) = tensors.split_at(tensors.len() / 2);
            let both = [second, &[first[0].clone()]].concat();
            std::fs::write(dir.join(SHARDS[1]), file(&both)).unwrap();
        }),
        &[],
    ),
];

const CONFIGS: &[Row] = &[
    ("empty", ConfigText(|_| String::new()), &["config.json", "EOF"]),
    ("cut in half", ConfigText(|t| t[..t.len() / 2].to_owned()), &["config.json", "EOF"]),
    ("a list", ConfigText(|_| "[]".to_owned()), &["config.json", "a map"]),
    (
        "nested 10,000 deep",
        ConfigText(|t| {
            t.replacen('{', &format!("{{\"a\":{0}{1},", "[".repeat(10_000), "]".repeat(10_000)), 1)
        }),
        &["config.json", "recursion limit"],
    ),
    (
        "larger than any",
        ConfigText(|t| format!("{t}{}", " ".repeat(16 << 20))),
        &["config.json", "16777216 bytes"],
    ),
    ("NaN", ConfigText(|t| t.replace("1e-6", "NaN")), &["config.json", "expected value"]),
    ("Infinity", ConfigText(|t| t.replace("1e-6", "Infinity")), &["config.json", "expected value"]),
    ("beyond f64", ConfigText(|t| t.replace("1e-6", "1e999")), &["config.json", "out of range"]),
    (
        "null where a size is needed",
        Config(|c| c["hidden_size"] = Value::Null),
        &["config.json", "hidden_size is missing"],
    ),
    (
        "text where a size is needed",
        Config(|c| c["hidden_size"] = json!("160")),
        &["config.json", "hidden_size is 160", "whole number"],
    ),
    (
        "object where a size is needed",
        Config(|c| c["hidden_size"] = json!({"a": 1})),
        &["config.json", "hidden_size is {\"a\":1}"],
    ),
    ("negative size", Config(|c| c["hidden_size"] = json!(-160)), &["config.json", "hidden_size is -160"]),
    (
        "fractional size",
        Config(|c| c["hidden_size"] = json!(160.0)),
        &["config.json", "hidden_size is 160.0"],
    ),
    (
        "size 0",
        Config(|c| c["hidden_size"] = json!(0)),
        &["config.json", "hidden_size is 0", "between 1 and"],
    ),
    (
        "size 2^64 - 1",
        Config(|c| c["hidden_size"] = json!(u64::MAX)),
        &["config.json", "hidden_size is 18446744073709551615"],
    ),
    (
        "size beyond 64 bits",
        ConfigText(|t| t.replace("\"vocab_size\":40", "\"vocab_size\":1e30")),
        &["config.json", "vocab_size is 1e+30"],
    ),
    (
        "a million layers",
        Config(|c| c["num_hidden_layers"] = json!(1_000_000)),
        &["config.json", "num_hidden_layers"],
    ),
    (
        "a billion experts",
        Config(|c| c["n_routed_experts"] = json!(1_000_000_000)),
        &["config.json", "n_routed_experts"],
    ),
    (
        "number where text is needed",
        Config(|c| c["model_type"] = json!(3)),
        &["config.json", "model_type is 3", "a string"],
    ),
    (
        "text where a flag is needed",
        Config(|c| c["norm_topk_prob"] = json!("true")),
        &["config.json", "norm_topk_prob is true", "true or false"],
    ),
    (
        "list where an object is needed",
        Config(|c| c["rope_scaling"] = json!([40])),
        &["config.json", "rope_scaling is [40]", "an object"],
    ),
    (
        "a long value",
        Config(|c| c["hidden_act"] = json!("x".repeat(1 << 20))),
        &["config.json", "hidden_act is xxx", "…"],
    ),
    // Numbers whose consequences are infinite, or 0, in f32.
    (
        "rope_theta overflows",
        Config(|c| c["rope_theta"] = json!(1e300)),
        &["config.json", "rope_theta", "at most 1e12"],
    ),
    (
        "factor overflows",
        Config(|c| c["rope_scaling"]["factor"] = json!(1e300)),
        &["config.json", "rope_scaling.factor", "1e6"],
    ),
    (
        "beta_fast vanishes",
        Config(|c| c["rope_scaling"]["beta_fast"] = json!(1e-308)),
        &["config.json", "rope_scaling.beta_fast"],
    ),
    (
        "beta_slow overflows",
        Config(|c| c["rope_scaling"]["beta_slow"] = json!(1e308)),
        &["config.json", "rope_scaling.beta_slow"],
    ),
    (
        "mscale overflows",
        Config(|c| c["rope_scaling"]["mscale"] = json!(1e300)),
        &["config.json", "rope_scaling.mscale", "1000"],
    ),
    (
        "mscale_all_dim overflows",
        Config(|c| c["rope_scaling"]["mscale_all_dim"] = json!(1e300)),
        &["config.json", "rope_scaling.mscale_all_dim"],
    ),
    (
        "rms_norm_eps vanishes",
        Config(|c| c["rms_norm_eps"] = json!(1e-300)),
        &["config.json", "rms_norm_eps", "1e-30"],
    ),
    (
        "routed_scaling_factor overflows",
        Config(|c| c["routed_scaling_factor"] = json!(1e300)),
        &["config.json", "routed_scaling_factor"],
    ),
    (
        "routed_scaling_factor vanishes",
        Config(|c| c["routed_scaling_factor"] = json!(1e-300)),
        &["config.json", "routed_scaling_factor"],
    ),
    (
        "another model's sizes",
        Config(|c| c["hidden_size"] = json!(128)),
        &["disagrees with config.json", FILE, "[40, 160]", "[40, 128]"],
    ),
    ("one layer too many", Config(|c| c["num_hidden_layers"] = json!(4)), &["model.layers.3", "missing"]),
    ("generation_config.json: no JSON", Generation("{"), &["generation_config.json", "EOF"]),
    (
        "generation_config.json: hot",
        Generation(r#"{"temperature": 1e9}"#),
        &["generation_config.json", "temperature is 1000000000"],
    ),
    (
        "generation_config.json: top_p as text",
        Generation(r#"{"top_p": "0.9"}"#),
        &["generation_config.json", "top_p is 0.9"],
    ),
    (
        "generation_config.json: end beyond the vocabulary",
        Generation(r#"{"eos_token_id": [1, 40]}"#),
        &["generation_config.json", "eos_token_id is 40"],
    ),
];

fn drop_field(header: &Value, field: &str) -> Value {
    let mut header = header.clone();
    header[NORM] = without(header[NORM].clone(), &[field]);
    header
}

fn reverse(header: &mut Value) {
    let entries: Vec<_> = header.as_object().unwrap().clone().into_iter().collect();
    *header = Value::Object(entries.into_iter().rev().collect());
}

fn cut_file(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
}

/// The file with another text as header.
fn with_header(bytes: &[u8], change: impl FnOnce(&str) -> String) -> Vec<u8> {
    let data = 8 + length(bytes);
    let header = change(std::str::from_utf8(&bytes[8..data]).unwrap());
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[data..]].concat()
}

/// Writes the good folder and damages it.
fn make(dir: &Path, bad: &Bad) {
    let mut tensors = toy_tensors();
    let mut config = toy();
    match bad {
        Bad::Tensors(change) => change(&mut tensors),
        Config(change) => change(&mut config),
        _ => {}
    }
    let mut config = config.to_string();
    let mut generation = "{}";
    let mut bytes = file(&tensors);
    match bad {
        Bytes(change) => change(&mut bytes),
        Text(change) => bytes = with_header(&bytes, change),
        Header(change) => {
            bytes = with_header(&bytes, |text| {
                let mut header = serde_json::from_str(text).unwrap();
                change(&mut header);
                header.to_string()
            });
        }
        ConfigText(change) => config = change(&config),
        Generation(text) => generation = text,
        _ => {}
    }
    std::fs::write(dir.join("config.json"), config).unwrap();
    std::fs::write(dir.join("generation_config.json"), generation).unwrap();
    if !matches!(bad, Shards(_) | Index(_)) {
        return std::fs::write(dir.join(FILE), bytes).unwrap();
    }
    let second = tensors.split_off(tensors.len() / 2);
    write_sharded(dir, &[(SHARDS[0], tensors), (SHARDS[1], second)]);
    match bad {
        Shards(change) => change(dir),
        Index(change) => {
            let index = std::fs::read_to_string(dir.join(INDEX)).unwrap();
            std::fs::write(dir.join(INDEX), change(&index)).unwrap();
        }
        _ => unreachable!(),
    }
}

/// Everything that loading a model reads of its folder.
fn load(dir: &Path) -> Result<(), String> {
    let config = ModelConfig::open(dir).map_err(|e| e.to_string())?;
    GenerationDefaults::open(dir, config.vocab_size).map_err(|e| e.to_string())?;
    let checkpoint = Checkpoint::open(dir).map_err(|e| e.to_string())?;
    load_weights(&checkpoint, &config)
}

fn load_weights(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<(), String> {
    checkpoint.verify(config).map_err(|e| e.to_string())?;
    for tensor in expected_tensors(config) {
        if let TensorKind::Linear | TensorKind::ExpertLinear = tensor.kind {
            let prefix = tensor.name.strip_suffix(".weight").unwrap();
            let (n, k, fp8) = (tensor.shape[0], tensor.shape[1], config.quantization.as_ref());
            let shard = checkpoint.linear(prefix, n, k, fp8, Partition::Column { rank: 1, world: 2 });
            let shard = shard.map_err(|e| e.to_string())?;
            assert_eq!(shard.to_f32().len(), n / 2 * k, "{prefix}");
        }
    }
    Ok(())
}

#[track_caller]
fn check(rows: &[Row]) {
    let mut wrong = Vec::new();
    for (name, bad, expected) in rows {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path(), bad);
        match (load(dir.path()), expected) {
            (Ok(()), []) => {}
            (Ok(()), _) => wrong.push(format!("{name}: it loads")),
            (Err(error), []) => wrong.push(format!("{name}: it does not load: {error}")),
            (Err(error), parts) => {
                let lacking: Vec<_> = parts.iter().filter(|part| !error.contains(**part)).collect();
                if !lacking.is_empty() {
                    wrong.push(format!("{name}: {lacking:?} is not in: {error}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn bad_files() {
    check(FILES);
}

#[test]
fn bad_tensors() {
    check(TENSORS);
}

#[test]
fn bad_indexes() {
    check(INDEXES);
}

#[test]
fn bad_configs() {
    check(CONFIGS);
}

/// One dense layer, nothing optional: whatever is lost, something that is needed is lost.
fn small() -> (Value, Tensors) {
    let sizes = json!({
        "vocab_size": 4, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "q_lora_rank": null,
        "kv_lora_rank": 4, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 2, "eos_token_id": 1,
        "num_nextn_predict_layers": 0
    });
    let config = with(toy(), sizes);
    let parsed = ModelConfig::from_json(config.to_string().as_bytes()).unwrap();
    let mut tensors = Tensors::new();
    for tensor in expected_tensors(&parsed) {
        if tensor.kind == TensorKind::Linear {
            tensors.push((format!("{}_scale_inv", tensor.name), Tensor::f32(&[1.0], &[1, 1])));
            tensors.push((tensor.name, Tensor::zeros(Dtype::F8_E4M3, &tensor.shape)));
        } else {
            tensors.push((tensor.name, Tensor::zeros(Dtype::BF16, &tensor.shape)));
        }
    }
    (config, tensors)
}

/// Name, dtype, shape and size of every tensor, sorted.
fn contents(checkpoint: &Checkpoint) -> Vec<(String, String, Vec<usize>, Vec<u8>)> {
    let mut contents: Vec<_> = checkpoint
        .names()
        .map(|name| {
            let info = checkpoint.info(name).unwrap();
            let bytes = checkpoint.tensor(name).unwrap().bytes().to_vec();
            (name.to_owned(), info.dtype.to_owned(), info.shape.to_vec(), bytes)
        })
        .collect();
    contents.sort();
    contents
}

/// Opens and loads `bytes`; an error must name the file. Gives what was loaded.
fn damaged(bytes: Vec<u8>, config: &ModelConfig, what: &str) -> Option<Checkpoint> {
    let result = Checkpoint::from_bytes("damaged.bin", Arc::new(bytes)).map_err(|e| e.to_string());
    let result = result.and_then(|checkpoint| load_weights(&checkpoint, config).map(|()| checkpoint));
    result.inspect_err(|error| assert!(error.contains("damaged.bin"), "{what}: {error}")).ok()
}

#[test]
fn every_truncation_is_an_error_that_names_the_file() {
    let (config, tensors) = small();
    let config = ModelConfig::from_json(config.to_string().as_bytes()).unwrap();
    let good = file(&tensors);
    assert!(damaged(good.clone(), &config, "whole").is_some());
    for end in 0..good.len() {
        let what = format!("the first {end} bytes");
        assert!(damaged(good[..end].to_vec(), &config, &what).is_none(), "{what} load");
    }
}

/// One bit of the length or the header: an error that names the file, or the same tensors.
#[test]
fn every_flipped_bit_of_the_header_is_an_error_or_harmless() {
    let (config, tensors) = small();
    let config = ModelConfig::from_json(config.to_string().as_bytes()).unwrap();
    let good = file(&tensors);
    let expected = contents(&damaged(good.clone(), &config, "whole").unwrap());
    let mut harmless = 0;
    for bit in 0..8 * (8 + length(&good)) {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Some(checkpoint) = damaged(bytes, &config, &format!("bit {bit}")) {
            assert_eq!(contents(&checkpoint), expected, "bit {bit}");
            harmless += 1;
        }
    }
    // What can change unnoticed is white space.
    assert!(harmless < 64, "{harmless} flips pass");
}

/// `write_index` and `toy` are what the rows start from: they load.
#[test]
fn the_good_folders_load() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), &Shards(|_| ()));
    load(dir.path()).unwrap();
    write_index(dir.path(), &json!({NORM: SHARDS[0]}));
    assert!(load(dir.path()).unwrap_err().contains("missing"));
}
