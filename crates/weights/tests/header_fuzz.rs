//! Whatever a file's bytes are, opening it ends in a checkpoint or an error: no panic, no allocation beyond what the
//! file's length justifies, and nothing accepted that the format's own crate refuses.

use std::sync::Arc;

use proptest::prelude::*;
use r1_weights::Checkpoint;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

/// A file as real ones are: dtypes, ranks, free text.
fn real_file() -> Vec<u8> {
    let data = [1u8; 64];
    let view =
        |dtype, shape: &[usize], len: usize| TensorView::new(dtype, shape.to_vec(), &data[..len]).unwrap();
    let tensors = [
        ("model.embed_tokens.weight", view(Dtype::BF16, &[4, 4], 32)),
        ("model.layers.0.mlp.gate_proj.weight", view(Dtype::F8_E4M3, &[8, 8], 64)),
        ("model.layers.0.mlp.gate_proj.weight_scale_inv", view(Dtype::F32, &[1, 1], 4)),
        ("model.norm.weight", view(Dtype::BF16, &[4], 8)),
        ("scalar", view(Dtype::I64, &[], 8)),
    ];
    let text = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(tensors, Some(text)).unwrap()
}

/// The file with its header's text changed and the length kept true, so that the change is reached.
fn with_header(file: &[u8], change: impl FnOnce(String) -> String) -> Vec<u8> {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header = change(String::from_utf8(file[8..8 + length].to_vec()).unwrap());
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(&file[8 + length..]);
    out
}

/// Replaces the `which`-th number of the text.
fn replace_number(text: &str, which: usize, with: &str) -> String {
    let mut spans = Vec::new();
    let mut start = None;
    for (i, c) in text.char_indices() {
        match (c.is_ascii_digit(), start) {
            (true, None) => start = Some(i),
            (false, Some(from)) => {
                spans.push(from..i);
                start = None;
            }
            _ => {}
        }
    }
    let span = spans[which % spans.len()].clone();
    format!("{}{with}{}", &text[..span.start], &text[span.end..])
}

#[derive(Clone, Debug)]
enum Damage {
    Truncate(usize),
    Extend(Vec<u8>),
    Bytes(Vec<(usize, u8)>),
    Length(u64),
    Number(usize, String),
    Splice(usize, String),
    Repeat(usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let number = prop_oneof![
        Just("18446744073709551615".to_owned()),
        Just("9223372036854775808".to_owned()),
        Just("99999999999999999999999".to_owned()),
        Just("-1".to_owned()),
        Just("1e3".to_owned()),
        Just("0".to_owned()),
        any::<u64>().prop_map(|n| n.to_string()),
        (0u64..300).prop_map(|n| n.to_string()),
    ];
    let token = prop_oneof![
        Just("{".to_owned()),
        Just("]".to_owned()),
        Just(",".to_owned()),
        Just("\"".to_owned()),
        Just("null".to_owned()),
        Just("[".repeat(5000)),
        Just("\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]},".to_owned()),
        "[ -~]{0,8}",
    ];
    prop_oneof![
        any::<usize>().prop_map(Damage::Truncate),
        prop::collection::vec(any::<u8>(), 1..20).prop_map(Damage::Extend),
        prop::collection::vec((any::<usize>(), any::<u8>()), 1..8).prop_map(Damage::Bytes),
        prop_oneof![any::<u64>(), 0u64..2000, Just(100_000_000), Just(u64::MAX)].prop_map(Damage::Length),
        (any::<usize>(), number).prop_map(|(i, n)| Damage::Number(i, n)),
        (any::<usize>(), token).prop_map(|(i, t)| Damage::Splice(i, t)),
        (1usize..4).prop_map(Damage::Repeat),
    ]
}

fn apply(file: &[u8], damage: &Damage) -> Vec<u8> {
    let mut out = file.to_vec();
    match damage {
        Damage::Truncate(at) => out.truncate(at % file.len()),
        Damage::Extend(more) => out.extend_from_slice(more),
        Damage::Bytes(changes) => changes.iter().for_each(|&(i, b)| out[i % file.len()] = b),
        Damage::Length(length) => out[..8].copy_from_slice(&length.to_le_bytes()),
        Damage::Number(which, with) => out = with_header(file, |text| replace_number(&text, *which, with)),
        Damage::Splice(at, token) => {
            out = with_header(file, |text| {
                let at = at % text.len();
                format!("{}{token}{}", &text[..at], &text[at..])
            });
        }
        Damage::Repeat(times) => {
            out = with_header(file, |text| {
                let body = text.trim_end().trim_start_matches('{').trim_end_matches('}');
                format!("{{{}}}", vec![body; times + 1].join(","))
            });
        }
    }
    out
}

/// Peak of the address space in KiB, where the system tells.
fn peak_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmPeak:"))?;
    line.trim().trim_end_matches("kB").trim().parse().ok()
}

fn open(bytes: Vec<u8>) -> Option<Checkpoint> {
    Checkpoint::from_bytes("fuzz", Arc::new(bytes)).ok()
}

/// The file's only test, so that no other one's memory is measured.
#[test]
fn damaged_files_give_errors_and_nothing_else() {
    let file = real_file();
    assert_eq!(open(file.clone()).unwrap().names().count(), 5);
    for end in 0..file.len() {
        assert!(open(file[..end].to_vec()).is_none(), "the first {end} bytes of {} pass", file.len());
    }
    let before = peak_kib();
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(20_000) };
    proptest!(config, |(first in damage(), second in prop::option::of(damage()))| {
        let mut bytes = apply(&file, &first);
        // The header's length may be untrue by now; only damage that does not need it follows.
        if let Some(second @ (Damage::Truncate(_) | Damage::Extend(_) | Damage::Bytes(_))) = &second
            && !bytes.is_empty()
        {
            bytes = apply(&bytes, second);
        }
        let theirs = SafeTensors::deserialize(&bytes).is_ok();
        if let Some(checkpoint) = open(bytes) {
            prop_assert!(theirs, "accepted what the format's own crate refuses");
            for name in checkpoint.names() {
                // Reading every byte shows that every range is real.
                let read = checkpoint.tensor(name).map(|t| t.bytes().iter().map(|&b| u64::from(b)).sum::<u64>());
                prop_assert!(read.is_ok() || !["F32", "BF16", "F16", "F8_E4M3", "U32"]
                    .contains(&checkpoint.info(name).unwrap().dtype));
            }
        }
    });
    if let Some((before, after)) = before.zip(peak_kib()) {
        assert!(after - before < 64 << 10, "files of 1 KB made the process grow by {} KiB", after - before);
    }
}
