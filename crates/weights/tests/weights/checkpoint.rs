//! Files good and bad: what is handed out, and what each refusal names.

use r1_core::DType;
use r1_weights::{Checkpoint, WeightsError};
use safetensors::Dtype;
use serde_json::json;

use crate::support::{Tensor, Tensors, file, raw_file, write_index, write_sharded};

fn two() -> Tensors {
    vec![
        ("a".to_owned(), Tensor::f32(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3])),
        ("b".to_owned(), Tensor::bf16(&[7.0, 8.0], &[2])),
    ]
}

fn bytes(file: Vec<u8>) -> Result<Checkpoint, WeightsError> {
    Checkpoint::from_bytes("in memory", std::sync::Arc::new(file))
}

#[test]
fn one_file_is_mapped() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Checkpoint::open(dir.path()), Err(WeightsError::NoWeights { .. })));
    std::fs::write(dir.path().join("model.safetensors"), file(&two())).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let a = checkpoint.take("a", &[2, 3], &[DType::F32]).unwrap();
    assert_eq!(r1_weights::widen_to_f32(&a), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(checkpoint.tensor("b").unwrap().shape(), [2]);
    assert_eq!((checkpoint.num_files(), checkpoint.size_bytes()), (1, 28));
    // The mapping lives as long as a tensor of it.
    drop((checkpoint, dir));
    assert_eq!(r1_weights::widen_to_f32(&a)[5], 6.0);
}

#[test]
fn bytes_in_the_program_are_used_in_place() {
    let program: &'static [u8] = file(&two()).leak();
    let checkpoint = Checkpoint::from_static("built in", program).unwrap();
    let a = checkpoint.tensor("a").unwrap();
    assert!(program.as_ptr_range().contains(&a.bytes().as_ptr()));
    a.discard();
    let error = checkpoint.tensor("c").unwrap_err();
    assert!(error.to_string().contains("built in"), "{error}");
}

/// A header of odd length puts every tensor at an odd address.
#[test]
fn misaligned_tensors_are_handed_out() {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} "#;
    for pad in 0..4 {
        let mut file = raw_file(&format!("{header}{}", " ".repeat(pad)), 0);
        file.extend([1.5f32, -2.5].iter().flat_map(|v| v.to_le_bytes()));
        let a = bytes(file).unwrap().take("a", &[2], &[DType::F32]).unwrap();
        assert_eq!(r1_weights::widen_to_f32(&a), [1.5, -2.5]);
    }
}

#[test]
fn shards_are_found_through_the_index_and_symbolic_links() {
    let (dir, blobs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let [a, b]: [_; 2] = two().try_into().unwrap_or_else(|_| panic!());
    let stray = ("stray".to_owned(), Tensor::f32(&[0.0], &[1]));
    write_sharded(dir.path(), &[("model-1.safetensors", vec![a]), ("model-2.safetensors", vec![b.clone()])]);
    let blob = blobs.path().join("0f3a");
    std::fs::write(&blob, file(&vec![b, stray])).unwrap();
    std::fs::remove_file(dir.path().join("model-2.safetensors")).unwrap();
    std::os::unix::fs::symlink(blob, dir.path().join("model-2.safetensors")).unwrap();

    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.num_files(), 2);
    assert_eq!(checkpoint.info("a").unwrap().file, "model-1.safetensors");
    assert_eq!(checkpoint.info("b").unwrap().file, "model-2.safetensors");
    assert_eq!(checkpoint.unindexed(), ["stray"]);
    let error = checkpoint.tensor("stray").unwrap_err();
    assert!(error.to_string().contains("2 shards"), "{error}");
}

#[test]
fn an_index_that_is_wrong_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Checkpoint::open(dir.path()).unwrap_err();
    std::fs::write(dir.path().join("model-1.safetensors"), file(&two())).unwrap();
    let name = "model-1.safetensors";

    write_index(dir.path(), &json!({"a": name, "c": name}));
    assert!(matches!(open(), WeightsError::NotInShard { tensor, file } if tensor == "c" && file == name));
    write_index(dir.path(), &json!({"a": "model-9.safetensors"}));
    assert!(matches!(open(), WeightsError::MissingShard { tensor, .. } if tensor == "a"));
    write_index(dir.path(), &json!({}));
    assert!(matches!(open(), WeightsError::BadIndex { .. }));
    write_index(dir.path(), &json!({"a": 1}));
    assert!(matches!(open(), WeightsError::BadIndex { .. }));
    for evil in [
        "../x.safetensors",
        "/x.safetensors",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "x.bin",
        "a\\b.safetensors",
        "nul\0.safetensors",
        ".safetensors",
    ] {
        write_index(dir.path(), &json!({"a": evil}));
        assert!(matches!(open(), WeightsError::UnsafeFileName { name, .. } if name == evil), "{evil}");
    }
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::write(&index, format!(r#"{{"weight_map": {{"a": "{name}", "a": "{name}"}}}}"#)).unwrap();
    assert!(matches!(open(), WeightsError::Duplicate { tensor, .. } if tensor == "a"));
    std::fs::write(&index, "{").unwrap();
    assert!(matches!(open(), WeightsError::BadIndex { .. }));
    std::fs::remove_file(&index).unwrap();
    std::fs::create_dir(&index).unwrap();
    assert!(matches!(open(), WeightsError::Open { .. }));
}

#[test]
fn a_tensor_that_does_not_fit_is_named_with_both_shapes_and_the_file() {
    let checkpoint = bytes(file(&two())).unwrap();
    let message = |error: WeightsError| error.to_string();
    let error = message(checkpoint.take("a", &[3, 2], &[DType::F32]).unwrap_err());
    for part in ["a:", "[2, 3]", "[3, 2]", "in memory"] {
        assert!(error.contains(part), "{error}");
    }
    let error = message(checkpoint.take("a", &[2, 3], &[DType::BF16, DType::F16]).unwrap_err());
    for part in ["a:", "F32", "BF16, F16", "in memory"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(matches!(checkpoint.take("c", &[1], &[DType::F32]), Err(WeightsError::Missing { .. })));
    // A dtype that exists and that nothing here reads does not spoil the file, only its own tensor.
    let odd = bytes(file(&vec![("i".to_owned(), Tensor::zeros(Dtype::I64, &[3]))])).unwrap();
    assert!(matches!(odd.tensor("i"), Err(WeightsError::DTypeMismatch { found, .. }) if found == "I64"));
}

#[test]
fn headers_that_lie_are_refused() {
    let entry = |shape: &str, from: u64, to: u64| {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let open = |header: String, data_len| bytes(raw_file(&header, data_len)).unwrap_err();
    let reason = |header: String, data_len| match open(header, data_len) {
        WeightsError::BadEntry { reason, .. } => reason,
        other => panic!("{other}"),
    };

    assert!(matches!(bytes(Vec::new()), Err(WeightsError::BadHeader { .. })));
    assert!(matches!(bytes(vec![0; 7]), Err(WeightsError::BadHeader { .. })));
    assert!(matches!(bytes(vec![0; 8]), Err(WeightsError::BadHeader { .. })));
    for length in [9, 100_000_001, u64::MAX] {
        let mut file = raw_file("{}", 0);
        file[..8].copy_from_slice(&length.to_le_bytes());
        assert!(
            matches!(bytes(file), Err(WeightsError::HeaderTooLong { header_bytes, .. }) if header_bytes == length)
        );
    }
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    assert!(matches!(bytes(pointer.to_vec()), Err(WeightsError::LfsPlaceholder { .. })));
    assert!(matches!(open("[]".to_owned(), 0), WeightsError::BadHeader { .. }));
    assert!(matches!(open("{".to_owned(), 0), WeightsError::BadHeader { .. }));

    let one = |e: String| format!(r#"{{"a":{e}}}"#);
    let pair = |a: String, b: String| format!(r#"{{"a":{a},"b":{b}}}"#);
    assert!(reason(one(entry("[3]", 0, 8)), 8).contains("12 bytes"));
    assert!(reason(one(entry("[2]", 8, 0)), 8).contains("8..0"));
    assert!(reason(one(entry("[18446744073709551615, 2]", 0, 8)), 8).contains("no whole number"));
    assert!(reason(one(entry("[1,1,1,1,1,1,1,1,1]", 0, 4)), 4).contains("dimensions"));
    assert!(reason(one(entry("[1]", u64::MAX - 4, u64::MAX)), 4).contains("overflow"));
    assert!(reason(one(r#"{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}"#.to_owned()), 4).contains("Q4"));
    assert!(
        reason(one(r#"{"dtype":"F4","shape":[3],"data_offsets":[0,1]}"#.to_owned()), 1).contains("no whole")
    );
    assert!(
        reason(one(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#.to_owned()), 4)
            .contains("must have")
    );
    assert!(reason(one("7".to_owned()), 0).contains("must have"));
    for text in [r#"{"format":1}"#, "null", &entry("[1]", 0, 4)] {
        assert!(reason(format!(r#"{{"__metadata__":{text}}}"#), 4).contains("strings"), "{text}");
    }
    let text_twice = r#"{"__metadata__":{},"__metadata__":{}}"#.to_owned();
    assert!(matches!(open(text_twice, 0), WeightsError::Duplicate { .. }));
    assert!(reason(pair(entry("[2]", 0, 8), entry("[1]", 4, 8)), 8).contains("overlaps"));
    assert!(reason(pair(entry("[1]", 0, 4), entry("[1]", 8, 12)), 12).contains("hole"));
    assert!(reason(one(entry("[1]", 4, 8)), 8).contains("hole"));
    let twice = format!(r#"{{"a":{0},"a":{0}}}"#, entry("[1]", 0, 4));
    assert!(matches!(open(twice, 4), WeightsError::Duplicate { tensor, .. } if tensor == "a"));
    let cut = open(one(entry("[2]", 0, 8)), 7);
    assert!(matches!(&cut, WeightsError::Truncated { tensor, .. } if tensor == "a"), "{cut}");
    assert!(matches!(open(one(entry("[2]", 0, 8)), 9), WeightsError::TrailingBytes { extra_bytes: 1, .. }));
}

#[test]
fn metadata_and_empty_tensors_are_allowed() {
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[0,5],"data_offsets":[0,0]},
                     "b":{"dtype":"F16","shape":[],"data_offsets":[0,2]}}"#;
    let checkpoint = bytes(raw_file(header, 2)).unwrap();
    assert_eq!(checkpoint.names().count(), 2);
    assert_eq!(checkpoint.tensor("a").unwrap().bytes(), b"");
    assert_eq!(checkpoint.tensor("b").unwrap().shape(), [0; 0]);
}
